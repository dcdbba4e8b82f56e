"""KVQuant: keys per channel before RoPE, values per token, non-uniform levels, outliers kept beside, the first token exact."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from einops import rearrange

from lcx.axes import Array, Codec
from lcx.cache import Leaf, Size
from lcx.codecs.outliers import extremes, half, index_type, marked, num_outliers, outlier_leaves, put, value_range
from lcx.codecs.packing import codes_per_byte, pack, unpack
from lcx.errors import UserError
from lcx.policies.first import First
from lcx.segments import Segment

BITS = (4, 3, 2)


@dataclass(frozen=True)
class KVQuant(Codec):
    """Codes of 4, 3 or 2 bits for non-uniform levels of the layer, and the outermost entries of every token beside them.

    KVQuant, Hooper et al. 2024, arXiv:2401.18079.  Keys (before RoPE, section 3.2): per channel, with calibrated ranges (3.1).
    Values: per token over all KV heads of the segment, with ranges found when it is written.  Levels by Fisher-weighted k-means, one
    set a layer for keys and one for values (3.3).  Entries outside the ranges are stored as they are (3.4): of a token's
    C = KV heads * head_dim channels n = ceil(outliers * C / 2) values at each end, and at most n + spare keys: a float16 value and an
    index of 8 bits for C < 256, else 16.  Bits a value: bits + 2 n (16 + index) / C, n + spare for keys, and 32 / C more for values; key
    ranges and levels are the model's, from `lcx.artefacts.kvquant.KVQuantTables`.  3 bits are planes of two and of one, 3 * D / 8 bytes.

    Differs: the authors' sparse matrices grow, their kernels hold n keys (21 of 4,096).  Here a token has places of a fixed number, empty
    where it has fewer outliers; with n alone, 1 of SmolLM2's 192, most of the loss in likelihood is keys that found no place and were
    rounded to the outermost level.  Outliers are exact to float16.  The first token is a segment of its own: see `chain`.

    Args:
      bits: 4, 3 or 2.
      outliers: share of the entries that are kept beside, 0 (none) to below 0.5; 0.01 in the paper.  The calibration's own.
      spare: more places for keys at each end, for tokens with more outliers than most; 0 as in the authors' kernels.
    """

    bits: int = 4
    outliers: float = 0.01
    spare: int = 3

    exact = "Never: keys and values are rounded, but for the first token, which the segment before holds."
    small = {"bits": 2}
    raw = True
    needs = frozenset({"one set"})

    def __post_init__(self):
        if self.bits not in BITS:
            raise UserError(f"KVQuant: bits={self.bits!r}: allowed are 4, 3, 2")
        if isinstance(self.outliers, bool) or not 0 <= self.outliers < 0.5:
            raise UserError(f"KVQuant: outliers={self.outliers!r} must be a share of at least 0 and below 0.5")
        if isinstance(self.spare, bool) or not isinstance(self.spare, int) or self.spare < 0:
            raise UserError(f"KVQuant: spare={self.spare!r} must be an integer of at least 0 places")

    def check(self, size):
        if size.head_dim % codes_per_byte(self.bits):
            raise UserError(
                f"KVQuant: head_dim={size.head_dim} is not a multiple of {codes_per_byte(self.bits)} codes a byte"
            )
        if size.rows * size.head_dim >= 2**16:
            raise UserError(f"KVQuant: {size.rows} KV heads x {size.head_dim} channels; allowed are 65,535 channels")

    def arrays(self, model):
        channel = Array((model.head_dim,), per="KV head")
        # of each of BITS: the levels that are rounded to, and those that are read
        levels = Array((len(BITS), 2, 2 ** max(BITS)))
        return {"key_zero": channel, "key_scale": channel, "key_levels": levels, "value_levels": levels}

    def leaves(self, size: Size):
        codes, token = (size.head_dim * self.bits // 8,), Leaf(jnp.float16, rows=1)
        channels = size.rows * size.head_dim
        keys, values = self._places(channels)
        return {
            "k": Leaf(jnp.uint8, before=codes),
            "v": Leaf(jnp.uint8, after=codes),
            "v_zero": token,
            "v_scale": token,
            **outlier_leaves("k", 2 * keys, channels),
            **outlier_leaves("v", 2 * values, channels),
        }

    def _places(self, channels: int) -> tuple[int, int]:
        """Places at each end of a token, for keys and for values."""
        count = num_outliers(self.outliers, channels)
        return (min(count + self.spare, channels // 2) if count else 0), count

    def _levels(self, ctx, name: str) -> jax.Array:
        """Levels to round to and levels to read, [2, 2**bits]."""
        return ctx.aux[name + "_levels"][BITS.index(self.bits), :, : 2**self.bits]

    def encode(self, ctx, tokens, pick):
        rows = tokens.k.shape[1]
        k, v = (rearrange(x.astype(jnp.float32), "B R N D -> B N (R D)") for x in (tokens.k, tokens.v))
        keys, values = self._places(k.shape[-1])
        x = (k - ctx.aux["key_zero"].reshape(-1)) / ctx.aux["key_scale"].reshape(-1)
        k_at, v_at = extremes(x, keys), extremes(v, values)
        # the paper fills the places of outliers with the token's median, which is neither minimum nor maximum
        zero, scale = value_range(v, marked(v.shape, v_at))
        y = (v - zero.astype(jnp.float32)) / jnp.where(scale > 0, scale, 1).astype(jnp.float32)

        def codes(x, name):
            nearest = _nearest(x, self._levels(ctx, name)[0])
            return pack(rearrange(nearest, "B N (R D) -> B R N D", R=rows), self.bits, 3)

        payload = {"k": codes(x, "key").swapaxes(2, 3), "v": codes(y, "value")}
        payload |= {"v_zero": zero[:, None, :, 0], "v_scale": scale[:, None, :, 0]}
        if values:
            # a place stays empty where fewer entries lie outside the range
            used = jnp.where(jnp.abs(jnp.take_along_axis(x, k_at, -1)) > 1, k_at, k.shape[-1])
            for name, whole, at, stored in (("k", k, k_at, used), ("v", v, v_at, v_at)):
                payload[name + "_out"] = half(jnp.take_along_axis(whole, at, -1))[:, None]
                payload[name + "_at"] = stored[:, None].astype(index_type(k.shape[-1]))
        return payload

    def decode(self, ctx, payload, pick):
        def read(name, axis):
            levels = self._levels(ctx, "key" if name == "k" else "value")[1]
            return levels.at[unpack(payload[name], self.bits, axis)].get(mode="promise_in_bounds")

        token = lambda name: payload[name].astype(jnp.float32)[..., None]
        k = read("k", 2) * ctx.aux["key_scale"][..., None] + ctx.aux["key_zero"][..., None]
        v = read("v", 3) * token("v_scale") + token("v_zero")
        return put(k, payload, "k", 2), put(v, payload, "v", 3)


def _nearest(x: jax.Array, levels: jax.Array) -> jax.Array:
    """Return uint8 codes of the nearest of ascending levels; the lower one at a tie."""
    between = (levels[1:] + levels[:-1]) / 2
    return sum(((x > edge).astype(jnp.uint8) for edge in between), jnp.zeros(x.shape, jnp.uint8))


def chain(
    bits: int = 4, outliers: float = 0.01, spare: int = 3, first: int = 1, heads: str = "all"
) -> tuple[Segment, Segment]:
    """Return KVQuant's two segments: the first tokens, exact, and the codes of all others.

    Args:
      bits, outliers, spare: as in `KVQuant`.
      first: tokens that are kept exact, >= 1; the authors keep 1, and 5 for LWM (section 3.5).
      heads: as in `Segment`.
    """
    codec = KVQuant(bits, outliers, spare)
    return Segment("first", heads=heads, policy=First(first)), Segment("codes", heads=heads, codec=codec)
