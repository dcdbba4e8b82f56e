"""Scores of blocks for Hopper, by which a sparse pattern ranks them before it attends (pooled keys, antidiagonals, page extremes).

All three are one product of rows by columns whose result is wanted by block.  A block of the grid takes 128 rows and up to `run` tiles of
columns; two consumer warpgroups of 64 rows each, and one whose single thread feeds them through a ring of `stages` slices.

    columns ->     tile 0    tile 1    tile 2    tile 3         one tile: slices of 64 channels, one after the other
                 +---------+---------+---------+---------+
    128 rows     | visible | visible | border  |  never  |      producer:    A0 B0 . A1 B1 . A2 B2 ...   waits for a free place in the ring
    of A         |         |         |         | written |      consumer 0:  acc += A0 B0 | += A1 B1 | ... | result out
                 +---------+---------+---------+---------+      consumer 1:  the same with its 64 rows

    for each visible tile:                      (acc [64, columns] in registers)
        acc = sum over slices of A B            wgmma, both from shared memory, the next one issued before the last is waited for
        pooled, extremes:  out = acc * scale
        antidiagonals:     m   = maximum of a row;  p = exp2(acc * scale * log2 e - m)
                           out = p [64, columns] x ones: sums of the columns of each block of 128 keys, by wgmma; m beside it

Antidiagonals: row r of A is `stride` successive queries, column c of B as many keys in reverse, so one product adds up an antidiagonal of
a stride x stride square.  XLA makes one distribution of the tiles' parts and adds the rows of a block up: memory is T/stride x S/128.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lcx.errors import UserError
from lcx.ops.block_scores import BLOCK, STRIDES, check_antidiagonal, check_minmax, check_pooled
from pallas_kernels.inputs import pad
from pallas_kernels.lists import ROWS
from pallas_kernels.registers import HALF, HIDDEN, LINE, LOG2E, PRODUCER, SWIZZLED, empty, line_buffer, write_rows
from pallas_kernels.tables import SCORE, ScoreTile

SLICE = 64  # channels of a step of the ring


def score_pooled(
    q: jax.Array,
    k: jax.Array,
    *,
    scale: float,
    rows: int,
    size: int,
    causal: bool = True,
    q_offset=0,
    tile: ScoreTile | None = None,
) -> jax.Array:
    """Compute `lcx.ops.block_scores.score_pooled`; q and k in bfloat16 or float16, the products in float32."""
    check_pooled(q, k, scale, rows, size)
    check_types(q, k)
    B, K, G, Q, D = q.shape
    N = k.shape[-1]
    first = jnp.broadcast_to(jnp.asarray(q_offset, jnp.int32), (B,))
    # the number of columns that the rows of a tile see: those that begin at its last position or before
    ends = first[:, None] + jnp.minimum((jnp.arange(-(-Q // ROWS)) + 1) * ROWS, Q) * rows
    limit = jnp.minimum((ends - 1) // size + 1, N) if causal else jnp.full_like(ends, N)
    a = pad(q.reshape(B * K * G, Q, D), 2, SLICE)
    out, _ = _products(a, [k.reshape(B * K, D, N)], limit, scale, tile or _tile(D))
    out = out.reshape(B, K, G, Q, N)
    if not causal:
        return out
    last = first[:, None] + (jnp.arange(Q) + 1) * rows - 1
    seen = jnp.arange(N) * size <= last[..., None]
    return jnp.where(seen[:, None, None], out, -jnp.inf)


def score_minmax(q: jax.Array, low: jax.Array, high: jax.Array, *, tile: ScoreTile | None = None) -> jax.Array:
    """Compute `lcx.ops.block_scores.score_minmax`; all arrays in bfloat16 or float16, the products in float32."""
    check_minmax(q, low, high)
    check_types(q, low, high)
    B, K, G, T, D = q.shape
    N = low.shape[-1]
    # the sum over d of max(q * low, q * high) is q+ . high + q- . low: one product of twice the channels
    halves = [jnp.maximum(q, 0), jnp.minimum(q, 0)]
    a = jnp.concatenate([pad(x.reshape(B * K, G * T, D), 2, SLICE) for x in halves], 2)
    limit = jnp.full((B, -(-G * T // ROWS)), N, jnp.int32)
    bs = [x.reshape(B * K, D, N) for x in (high, low)]
    return _products(a, bs, limit, 1.0, tile or _tile(D))[0].reshape(B, K, G, T, N)


def score_antidiagonal(
    q: jax.Array,
    k: jax.Array,
    *,
    stride: int,
    scale: float,
    q_offset=0,
    kv_len=None,
    tile: ScoreTile | None = None,
) -> jax.Array:
    """Compute `lcx.ops.block_scores.score_antidiagonal`; q and k in bfloat16 or float16, stride 4, 8 or 16.

    exp2 of a column is rounded to float16 before it is added up (relative 2^-11; below 2^-24 of its tile's largest it counts 0).
    """
    check_antidiagonal(q, k, stride, scale, q_offset)
    if stride not in STRIDES:
        raise UserError(
            f"stride={stride}: allowed are {', '.join(map(str, STRIDES))}; lcx.ops.block_scores takes others"
        )
    check_types(q, k)
    B, K, G, T, D = q.shape
    S = k.shape[-1]
    head_dim, per_block = -(-D // SLICE) * SLICE, BLOCK // stride
    a = pad(pad(q.reshape(B * K * G, T, D), 2, SLICE), 1, stride)
    a = rearrange(a, "z (r s) d -> z r (s d)", s=stride)
    b = pad(pad(k, 2, SLICE), 3, BLOCK).reshape(B * K, head_dim, -1)
    # query s of a row meets key stride - 1 - s of a column; columns lie side by side, as TMA reads them
    b = rearrange(b, "z d (c s) -> z s d c", s=stride)[:, ::-1].reshape(B * K, stride * head_dim, -1)
    R, N = a.shape[1], b.shape[2] // per_block
    first = jnp.broadcast_to(jnp.asarray(q_offset, jnp.int32), (B,)) // stride
    held = jnp.broadcast_to(jnp.clip(jnp.asarray(S if kv_len is None else kv_len, jnp.int32), 0, S), (B,))
    columns = -(-held // stride)
    ends = first[:, None] + jnp.minimum((jnp.arange(-(-R // ROWS)) + 1) * ROWS, R)
    limit = jnp.minimum(ends, columns[:, None])
    tile = tile or _tile(D)
    sums, top = _products(a, [b], limit, scale / stride, tile, group=per_block, first=first)
    return _distribution(sums, top, limit, (B, K, G, -(-T // stride), N), per_block, tile)


def _distribution(sums, top, limit, shape, per_block: int, tile: ScoreTile):
    """Return the mean probability of each block from the rows' parts: float32 [B,K,G,Q,N]."""
    B, K, G, R, N = shape
    tiles, wide = top.shape[1], tile.columns // per_block
    sums = sums.reshape(B, K * G, R, tiles, wide)
    top = top[:, :, :R].reshape(B, K * G, tiles, R).swapaxes(2, 3)
    # tiles that no row of a block of the grid sees are not written
    written = jnp.arange(tiles) * tile.columns < jnp.repeat(limit, ROWS, 1)[:, :R, None]
    top = jnp.where(written[:, None], top, HIDDEN)
    sums = jnp.where(written[:, None, :, :, None], sums, 0.0)
    share = jnp.exp2(top - top.max(-1, keepdims=True))
    total = (share * sums.sum(-1)).sum(-1, keepdims=True)
    share = share / jnp.where(total == 0, 1.0, total)
    mass = (sums * share[..., None]).reshape(B, K * G, R, tiles * wide)[..., :N]
    Q = -(-R // per_block)
    mass = jnp.pad(mass, ((0, 0), (0, 0), (0, Q * per_block - R), (0, 0)))
    count = jnp.minimum(R - jnp.arange(Q) * per_block, per_block)
    mass = mass.reshape(B, K, G, Q, per_block, N).sum(4)
    return mass / count[:, None]


def _tile(head_dim: int) -> ScoreTile:
    return SCORE[next(d for d in SCORE if d >= head_dim)]


def check_types(q, *others):
    """Raise UserError for types and head dims that the kernels of scores do not serve."""
    if q.dtype not in (jnp.bfloat16, jnp.float16) or any(x.dtype != q.dtype for x in others):
        raise UserError(f"q {q.dtype}, keys {others[0].dtype}: allowed are all bfloat16 or all float16")
    if q.shape[-1] > max(SCORE):
        raise UserError(f"head_dim={q.shape[-1]}: allowed are at most {max(SCORE)}")


def _products(a, bs, limit, scale: float, tile: ScoreTile, *, group: int | None = None, first=None):
    """Multiply rows of `a` by columns of `bs`, whose channels follow each other in `a`.

    Args:
      a: [Z,R,C]; bs: each [Zb,Cb,N], Z a multiple of Zb; C the sum of the Cb in whole slices.
      limit: int32 [B, tiles of rows], columns that the rows of a tile see; of the others nothing is written.
      group: None: only products.  A number: sums of exp2 over this many successive columns, rows and columns being steps of a text: row r
        sees columns up to `first` + r, int32 [B].

    Returns:
      (float32 [Z,R,N] products times scale, None); or (sums float32 [Z,R,N / group in whole tiles], top float32 [Z, tiles of columns, R
      in whole tiles]): of the columns of a tile, exp2 of the logits less `top`, their largest.
    """
    Z, R, _ = a.shape
    B = limit.shape[0]
    Zb, _, N = bs[0].shape
    # TMA moves tiles of 8 x 64 elements: arrays hold whole ones
    a = pad(a, 1, 8)
    bs = [pad(pad(b, 1, SLICE), 2, 64) for b in bs]
    columns, stages, run = tile.columns, tile.stages, tile.run
    row_tiles, tiles = -(-R // ROWS), -(-N // columns)
    chunks, slices = -(-tiles // run), bs[0].shape[1] // SLICE
    unit = scale * LOG2E
    wide = columns // group if group else columns
    lengths = limit if first is None else jnp.concatenate([limit, first[:, None]], 1)
    ones = [jnp.repeat(jnp.eye(wide, dtype=jnp.float16), group, 1)] if group else []

    float32 = jnp.float32
    # a copy to global memory lowers to tiles of its own width: rows are whole lines of 32 numbers, or (sums) as wide as all tiles
    width = tiles * wide if group else -(-N // (LINE // 4)) * (LINE // 4)
    made = [jax.ShapeDtypeStruct((Z, a.shape[1], width), float32)]
    if group:
        made.append(jax.ShapeDtypeStruct((Z, tiles, row_tiles * ROWS), float32))

    def body(a_ref, b_refs, lengths_ref, ones_refs, *refs):
        # without a group there is no second result
        out_ref, top_ref = refs[0], refs[len(made) - 1]
        a_smem, b_smem, ones_smem, out_smem, top_smem, ready, free, ones_ready = refs[len(made) :]
        wg, block = lax.axis_index("wg"), lax.axis_index("block")
        # heads side by side share what they read; the last rows, which see most, first
        z, rest = lax.rem(block, Z), lax.div(block, Z)
        chunk, i = lax.rem(rest, chunks), row_tiles - 1 - lax.div(rest, chunks)
        b = lax.div(z, Z // B)
        steps_of_tile = len(bs) * slices
        visible = lax.div(lengths_ref[b, i] + columns - 1, columns)
        count = jnp.clip(visible - chunk * run, 0, run)

        @pl.when(wg == PRODUCER)
        def _():
            plgpu.set_max_registers(24, action="decrease")
            for ref in ones_refs:
                plgpu.copy_gmem_to_smem(ref, ones_smem, ones_ready)

            @pl.loop(0, count)
            def _tiles(t):
                column = pl.ds((chunk * run + t) * columns, columns)
                for part, b_ref in enumerate(b_refs):

                    @pl.loop(0, slices)
                    def _slices(c, part=part, b_ref=b_ref):
                        step = t * steps_of_tile + part * slices + c
                        slot = lax.rem(step, stages)
                        pl.when(step >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
                        of_a = pl.ds((part * slices + c) * SLICE, SLICE)
                        plgpu.copy_gmem_to_smem(
                            a_ref.at[z, pl.ds(i * ROWS, ROWS), of_a], a_smem.at[slot], ready.at[slot]
                        )
                        of_b = b_ref.at[lax.div(z, Z // Zb), pl.ds(c * SLICE, SLICE), column]
                        plgpu.copy_gmem_to_smem(of_b, b_smem.at[slot], ready.at[slot])

            total = count * steps_of_tile

            @pl.loop(jnp.maximum(total - stages, 0), total)
            def _drain(step):
                plgpu.barrier_wait(free.at[lax.rem(step, stages)])

        @pl.when(wg != PRODUCER)
        def _():
            plgpu.set_max_registers(240, action="increase")
            mine = i * ROWS + wg * HALF
            rows, half = pl.ds(mine, HALF), pl.ds(wg * HALF, HALF)
            if group:
                plgpu.barrier_wait(ones_ready)

            @pl.loop(0, count)
            def _tiles(t):
                n = chunk * run + t

                def product(acc):
                    @pl.loop(0, steps_of_tile)
                    def _steps(c):
                        step = t * steps_of_tile + c
                        slot = lax.rem(step, stages)
                        plgpu.barrier_wait(ready.at[slot])
                        plgpu.wgmma(acc, a_smem.at[slot, half], b_smem.at[slot])
                        # all but this one are done: its place goes back a step later
                        plgpu.wgmma_wait(1)
                        pl.when(c > 0)(lambda: plgpu.barrier_arrive(free.at[lax.rem(step - 1, stages)]))

                    return acc[...]

                s = pl.run_scoped(product, plgpu.ACC((HALF, columns), jnp.float32))
                plgpu.barrier_arrive(free.at[lax.rem((t + 1) * steps_of_tile - 1, stages)])
                if not group:
                    write_rows(s * scale, out_smem.at[wg], out_ref.at[z, rows, pl.ds(n * columns, columns)])
                    return
                start = n * columns
                seen = lengths_ref[b, row_tiles] + mine

                def hide(s):
                    row, column = (
                        plgpu.broadcasted_iota(jnp.int32, s.shape, axis, layout=plgpu.Layout.WGMMA) for axis in (0, 1)
                    )
                    see = (start + column <= seen + row) & (start + column < lengths_ref[b, i])
                    return jnp.where(see, s, HIDDEN / unit)

                every = (start + columns - 1 <= seen) & (start + columns <= lengths_ref[b, i])
                s = lax.cond(every, lambda s: s, hide, s)
                high = s.max(axis=1) * unit
                # a row that sees nothing of the tile takes 0, so that its hidden columns are exp2(HIDDEN) = 0
                level = jnp.where(high < HIDDEN / 2, 0.0, high)
                p = jnp.exp2(s * unit - lax.broadcast_in_dim(level, s.shape, [0])).astype(jnp.float16)
                add = lambda acc: plgpu.wgmma(acc, p, ones_smem.transpose((1, 0)))
                sums = pl.run_state(add)(plgpu.ACC.init(empty(HALF, wide)))
                # the copies of the tile before have read the buffers
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                out_smem[wg] = sums
                top_smem[wg] = high
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out_smem.at[wg], out_ref.at[z, rows, pl.ds(n * wide, wide)])
                plgpu.copy_smem_to_gmem(top_smem.at[wg], top_ref.at[z, n, rows])

            plgpu.wait_smem_to_gmem(0)

    out = plgpu.kernel(
        body,
        out_type=made,
        grid=(Z * row_tiles * chunks,),
        grid_names=("block",),
        num_threads=3,
        thread_name="wg",
        scratch_types=(
            plgpu.SMEM((stages, ROWS, SLICE), a.dtype, transforms=SWIZZLED),
            plgpu.SMEM((stages, SLICE, columns), a.dtype, transforms=SWIZZLED),
            plgpu.SMEM((wide, columns), jnp.float16, transforms=SWIZZLED) if group else None,
            plgpu.SMEM((2, HALF, wide), float32) if group else line_buffer(float32),
            plgpu.SMEM((2, HALF), float32) if group else None,
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier() if group else None,
        ),
        # maxima along a row stay within a warp: no shared memory for reductions, which stride 16 has no room for
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
    )(a, bs, lengths, ones)
    return (out[0][:, :R], out[1]) if group else (out[0][:, :R, :N], None)
