"""The decode kernel against a float64 reference of the dequantised values, interpreted with race detection, and compiled for the H200.

The reference unpacks pages by the formulas of `pack_pages`'s docstring, one value at a time in effect, and shares no code with the kernel.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiler_support import compile_kernel, require_compiler

from lcx.bench.decode import abstract_pages
from lcx.bench.interpret import interpreted
from lcx.errors import UserError
from lcx.plan.targets import TARGETS, compile_for
from pallas_kernels.decode import decode
from pallas_kernels.payloads import Pages, Payload, pack_pages, page_bytes
from pallas_kernels.pieces import Plan, merge_pieces, plan_pieces
from pallas_kernels.tables import DECODE, DecodeTile

PAYLOADS = [
    Payload("bf16"),
    Payload("fp8"),
    Payload("fp8", "token"),
    Payload("int8"),
    Payload("int8", "token"),
    Payload("int4"),
    Payload("int4", "token"),
    Payload("int2"),
    Payload("int2", "token"),
]
NAMES = [f"{p.kind}-{p.by}" for p in PAYLOADS]
EPS = 2.0**-24


def dequantised(pages: Pages):
    """float64 keys and values [pages, 64, D] of a pool."""
    p, D = pages.payload, pages.head_dim
    if not p.codes:
        k, v = np.asarray(pages.k, np.float64), np.asarray(pages.v, np.float64).swapaxes(1, 2)
    else:
        bits, width = p.bits, min(64, D * p.bits // 16)
        count = 16 // bits
        k_words, v_words = (np.asarray(x).view(np.uint16).astype(np.int64) for x in (pages.k, pages.v))
        k, v = np.empty((2, k_words.shape[0], 64, D))
        for c in range(D):
            block, x = divmod(c, width)
            i, j = divmod(block, count)
            k[:, :, c] = (k_words[:, :, i * width + x] >> (bits * j)) % 2**bits
        for t in range(64):
            b, x = divmod(t, width)
            for h in range(D // 64):
                i, j = divmod(h * (64 // width) + b, count)
                v[:, t, 64 * h : 64 * h + 64] = (v_words[:, :, i * width + x] >> (bits * j)) % 2**bits
    if p.exact:
        return k, v
    s = np.asarray(pages.scales, np.float64)
    n = D // 64 if p.by == "channel" else 1
    axis = 1 if p.by == "channel" else 2

    def line(start, size, axis):
        return np.expand_dims(s[:, start : start + size].reshape(len(s), -1), axis)

    if not p.codes:
        return k * line(0, n, axis), v * line(n, 1, 2)
    return k * line(0, n, axis) + line(n, n, axis), v * line(2 * n, 1, 2) + line(2 * n + 1, 1, 2)


def reference(q, k, v, table, length, scale):
    """float64 out [B,K,G,T,D] and lse; k, v [pages, 64, D] as `dequantised`, the pages of a row in the order of its table."""
    q = np.asarray(q, np.float64)
    B, K, G, T, D = q.shape
    length = np.broadcast_to(np.reshape(length, (B, -1)), (B, K))
    out, lse = np.zeros(q.shape), np.full(q.shape[:-1], -np.inf)
    for b in range(B):
        for h in range(K):
            keys, values = (x[table[b, h]].reshape(-1, x.shape[-1])[:, :D] for x in (k, v))
            for t in range(T):
                seen = length[b, h] - T + t + 1
                if seen <= 0:
                    continue
                s = q[b, h, :, t] @ keys[:seen].T * scale
                top = s.max(-1, keepdims=True)
                p = np.exp(s - top)
                out[b, h, :, t] = p @ values[:seen] / p.sum(-1, keepdims=True)
                lse[b, h, :, t] = np.log(p.sum(-1)) + top[:, 0]
    return out, lse


def make(payload, B=1, K=2, G=4, T=1, D=128, S=200, length=None, shuffle=True, poison=True, seed=0):
    """q, pages, table, length; the pool's pages shuffled, and what no token uses poisoned."""
    rng = np.random.default_rng(seed)
    length = np.asarray([S] * B if length is None else length, np.int32)
    q = jnp.asarray(rng.normal(size=(B, K, G, T, D)), jnp.bfloat16)
    # channels of K with a mean of their own, as real ones have
    k = jnp.asarray(rng.normal(size=(B, K, D, S)) + 2 * rng.normal(size=(D, 1)), jnp.float32)
    v = jnp.asarray(rng.normal(size=(B, K, S, D)), jnp.float32)
    pages, table = pack_pages(k, v, payload, length)
    if poison:
        pages = poisoned(pages, np.asarray(table), length)
    if shuffle:
        order = rng.permutation(pages.k.shape[0])
        pages = jax.tree.map(lambda x: x[np.argsort(order)], pages)
        table = jnp.asarray(order[np.asarray(table)], jnp.int32)
    return q, pages, table, jnp.asarray(length)


