"""KIVI: keys per channel, values per token, newest tokens in full precision."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from einops import rearrange

from lcx.axes import Codec, Compress
from lcx.cache import Leaf
from lcx.codecs.packing import dequantise, pack, quantise, ranges, unpack
from lcx.errors import UserError
from lcx.ops.attention import EMPTY, KV_TILE
from lcx.policies.flush import Flush
from lcx.segments import Segment


@dataclass(frozen=True)
class Kivi(Codec):
    """Keys quantised per channel over groups of neighbouring tokens, values per token over groups of channels.

    KIVI, Liu et al. 2024, arXiv:2402.02750, section 3.2 and the authors' code: asymmetric, keys after RoPE, float16 scale and
    minimum, so bits + 32 / group_size bits a value.  Its segment follows one that holds the newest tokens exactly: see `chain`.

    Args:
      bits: 2 or 4.
      group_size: tokens of a key group and channels of a value group, a divisor of 256; the authors' default is 32.
    """

    bits: int = 2
    group_size: int = 32

    exact = "Never: values are rounded, but for the newest tokens, which the segment before holds."
    small = {"group_size": 8}

    def __post_init__(self):
        if self.bits not in (2, 4):
            raise UserError(f"Kivi: bits={self.bits!r}: allowed are 2, 4")
        if isinstance(self.group_size, bool) or not isinstance(self.group_size, int) or self.group_size < 1:
            raise UserError(f"Kivi: group_size={self.group_size!r} must be an integer of at least 1")
        if KV_TILE % self.group_size:
            raise UserError(
                f"Kivi: group_size={self.group_size} does not divide {KV_TILE}, the keys that attention reads at a time"
            )

    @property
    def page(self) -> int:
        return self.group_size

    def check(self, size):
        head_dim = size.head_dim
        if head_dim % self.group_size or head_dim % (8 // self.bits):
            raise UserError(
                f"Kivi: head_dim={head_dim} is not a multiple of group_size={self.group_size} and of {8 // self.bits} codes a byte"
            )

    def leaves(self, size):
        head_dim = size.head_dim
        codes, groups = (head_dim * self.bits // 8,), (head_dim // self.group_size,)
        per_page = Leaf(jnp.float16, before=(head_dim,), per=self.group_size)
        per_token = Leaf(jnp.float16, after=groups)
        return {
            "k": Leaf(jnp.uint8, before=codes),
            "k_scale": per_page,
            "k_min": per_page,
            "v": Leaf(jnp.uint8, after=codes),
            "v_scale": per_token,
            "v_min": per_token,
        }

    def encode(self, ctx, tokens, pick):
        g, v = self.group_size, tokens.v
        k = rearrange(tokens.k.astype(jnp.float32), "B R (p g) D -> B R D p g", g=g)
        # a place without a token must not widen the range of its group
        valid = rearrange(tokens.pos != EMPTY, "B R (p g) -> B R 1 p g", g=g)
        some = jnp.any(valid, -1)
        low = jnp.where(some, jnp.min(jnp.where(valid, k, jnp.inf), -1), 0.0)
        high = jnp.where(some, jnp.max(jnp.where(valid, k, -jnp.inf), -1), 0.0)
        k_scale, k_min = ranges(low, high, self.bits)
        codes = quantise(jnp.where(valid, k, 0.0), k_scale[..., None], k_min[..., None], self.bits)
        groups = rearrange(v.astype(jnp.float32), "B R N (j g) -> B R N j g", g=g)
        v_scale, v_min = ranges(groups.min(-1), groups.max(-1), self.bits)
        v_codes = quantise(groups, v_scale[..., None], v_min[..., None], self.bits)
        return {
            "k": pack(rearrange(codes, "B R D p g -> B R D (p g)"), self.bits, 2),
            "k_scale": k_scale,
            "k_min": k_min,
            "v": pack(rearrange(v_codes, "B R N j g -> B R N (j g)"), self.bits, 3),
            "v_scale": v_scale,
            "v_min": v_min,
        }

    def decode(self, ctx, payload, pick):
        k_wide = [jnp.repeat(payload[n], self.group_size, 3) for n in ("k_scale", "k_min")]
        v_wide = [jnp.repeat(payload[n], self.group_size, 3) for n in ("v_scale", "v_min")]
        k = dequantise(unpack(payload["k"], self.bits, 2), *k_wide)
        return k, dequantise(unpack(payload["v"], self.bits, 3), *v_wide)


def chain(
    bits: int = 2, group_size: int = 32, residual: int = 128, heads: str = "all", compress: Compress | None = None
) -> tuple[Segment, Segment]:
    """Return KIVI's two segments: an exact tail of the newest tokens, and the pages that leave it.

    Differs: keys and values leave together, `residual` tokens at a time, once 2 * residual are there, so the tail holds residual ...
    2 * residual - 1 tokens.  It always contains what the paper keeps exact (keys: the T % residual newest; values: the residual newest).

    Args:
      bits, group_size: as in `Kivi`.
      residual: the paper's R, 128; a multiple of group_size.
      heads, compress: as in `Segment`.
    """
    codec = Kivi(bits, group_size)
    if residual < 1 or residual % group_size:
        near = max(1, -(-residual // group_size)) * group_size
        raise UserError(f"residual={residual} is not a positive multiple of group_size={group_size}; use {near}")
    tail = Segment("tail", heads=heads, policy=Flush(page=residual, keep=residual), compress=compress)
    return tail, Segment("pages", heads=heads, codec=codec)
