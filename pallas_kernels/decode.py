"""Decode attention for Hopper: a few queries of each KV head over its pages, in pieces that fill the GPU.

A piece is a run of pages of one (sequence, KV head), and one block computes it: one thread feeds a ring of `stages` slots of `pages` pages
each, `consumers` warpgroups take the slots in turn.  Each has sums of its own, and XLA merges those of all pieces of a row.

    pages of row 0: [ piece 0 | piece 1 | piece 2 ]      producer:    K,V,scales of pages 0 1 | 2 3 | 4 5 | 6 7 ...   one TMA each, by table
    pages of row 1: [ piece 3 ]                          consumer 0:                      0 1       | 4 5       |
                                                         consumer 1:                            2 3       | 6 7 |

Keys and values are the operand A (64 rows), queries and probabilities the operand B of N = 8, 16 ... 32 columns ("swap-AB"): the G heads
of a KV head times T tokens fill N, so the tensor core does not multiply padding.  Everything is transposed:

    for each page of the slot:
        q'  = q * k_scale                            K by channel: the scale is folded into q [N,D], in shared memory
        s   = K q'^T + zero q^T                      [64,N]; K's codes go from shared memory through registers to wgmma, see payloads.py
    m, p    = running maximum, exp2(s - m)           over the slot's pages; the four warps agree on m once a slot
    acc     = acc * exp2(m_old - m) + V^T (p * v_scale)    [D,N]; p goes through shared memory, V's codes through registers
    l, z   += p, p * v_zero                          by thread, summed over the tokens once, at the end
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lcx.errors import UserError
from lcx.ops.attention import Partial
from pallas_kernels.payloads import PAGE, Pages, Payload, planes
from pallas_kernels.pieces import Plan, merge_pieces, plan_pieces
from pallas_kernels.registers import HIDDEN, LOG2E, empty, rows_of
from pallas_kernels.tables import DecodeTile, decode_rows, decode_tile

QUERIES = 8  # T at most
COLUMN = plgpu.Layout.WGMMA.reduce(0)  # one value for each query
ROW = plgpu.Layout.WGMMA.reduce(1)  # one value for each token or channel


def decode(
    q: jax.Array,
    pages: Pages,
    table: jax.Array,
    length: jax.Array,
    *,
    scale: float,
    splits: int | None = None,
    tile: DecodeTile | None = None,
) -> Partial:
    """Compute attention of the newest T tokens over the pages of each KV head.

    Query t sees the first `length - T + t + 1` tokens of its row: the T tokens are already written.  What lies behind `length` in a page,
    and table entries behind the last page, may be anything; entries in use are page numbers of the pool and are not checked.

    Args:
      q: [B,K,G,T,D], bfloat16 or float16; T at most 8.  Groups of more than 32 rows (G * T; 16 for some payloads at head_dim 256) read
        the pages once for each part.
      pages: the pool; see `payloads.Pages`.
      table: int32 [B,K,n], pages of each KV head in the order of its tokens.
      length: int32 [B] or [B,K], tokens of each row, at most 64 * n; longer ones count as 64 * n.  One for all rows ([1]) needs fewer
        small programs around the kernel.
      scale: factor on the logits, positive.
      splits: pieces of each row; None: as many as fill the GPU, long rows more.
      tile: sizes other than those of the table, to measure.

    Returns:
      Partial: out float32 [B,K,G,T,D], lse float32 [B,K,G,T].  A query that sees no token has out 0 and lse -inf.

    Raises:
      UserError: a shape, type or combination that is not served.
    """
    _check(q, pages, table, length, scale, splits)
    B, K, G, T, D = q.shape
    if q.size == 0 or table.size == 0:
        return Partial(jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:-1], -jnp.inf))
    # a part of the group reads the pages by itself where all of it has more rows than fit the registers
    entry = pages.payload.kind, pages.head_dim
    parts = next(p for p in range(1, G + 1) if G % p == 0 and G // p * T <= decode_rows(*entry))
    if parts > 1:
        table, length = (jnp.repeat(x, parts, 1) if x.ndim > 1 else x for x in (table, length))
        q = q.reshape(B, K * parts, G // parts, T, D)
        out, lse = decode(q, pages, table, length, scale=scale, splits=splits, tile=tile)
        return Partial(out.reshape(B, K, G, T, D), lse.reshape(B, K, G, T))
    R, n, N = B * K, table.shape[2], -(-G * T // 8) * 8
    tile = tile or decode_tile(*entry, N)
    length = jnp.clip(length, 0, n * PAGE).astype(jnp.int32)
    if length.ndim == 2 or B > 1:
        length = jnp.broadcast_to(length if length.ndim == 2 else length[:, None], (B, K)).reshape(R)
    rows = q.reshape(R, G * T, D).astype(pages.payload.dtype)
    rows = jnp.pad(rows, ((0, 0), (0, N - G * T), (0, pages.head_dim - D)))
    plan = plan_pieces(length, R, n, splits, tile)
    out, lse = _call(rows, pages, table.reshape(R, n), plan, scale, T, tile)
    # padding is cut before the merge: another program would cut the result
    out, lse = merge_pieces(out[:, :, :D, : G * T], lse[:, :, : G * T], plan, R)
    out = rearrange(out, "(B K) D (G T) -> B K G T D", K=K, T=T)
    return Partial(out, rearrange(lse, "(B K) (G T) -> B K G T", K=K, T=T))


def _check(q, pages, table, length, scale, splits):
    pages.check()
    if q.ndim != 5 or q.dtype not in (jnp.bfloat16, jnp.float16):
        raise UserError(f"q of {q.dtype}{list(q.shape)}: allowed is [B,K,G,T,D] in bfloat16 or float16")
    B, K, G, T, D = q.shape
    if T > QUERIES:
        raise UserError(f"q of {q.shape}: allowed are T at most {QUERIES}; attend takes more queries")
    if D > pages.head_dim:
        raise UserError(f"q of head_dim {D}: allowed are at most {pages.head_dim}, that of the pages")
    if table.ndim != 3 or table.shape[:2] != (B, K) or table.dtype != jnp.int32:
        raise UserError(f"table of {table.dtype}{list(table.shape)}: allowed is int32 [{B},{K},n]")
    if length.shape not in ((B,), (B, K)) or not jnp.issubdtype(length.dtype, jnp.integer):
        raise UserError(f"length of {length.dtype}{list(length.shape)}: allowed are integers [{B}] or [{B},{K}]")
    if not scale > 0:
        raise UserError(f"scale={scale}: allowed are numbers above 0")
    if splits is not None and splits < 1:
        raise UserError(f"splits={splits}: allowed are 1 and more, or None")


def _operand(columns: int):
    """Return the transforms of shared memory that wgmma reads in groups of `columns` 16-bit values."""
    return (plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(2 * columns))


def _call(q, pages: Pages, table, plan: Plan, scale, T, tile: DecodeTile):
    """Call the kernel: q [R,N,D] -> (out float32 [I,W,D,N], lse float32 [I,W,N]) of each piece and consumer."""
    _, N, D = q.shape
    payload, I = pages.payload, plan.piece.shape[1]  # noqa: E741
    P, W, stages = tile.pages, tile.consumers, tile.stages
    columns, rows = payload.columns(D), payload.rows(D)
    halves = range(D // 64)
    factor = scale * LOG2E
    folded = bool(rows) and payload.by == "channel"
    # sums over tokens: by thread until the end, or each slot where that would take too many registers
    late = N <= 16

    def token_sum(x):
        return x if late else x.sum(axis=0)

    def spread(x):
        """Spread one value a query over 64 rows."""
        return rows_of(x, (64, N), 1)

    def body(q_ref, k_ref, v_ref, scales_ref, table_ref, piece_ref, out_ref, lse_ref, *scratch):
        q_smem, k_smem, v_smem, scales_smem, b_smem, p_smem, out_smem, lse_smem, q_ready, ready, free = scratch
        wg, i = lax.axis_index("wg"), lax.axis_index("piece")
        row, first, stop = piece_ref[0, i], piece_ref[1, i], piece_ref[2, i]
        steps = lax.div(stop - first + P - 1, P)

        @pl.when(wg == W)
        def _():
            plgpu.set_max_registers(24, action="decrease")
            plgpu.copy_gmem_to_smem(q_ref.at[row], q_smem, q_ready)
            if rows and not folded:
                plgpu.copy_gmem_to_smem(q_ref.at[row], b_smem, q_ready)

            def numbers(step):
                # behind the last page of the piece that page is read again, hidden
                last = jnp.maximum(stop - 1, 0)
                return [table_ref[row, jnp.minimum(first + step * P + j, last)] for j in range(P)]

            def fill(step, page):
                slot = lax.rem(step, stages)
                # loaded before the wait: the table lies in global memory
                following = numbers(step + 1)

                @pl.when(step >= stages)
                def _():
                    plgpu.barrier_wait(free.at[slot])

                for j in range(P):
                    plgpu.copy_gmem_to_smem(k_ref.at[page[j]], k_smem.at[slot, j], ready.at[slot])
                    plgpu.copy_gmem_to_smem(v_ref.at[page[j]], v_smem.at[slot, j], ready.at[slot])
                    if rows:
                        plgpu.copy_gmem_to_smem(scales_ref.at[page[j]], scales_smem.at[slot, j], ready.at[slot])
                return following

            lax.fori_loop(0, steps, fill, numbers(0))

            @pl.loop(jnp.maximum(steps - stages, 0), steps)
            def _drain(step):
                plgpu.barrier_wait(free.at[lax.rem(step, stages)])

        @pl.when(wg != W)
        def _():
            plgpu.set_max_registers(tile.registers, action="increase")
            plgpu.barrier_wait(q_ready)
            tokens = piece_ref[3, i]
            q_sum = None
            if rows and not folded:
                q_sum = plgpu.load(q_smem.T, layout=plgpu.Layout.WGMMA).astype(jnp.float32).sum(axis=0)

            def line(slot, j, name, layout, part=0):
                """Load 64 scales or zero points."""
                return plgpu.load(scales_smem.at[slot, j, rows[name].start + part], layout=layout)

            def fold(slot, j):
                """Write q * k_scale to shared memory."""
                for h in halves:
                    channels = slice(64 * h, 64 * h + 64)
                    block = plgpu.load(q_smem.at[:, channels].T, layout=plgpu.Layout.WGMMA).astype(jnp.float32)
                    by = line(slot, j, "k_scale", ROW, h).astype(jnp.float32)
                    b_smem.at[wg, j, :, channels].T[...] = (block * rows_of(by, block.shape, 0)).astype(payload.dtype)

            def multiply(accs, values, b, by_half: bool):
                """Add values b^T to each of accs [64,N]; `by_half`: rows of the operand are channels and belong to accs in turn."""
                per_half = (64 if by_half else D) // columns
                for u, a in enumerate(_operands(values, payload)):
                    h, at = divmod(u, per_half)
                    plgpu.wgmma(accs[h], a, b.at[:, at * columns : at * columns + columns].T)

            def logits(slot, j):
                """Return the logits s [64,N] of one page, before `factor`."""
                b = q_smem if not rows else b_smem.at[wg, j] if folded else b_smem

                values = _load(k_smem.at[slot, j], payload, D, by_half=False)

                def product(s):
                    multiply([s], values, b, by_half=False)
                    if not payload.exact:
                        plgpu.wgmma_wait(0)
                    if folded and "k_zero" in rows:
                        # one product more is cheaper than a sum over channels that all warps must agree on
                        for h in halves:
                            zero = rows_of(line(slot, j, "k_zero", COLUMN, h), (64, 64), 1)
                            plgpu.wgmma(s, zero, q_smem.at[:, 64 * h : 64 * h + 64].T)
                    return s[...]

                s = pl.run_scoped(product, plgpu.ACC((64, N), jnp.float32))
                if rows and not folded:
                    s = s * rows_of(line(slot, j, "k_scale", ROW).astype(jnp.float32), s.shape, 0)
                    if "k_zero" in rows:
                        zero = line(slot, j, "k_zero", ROW).astype(jnp.float32)
                        s = s + rows_of(zero, s.shape, 0) * rows_of(q_sum, s.shape, 1)
                return s

            def one_slot(turn, carry):
                accs, m, sums = carry
                step = turn * W + wg
                slot = lax.rem(step, stages)
                plgpu.barrier_wait(ready.at[slot])
                start = [(first + step * P + j) * PAGE for j in range(P)]
                if not payload.codes:

                    @pl.when(start[-1] + PAGE > tokens)
                    def _():
                        for j in range(P):
                            _clear(v_smem.at[slot, j], payload, tokens - start[j])
                        plgpu.commit_smem()

                if folded:
                    for j in range(P):
                        fold(slot, j)
                    plgpu.commit_smem()
                token = plgpu.broadcasted_iota(jnp.int32, (64, N), 0, layout=plgpu.Layout.WGMMA)
                query = plgpu.broadcasted_iota(jnp.int32, (64, N), 1, layout=plgpu.Layout.WGMMA)
                limit = jnp.minimum(tokens - T + 1 + lax.rem(query, T), stop * PAGE)
                seen = [token + start[j] < limit for j in range(P)]

                raw = [logits(slot, j) for j in range(P)]
                s = [jnp.where(see, x, HIDDEN / factor) for see, x in zip(seen, raw, strict=True)]
                high = s[0]
                for x in s[1:]:
                    high = jnp.maximum(high, x)
                m_new = jnp.maximum(m, high.max(axis=0) * factor)
                # a query that has seen nothing takes 0 for its maximum, so that its hidden keys are exp2(HIDDEN) = 0
                top = jnp.where(m_new < HIDDEN / 2, 0.0, m_new)
                keep = jnp.exp2(m - top)
                sums = [x * (spread(keep) if late else keep) for x in sums]
                for j in range(P):
                    p = jnp.exp2(s[j] * factor - spread(top))
                    sums[0] = sums[0] + token_sum(p)
                    if rows:
                        if "v_zero" in rows:
                            zero = rows_of(line(slot, j, "v_zero", ROW).astype(jnp.float32), p.shape, 0)
                            sums[1] = sums[1] + token_sum(jnp.where(seen[j], p * zero, 0.0))
                        by = rows_of(line(slot, j, "v_scale", ROW).astype(jnp.float32), p.shape, 0)
                        # behind the last token the scale may be nan
                        p = jnp.where(seen[j], p * by, 0.0)
                    p_smem.at[wg, j].T[...] = p.astype(payload.dtype)

                # read before the commit, after which nothing of the slot goes through registers
                def values(j):
                    return _load(v_smem.at[slot, j], payload, D, by_half=True)

                loaded = None if payload.exact else [values(j) for j in range(P)]
                plgpu.commit_smem()

                def product(accs):
                    for j in range(P):
                        # run_state cannot close over a reference's indices
                        multiply(accs, loaded[j] if loaded else values(j), p_smem.at[wg, j], by_half=True)
                        if not payload.exact:
                            # operands in registers stay there until wgmma has read them
                            plgpu.wgmma_wait(0)

                accs = pl.run_state(product)(tuple(plgpu.ACC.init(acc * spread(keep)) for acc in accs))
                plgpu.barrier_arrive(free.at[slot])
                return accs, m_new, sums

            turns = lax.div(steps - wg + W - 1, W)
            none = empty(64, N) if late else plgpu.layout_cast(jnp.zeros((N,), jnp.float32), COLUMN)
            carry = (
                tuple(empty(64, N) for _ in halves),
                plgpu.layout_cast(jnp.full((N,), HIDDEN, jnp.float32), COLUMN),
                # sums of p, and of p * v_zero
                [none, none] if "v_zero" in rows else [none],
            )
            accs, m, sums = lax.fori_loop(0, turns, one_slot, carry)
            sums = [x.sum(axis=0) if late else x for x in sums]
            some = sums[0] > 0
            # a poisoned sum is not above 0 either, and must stay
            poisoned = sums[0] != sums[0]
            l = jnp.where(some | poisoned, sums[0], 1.0)
            lse_smem[wg] = jnp.where(some | poisoned, m / LOG2E + jnp.log(l), -jnp.inf)
            for h in halves:
                acc = accs[h] + spread(sums[1]) if "v_zero" in rows else accs[h]
                # the copy before this one has read the buffer
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                out_smem[wg] = acc * spread(1 / l)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out_smem.at[wg], out_ref.at[i, wg, 64 * h : 64 * h + 64])
            plgpu.copy_smem_to_gmem(lse_smem.at[wg], lse_ref.at[i, wg])
            plgpu.wait_smem_to_gmem(0)

    operand, values = _operand(columns), _stored(payload, D)
    count = sum(map(len, rows.values()))
    return plgpu.kernel(
        body,
        out_type=(jax.ShapeDtypeStruct((I, W, D, N), jnp.float32), jax.ShapeDtypeStruct((I, W, N), jnp.float32)),
        grid=(I,),
        grid_names=("piece",),
        num_threads=W + 1,
        thread_name="wg",
        scratch_types=(
            plgpu.SMEM((N, D), q.dtype, transforms=_operand(64)),
            plgpu.SMEM((stages, P, *payload.k_shape(D)), pages.k.dtype, transforms=values),
            plgpu.SMEM((stages, P, *payload.v_shape(D)), pages.v.dtype, transforms=values),
            plgpu.SMEM((stages, P, count, 64), jnp.float16) if rows else None,
            plgpu.SMEM((W, P, N, D) if folded else (N, D), q.dtype, transforms=operand) if rows else None,
            plgpu.SMEM((W, P, N, 64), q.dtype, transforms=operand),
            plgpu.SMEM((W, 64, N), jnp.float32),
            plgpu.SMEM((W, N), jnp.float32),
            plgpu.Barrier(num_arrivals=2 if rows and not folded else 1),
            plgpu.Barrier(num_arrivals=P * (3 if rows else 2), num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(q, pages.k, pages.v, pages.scales, table, plan.piece)


def _stored(payload: Payload, head_dim: int):
    """Return the transforms of a page's values in shared memory."""
    width = payload.width(head_dim)
    size = width * (1 if payload.kind == "fp8" else 2)
    tiled = (plgpu.TilingTransform((8, width)),)
    # rows of 16 bytes cannot be swizzled
    return tiled + ((plgpu.SwizzleTransform(size),) if size > 16 else ())


