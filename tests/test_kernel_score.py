"""K3, scores of blocks, against float64 oracles: references, kernels interpreted with race detection, and compiled for the H200."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiler_support import compile_kernel

from lcx.bench.interpret import interpreted
from lcx.errors import UserError
from lcx.ops import block_scores as scores
from pallas_kernels import score_blocks, score_probe
from pallas_kernels.tables import PROBE, SCORE, ProbeTile, ScoreTile

pytestmark = pytest.mark.timeout(200)

SMALL = ScoreTile(
    columns=128, stages=2, run=2
)  # several tiles, and a ring that comes round, at sizes that interpret quickly


def normal(*shape, seed=0, dtype=jnp.bfloat16):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def wide(x):
    return np.asarray(x, np.float64)


def agree(got, want, tolerance):
    got = np.asarray(got, np.float64)
    assert got.shape == want.shape
    hidden = np.isneginf(want)
    assert np.array_equal(np.isneginf(got), hidden)
    difference = np.abs(np.where(hidden, 0, got) - np.where(hidden, 0, want))
    assert difference.max() <= tolerance * np.abs(np.where(hidden, 0, want)).max(), difference.max()


# antidiagonals


def oracle_antidiagonal(q, k, stride, scale, q_offset=0, kv_len=None):
    """float64 [B,K,G,Q,N], square by square from the words of the paper."""
    q, k = wide(q), wide(k)
    B, K, G, T, D = q.shape
    S = k.shape[3]
    rows, columns = -(-T // stride), -(-S // stride)
    out = np.zeros((B, K, G, -(-T // 128), -(-S // 128)))
    offset = np.broadcast_to(q_offset, B)
    length = np.broadcast_to(S if kv_len is None else kv_len, B)
    for b, h, g in np.ndindex(B, K, G):
        dots = np.zeros((rows * stride, columns * stride))
        dots[:T, :S] = q[b, h, g] @ k[b, h]
        for r in range(rows):
            logits = []
            for c in range(columns):
                if c * stride <= offset[b] + r * stride and c * stride < length[b]:
                    square = dots[r * stride : (r + 1) * stride, c * stride : (c + 1) * stride]
                    logits.append(np.fliplr(square).trace() * scale / stride)
            if not logits:
                continue
            p = np.exp(np.array(logits) - max(logits))
            for c, x in enumerate(p / p.sum()):
                out[b, h, g, r * stride // 128, c * stride // 128] += x
    last = np.minimum(rows - np.arange(out.shape[3]) * (128 // stride), 128 // stride)
    return out / last[:, None]


SHAPES = [
    # the ring comes round, two tiles of columns, the last one partly hidden
    dict(stride=16, T=256, S=2_304, q_offset=2_048),
    # two tiles of rows, whose first one sees one tile of columns
    dict(stride=4, T=600, S=600, K=1, G=1),
    dict(stride=8, T=130, S=203, q_offset=72, kv_len=201, G=1),
    dict(stride=16, B=2, K=1, T=100, S=300, q_offset=[16, 192], kv_len=[90, 0]),
    pytest.param(dict(stride=8, D=128, T=256, S=256), marks=pytest.mark.slow),
    pytest.param(dict(stride=16, D=80, G=1, T=256, S=256), marks=pytest.mark.slow),
    pytest.param(dict(stride=16, D=256, G=1, T=128, S=256, q_offset=128), marks=pytest.mark.slow),
    pytest.param(dict(stride=4, D=64, K=1, G=8, T=128, S=1_024, q_offset=896), marks=pytest.mark.slow),
]


def antidiagonal_case(stride, B=1, K=2, G=2, T=128, S=128, D=64, **data):
    data = {name: x if isinstance(x, int) else jnp.asarray(x, jnp.int32) for name, x in data.items()}
    # a scale that makes some blocks much likelier than others
    return normal(B, K, G, T, D), normal(B, K, D, S, seed=1), dict(stride=stride, scale=2 * stride / D**0.5 / 4, **data)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_antidiagonal_scores(shape):
    q, k, asked = antidiagonal_case(**shape)
    want = oracle_antidiagonal(q, k, **{name: np.asarray(x) for name, x in asked.items()})
    agree(scores.score_antidiagonal(*(x.astype(jnp.float32) for x in (q, k)), **asked), want, 1e-4)
    # wgmma makes at least 8 sums of a tile
    tile = replace(SMALL, columns=max(128, 8 * 128 // asked["stride"]))
    got = interpreted(partial(score_blocks.score_antidiagonal, tile=tile, **asked))(q, k)
    # exp2 in float16 before sums; products are exact in float32 up to the order of summation
    agree(got, want, 2e-3)
    total = np.asarray(got).sum(-1)
    assert np.abs(total[total > 0] - 1).max() < 1e-3 and ((total > 0) == (want.sum(-1) > 0)).all()


def test_antidiagonals_of_aligned_tokens_are_found():
    """A block whose keys equal the queries in reverse order within each square stands out, wherever it is."""
    rng = np.random.default_rng(3)
    q, k = rng.standard_normal((1, 1, 1, 512, 64)), 0.1 * rng.standard_normal((1, 1, 64, 512))
    mirrored = q[0, 0, 0, 384:].reshape(16, 8, 64)[:, ::-1].reshape(128, 64)
    k[0, 0, :, 128:256] = mirrored.T
    mass = scores.score_antidiagonal(jnp.asarray(q), jnp.asarray(k), stride=8, scale=1.0)[0, 0, 0]
    assert int(mass[3].argmax()) == 1 and float(mass[3, 1]) > 0.9


def test_antidiagonals_of_one_token_are_the_exact_mass():
    q, k = normal(1, 2, 2, 200, 64, dtype=jnp.float32), normal(1, 2, 64, 300, seed=1, dtype=jnp.float32)
    logits = np.einsum("bkgtd,bkds->bkgts", wide(q), wide(k)) * 0.2
    p = np.where(np.arange(300) <= 100 + np.arange(200)[:, None], np.exp(logits), 0)
    p /= p.sum(-1, keepdims=True)
    p = np.pad(p, ((0, 0),) * 4 + ((0, 84),)).reshape(1, 2, 2, 200, 3, 128).sum(-1)
    want = np.stack([p[:, :, :, :128].mean(3), p[:, :, :, 128:].mean(3)], 3)
    agree(scores.score_antidiagonal(q, k, stride=1, scale=0.2, q_offset=100), want, 1e-5)
    with pytest.raises(UserError, match="stride=1: allowed are 4, 8, 16"):
        score_blocks.score_antidiagonal(*(x.astype(jnp.bfloat16) for x in (q, k)), stride=1, scale=0.2, q_offset=100)


# pooled


def oracle_pooled(q, k, scale, rows, size, causal=True, q_offset=0):
    q, k = wide(q), wide(k)
    out = np.einsum("bkgqd,bkdn->bkgqn", q, k) * scale
    for b, r, n in np.ndindex(q.shape[0], q.shape[3], k.shape[3]):
        last = np.broadcast_to(q_offset, q.shape[0])[b] + (r + 1) * rows - 1
        if causal and n * size > last:
            out[b, :, :, r, n] = -np.inf
    return out


@pytest.mark.parametrize(
    "shape, asked",
    [
        (dict(Q=140, N=300), dict(rows=128, size=128, q_offset=128 * 160)),
        (dict(B=2, Q=9, N=20, K=1, D=128), dict(rows=1, size=4, q_offset=[0, 37])),
        (dict(Q=10, N=130, G=1, D=80), dict(rows=128, size=128, causal=False)),
        pytest.param(dict(Q=130, N=520, D=256, G=1), dict(rows=64, size=64), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_pooled_scores(shape, asked):
    shape = dict(B=1, K=2, G=2, D=64) | shape
    B, K, G, Q, D, N = (shape[x] for x in "BKGQDN")
    q, k = normal(B, K, G, Q, D), normal(B, K, D, N, seed=1)
    want = oracle_pooled(q, k, 0.3, **asked)
    asked = {n: jnp.asarray(x, jnp.int32) if isinstance(x, list) else x for n, x in asked.items()}
    agree(scores.score_pooled(*(x.astype(jnp.float32) for x in (q, k)), scale=0.3, **asked), want, 1e-5)
    agree(interpreted(partial(score_blocks.score_pooled, scale=0.3, tile=SMALL, **asked))(q, k), want, 1e-5)


# extremes of pages


@pytest.mark.parametrize(
    "shape",
    [dict(), dict(B=2, K=1, G=8, T=2, N=300), dict(G=1, D=80, N=5), dict(D=256, N=260, dtype=jnp.float16)],
    ids=str,
)
def test_page_extremes(shape):
    shape = dict(B=1, K=2, G=4, T=1, D=64, N=140, dtype=jnp.bfloat16) | shape
    B, K, G, T, D, N = (shape[x] for x in "BKGTDN")
    q, ends = normal(B, K, G, T, D, dtype=shape["dtype"]), normal(2, B, K, D, N, seed=1, dtype=shape["dtype"])
    low, high = jnp.sort(ends, 0)
    a, lo, hi = wide(q)[..., None], wide(low)[:, :, None, None], wide(high)[:, :, None, None]
    want = np.maximum(a * lo, a * hi).sum(4)
    agree(scores.score_minmax(q, low, high), want, 1e-5)
    agree(interpreted(partial(score_blocks.score_minmax, tile=SMALL))(q, low, high), want, 1e-5)


# the probe


def oracle_probe(q, k, scale, q_offset, kv_len=None, window=None):
    q, k = wide(q), wide(k)
    B, K, G, T, _ = q.shape
    S = k.shape[3]
    columns, diagonals = np.zeros((2, B, K, G, S))
    for b, t in np.ndindex(B, T):
        position = np.broadcast_to(q_offset, B)[b] + t
        length = np.broadcast_to(S if kv_len is None else kv_len, B)[b]
        keys = np.arange(max(0, 0 if window is None else position - window + 1), max(0, min(position + 1, length)))
        if not len(keys):
            continue
        logits = np.einsum("kgd,kds->kgs", q[b, :, :, t], k[b][..., keys]) * scale
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        columns[b][..., keys] += p
        diagonals[b][..., position - keys] += p
    return columns, diagonals


@pytest.mark.parametrize(
    "shape, asked",
    [
        (dict(S=500), dict(q_offset=436)),
        # a text shorter than the probe, and one that ends within a tile
        (dict(B=2, S=300, K=1, T=60), dict(q_offset=[-20, 130], kv_len=[40, 190])),
        (dict(S=400, T=64, G=1), dict(q_offset=330, window=100)),
        (dict(S=130, T=3, K=1, G=1, D=80), dict(q_offset=127)),
        pytest.param(dict(S=256, D=128, dtype=jnp.float16), dict(q_offset=192), marks=pytest.mark.slow),
        pytest.param(dict(S=256, D=256, K=1), dict(q_offset=192, kv_len=250), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_probe(shape, asked):
    shape = dict(B=1, K=2, G=2, T=64, D=64, dtype=jnp.bfloat16) | shape
    B, K, G, T, D, S = (shape[x] for x in "BKGTDS")
    q, k = normal(B, K, G, T, D, dtype=shape["dtype"]), normal(B, K, D, S, seed=1, dtype=shape["dtype"])
    want = oracle_probe(q, k, 0.2, **asked)
    asked = {n: jnp.asarray(x, jnp.int32) if isinstance(x, list) else x for n, x in asked.items()}
    plain = scores.score_probe(*(x.astype(jnp.float32) for x in (q, k)), scale=0.2, **asked)
    tile = ProbeTile(stages=2, run=3)
    got = interpreted(partial(score_probe.score_probe, scale=0.2, tile=tile, **asked))(q, k)
    for a, b, expected in zip(plain, got, want, strict=True):
        agree(a, expected, 1e-5)
        # exp2 and logarithm of the lse in float32
        agree(b, expected, 1e-4)


# refusals


def test_wrong_calls_are_refused():
    q, k = normal(1, 1, 1, 128, 64), normal(1, 1, 64, 128)
    for module in (scores, score_blocks):
        for call, message in (
            (lambda m: m.score_antidiagonal(q, k, stride=5, scale=1.0), "stride=5: allowed are"),
            (lambda m: m.score_antidiagonal(q, k, stride=8, scale=1.0, q_offset=4), "q_offset=4"),
            (lambda m: m.score_antidiagonal(q, k, stride=8, scale=0.0), "scale=0.0"),
            (lambda m: m.score_pooled(q, k[:, :, :9], scale=1.0, rows=1, size=1), "allowed are"),
            (lambda m: m.score_pooled(q, k, scale=1.0, rows=0, size=1), "rows=0"),
            (lambda m: m.score_minmax(q, k, k[..., :3]), "equal shapes"),
        ):
            with pytest.raises(UserError, match=message):
                call(module)
    for module in (scores, score_probe):
        with pytest.raises(UserError, match="at most 64 queries"):
            module.score_probe(q, k, scale=1.0, q_offset=0)
        with pytest.raises(UserError, match="window=0"):
            module.score_probe(q[:, :, :, :64], k, scale=1.0, q_offset=0, window=0)
    with pytest.raises(UserError, match="q float32"):
        score_blocks.score_minmax(*(x.astype(jnp.float32) for x in (q, k, k)))
    with pytest.raises(UserError, match="head_dim=320"):
        score_blocks.score_pooled(normal(1, 1, 1, 8, 320), normal(1, 1, 320, 8), scale=1.0, rows=1, size=1)


# compiled for the H200


def compiled(kind, D, tile=None):
    shape = jax.ShapeDtypeStruct
    q, k = shape((1, 8, 4, 2_048, D), jnp.bfloat16), shape((1, 8, D, 8_192), jnp.bfloat16)
    if kind == "pooled":
        run = partial(score_blocks.score_pooled, scale=0.1, rows=1, size=128, tile=tile)
        return compile_kernel(run, q, k)
    if kind == "extremes":
        few = shape((1, 8, 4, 1, D), jnp.bfloat16)
        return compile_kernel(partial(score_blocks.score_minmax, tile=tile), few, k, k)
    return compile_kernel(partial(score_blocks.score_antidiagonal, stride=kind, scale=0.1, tile=tile), q, k)


@pytest.mark.parametrize("D", list(SCORE))
@pytest.mark.parametrize("kind", [4, 8, 16, "pooled", "extremes"])
def test_every_table_entry_compiles_for_the_h200(D, kind):
    compiled(kind, D).check()


@pytest.mark.parametrize("D", list(PROBE))
@pytest.mark.parametrize("extras", [{}, dict(window=1_000)], ids=["plain", "window"])
def test_every_probe_compiles_for_the_h200(D, extras):
    q, k = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((1, 8, 4, 64, D), (1, 8, D, 8_192)))
    report = compile_kernel(partial(score_probe.score_probe, scale=0.1, q_offset=8_128, **extras), q, k).check()
    assert report.kernels == 2