def poisoned(pages: Pages, table, length):
    """NaN behind each row's last token: in values, in scales by token, in whole pages."""
    p = pages.payload
    B, K, n = table.shape
    length = np.broadcast_to(np.reshape(length, (B, -1)), (B, K))
    k, v = np.array(pages.k), np.array(pages.v)
    s = None if p.exact else np.array(pages.scales)
    names = p.rows(pages.head_dim)
    for b, h, i in np.ndindex(B, K, n):
        page, used = table[b, h, i], int(np.clip(length[b, h] - 64 * i, 0, 64))
        if not p.codes:
            k[page, used:] = np.nan
            v[page, :, used:] = np.nan
        for name, rows in names.items():
            if used == 0:
                s[page, rows.start : rows.stop] = np.nan
            elif name[0] == "v" or p.by == "token":
                s[page, rows.start, used:] = np.nan
    return Pages(jnp.asarray(k), jnp.asarray(v), None if s is None else jnp.asarray(s), p)


def compare(payload, *, scale=None, splits=None, tile=None, **sizes):
    q, pages, table, length = make(payload, **sizes)
    scale = scale or q.shape[-1] ** -0.5
    got = interpreted(decode)(q, pages, table, length, scale=scale, splits=splits, tile=tile)
    k, v = dequantised(pages)
    out, lse = reference(q, k, v, np.asarray(table), np.asarray(length), scale)
    assert got.out.dtype == got.lse.dtype == jnp.float32
    close(got, out, lse)


def close(got, out, lse):
    np.testing.assert_array_equal(np.isneginf(got.lse), np.isneginf(lse))
    some = ~np.isneginf(lse)
    # bfloat16 keys, queries and probabilities; float16 where there are scales
    assert np.abs(got.out - out).max() <= 1e-2 * max(np.abs(out).max(), EPS)
    assert np.abs(np.asarray(got.lse)[some] - lse[some]).max(initial=0) <= 1e-3
    assert (np.asarray(got.out)[~some] == 0).all()


