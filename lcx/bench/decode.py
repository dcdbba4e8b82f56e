"""Decode over pages: arguments at random, one program of several calls, and a plain float32 reference of dequantised pages."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from lcx.bench.cases import Case
from lcx.ops.attention import Partial
from pallas_kernels.decode import decode
from pallas_kernels.payloads import FLOATS, PAGE, Pages, Payload, pack_pages

BEYOND = 256e6  # bytes that a program reads at least: more than an L2 cache holds, so that pages come from memory
LEAST = 4  # calls of a program


def calls(case: Case) -> int:
    """Return how often the timed program attends, each time over pages of its own."""
    return max(LEAST, int(-(-BEYOND // case.bytes)))


def abstract_pages(payload: Payload, head_dim: int, pages: int) -> Pages:
    """Return a pool as shapes."""
    shape = jax.ShapeDtypeStruct
    store = jnp.int16 if payload.codes else FLOATS[payload.kind]
    rows = sum(map(len, payload.rows(head_dim).values()))
    k, v = (shape((pages, *one), store) for one in (payload.k_shape(head_dim), payload.v_shape(head_dim)))
    return Pages(k, v, shape((pages, rows, 64), jnp.float16) if rows else None, payload)  # pyrefly: ignore


def abstract(case: Case, sets: int):
    """Return (q, pages, tables, lengths) of the timed program as shapes: `sets` tables of one pool, each of pages of its own."""
    B, K, n = case.batch, case.kv_heads, -(-case.tokens // PAGE)
    shape = jax.ShapeDtypeStruct
    return (
        shape(case.shapes[0], jnp.bfloat16),
        abstract_pages(Payload(case.payload, case.by), case.head_dim, sets * B * K * n),
        shape((sets, B, K, n), jnp.int32),
        shape((sets, B), jnp.int32),
    )


def arrays(case: Case, sets: int, seed: int = 0):
    """Return random arguments of the timed program: finite, and no two entries of the tables alike."""
    q, pages, tables, lengths = abstract(case, sets)

    def make(key):
        keys = jax.random.split(key, 5)
        scales = pages.scales
        if scales is not None:
            # for codes of up to 448
            scales = jax.random.uniform(keys[3], scales.shape, jnp.float32, 0.5, 1.0) / 64
            scales = scales.astype(jnp.float16)
        order = jax.random.permutation(keys[4], tables.size).astype(jnp.int32)
        return (
            jax.random.normal(keys[0], q.shape, q.dtype),
            Pages(_random(keys[1], pages.k), _random(keys[2], pages.v), scales, pages.payload),
            order.reshape(tables.shape),
            jnp.full(lengths.shape, case.tokens, jnp.int32),
        )

    return jax.jit(make)(jax.random.key(seed))


def _random(key, array):
    if array.dtype == jnp.int16:
        return jax.lax.bitcast_convert_type(jax.random.bits(key, array.shape, jnp.uint16), jnp.int16)
    return jax.random.normal(key, array.shape, jnp.bfloat16).astype(array.dtype)


def program(case: Case, splits: int | None = None, tile=None) -> Callable:
    """Return a function (q, pages, tables, lengths) -> each table's result, of one length each."""
    one = jax.jit(lambda *args: decode(*args, scale=case.head_dim**-0.5, splits=splits, tile=tile))
    return lambda q, pages, tables, lengths: [one(q, pages, tables[i], lengths[i]) for i in range(tables.shape[0])]


# checks


def small(case: Case, seed: int = 0):
    """Return (q, pages, table, length) of packed random keys and values, the pages shuffled."""
    q, k, v = case.arrays(seed)
    pages, table = pack_pages(k, v, Payload(case.payload, case.by))
    order = np.random.default_rng(seed).permutation(pages.k.shape[0])
    pages = jax.tree.map(lambda x: x[np.argsort(order)], pages)
    table = jnp.asarray(order[np.asarray(table)], jnp.int32)
    return q, pages, table, jnp.full((case.batch,), case.tokens, jnp.int32)


def abstract_small(case: Case):
    """Return the arguments of `small` as shapes."""
    q, pages, tables, lengths = abstract(case, 1)
    table, length = (jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in (tables, lengths))
    return q, pages, table, length


def dequantised(pages: Pages):
    """Return float32 keys and values [pages,64,D], by the formulas of `pack_pages`'s docstring."""
    p, D = pages.payload, pages.head_dim
    if p.codes:
        count, width = 16 // p.bits, min(64, D * p.bits // 16)
        k, v = (np.asarray(x).view(np.uint16).astype(np.int32) for x in (pages.k, pages.v))
        # [pages,64,i,j,x]: code j of word i * width + x
        k, v = (x.reshape(len(x), 64, -1, 1, width) >> (p.bits * np.arange(count)[:, None]) for x in (k, v))
        k, v = k % 2**p.bits, v % 2**p.bits
        k = k.reshape(len(k), 64, D)
        v = v.reshape(len(v), 64, D // 64, 64 // width, width)  # row, half, block of tokens, token
        v = v.transpose(0, 3, 4, 2, 1).reshape(len(v), 64, D)
    else:
        k, v = np.asarray(pages.k, np.float32), np.asarray(pages.v, np.float32).swapaxes(1, 2)
    if p.exact:
        return k, v
    scales = np.asarray(pages.scales, np.float32)
    # rows of 64: those of K by channel, or one by token; then one of V by token
    n, of_k = (D // 64, (-1, 1, D)) if p.by == "channel" else (1, (-1, 64, 1))
    first, second = (scales[:, i * n : i * n + n].reshape(of_k) for i in range(2))
    if not p.codes:
        return k * first, v * scales[:, n, :, None]
    return k * first + second, v * scales[:, 2 * n, :, None] + scales[:, 2 * n + 1, :, None]


def reference(case: Case) -> Callable:
    """Return float32 attention over the dequantised pages, in numpy."""

    def attend(q, pages, table, length):
        q, table = np.asarray(q, np.float32), np.asarray(table)
        k, v = (x[table].reshape(*table.shape[:2], -1, x.shape[-1]) for x in dequantised(pages))
        s = np.einsum("bkgtd,bksd->bkgts", q, k) * case.head_dim**-0.5
        last = np.asarray(length)[:, None, None, None] - case.T + np.arange(case.T)[:, None]
        s = np.where(np.arange(k.shape[2]) <= last[:, None], s, -np.inf)
        top = s.max(-1, keepdims=True)
        p = np.exp(s - top)
        total = p.sum(-1, keepdims=True)
        return Partial(np.einsum("bkgts,bksd->bkgtd", p / total, v), (np.log(total) + top)[..., 0])  # pyrefly: ignore

    return attend
