"""Attention by the kernels of `pallas_kernels`: which calls they can honour, and how a call becomes tiles and pages."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lcx.ops.attention import EMPTY, Partial, Source, used_length
from lcx.ops.masks import Mask, Near
from lcx.ops.visits import Visit

DECODE_ROWS = 128  # query rows of a KV head that fill one tile of a kernel
CORES = 132  # multiprocessors; a block of the kernel takes most of the shared memory of one
LISTED_ROWS = 8_192  # queries whose lists exist together; 64 tiles of 32 heads fill the device many times
MOST_LISTED = 2**26  # tiles of a list for one head; beyond, the list takes more memory than what it saves


def why_not(q, source: Source, mask: Mask | None) -> str | None:
    """Return why the kernels cannot serve a source, or None."""
    from pallas_kernels.lists import ROWS, SIZE

    T, D = q.shape[3:]
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"queries of {q.dtype}; the kernels take bfloat16 and float16"
    if D > 256:
        return f"head_dim={D}; the kernels take at most 256"
    if source.pages is not None and mask is None and T * q.shape[2] <= DECODE_ROWS:
        return None
    if not source.plain:
        return (
            "slots that are not keys and values in the model's own type are decoded by XLA, but for decode over pages"
        )
    if not _knows(mask):
        return "the mask is not a window with sinks, the only one that the kernels know"
    if -(-T // ROWS) * -(-source.pos.shape[-1] // SIZE) > MOST_LISTED:
        return f"{T:,} queries x {source.pos.shape[-1]:,} keys have more than {MOST_LISTED:,} tiles; read the prompt in chunks"
    return None


def _knows(mask: Mask | None) -> bool:
    return mask is None or isinstance(mask, Near)


def _kernel_mask(mask: Mask | None) -> Any:
    from pallas_kernels.mask import Mask as KernelMask

    if isinstance(mask, Near):
        return KernelMask(causal=True, positions=True, window=mask.window, sink=mask.sink)
    return KernelMask(causal=True, positions=True)


def attend(q, source: Source, q_pos, *, mask: Mask | None, scale: float) -> Partial:
    """Attention by the kernel over pages, or over the tiles that positions and window leave."""
    if source.pages is not None:
        return _paged(q, source, q_pos, scale=scale)
    from pallas_kernels.attend import attend as kernel
    from pallas_kernels.lists import from_mask

    S = source.pos.shape[-1]
    k, v = (x.astype(q.dtype) for x in source.tile(0, S))
    hidden = _kernel_mask(mask)
    shared: dict[str, Any] = {"scale": scale, "mask": hidden, "kv_pos": source.pos}
    T, G = q.shape[3], q.shape[2]
    if T * G <= DECODE_ROWS:
        return _split(q, k, v, q_pos, shared)
    blocks = from_mask(hidden, T, S, q_pos=q_pos, kv_pos=source.pos)
    # several such parts live until they are merged: 2,048 queries of 32 heads take 32 MiB each in float32
    return kernel(q, k, v, blocks=blocks, q_pos=q_pos, out_dtype=q.dtype, **shared)


def why_no_visit(q, source: Source, visit: Visit, mask: Mask | None) -> str | None:
    """Return why the kernels cannot serve a page list, or None."""
    from pallas_kernels.lists import ROWS, SIZE

    if q.dtype not in (jnp.bfloat16, jnp.float16) or q.shape[-1] > 256:
        return f"queries of {q.dtype}, head_dim={q.shape[-1]}; the kernels take bfloat16 and float16, at most 256"
    if visit.weigh is not None:
        return "the pattern weighs the logits of what it reads; XLA alone does that"
    if (visit.rows, visit.size) != (ROWS, SIZE):
        return f"lists of {visit.size} slots for {visit.rows} queries; the kernels take {SIZE} slots for {ROWS} queries"
    if not source.plain or not _knows(mask):
        return "slots in another type, or a mask that is not a window with sinks"
    return None


def attend_visits(q, source: Source, q_pos, visit: Visit, *, mask: Mask | None, scale: float):
    """Attention by the kernel over blocks of 128 slots for 128 queries: (Partial, overflow)."""
    from pallas_kernels.attend import attend as kernel
    from pallas_kernels.lists import ROWS, SIZE, from_blocks

    B, R, G, T, _ = q.shape
    visit.check(T)
    if visit.listing is not None:
        return _attend_listing(q, source, q_pos, visit, mask=mask, scale=scale)
    S = source.pos.shape[-1]
    Q, N = -(-T // ROWS), -(-S // SIZE)
    blocks = visit.blocks
    overflow = jnp.zeros((), jnp.int32)
    if blocks is None:
        index, count = visit.lists  # pyrefly: ignore
        listed = jnp.arange(index.shape[-1]) < count[..., None]
        b, r, g, n = (i[..., None] for i in jnp.ogrid[tuple(slice(x) for x in index.shape[:4])])
        # entries that mean nothing go to a block behind the last, which is dropped
        at = jnp.where(listed, index, N)
        blocks = jnp.zeros((*index.shape[:4], N), bool).at[b, r, g, n, at].set(True, mode="drop")
        overflow = jnp.sum(jnp.maximum(count - index.shape[-1], 0))
    elif visit.width < N:
        wanted = blocks.sum(-1, dtype=jnp.int32)
        overflow = jnp.sum(jnp.maximum(wanted - visit.width, 0))
    g = blocks.shape[2]
    pairs = {"q_pos": q_pos, "kv_pos": source.pos}
    kernel_mask = _kernel_mask(mask)
    blocks = from_blocks(blocks.reshape(B, R * g, Q, N), kernel_mask, T, S, width=visit.width, heads=R, **pairs)
    k, v = (x.astype(q.dtype) for x in source.tile(0, S))
    part = kernel(
        q, k, v, blocks=blocks, q_pos=q_pos, kv_pos=source.pos, mask=kernel_mask, scale=scale, out_dtype=q.dtype
    )
    return part, overflow


def _attend_listing(q, source: Source, q_pos, visit: Visit, **settings):
    """Attend lists that are worked out when they are read, some tiles of queries at a time: those of a long prompt never exist together."""
    T = q.shape[3]

    def rows(start, size: int):
        qt, pos = (lax.dynamic_slice_in_dim(x, start, size, axis) for x, axis in ((q, 3), (q_pos, 1)))
        at = jax.vmap(visit.at, out_axes=3)
        index, count = at(start // visit.rows + jnp.arange(-(-size // visit.rows)))
        lists = index[..., : visit.width], count
        return attend_visits(qt, source, pos, Visit(visit.size, visit.rows, lists=lists), **settings)

    if T <= LISTED_ROWS:
        return rows(0, T)

    def put(start, size, carry):
        part, overflow = rows(start, size)
        joined = (lax.dynamic_update_slice_in_dim(x, y, start, 3) for x, y in zip(carry[0], part, strict=True))
        return Partial(*joined), carry[1] + overflow

    carry = Partial(jnp.zeros_like(q), jnp.zeros(q.shape[:-1])), jnp.zeros((), jnp.int32)
    steps, rest = divmod(T, LISTED_ROWS)
    carry = lax.fori_loop(0, steps, lambda i, carry: put(i * LISTED_ROWS, LISTED_ROWS, carry), carry)
    return put(steps * LISTED_ROWS, rest, carry) if rest else carry


def _paged(q, source: Source, q_pos, *, scale: float) -> Partial:
    """The decode kernel; what is held in pages comes before the queries, so that each of them sees all of it."""
    from pallas_kernels.decode import decode

    B, K, G, T, D = q.shape
    n = source.pages.k.shape[0] // (B * K)
    table = jnp.arange(B * K * n, dtype=jnp.int32).reshape(B, K, n)
    length = used_length(source.pos, axis=-1)
    length = length[:, 0] if length.shape[1] == 1 else length
    out, lse = decode(q.reshape(B, K, G * T, 1, D), source.pages, table, length, scale=scale)
    real = (q_pos != EMPTY)[:, None, None]
    out, lse = out.reshape(q.shape), lse.reshape(q.shape[:-1])
    return Partial(jnp.where(real[..., None], out, 0.0), jnp.where(real, lse, -jnp.inf))


def _split(q, k, v, q_pos, shared) -> Partial:
    """Few queries: the group's rows share a tile, and the tiles of keys are dealt to several blocks whose parts are merged.

    Each part stands for a query head of the kernel's, [B,K,parts,rows,D], with its share of the list: rows of a tile that are not meant
    are neither read nor written.
    """
    from pallas_kernels.attend import attend as kernel
    from pallas_kernels.lists import SIZE, BlockList, from_mask

    B, K, G, T, D = q.shape
    S = k.shape[-1]
    most = -(-S // SIZE)
    parts = min(most, max(1, CORES // (B * K)))
    rows = G * T
    folded = jnp.broadcast_to(q.reshape(B, K, 1, rows, D), (B, K, parts, rows, D))
    pos = jnp.tile(q_pos, (1, G))
    listed = from_mask(shared["mask"], rows, S, q_pos=pos, kv_pos=shared["kv_pos"])
    # the share follows what is held, so that a cache that is nearly empty still fills the device
    width = math.ceil(most / parts)
    share = -(-listed.count // parts)  # [b,r,1]
    first = share[..., None] * jnp.arange(parts)[:, None] + jnp.arange(width)[None]  # [b,r,parts,width]
    pick = jnp.minimum(first, most - 1)

    def of_parts(x):
        """[b,r,1,most] -> [b,K * parts,1,width]"""
        x = jnp.take_along_axis(jnp.broadcast_to(x, (*x.shape[:2], parts, most)), pick, -1)
        return jnp.broadcast_to(x, (x.shape[0], K, parts, width)).reshape(x.shape[0], K * parts, 1, width)

    count = jnp.clip(listed.count - share * jnp.arange(parts), 0, share)  # [b,r,parts]
    count = jnp.broadcast_to(count, (count.shape[0], K, parts)).reshape(count.shape[0], K * parts, 1)
    blocks = BlockList(of_parts(listed.index), count, of_parts(listed.flags))
    part = kernel(folded, k, v, blocks=blocks, q_pos=pos, **shared)
    out, lse = part.out.reshape(B, K, parts, G, T, D), part.lse.reshape(B, K, parts, G, T)
    top = lse.max(2, keepdims=True)
    weight = jnp.exp(lse - jnp.where(jnp.isneginf(top), 0.0, top))
    total = weight.sum(2)
    some = total > 0
    safe = jnp.where(some, total, 1.0)
    merged = jnp.einsum("bkpgtd,bkpgt->bkgtd", out, weight) / safe[..., None]
    return Partial(merged, jnp.where(some, top[:, :, 0] + jnp.log(safe), -jnp.inf))
