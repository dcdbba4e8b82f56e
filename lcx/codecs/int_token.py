"""Integers per token: 8 bits symmetric, 4 or 2 bits asymmetric."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from einops import rearrange

from lcx.axes import Codec
from lcx.cache import Leaf
from lcx.codecs.packing import dequantise, pack, quantise, ranges, unpack
from lcx.errors import UserError


@dataclass(frozen=True)
class Int(Codec):
    """Keys (after RoPE) and values quantised token by token, as every serving system does it.

    8 bits: symmetric, scale = amax / 127 per token and KV head.  4 and 2 bits: asymmetric, x = code * scale + minimum per group of
    `group_size` channels.  Scales and minima are float16: 8 + 16/D, or bits + 32/group_size bits a value.  No residual is needed.

    Int(4, group_size=64) is the format of FlexGen, Sheng et al. 2023, arXiv:2303.06865, section 5, whose models have no RoPE.  Differs:
    the scale is stored, not its inverse, halves of a head share bytes, not neighbours, and a constant group is exact, not nan.

    Args:
      bits: 8, 4 or 2.
      group_size: channels that share a scale, for 4 and 2 bits; None: all of the head (4.25 bits at D = 128).
    """

    bits: int = 8
    group_size: int | None = None

    exact = "Never: values are rounded."

    def __post_init__(self):
        if self.bits not in (2, 4, 8):
            raise UserError(f"Int: bits={self.bits!r}: allowed are 2, 4, 8")
        size = self.group_size
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1 or self.bits == 8):
            raise UserError(
                f"Int: group_size={size!r} must be an integer of at least 1, and only 2 and 4 bits have groups"
            )

    def check(self, size):
        head_dim = size.head_dim
        group = self.group_size or head_dim
        if head_dim % group or head_dim % (8 // self.bits):
            raise UserError(
                f"Int: head_dim={head_dim} is not a multiple of group_size={group} and of {8 // self.bits} codes a byte"
            )

    def leaves(self, size):
        head_dim = size.head_dim
        codes = (head_dim * self.bits // 8,)
        groups = (head_dim // (self.group_size or head_dim),)
        kind = jnp.int8 if self.bits == 8 else jnp.uint8
        leaves = {"k": Leaf(kind, before=codes), "k_scale": Leaf(jnp.float16, before=groups)}
        leaves |= {"v": Leaf(kind, after=codes), "v_scale": Leaf(jnp.float16, after=groups)}
        if self.bits < 8:
            leaves |= {"k_min": Leaf(jnp.float16, before=groups), "v_min": Leaf(jnp.float16, after=groups)}
        return leaves

    def _encode(self, x):
        """Encode x [B,R,N,D] as codes [B,R,N,D * bits / 8] with scale and minimum [B,R,N,groups]."""
        x = x.astype(jnp.float32)
        if self.bits == 8:
            # float16 has no scale below 6e-8: such tokens become 0, and none becomes infinite
            top = float(jnp.finfo(jnp.float16).max)
            scale = jnp.minimum(jnp.max(jnp.abs(x), -1, keepdims=True) / 127, top).astype(jnp.float16)
            step = scale.astype(jnp.float32)
            codes = jnp.round(x / jnp.where(step > 0, step, 1.0)) * (step > 0)
            return jnp.clip(codes, -127, 127).astype(jnp.int8), scale, None
        groups = rearrange(x, "B R N (j g) -> B R N j g", g=self.group_size or x.shape[-1])
        scale, minimum = ranges(groups.min(-1), groups.max(-1), self.bits)
        codes = quantise(groups, scale[..., None], minimum[..., None], self.bits)
        return pack(rearrange(codes, "B R N j g -> B R N (j g)"), self.bits, -1), scale, minimum

    def encode(self, ctx, tokens, pick):
        payload = {}
        for name, x, turn in (("k", tokens.k, True), ("v", tokens.v, False)):
            for part, value in zip(("", "_scale", "_min"), self._encode(x), strict=True):
                if value is not None:
                    payload[name + part] = value.swapaxes(2, 3) if turn else value
        return payload

    def decode(self, ctx, payload, pick):
        out = []
        for name, axis in (("k", 2), ("v", 3)):
            codes, scale = payload[name], payload[name + "_scale"]
            if self.bits == 8:
                out.append(codes.astype(jnp.float32) * scale.astype(jnp.float32))
                continue
            codes = unpack(codes, self.bits, axis)
            each = codes.shape[axis] // scale.shape[axis]
            wide = [jnp.repeat(payload[name + part], each, axis) for part in ("_scale", "_min")]
            out.append(dequantise(codes, *wide))
        return tuple(out)
