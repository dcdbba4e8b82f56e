"""Attention forward for Hopper: dense, masked by position, or over a list of tiles.

One block computes 128 queries of one query head.  Three warpgroups: two consumers of 64 rows each, and one whose single thread feeds them
through a ring of `stages` tiles of K and of V.

    keys ->      tile 0    tile 1    tile 2    tile 3           visited tiles: of the list, or all that causality, window and sink leave
                +---------+---------+---------+---------+
    128 rows    | visited |  never  | visited | visited |       producer:   K0 V0 . K2 V2 . K3 V3    waits for a free place in the ring
    of q        |  full   |  read   |  full   | masked  |
                +---------+---------+---------+---------+
                                                                consumer 0: QK0 | softmax | PV0 QK2 | softmax | PV2 QK3 | ...
    rows 0-63: consumer 0, rows 64-127: consumer 1              consumer 1:       QK0     | softmax | PV0 QK2 | softmax | ...

    for each visited tile j:                    (running maximum m, sum l, and acc [64,D] in registers)
        s   = q K_j                             wgmma, both from shared memory; K lies channel-major [D, keys], as caches do
        s   = s where the predicate holds       only in tiles that are not full
        p   = exp2(s * scale * log2 e - m)
        acc = acc * exp2(m_old - m) + p V_j     wgmma, p stays in registers
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lcx.ops.attention import Partial
from pallas_kernels.inputs import (
    Data,
    check_arrays,
    listed_tiles,
    longest_first,
    pad,
    predicate,
    prepare,
    with_list,
)
from pallas_kernels.lists import FULL, ROWS, BlockList
from pallas_kernels.mask import Mask
from pallas_kernels.registers import HALF, HIDDEN, LOG2E, PRODUCER, SWIZZLED, empty, line_buffer, write_rows
from pallas_kernels.tables import ATTEND, AttendTile


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    scale: float,
    mask: Mask = Mask(causal=True),  # noqa: B008 - frozen
    blocks: BlockList | None = None,
    q_offset=0,
    kv_len=None,
    q_pos: jax.Array | None = None,
    kv_pos: jax.Array | None = None,
    segments=None,
    spans: jax.Array | None = None,
    out_dtype=None,
    tile: AttendTile | None = None,
) -> Partial:
    """Compute attention of `q` over `k`, `v`; the cost is that of the tiles visited.

    Values at hidden slots must be finite: a hidden NaN or infinity in `v` makes the rows of a visited tile NaN (0 * NaN), where
    `lcx.ops.attention.attend` leaves it out.  Hidden keys may hold anything.  Odd sizes cost a padded copy: of k where S
    is no multiple of 64, of v where it is none of 8, of q and the result where T is none of 8, of all where head_dim is not 64, 128 or 256.

    Args:
      q: [B,K,G,T,D], bfloat16 or float16, D at most 256.
      k: [B,K,D,S], v: [B,K,S,D], in the type of q.
      scale: factor on the logits, positive.
      mask: who sees whom.
      blocks: the tiles to visit; the mask holds inside of those that are not flagged FULL.  None: all that causality, window and sink
        leave.  With positions as data none can be left out without a list: see `lists.from_mask`.
      q_offset: int32 [B] or one number, position of the first query; not with positions.
      kv_len: int32 [B] or one number, slots in use, at most S; None: S.  Not with positions.
      q_pos, kv_pos: where `mask.positions`: int32 [B,T], and [B,S] or [B,K,S], EMPTY where there is none.
      segments: where `mask.segments`: (int32 [B,T], int32 [B,S]), numbers >= 0; or one [B,S] for both, if T = S.
      spans: where `mask.spans`: int32 [K] or [B,K], window of each KV head in tokens.
      out_dtype: of the result, float32 by default; the type of q halves the written bytes.
      tile: sizes other than those of the table, to measure.

    Returns:
      Partial: out [B,K,G,T,D], lse float32 [B,K,G,T].  A row without keys has out 0 and lse -inf.

    Raises:
      UserError: a shape, type or combination that is not served.
    """
    out_dtype = jnp.dtype(jnp.float32 if out_dtype is None else out_dtype)
    check_arrays(q, k, v, scale, out_dtype, max(ATTEND))
    if q.size == 0 or k.size == 0:
        return Partial(jnp.zeros(q.shape, out_dtype), jnp.full(q.shape[:-1], -jnp.inf))
    data = prepare(
        mask,
        q.shape,
        k.shape[-1],
        q_offset=q_offset,
        kv_len=kv_len,
        q_pos=q_pos,
        kv_pos=kv_pos,
        segments=segments,
        spans=spans,
    )
    return forward(q, k, v, data, blocks, mask=mask, scale=scale, out_dtype=out_dtype, tile=tile)


def forward(q, k, v, data: Data, blocks, *, mask, scale, out_dtype, tile: AttendTile | None = None) -> Partial:
    """Compute `attend` after its checks."""
    B, K, G, T, D = q.shape
    H = K * G
    shape = None
    if blocks is not None:
        blocks.check(B, K, H, -(-T // ROWS))
        shape = blocks.index.shape
        data = with_list(data, blocks)._replace(order=longest_first(blocks, B, H))
    head_dim = next(d for d in ATTEND if d >= D)
    # TMA moves tiles of 8 x 64 elements: arrays hold whole ones
    q, v = (pad(pad(x, 3, head_dim), 2, 8) for x in (q.reshape(B, H, T, D), v))
    k = pad(pad(k, 2, head_dim), 3, 64)
    out, lse = _call(q, k, v, data, shape, mask, scale, out_dtype, T, tile or ATTEND[head_dim])
    return Partial(out[:, :, :T, :D].reshape(B, K, G, T, D), lse[..., :T].reshape(B, K, G, T))


def _call(q, k, v, data: Data, listed, mask: Mask, scale, out_dtype, T, tile: AttendTile):
    """Call the kernel: q [B,H,T or more,D] -> (out as q, lse [B,H,T to whole tiles]); `listed`: shape of the list."""
    B, H, _, D = q.shape
    K, Q = k.shape[1], -(-T // ROWS)
    size, stages = tile.size, tile.stages
    factor = scale * LOG2E
    names = data.names()

    def body(q_ref, k_ref, v_ref, inputs, out_ref, lse_ref, q_smem, k_smem, v_smem, out_smem, lse_smem, *barriers):
        q_ready, k_ready, v_ready, k_free, v_free, turn = barriers
        ref = Data(**dict(zip(names, inputs, strict=True)))
        wg = lax.axis_index("wg")
        b, h, i = block_of(lax.axis_index("block"), B, H, Q, ref)
        kv_head = lax.div(h, H // K)
        q_start, kv_len = ref.lengths[0, b], ref.lengths[1, b]
        span = None if ref.spans is None else ref.spans[b, kv_head]
        q_lo = q_start + i * ROWS
        q_hi = q_start + jnp.minimum((i + 1) * ROWS, T) - 1
        steps, entry = steps_of(ref, mask, (b, h, kv_head, i), H, listed, q_lo, q_hi, kv_len, span, size)

        @pl.when(wg == PRODUCER)
        def _():
            plgpu.set_max_registers(24, action="decrease")

            def fill(step, code):
                slot = lax.rem(step, stages)
                keys = pl.ds(_start(code, size), size)
                # loaded before the waits: a list lies in global memory
                following = entry(step + 1)

                @pl.when(step >= stages)
                def _():
                    plgpu.barrier_wait(k_free.at[slot])

                plgpu.copy_gmem_to_smem(k_ref.at[b, kv_head, :, keys], k_smem.at[slot], k_ready.at[slot])

                @pl.when(step >= stages)
                def _():
                    plgpu.barrier_wait(v_free.at[slot])

                plgpu.copy_gmem_to_smem(v_ref.at[b, kv_head, keys], v_smem.at[slot], v_ready.at[slot])
                return following

            lax.fori_loop(0, steps, fill, entry(0))

            @pl.loop(jnp.maximum(steps - stages, 0), steps)
            def _drain(step):
                plgpu.barrier_wait(k_free.at[lax.rem(step, stages)])
                plgpu.barrier_wait(v_free.at[lax.rem(step, stages)])

        @pl.when(wg != PRODUCER)
        def _():
            plgpu.set_max_registers(tile.registers, action="increase")
            first, first_pos = i * ROWS + wg * HALF, q_lo + wg * HALF
            rows = pl.ds(first, HALF)
            q_mine = q_smem.at[wg]
            plgpu.copy_gmem_to_smem(q_ref.at[b, h, rows], q_mine, q_ready.at[wg])
            hide = predicate(ref, mask, b, kv_head, kv_len, span, rows=HALF, keys=size)
            plgpu.barrier_wait(q_ready.at[wg])

            def take_turn():
                if tile.ping_pong:
                    plgpu.barrier_arrive(turn)
                    plgpu.barrier_wait(turn)

            pl.when(wg == 1)(take_turn)

            def one_tile(step, carry):
                acc, m, l, code = carry
                slot = lax.rem(step, stages)
                following = entry(step + 1)
                plgpu.barrier_wait(k_ready.at[slot])

                def multiply_qk(s):
                    plgpu.wgmma(s, q_mine, k_smem.at[slot])
                    take_turn()
                    return s[...]

                s = pl.run_scoped(multiply_qk, plgpu.ACC((HALF, size), jnp.float32))
                plgpu.barrier_arrive(k_free.at[slot])
                start = _start(code, size)
                every = lax.rem(code, 2) == FULL
                every = every & (start + size <= kv_len) if ref.kv_pos is None else every
                s = lax.cond(every, lambda s: s, lambda s: hide(s, first, first_pos, start, HIDDEN / factor), s)

                m_new = jnp.maximum(m, s.max(axis=1) * factor)
                # a row that has seen nothing takes 0 for its maximum, so that its hidden keys are exp2(HIDDEN) = 0
                top = jnp.where(m_new < HIDDEN / 2, 0.0, m_new)
                keep = jnp.exp2(m - top)
                p = jnp.exp2(s * factor - lax.broadcast_in_dim(top, s.shape, [0]))
                acc = acc * lax.broadcast_in_dim(keep, acc.shape, [0])
                l = l * keep + p.sum(axis=1)
                p = p.astype(q.dtype)
                acc, l, m_new, p = lax.optimization_barrier((acc, l, m_new, p))
                if tile.ping_pong:
                    plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(v_ready.at[slot])
                if tile.ping_pong:
                    plgpu.barrier_wait(turn)
                acc = pl.run_state(lambda acc: plgpu.wgmma(acc, p, v_smem.at[slot]))(plgpu.ACC.init(acc))
                plgpu.barrier_arrive(v_free.at[slot])
                return acc, m_new, l, following

            acc, m, l, _ = lax.fori_loop(
                0, steps, one_tile, (empty(HALF, D), empty(HALF) + HIDDEN, empty(HALF), entry(0))
            )
            pl.when(wg == 0)(take_turn)

            some = l > 0
            # a poisoned sum is not above 0 either, and must stay
            poisoned = l != l
            l = jnp.where(some | poisoned, l, 1.0)
            acc = acc * lax.broadcast_in_dim(1 / l, acc.shape, [0])
            lse_smem[wg] = jnp.where(some | poisoned, m / LOG2E + jnp.log(l), -jnp.inf)
            write_rows(acc, out_smem.at[wg], out_ref.at[b, h, rows])
            plgpu.copy_smem_to_gmem(lse_smem.at[wg], lse_ref.at[b, h, rows])
            plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct(q.shape, out_dtype),
            jax.ShapeDtypeStruct((B, H, Q * ROWS), jnp.float32),
        ),
        grid=(B * H * Q,),
        grid_names=("block",),
        num_threads=3,
        thread_name="wg",
        scratch_types=(
            plgpu.SMEM((2, HALF, D), q.dtype, transforms=SWIZZLED),
            plgpu.SMEM((stages, D, size), q.dtype, transforms=SWIZZLED),
            plgpu.SMEM((stages, size, D), q.dtype, transforms=SWIZZLED),
            line_buffer(out_dtype),
            plgpu.SMEM((2, HALF), jnp.float32),
            plgpu.Barrier(num_barriers=2),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=2),
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(q, k, v, [getattr(data, name) for name in names])


def block_of(block, B: int, H: int, Q: int, ref: Data):
    """Return (sequence, head, tile of queries) of a block; long ones first: by the list's order, else the last queries first."""
    if ref.order is not None:
        work = ref.order[block]
        return lax.div(work, H * Q), lax.rem(lax.div(work, Q), H), lax.rem(work, Q)
    # the heads of a tile of queries run side by side and share what they read
    return lax.rem(lax.div(block, H), B), lax.rem(block, H), Q - 1 - lax.div(block, H * B)


def steps_of(ref: Data, mask: Mask, at, H: int, listed, q_lo, q_hi, kv_len, span, size: int):
    """Return the number of kernel tiles to visit, and `entry(step)`: a tile's number * 2 + its flag."""
    if listed is not None:
        return listed_tiles(ref, listed, at, H, size)
    if mask.positions:
        return lax.div(kv_len + size - 1, size), lambda step: step * 2
    walk = mask.walk(q_lo, q_hi, kv_len, size, span)

    def entry(step):
        tile = walk.tile(step)
        every = mask.every(q_lo, q_hi, tile * size, tile * size + size - 1, span)
        return tile * 2 + (jnp.where(every, FULL, 0) if not mask.segments else 0)

    return walk.steps, entry


def _start(code, size: int):
    return lax.div(code, 2) * size
