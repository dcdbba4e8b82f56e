"""Gradients of attention for Hopper: dq over the tiles that the forward visits, dk and dv over the same tiles by key.

Both kernels compute the probabilities again from lse.  Warpgroups as in `attend`: two consumers of 64 rows, one producer.

    dq: 128 queries of a query head             dk, dv: 128 keys of a KV head

    keys ->   0     1     2     3               queries of head 0 -> 0     1     2  | of head 1 -> 0     1     2      (its G heads)
            +-----+-----+-----+-----+                            +-----+-----+-----+            +-----+-----+-----+
    q, do   | K V |     | K V | K V |  -> dq    k, v             |     |q do |q do |            |     |q do |q do |   -> dk, dv
            +-----+-----+-----+-----+                            +-----+-----+-----+            +-----+-----+-----+

    for each visited tile:                      for each visited tile, everything transposed:
        s  = q K;   dp = do V^T                     s  = K^T q^T;   dp = V do^T
        p  = exp2(s * scale * log2 e - lse)         p  = exp2(s * scale * log2 e - lse)
        ds = p * (dp - delta)                       ds = p * (dp - delta)
        dq = dq + ds K^T                            dv = dv + p do;    dk = dk + ds q

delta is the sum of out * dout over a row, less the gradient of lse.  The sum over a GQA group stays in float32 registers.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lcx.ops.attention import BIG, Partial
from pallas_kernels import inputs
from pallas_kernels.attend import block_of, forward, steps_of
from pallas_kernels.inputs import Data, longest_first, pad, predicate, with_list
from pallas_kernels.lists import FULL, ROWS, SIZE, BlockList, transpose
from pallas_kernels.mask import Mask
from pallas_kernels.registers import (
    HALF,
    HIDDEN,
    LOG2E,
    PRODUCER,
    empty,
    in_loop,
    rows_of,
    swizzled,
    write_rows,
)
from pallas_kernels.tables import ATTEND_GRAD, AttendGradTile


def attend_with_gradient(
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
    tile: AttendGradTile | None = None,
) -> Partial:
    """Compute `attend`, differentiable in q, k and v, with the same arguments and results.

    Gradients have the type of q.  Keys and values at hidden slots must be finite in visited tiles: either would turn up as 0 * NaN.
    `tile`: sizes of the backward kernels other than those of the table.
    """
    out_dtype = jnp.dtype(jnp.float32 if out_dtype is None else out_dtype)
    inputs.check_arrays(q, k, v, scale, out_dtype, max(ATTEND_GRAD))
    if q.size == 0 or k.size == 0:
        return Partial(jnp.zeros(q.shape, out_dtype), jnp.full(q.shape[:-1], -jnp.inf))
    given = dict(q_offset=q_offset, kv_len=kv_len, q_pos=q_pos, kv_pos=kv_pos, segments=segments, spans=spans)
    data = inputs.prepare(mask, q.shape, k.shape[-1], **given)
    return _attend(mask, scale, out_dtype, tile, q, k, v, data, blocks)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _attend(mask, scale, out_dtype, tile, q, k, v, data, blocks):
    return forward(q, k, v, data, blocks, mask=mask, scale=scale, out_dtype=out_dtype)


def _attend_fwd(mask, scale, out_dtype, tile, q, k, v, data, blocks):
    part = _attend(mask, scale, out_dtype, tile, q, k, v, data, blocks)
    return part, (q, k, v, data, blocks, part)


def _attend_bwd(mask, scale, out_dtype, tile, saved, grad: Partial):
    q, k, v, data, blocks, part = saved
    return *backward(q, k, v, data, blocks, part, grad, mask=mask, scale=scale, tile=tile), None, None


_attend.defvjp(_attend_fwd, _attend_bwd)


def backward(q, k, v, data: Data, blocks, part: Partial, grad: Partial, *, mask, scale, tile=None):
    """Return (dq, dk, dv), each with the shape and type of its argument."""
    B, K, G, T, D = q.shape
    S, H = k.shape[-1], K * G
    head_dim = next(d for d in ATTEND_GRAD if d >= D)
    tile = tile or ATTEND_GRAD[head_dim]
    delta = (part.out.astype(jnp.float32) * grad.out.astype(jnp.float32)).sum(-1) - grad.lse
    # a row without keys, or behind the last one, gets probabilities exp2(... - BIG) = 0
    lse = jnp.where(jnp.isneginf(part.lse), BIG, part.lse * LOG2E)
    lse = pad(lse.reshape(B, H, T), 2, ROWS, BIG)
    delta = pad(jnp.where(jnp.isneginf(part.lse), 0.0, delta).reshape(B, H, T), 2, ROWS)
    do = pad(pad(grad.out.astype(q.dtype).reshape(B, H, T, D), 3, head_dim), 2, 8)
    q, v = (pad(pad(x, 3, head_dim), 2, 8) for x in (q.reshape(B, H, T, D), v))
    k = pad(pad(k, 2, head_dim), 3, 64)
    arrays, static = (q, k, v, do, lse, delta), (mask, scale, T, tile)

    by_query, by_key, shape, back_shape = data, data, None, None
    if blocks is not None:
        shape = blocks.index.shape
        by_query = with_list(data, blocks)._replace(order=longest_first(blocks, B, H))
        back = transpose(blocks, -(-S // SIZE))
        back_shape = back.index.shape
        by_key = with_list(data, back)._replace(order=longest_first(_by_kv_head(back, K), B, K))
    dq = _dq(*arrays, by_query, shape, *static)
    wants = [("k", "v")] if tile.together else [("k",), ("v",)]
    dk, dv = (x for want in wants for x in _dkv(*arrays, by_key, back_shape, S, *static, want))
    dk, dv = dk[:, :, :S, :D], dv[:, :, :S, :D]
    return dq[:, :, :T, :D].reshape(B, K, G, T, D), dk.swapaxes(2, 3), dv


def _by_kv_head(blocks: BlockList, K: int) -> BlockList:
    """Return the same list with the counts of a GQA group summed."""
    b, h, N = blocks.count.shape
    count = blocks.count.reshape(b, K, h // K, N).sum(2) if h > K else blocks.count
    return BlockList(blocks.index, count, blocks.flags)


def _dq(q, k, v, do, lse, delta, data: Data, listed, mask: Mask, scale, T, tile: AttendGradTile):
    """Return dq [B,H,T or more,D]."""
    B, H, _, D = q.shape
    K, Q = k.shape[1], -(-T // ROWS)
    size, stages = tile.size, tile.dq_stages
    factor = scale * LOG2E
    names = data.names()
    # a product sums whole widths of the swizzle, of its keys here; both operands are swizzled alike
    operand = swizzled(size)

    def body(q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, others, dq_ref, *scratch):
        q_smem, do_smem, k_smem, v_smem, q_ready, k_ready, v_ready, k_free, v_free = scratch
        ref = Data(**dict(zip(names, others, strict=True)))
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
            plgpu.set_max_registers(tile.producer_registers, action="decrease")

            def fill(step, code):
                slot = lax.rem(step, stages)
                keys = pl.ds(lax.div(code, 2) * size, size)
                following = entry(step + 1)
                pl.when(step >= stages)(lambda: plgpu.barrier_wait(k_free.at[slot]))
                plgpu.copy_gmem_to_smem(k_ref.at[b, kv_head, :, keys], k_smem.at[slot], k_ready.at[slot])
                pl.when(step >= stages)(lambda: plgpu.barrier_wait(v_free.at[slot]))
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
            rows, by_row = pl.ds(first, HALF), plgpu.Layout.WGMMA.reduce(1)
            plgpu.copy_gmem_to_smem(q_ref.at[b, h, rows], q_smem.at[wg], q_ready.at[wg])
            plgpu.copy_gmem_to_smem(do_ref.at[b, h, rows], do_smem.at[wg], q_ready.at[wg])
            row_lse = plgpu.load(lse_ref.at[b, h, rows], layout=by_row, optimized=False)
            row_delta = plgpu.load(delta_ref.at[b, h, rows], layout=by_row, optimized=False)
            hide = predicate(ref, mask, b, kv_head, kv_len, span, rows=HALF, keys=size)
            plgpu.barrier_wait(q_ready.at[wg])

            def one_tile(step, carry):
                dq, code = carry
                slot = lax.rem(step, stages)
                half = in_loop(wg)
                following = entry(step + 1)
                plgpu.barrier_wait(k_ready.at[slot])

                def multiply(s, dp):
                    plgpu.wgmma(s, q_smem.at[half], k_smem.at[slot])
                    plgpu.barrier_wait(v_ready.at[slot])
                    plgpu.wgmma(dp, do_smem.at[half], v_smem.at[slot].transpose((1, 0)))
                    return s[...], dp[...]

                tile_of = plgpu.ACC((HALF, size), jnp.float32)
                s, dp = pl.run_scoped(multiply, tile_of, tile_of)
                plgpu.barrier_arrive(v_free.at[slot])
                start = lax.div(code, 2) * size
                every = lax.rem(code, 2) == FULL
                every = every & (start + size <= kv_len) if ref.kv_pos is None else every
                s = lax.cond(every, lambda s: s, lambda s: hide(s, first, first_pos, start, HIDDEN / factor), s)
                p = jnp.exp2(s * factor - rows_of(row_lse, s.shape, 0))
                ds = p * (dp - rows_of(row_delta, s.shape, 0))
                ds = ds.astype(q.dtype)
                multiply_ds = lambda dq: plgpu.wgmma(dq, ds, k_smem.at[slot].transpose((1, 0)))
                dq = pl.run_state(multiply_ds)(plgpu.ACC.init(dq))
                plgpu.barrier_arrive(k_free.at[slot])
                return dq, following

            dq, _ = lax.fori_loop(0, steps, one_tile, (empty(HALF, D), entry(0)))
            # through the place of do, which no product reads any more
            write_rows(dq * scale, do_smem.at[wg], dq_ref.at[b, h, rows])
            plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid=(B * H * Q,),
        grid_names=("block",),
        num_threads=3,
        thread_name="wg",
        scratch_types=(
            plgpu.SMEM((2, HALF, D), q.dtype, transforms=operand),
            plgpu.SMEM((2, HALF, D), q.dtype, transforms=operand),
            plgpu.SMEM((stages, D, size), q.dtype, transforms=operand),
            plgpu.SMEM((stages, size, D), q.dtype, transforms=operand),
            plgpu.Barrier(num_arrivals=2, num_barriers=2),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(q, k, v, do, lse, delta, [getattr(data, name) for name in names])


def _dkv(q, k, v, do, lse, delta, data: Data, listed, S, mask: Mask, scale, T, tile: AttendGradTile, want):
    """Return [dk] or [dv] or both gradients, [B,K,S or more,D]; `listed`: shape of the list by key."""
    B, H, _, D = q.shape
    K, N = k.shape[1], -(-S // SIZE)
    G = H // K
    rows, stages = tile.rows, tile.dkv_stages
    factor = scale * LOG2E
    names = data.names()
    # a product sums whole widths of the swizzle, of its rows here; both operands are swizzled alike
    operand = swizzled(rows)

    def body(q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, others, *refs):
        out_refs, scratch = refs[: len(want)], refs[len(want) :]
        k_smem, v_smem, q_smem, do_smem, lse_smem, delta_smem, *barriers = scratch
        kv_ready, q_ready, do_ready, q_free, do_free = barriers
        ref = Data(**dict(zip(names, others, strict=True)))
        wg = lax.axis_index("wg")
        b, kv_head, n = inputs.key_block_of(lax.axis_index("block"), B, K, N, ref)
        q_start, kv_len = ref.lengths[0, b], ref.lengths[1, b]
        span = None if ref.spans is None else ref.spans[b, kv_head]
        start = n * SIZE
        walk = partial(inputs.queries_of, ref, mask, listed, (b, kv_head, n), H, q_start, T, kv_len, span, rows)

        def over_heads(one_tile, carry):
            """Run `one_tile(h, count of tiles before, code, carry)` for the tiles of all heads; return (number of tiles, carry)."""

            def one_head(g, state):
                before, carry = state
                h = kv_head * G + g
                steps, entry = walk(h)

                def one(step, state):
                    carry, code = state
                    following = entry(step + 1)
                    return one_tile(h, before + step, code, carry), following

                carry, _ = lax.fori_loop(0, steps, one, (carry, entry(0)))
                return before + steps, carry

            return lax.fori_loop(0, G, one_head, (jnp.int32(0), carry))

        @pl.when(wg == PRODUCER)
        def _():
            plgpu.set_max_registers(tile.producer_registers, action="decrease")

            def fill(h, step, code, carry):
                slot = lax.rem(step, stages)
                at = pl.ds(lax.div(code, 2) * rows, rows)
                pl.when(step >= stages)(lambda: plgpu.barrier_wait(q_free.at[slot]))
                plgpu.copy_gmem_to_smem(q_ref.at[b, h, at], q_smem.at[slot], q_ready.at[slot])
                plgpu.copy_gmem_to_smem(lse_ref.at[b, h, at], lse_smem.at[slot], q_ready.at[slot])
                pl.when(step >= stages)(lambda: plgpu.barrier_wait(do_free.at[slot]))
                plgpu.copy_gmem_to_smem(do_ref.at[b, h, at], do_smem.at[slot], do_ready.at[slot])
                plgpu.copy_gmem_to_smem(delta_ref.at[b, h, at], delta_smem.at[slot], do_ready.at[slot])
                return carry

            total, _ = over_heads(fill, jnp.int32(0))

            @pl.loop(jnp.maximum(total - stages, 0), total)
            def _drain(step):
                plgpu.barrier_wait(q_free.at[lax.rem(step, stages)])
                plgpu.barrier_wait(do_free.at[lax.rem(step, stages)])

        @pl.when(wg != PRODUCER)
        def _():
            plgpu.set_max_registers(tile.registers, action="increase")
            mine = start + wg * HALF
            keys = pl.ds(mine, HALF)
            plgpu.copy_gmem_to_smem(k_ref.at[b, kv_head, :, keys], k_smem.at[wg], kv_ready.at[wg])
            if "k" in want:
                plgpu.copy_gmem_to_smem(v_ref.at[b, kv_head, keys], v_smem.at[wg], kv_ready.at[wg])
            hide = predicate(ref, mask, b, kv_head, kv_len, span, rows=rows, keys=HALF, rows_axis=1)
            plgpu.barrier_wait(kv_ready.at[wg])
            by_column = plgpu.Layout.WGMMA.reduce(0)
            tile_of = plgpu.ACC((HALF, rows), jnp.float32)

            def one_tile(h, step, code, sums):
                slot = lax.rem(step, stages)
                half = in_loop(wg)
                first = lax.div(code, 2) * rows
                plgpu.barrier_wait(q_ready.at[slot])

                def multiply_k(s):
                    plgpu.wgmma(s, k_smem.at[half].transpose((1, 0)), q_smem.at[slot].transpose((1, 0)))
                    return s[...]

                s = pl.run_scoped(multiply_k, tile_of)
                every = lax.rem(code, 2) == FULL
                every = every & (start + SIZE <= kv_len) if ref.kv_pos is None else every
                s = lax.cond(every, lambda s: s, lambda s: hide(s, first, q_start + first, mine, HIDDEN / factor), s)
                p = jnp.exp2(s * factor - rows_of(plgpu.load(lse_smem.at[slot], layout=by_column), s.shape, 1))
                plgpu.barrier_wait(do_ready.at[slot])
                sums = dict(sums)
                if "v" in want:
                    p16 = p.astype(q.dtype)
                    sums["v"] = pl.run_state(lambda dv: plgpu.wgmma(dv, p16, do_smem.at[slot]))(
                        plgpu.ACC.init(sums["v"])
                    )
                if "k" in want:

                    def multiply_v(dp):
                        plgpu.wgmma(dp, v_smem.at[half], do_smem.at[slot].transpose((1, 0)))
                        return dp[...]

                    # ahead of the product, so that one array waits for it and not three
                    p = lax.optimization_barrier(p)
                    dp = pl.run_scoped(multiply_v, tile_of)
                    ds = p * (dp - rows_of(plgpu.load(delta_smem.at[slot], layout=by_column), s.shape, 1))
                    ds = ds.astype(q.dtype)
                    sums["k"] = pl.run_state(lambda dk: plgpu.wgmma(dk, ds, q_smem.at[slot]))(plgpu.ACC.init(sums["k"]))
                # lse and delta were read into registers
                plgpu.commit_smem()
                plgpu.barrier_arrive(q_free.at[slot])
                plgpu.barrier_arrive(do_free.at[slot])
                return sums

            _, sums = over_heads(one_tile, {name: empty(HALF, D) for name in want})
            for name, out_ref in zip(want, out_refs, strict=True):
                total = sums[name] * scale if name == "k" else sums[name]
                write_rows(total, v_smem.at[wg], out_ref.at[b, kv_head, keys])
            plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct(v.shape, q.dtype) for _ in want],
        grid=(B * K * N,),
        grid_names=("block",),
        num_threads=3,
        thread_name="wg",
        scratch_types=(
            plgpu.SMEM((2, D, HALF), q.dtype, transforms=operand),
            # read only for dk; the results leave through it
            plgpu.SMEM((2, HALF, D if "k" in want else 64), q.dtype, transforms=operand),
            plgpu.SMEM((stages, rows, D), q.dtype, transforms=operand),
            plgpu.SMEM((stages, rows, D), q.dtype, transforms=operand),
            plgpu.SMEM((stages, rows), jnp.float32),
            plgpu.SMEM((stages, rows), jnp.float32),
            plgpu.Barrier(num_arrivals=2 if "k" in want else 1, num_barriers=2),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(q, k, v, do, lse, delta, [getattr(data, name) for name in names])