def _load(ref, payload: Payload, head_dim: int, by_half: bool):
    """Load a page's values in blocks of [64, width], or of words: channels of K, or (`by_half`) 64 channels of V and their tokens.

    In registers, as stored; exact ones stay in shared memory, where wgmma reads them.
    """
    width = payload.width(head_dim)
    if payload.codes:
        blocks = [ref.at[:, start : start + width] for start in range(0, ref.shape[1], width)]
    elif by_half:
        blocks = [ref.at[64 * h : 64 * h + 64] for h in range(head_dim // 64)]
    else:
        blocks = [ref.at[:, 64 * h : 64 * h + 64] for h in range(head_dim // 64)]
    return blocks if payload.exact else [plgpu.load(block, layout=plgpu.Layout.WGMMA) for block in blocks]


def _operands(blocks, payload: Payload):
    """Yield the blocks of `_load` as operands A of wgmma."""
    for block in blocks:
        if payload.codes:
            made = list(planes(block, payload.bits))
            # a plane of 8 columns is half an operand
            narrow = made[0].shape[1] < 16
            yield from [jnp.concatenate(made[u : u + 2], 1) for u in range(0, len(made), 2)] if narrow else made
        else:
            yield block if payload.exact else block.astype(payload.dtype)


def _clear(v_ref, payload: Payload, tokens):
    """Zero the tokens of a page of values [D,64] from `tokens` on, which may be nan."""
    for h in range(0, v_ref.shape[0], 64):
        block = v_ref.at[h : h + 64]
        token = plgpu.broadcasted_iota(jnp.int32, (64, PAGE), 1, layout=plgpu.Layout.WGMMA)
        # 8-bit types are not selected
        values = plgpu.load(block, layout=plgpu.Layout.WGMMA).astype(payload.dtype)
        block[...] = jnp.where(token < tokens, values, jnp.zeros_like(values)).astype(block.dtype)
