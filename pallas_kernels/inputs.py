"""Inputs of the attention kernels beside q, k and v, and the questions that they ask them: tiles to visit, and visible pairs inside of one.

`prepare` runs in XLA and checks; the rest is called inside of a kernel, on references.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lcx.errors import UserError
from lcx.ops.attention import EMPTY
from pallas_kernels.lists import FULL, ROWS, SIZE, BlockList
from pallas_kernels.mask import Mask


class Data(NamedTuple):
    """Arrays (in a kernel: references to them); None where the mask or the caller needs none.

    Attributes:
      lengths: int32 [2,B]: position of the first query, and slots in use.
      spans: int32 [B,K].
      q_pos, kv_pos: int32 [B, T to whole tiles] and [B, K or 1, S to whole tiles].
      q_seg, kv_seg: int32 [B, T to whole tiles] and [B, S to whole tiles].
      entries: int32 [b * h * Q * (M + 1)], tile * 2 + flag; one more than is listed, since the next one is read ahead.
      count: int32 [b * h * Q].
      order: int32 [blocks], the blocks of the grid in the order in which they start.
    """

    lengths: Any
    spans: Any = None
    q_pos: Any = None
    kv_pos: Any = None
    q_seg: Any = None
    kv_seg: Any = None
    entries: Any = None
    count: Any = None
    order: Any = None

    def names(self) -> list[str]:
        """Return the names of the present fields."""
        return [name for name in self._fields if getattr(self, name) is not None]


def pad(x: jax.Array, axis: int, multiple: int, value=0) -> jax.Array:
    """Pad `axis` of `x` to a multiple."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths, constant_values=value) if widths[axis][1] else x


def _per_sequence(x, B: int, name: str) -> jax.Array:
    x = jnp.asarray(x, jnp.int32)
    if x.shape not in ((), (B,)):
        raise UserError(f"{name} of {x.shape}: allowed is a number or int32 [{B}]")
    return jnp.broadcast_to(x, (B,))


def _pair(name: str, field: str, given, needed: bool, q_shapes, kv_shapes):
    """Return (the queries' [B,T to whole tiles], the keys' [B,(K,) S to whole tiles]), or (None, None) where the mask needs none."""
    if any((x is not None) != needed for x in given):
        raise UserError(f"{name} with mask.{field}={needed}: allowed is {'both arrays' if needed else 'None'}")
    if not needed:
        return None, None
    first, second = (jnp.asarray(x, jnp.int32) for x in given)
    if first.shape not in q_shapes or second.shape not in kv_shapes:
        raise UserError(f"{name} of {first.shape} and {second.shape}: allowed are {q_shapes} and {kv_shapes}")
    return pad(first, 1, ROWS, EMPTY), pad(second, second.ndim - 1, SIZE, EMPTY)


def prepare(mask: Mask, shape, S: int, *, q_offset, kv_len, q_pos, kv_pos, segments, spans) -> Data:
    """Return the arrays of a mask, by the words of `attend`; `shape`: of q, [B,K,G,T,D].

    Raises:
      UserError: one is missing, has another shape, or would be ignored.
    """
    B, K, _, T, _ = shape
    if mask.positions and not (kv_len is None and isinstance(q_offset, int) and q_offset == 0):
        raise UserError(
            "q_offset or kv_len with mask.positions=True: allowed are only q_pos and kv_pos, EMPTY where there is no token"
        )
    kv_shapes = [(B, S), (B, 1, S), (B, K, S)]
    q_pos, kv_pos = _pair("q_pos, kv_pos", "positions", (q_pos, kv_pos), mask.positions, [(B, T)], kv_shapes)
    if kv_pos is not None and kv_pos.ndim == 2:
        kv_pos = kv_pos[:, None]
    if not isinstance(segments, tuple | list):
        segments = (segments, segments)
    q_seg, kv_seg = _pair("segments", "segments", segments, mask.segments, [(B, T)], [(B, S)])
    if mask.spans != (spans is not None):
        raise UserError(
            f"spans={'given' if spans is not None else None} with mask.spans={mask.spans}: allowed is both or neither"
        )
    if spans is not None:
        spans = jnp.asarray(spans, jnp.int32)
        if spans.shape not in ((K,), (B, K)):
            raise UserError(f"spans of {spans.shape}: allowed are [{K}] and [{B},{K}], one for each KV head")
        spans = jnp.broadcast_to(spans, (B, K))
    kv_len = jnp.clip(_per_sequence(S if kv_len is None else kv_len, B, "kv_len"), 0, S)
    return Data(jnp.stack([_per_sequence(q_offset, B, "q_offset"), kv_len]), spans, q_pos, kv_pos, q_seg, kv_seg)


def with_list(data: Data, blocks: BlockList | None) -> Data:
    """Return `data` with a list, flattened."""
    if blocks is None:
        return data
    entries = jnp.pad(blocks.index * 2 + (blocks.flags == FULL), ((0, 0),) * 3 + ((0, 1),))
    return data._replace(entries=entries.reshape(-1).astype(jnp.int32), count=blocks.count.reshape(-1))