SMALL = DecodeTile(pages=1, stages=2)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("payload", PAYLOADS, ids=NAMES)
def test_equals_the_reference(payload):
    compare(payload, S=330, splits=1, tile=DecodeTile(pages=2, stages=2))


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "sizes",
    [
        dict(G=1, T=1),
        dict(G=8, T=1),
        dict(G=4, T=4, K=1),
        pytest.param(dict(G=8, T=8, K=1), marks=pytest.mark.slow),
        pytest.param(dict(B=3, K=1, G=2, T=2, length=[200, 0, 65]), marks=pytest.mark.slow),
        dict(B=2, K=1, G=1, T=8, length=[5, 3]),
        pytest.param(dict(D=64), marks=pytest.mark.slow),
        pytest.param(dict(D=256, K=1), marks=pytest.mark.slow),
        pytest.param(dict(D=80, K=1), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_groups_tokens_and_lengths(sizes):
    """Rows of no token give 0 and -inf; the first of more tokens than there are see nothing."""
    compare(Payload("bf16"), tile=SMALL, **sizes)


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "kind", ["int4", pytest.param("fp8", marks=pytest.mark.slow), pytest.param("int2", marks=pytest.mark.slow)]
)
def test_quantised_pages_of_several_rows(kind):
    compare(Payload(kind), B=2, K=1, G=4, T=2, length=[190, 70], tile=SMALL)


@pytest.mark.timeout(120)
def test_several_pieces_are_one():
    """Pieces of one page each, merged, equal the whole."""
    q, pages, table, length = make(Payload("bf16"), K=1, S=300)
    one, many = (interpreted(decode)(q, pages, table, length, scale=0.1, splits=n, tile=SMALL) for n in (1, 5))
    np.testing.assert_allclose(one.out, many.out, atol=1e-2)
    np.testing.assert_allclose(one.lse, many.lse, atol=1e-4)
    k, v = dequantised(pages)
    close(many, *reference(q, k, v, np.asarray(table), np.asarray(length), 0.1))


@pytest.mark.parametrize("splits", [None, 1, 3])
@pytest.mark.parametrize(
    "n, lengths", [(1, [64]), (9, [576, 0, 1, 64, 65]), (300, [19_200, 3]), (40, [2_560] * 200), (7, [0, 0])]
)
def test_pieces_hold_every_page_once(n, lengths, splits):
    """Pieces of unequal rows, and of rows of one length, which are planned without a reduction."""
    R = len(lengths)
    for tile in (SMALL, DecodeTile(pages=2, stages=2)):
        for length in (lengths, lengths[:1]):
            plan = plan_pieces(jnp.asarray(length, jnp.int32), R, n, splits, tile)
            row, first, stop, tokens = np.asarray(plan.piece)
            wide = np.asarray(length * R if len(length) == 1 else length)
            np.testing.assert_array_equal(tokens, wide[row])
            assert splits is not None or len(row) <= max(132 * tile.per_core, R)
            for r in range(R):
                if plan.index is None:
                    mine = np.flatnonzero(row == r)
                    np.testing.assert_array_equal(mine, r * len(mine) + np.arange(len(mine)))
                else:
                    mine = np.asarray(plan.index)[r][np.asarray(plan.listed)[r]]
                    assert (row[mine] == r).all()
                pages = np.concatenate([np.arange(first[i], stop[i]) for i in mine] or [[]])
                np.testing.assert_array_equal(pages, np.arange(-(-wide[r] // 64)))
                assert all(first[i] % tile.pages == 0 or first[i] == stop[i] for i in mine)


def test_pieces_are_merged_as_in_float64():
    """A row without keys, pieces without keys, and pieces of other rows that are nan."""
    rng = np.random.default_rng(0)
    I, W, D, N = 6, 2, 16, 8
    out, lse = rng.normal(size=(I, W, D, N)), 30 * rng.normal(size=(I, W, N))
    lse[1], lse[4:] = -np.inf, -np.inf
    out[1], out[4:] = 0, 0
    listed = Plan(None, jnp.asarray([[0, 1, 2], [4, 5, 3]]), jnp.asarray([[True, True, True], [True, True, False]]))
    for plan, rows, hidden in ((listed, [[0, 1, 2], [4, 5]], [3]), (Plan(None), [[0, 1, 2], [3, 4, 5]], [])):
        dirty = out.copy()
        dirty[hidden] = np.nan
        got = merge_pieces(jnp.asarray(dirty, jnp.float32), jnp.asarray(lse, jnp.float32), plan, 2)
        for r, mine in enumerate(rows):
            part, weight = out[mine].reshape(-1, D, N), lse[mine].reshape(-1, N)
            top = weight.max(0)
            weight = np.exp(weight - np.where(np.isneginf(top), 0, top))
            total = weight.sum(0)
            want = (part * weight[:, None]).sum(0) / np.where(total, total, 1)
            np.testing.assert_allclose(got[0][r], want, atol=1e-5)
            if total.all():
                np.testing.assert_allclose(got[1][r], top + np.log(total), rtol=1e-6)
            else:
                assert np.isneginf(got[1][r]).all()


def test_bytes_of_pages_are_those_of_their_arrays():
    for payload in PAYLOADS:
        _, pages, _, _ = make(payload, S=128, poison=False)
        held = sum(x.nbytes for x in (pages.k, pages.v, pages.scales) if x is not None)
        assert page_bytes(payload, 128) * pages.k.shape[0] == held, payload


def test_wrong_calls_are_refused():
    q, pages, table, length = make(Payload("bf16"), S=64)
    for change, message in (
        (dict(q=q.astype(jnp.float32)), "bfloat16 or float16"),
        (dict(q=jnp.tile(q, (1, 1, 1, 9, 1))), "T at most 8"),
        (dict(table=table.astype(jnp.int16)), "allowed is int32"),
        (dict(length=length.astype(jnp.float32)), "allowed are integers"),
        (dict(scale=0.0), "scale"),
        (dict(splits=0), "splits"),
    ):
        with pytest.raises(UserError, match=message):
            decode(**(dict(q=q, pages=pages, table=table, length=length, scale=0.1) | change))


def test_groups_that_do_not_fit_are_read_in_parts():
    """24 rows of int2 pages of head_dim 256, of which 16 fit: each half of the group by itself."""
    compare(Payload("int2"), K=1, G=6, T=4, D=256, S=70, tile=SMALL)


# compiled for the H200


def entries():
    cheap = {
        ("bf16", 128, "channel"),
        ("int4", 128, "channel"),
        ("int2", 128, "token"),
        ("fp8", 128, "channel"),
        ("int8", 128, "channel"),
    }
    for kind, head_dim in DECODE:
        for by in ("channel",) if kind == "bf16" else ("channel", "token"):
            for G, T in ((4, 1), (4, 4), (8, 4), (8, 8)):
                easy = (kind, head_dim, by) in cheap and T == 1
                yield pytest.param(kind, head_dim, by, G, T, marks=() if easy else pytest.mark.slow)


@pytest.mark.parametrize("kind, head_dim, by, G, T", list(entries()))
def test_every_table_entry_compiles_for_the_h200(kind, head_dim, by, G, T):
    shape = jax.ShapeDtypeStruct
    pages = abstract_pages(Payload(kind, by), head_dim, 64)
    args = shape((1, 8, G, T, head_dim), jnp.bfloat16), pages, shape((1, 8, 2_048), jnp.int32), shape((1,), jnp.int32)
    compile_kernel(lambda q, pages, table, length: decode(q, pages, table, length, scale=0.1), *args).check()


def test_few_small_programs_stand_around_the_kernel():
    """Each costs about 2 microseconds, and the whole of an int2 layer at 131,072 tokens is to take 35."""
    require_compiler()
    shape = jax.ShapeDtypeStruct
    pages = abstract_pages(Payload("int2"), 128, 64)
    args = shape((1, 8, 4, 1, 128), jnp.bfloat16), pages, shape((1, 8, 2_048), jnp.int32), shape((1,), jnp.int32)
    compiled = compile_for(TARGETS["h200"], jax.jit(lambda q, *held: decode(q, *held, scale=0.1)), args)
    main = compiled.as_text().split("ENTRY")[1]
    assert main.count(" custom-call(") == 1
    assert main.count(" fusion(") + main.count(" reduce(") <= 6
