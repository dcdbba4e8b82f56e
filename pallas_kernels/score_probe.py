"""Attention mass of a text's last queries by key and by distance for Hopper, by which MInference ranks before it attends.

Two passes over the keys, which lie in tiles of 64; a block takes up to `run` tiles of one query head, one thread feeds a ring of `stages`
tiles, two consumer warpgroups take the tiles in turn.

    keys ->     [ tile 0 | tile 1 | tile 2 | tile 3 ]           pass 1:  largest logit and sum of each query, by consumer; XLA merges
    consumer        0        1        0        1                pass 2:  p = exp2(s - lse), then its two sums

    for each tile:                              a tile of p in shared memory, 64 zeros on either side of a row:
        s = q K                                     row 0   0 0 0 0 [p p p p] 0 0 0 0       window at column 0
        p = exp2(s * scale * log2 e - lse)          row 1   0 0 0 0 [p p p p] 0 0 0 0       window at column 1
        columns   = sum of p over its rows          row 2   0 0 0 0 [p p p p] 0 0 0 0       window at column 2
        diagonals = sum of a window of each row,    ...
                    one further right a row         element x of a window: key - query = x - 64, the same in all rows

A tile has 128 diagonals, which XLA adds to its neighbours'.  No array of the size queries x keys is written.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lcx.ops.attention import BIG
from lcx.ops.block_scores import PROBE, check_probe
from pallas_kernels.inputs import pad
from pallas_kernels.registers import HALF, HIDDEN, LOG2E, PRODUCER, SWIZZLED, empty, rows_of
from pallas_kernels.score_blocks import check_types
from pallas_kernels.tables import PROBE as TILES
from pallas_kernels.tables import ProbeTile

SIZE = 64  # keys of a tile; as many as there are queries, so that a window of 2 x 64 takes every diagonal


def score_probe(
    q: jax.Array,
    k: jax.Array,
    *,
    scale: float,
    q_offset,
    kv_len=None,
    window: int | None = None,
    tile: ProbeTile | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Compute `lcx.ops.block_scores.score_probe`; q and k in bfloat16 or float16, everything after their product in float32."""
    check_probe(q, k, scale, window)
    check_types(q, k)
    B, K, G, T, D = q.shape
    H, S = K * G, k.shape[3]
    head_dim = next(d for d in TILES if d >= D)
    tile = tile or TILES[head_dim]
    q = pad(pad(q.reshape(B, H, T, D), 3, head_dim), 2, PROBE)
    k = pad(pad(k, 2, head_dim), 3, SIZE)
    first = jnp.broadcast_to(jnp.asarray(q_offset, jnp.int32), (B,))
    held = jnp.broadcast_to(jnp.asarray(S if kv_len is None else kv_len, jnp.int32), (B,))
    held = jnp.clip(jnp.minimum(held, first + T), 0, S)
    begin = jnp.zeros_like(first) if window is None else jnp.maximum(first - window + 1, 0) // SIZE
    static = (jnp.stack([first, held, begin]), scale, window, T, tile)
    top, total = _call(q, k, None, *static)
    # rows, consumers and runs of tiles that saw nothing have HIDDEN and 0
    high = top.max(2)
    total = (total * jnp.exp2(top - high[:, :, None])).sum(2)
    lse = jnp.where(total > 0, high + jnp.log2(jnp.where(total > 0, total, 1.0)), BIG)
    columns, parts = _call(q, k, lse, *static)
    # tiles before the window or behind the last key are not written
    number = jnp.arange(parts.shape[2])
    written = ((number >= begin[:, None]) & (number * SIZE < held[:, None]))[:, None, :, None]
    columns = jnp.where(written, columns.reshape(B, H, -1, SIZE), 0.0).reshape(B, H, -1)[..., :S]
    parts = jnp.pad(jnp.where(written, parts, 0.0), ((0, 0), (0, 0), (0, 1), (0, 0)))
    left = jnp.pad(parts[:, :, :-1, :SIZE], ((0, 0), (0, 0), (0, 1), (0, 0)))
    right = jnp.pad(parts[:, :, :-1, SIZE:], ((0, 0), (0, 0), (1, 0), (0, 0)))
    # element y: key - query number = y - 64, so the distance of positions is first + 64 - y
    line = (left + right).reshape(B, H, -1)
    at = first[:, None] + SIZE - jnp.arange(S)
    inside = (at >= 0) & (at < line.shape[2])
    diagonals = jnp.take_along_axis(line, jnp.clip(at, 0, line.shape[2] - 1)[:, None], 2)
    diagonals = jnp.where(inside[:, None], diagonals, 0.0)
    return columns.reshape(B, K, G, S), diagonals.reshape(B, K, G, S)