def longest_first(blocks: BlockList, B: int, heads: int) -> jax.Array:
    """Return int32 [B * heads * Q]: the tiles of all sequences and heads by falling length of their list."""
    b, h, Q = blocks.count.shape
    work = jnp.repeat(blocks.count, heads // h, axis=1)
    return jnp.argsort(-jnp.broadcast_to(work, (B, heads, Q)).reshape(-1)).astype(jnp.int32)


def check_arrays(q, k, v, scale, out_dtype, widest: int):
    """Raise UserError for shapes, types and numbers that the attention kernels do not serve."""
    B, K, G, T, D = q.shape
    S = k.shape[-1]
    if k.shape != (B, K, D, S) or v.shape != (B, K, S, D):
        raise UserError(f"q {q.shape}, k {k.shape}, v {v.shape}: allowed are [B,K,G,T,D], [B,K,D,S], [B,K,S,D]")
    if q.dtype not in (jnp.bfloat16, jnp.float16) or not q.dtype == k.dtype == v.dtype:
        raise UserError(f"q {q.dtype}, k {k.dtype}, v {v.dtype}: allowed are all bfloat16 or all float16")
    if D > widest:
        raise UserError(f"head_dim={D}: allowed are at most {widest}")
    if out_dtype not in (jnp.float32, q.dtype):
        raise UserError(f"out_dtype={out_dtype}: allowed are float32 and {q.dtype}")
    if not 1e-6 <= scale <= 1e6:
        raise UserError(f"scale={scale}: allowed are 1e-6 to 1e6")


# inside of a kernel


def listed_tiles(ref: Data, shape, at, H: int, size: int):
    """Return (steps, entry) of a listed tile; `entry(step)` is a kernel tile's number * 2 + its flag, `size` its length.

    Args:
      shape: of the list's index.
      at: sequence, query head, KV head, tile.
      H: query heads.
    """
    b, h, kv_head, i = at
    few, heads, Q, M = shape
    row = ((b if few > 1 else 0) * heads + (h if heads == H else kv_head if heads > 1 else 0)) * Q + i
    first, parts = row * (M + 1), SIZE // size

    def entry(step):
        code = ref.entries[first + lax.div(step, parts)]
        return (lax.div(code, 2) * parts + lax.rem(step, parts)) * 2 + lax.rem(code, 2)

    return ref.count[row] * parts, entry


def predicate(ref: Data, mask: Mask, b, kv_head, kv_len, span, *, rows: int, keys: int, rows_axis: int = 0):
    """Return `hide(x, first, q_lo, start, value)`, which puts `value` where a query may not see a key.

    `x` is [rows, keys], or [keys, rows] where `rows_axis` is 1; `first` is the number of its first query, `q_lo` that query's position,
    `start` the first slot.
    """
    shape = (rows, keys) if rows_axis == 0 else (keys, rows)
    by_axis = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)

    def iota(axis):
        return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)

    def load(source, axis):
        return lax.broadcast_in_dim(plgpu.load(source, layout=by_axis[axis], optimized=False), shape, [axis])

    def hide(x, first, q_lo, start, value):
        at_q, at_k = pl.ds(first, rows), pl.ds(start, keys)
        q_axis, k_axis = rows_axis, 1 - rows_axis
        if mask.segments:
            # one predicate after the other: both at once do not fit the registers of head_dim 256
            same = load(ref.q_seg.at[b, at_q], q_axis) == load(ref.kv_seg.at[b, at_k], k_axis)
            x = lax.optimization_barrier(jnp.where(same, x, value))
        if ref.kv_pos is None:
            q_pos, kv_pos = q_lo + iota(q_axis), start + iota(k_axis)
            held = kv_pos < kv_len
        else:
            q_pos = load(ref.q_pos.at[b, at_q], q_axis)
            kv_pos = load(ref.kv_pos.at[b, kv_head if ref.kv_pos.shape[1] > 1 else 0, at_k], k_axis)
            held = (kv_pos != EMPTY) & (q_pos != EMPTY)
        return jnp.where(held & mask.allow(q_pos, kv_pos, span), x, value)

    return hide


def key_block_of(block, B: int, K: int, N: int, ref: Data):
    """Return (sequence, KV head, tile of keys) of a block; long ones first: by the list's order, else the first keys first."""
    if ref.order is not None:
        work = ref.order[block]
        return lax.div(work, K * N), lax.rem(lax.div(work, N), K), lax.rem(work, N)
    return lax.rem(lax.div(block, K), B), lax.rem(block, K), lax.div(block, K * B)


def queries_of(ref: Data, mask: Mask, listed, at, H: int, q_start, T: int, kv_len, span, rows: int, h):
    """Return the tiles of queries of head `h` that visit a tile of keys, in the form of `attend.steps_of`."""
    b, kv_head, n = at
    if listed is not None:
        return listed_tiles(ref, listed, (b, h, kv_head, n), H, rows)
    if mask.positions:
        return jnp.int32(-(-T // rows)), lambda step: step * 2
    start = n * SIZE
    walk = mask.walk_queries(start, start + SIZE - 1, q_start, T, kv_len, rows, span)

    def entry(step):
        tile = walk.tile(step)
        q_lo = q_start + tile * rows
        every = mask.every(q_lo, q_lo + rows - 1, start, start + SIZE - 1, span)
        return tile * 2 + (jnp.where(every, FULL, 0) if not mask.segments else 0)

    return walk.steps, entry
