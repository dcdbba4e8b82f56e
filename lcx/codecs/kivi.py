"""KIVI: keys per channel, values per token, newest tokens in full precision."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
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
        codes, scale, low = _quantised(tokens.v, self.bits, self.group_size)
        values = pack(rearrange(codes, "B R N j g -> B R N (j g)"), self.bits, 3)
        return self._encode_keys(tokens) | {"v": values, "v_scale": scale, "v_min": low}

    def _encode_keys(self, tokens):
        k = rearrange(tokens.k.astype(jnp.float32), "B R (p g) D -> B R D p g", g=self.group_size)
        # a place without a token must not widen the range of its group
        valid = rearrange(tokens.pos != EMPTY, "B R (p g) -> B R 1 p g", g=self.group_size)
        some = jnp.any(valid, -1)
        low = jnp.where(some, jnp.min(jnp.where(valid, k, jnp.inf), -1), 0.0)
        high = jnp.where(some, jnp.max(jnp.where(valid, k, -jnp.inf), -1), 0.0)
        scale, minimum = ranges(low, high, self.bits)
        codes = quantise(jnp.where(valid, k, 0.0), scale[..., None], minimum[..., None], self.bits)
        return {
            "k": pack(rearrange(codes, "B R D p g -> B R D (p g)"), self.bits, 2),
            "k_scale": scale,
            "k_min": minimum,
        }

    def decode(self, ctx, payload, pick):
        wide = [jnp.repeat(payload[n], self.group_size, 3) for n in ("v_scale", "v_min")]
        return self._decode_keys(payload), dequantise(unpack(payload["v"], self.bits, 3), *wide)

    def _decode_keys(self, payload):
        wide = [jnp.repeat(payload[n], self.group_size, 3) for n in ("k_scale", "k_min")]
        return dequantise(unpack(payload["k"], self.bits, 2), *wide)


@dataclass(frozen=True)
class KiviKeys(Kivi):
    """Keys as in `Kivi`, and values as they are: the page whose keys are quantised while its values are still among the newest.

    Args:
      bits, group_size: as in `Kivi`.
    """

    exact = "Never: keys are rounded."

    def leaves(self, size):
        keys = {name: leaf for name, leaf in super().leaves(size).items() if name.startswith("k")}
        return keys | {"v": Leaf(size.dtype, after=(size.head_dim,))}

    def encode(self, ctx, tokens, pick):
        return self._encode_keys(tokens) | {"v": tokens.v}

    def decode(self, ctx, payload, pick):
        return self._decode_keys(payload), payload["v"]


def _quantised(v: jax.Array, bits: int, group_size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return codes [B,R,N,j,g], scale and minimum [B,R,N,j] of values [B,R,N,D] in groups of `group_size` channels."""
    groups = rearrange(v.astype(jnp.float32), "B R N (j g) -> B R N j g", g=group_size)
    scale, minimum = ranges(groups.min(-1), groups.max(-1), bits)
    return quantise(groups, scale[..., None], minimum[..., None], bits), scale, minimum


@dataclass(frozen=True)
class Remainder(Flush):
    """Policy of the authors' tail of keys: what is left of the text once whole pages of `page` tokens are handed down."""

    small = {"page": 8}


@dataclass(frozen=True)
class Recent(Flush):
    """Policy that keeps the newest whole page, and rounds a value in place as soon as `keep` newer tokens have come.

    Tokens come in pages of `page`, which is also `keep`, so that the page is replaced whole.  Its codec holds values as they are; when
    the page falls, the codec behind finds rounded values and gives them the same codes.  Age is counted in positions of the text.

    Args:
      page, keep: tokens of the page.
      bits, group_size: of the rounding, as in `Kivi`; bits=None rounds nothing.
    """

    bits: int | None = 2
    group_size: int = 32

    exact = "With bits=None, which rounds no value."
    small = {"page": 8, "keep": 8, "group_size": 8}
    ordered = True

    def capacity(self, tokens, page):
        return -(-min(self.keep, tokens) // page) * page

    def handed(self, tokens):
        # with fewer tokens than a page none has come
        return super().handed(tokens // self.page * self.page)

    def edit(self, ctx, held, new):
        slots = replace(held.slots, payload=dict(held.slots.payload))
        slots.payload["v"] = self._rounded(ctx, slots.payload["v"], slots.pos)
        new = replace(new, v=self._rounded(ctx, new.v, new.pos))
        slots, edit, handed = super().edit(ctx, replace(held, slots=slots), new)
        # a row to which no page has come keeps its codes
        comes = jnp.any(new.pos != EMPTY, -1, keepdims=True)
        return slots, replace(edit, idx=jnp.where(comes, edit.idx, held.pos.shape[-1])), handed

    def _rounded(self, ctx, v, pos):
        """Return the values [B,R,N,D] with those rounded that have `keep` newer tokens; pos [B,R|1,N]."""
        if self.bits is None:
            return v
        codes, scale, low = _quantised(v, self.bits, self.group_size)
        rounded = rearrange(dequantise(codes, scale[..., None], low[..., None]), "B R N j g -> B R N (j g)")
        old = (pos != EMPTY) & (ctx.last_pos[:, None, None] - pos >= self.keep)
        return jnp.where(old[..., None], rounded.astype(v.dtype), v)

    def at_limit(self, tokens):
        return replace(self, bits=None)


RULES = ("authors", "together")


def chain(
    bits: int = 2,
    group_size: int = 32,
    residual: int = 128,
    heads: str = "all",
    compress: Compress | None = None,
    rule: str = "authors",
) -> tuple[Segment, ...]:
    """Return KIVI's segments: the newest tokens, exact, and the pages that leave them.

    With T tokens in the cache rule="authors" keeps the T % residual newest keys and the `residual` newest values exact, as the paper
        (section 3.2, algorithm 1) and the authors' code do: keys are quantised `residual` at a time, values one by one.  Segments: "tail",
    exact; "recent", the last whole page, keys quantised, values exact until they are old enough; "pages".  A step of several tokens
        reads what was held before it, and quantises afterwards.

    rule="together": keys and values leave together, `residual` tokens at a time, once 2 * residual are there, so that residual ...
    2 * residual - 1 of both are exact, more than the paper's.  Two segments: "tail" and "pages".

    Args:
      bits, group_size: as in `Kivi`.
      residual: the paper's R, 128; a multiple of group_size.
      heads, compress: as in `Segment`.
      rule: "authors" or "together".

    Raises:
      UserError: residual is no multiple of group_size, or an unknown rule.
    """
    codec = Kivi(bits, group_size)
    if residual < 1 or residual % group_size:
        near = max(1, -(-residual // group_size)) * group_size
        raise UserError(f"residual={residual} is not a positive multiple of group_size={group_size}; use {near}")
    if rule not in RULES:
        raise UserError(f"rule={rule!r}: allowed are {', '.join(RULES)}")
    pages = Segment("pages", heads=heads, codec=codec)
    if rule == "together":
        tail = Segment("tail", heads=heads, policy=Flush(page=residual, keep=residual), compress=compress)
        return tail, pages
    tail = Segment("tail", heads=heads, policy=Remainder(page=residual), compress=compress)
    policy = Recent(residual, residual, bits, group_size)
    return tail, Segment("recent", heads=heads, policy=policy, codec=KiviKeys(bits, group_size)), pages