def _call(q, k, lse, lengths, scale, window, T, tile: ProbeTile):
    """Call pass 1 (`lse` None): (largest logit, sum) in powers of two, float32 [B,H,2 runs,64] each.

    Pass 2: (sums by key float32 [B,H,S], by diagonal of a tile float32 [B,H,tiles,128]).
    """
    B, H, _, D = q.shape
    K, S = k.shape[1], k.shape[3]
    tiles, run, stages = S // SIZE, tile.run, tile.stages
    runs = -(-tiles // run)
    factor = scale * LOG2E
    summing = lse is not None

    def body(
        q_ref,
        k_ref,
        lengths_ref,
        lse_refs,
        out_ref,
        second_ref,
        q_smem,
        k_smem,
        p_smem,
        line_smem,
        q_ready,
        ready,
        free,
    ):
        wg, block = lax.axis_index("wg"), lax.axis_index("block")
        # heads side by side share what they read
        h, rest = lax.rem(block, H), lax.div(block, H)
        b, n = lax.rem(rest, B), lax.div(rest, B)
        first, held = lengths_ref[0, b], lengths_ref[1, b]
        begin = lengths_ref[2, b] + n * run
        steps = jnp.clip(lax.div(held + SIZE - 1, SIZE) - begin, 0, run)

        @pl.when(wg == PRODUCER)
        def _():
            plgpu.set_max_registers(24, action="decrease")
            plgpu.copy_gmem_to_smem(q_ref.at[b, h], q_smem, q_ready)

            @pl.loop(0, steps)
            def _fill(step):
                slot = lax.rem(step, stages)
                pl.when(step >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
                keys = pl.ds((begin + step) * SIZE, SIZE)
                plgpu.copy_gmem_to_smem(k_ref.at[b, lax.div(h, H // K), :, keys], k_smem.at[slot], ready.at[slot])

            @pl.loop(jnp.maximum(steps - stages, 0), steps)
            def _drain(step):
                plgpu.barrier_wait(free.at[lax.rem(step, stages)])

        @pl.when(wg != PRODUCER)
        def _():
            plgpu.set_max_registers(240, action="increase")
            plgpu.barrier_wait(q_ready)
            row, column = (
                plgpu.broadcasted_iota(jnp.int32, (HALF, SIZE), a, layout=plgpu.Layout.WGMMA) for a in (0, 1)
            )
            position = first + row
            if summing:
                by_row = plgpu.Layout.WGMMA.reduce(1)
                row_lse = plgpu.load(lse_refs[0].at[b, h], layout=by_row, optimized=False)
                for side in (0, 2 * SIZE):
                    p_smem.at[wg, :, side : side + SIZE][...] = empty(HALF, SIZE)

            def logits(turn):
                """Return the number of the tile, and its logits in powers of two, HIDDEN where a query may not see."""
                step = turn * 2 + wg
                slot = lax.rem(step, stages)
                plgpu.barrier_wait(ready.at[slot])

                def product(s):
                    plgpu.wgmma(s, q_smem, k_smem.at[slot])
                    return s[...]

                s = pl.run_scoped(product, plgpu.ACC((HALF, SIZE), jnp.float32))
                plgpu.barrier_arrive(free.at[slot])
                key = (begin + step) * SIZE + column
                seen = (key <= position) & (key < held) & (position >= 0) & (row < T)
                if window is not None:
                    seen = seen & (position - key < window)
                return begin + step, jnp.where(seen, s * factor, HIDDEN)

            turns = lax.div(steps - wg + 1, 2)
            if not summing:

                def one_tile(turn, carry):
                    m, l = carry
                    _, s = logits(turn)
                    m_new = jnp.maximum(m, s.max(axis=1))
                    level = jnp.where(m_new < HIDDEN / 2, 0.0, m_new)
                    return m_new, l * jnp.exp2(m - level) + jnp.exp2(s - rows_of(level, s.shape, 0)).sum(axis=1)

                m, l = lax.fori_loop(0, turns, one_tile, (empty(HALF) + HIDDEN, empty(HALF)))
                for value, ref, place in ((m, out_ref, 0), (l, second_ref, 1)):
                    line_smem[wg, pl.ds(place * SIZE, SIZE)] = value
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(line_smem.at[wg, pl.ds(place * SIZE, SIZE)], ref.at[b, h, n * 2 + wg])
            else:

                @pl.loop(0, turns)
                def _tiles(turn):
                    number, s = logits(turn)
                    p = jnp.exp2(s - rows_of(row_lse, s.shape, 0))
                    p_smem.at[wg, :, SIZE : 2 * SIZE][...] = p
                    # the copies of the tile before have read the buffers
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    line_smem[wg, pl.ds(2 * SIZE, SIZE)] = p.sum(axis=0)
                    plgpu.commit_smem()
                    strided = plgpu.Layout.WG_STRIDED((2 * SIZE,), vec_size=1)

                    def add(i, total):
                        return total + plgpu.load(p_smem.at[wg, i, pl.ds(i, 2 * SIZE)], layout=strided)

                    zero = plgpu.layout_cast(jnp.zeros((2 * SIZE,), jnp.float32), strided)
                    line_smem[wg, pl.ds(0, 2 * SIZE)] = lax.fori_loop(0, HALF, add, zero)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(
                        line_smem.at[wg, pl.ds(2 * SIZE, SIZE)], out_ref.at[b, h, pl.ds(number * SIZE, SIZE)]
                    )
                    plgpu.copy_smem_to_gmem(line_smem.at[wg, pl.ds(0, 2 * SIZE)], second_ref.at[b, h, number])

            plgpu.wait_smem_to_gmem(0)

    shape = lambda *sizes: jax.ShapeDtypeStruct((B, H, *sizes), jnp.float32)
    return plgpu.kernel(
        body,
        out_type=(shape(S), shape(tiles, 2 * SIZE)) if summing else (shape(2 * runs, HALF), shape(2 * runs, HALF)),
        grid=(B * H * runs,),
        grid_names=("block",),
        num_threads=3,
        thread_name="wg",
        scratch_types=(
            plgpu.SMEM((HALF, D), q.dtype, transforms=SWIZZLED),
            plgpu.SMEM((stages, D, SIZE), q.dtype, transforms=SWIZZLED),
            plgpu.SMEM((2, HALF, 3 * SIZE), jnp.float32) if summing else None,
            plgpu.SMEM((2, 3 * SIZE), jnp.float32),
            plgpu.Barrier(),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(q, k, lengths, [lse] if summing else [])
