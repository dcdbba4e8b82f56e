"""K1b, gradients of attention: interpreted with race detection against jax.grad of a float32 reference, and compiled for the H200."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiler_support import compile_kernel
from test_kernel_attend import FULL, LIST, VARIANTS, B, G, K, S, T, random_qkv, some_blocks, visible

from lcx.bench.interpret import interpreted
from lcx.errors import UserError
from lcx.ops.attention import EMPTY, Partial, merge
from pallas_kernels.attend_bwd import attend_with_gradient
from pallas_kernels.lists import from_blocks, from_mask
from pallas_kernels.mask import Mask
from pallas_kernels.tables import ATTEND_GRAD

pytestmark = pytest.mark.timeout(250)


def reference(q, k, v, mask, scale):
    """float32 Partial."""
    logits = jnp.einsum("bkgtd,bkds->bkgts", q, k) * scale
    weights = jnp.where(mask, jnp.exp(logits), 0)
    total = weights.sum(-1)
    some = total > 0
    total = jnp.where(some, total, 1)
    out = jnp.einsum("bkgts,bksd->bkgtd", weights, v) / total[..., None]
    return Partial(out, jnp.where(some, jnp.log(total), -jnp.inf))


def probe(part, weights):
    """A number that depends on every result, lse among them."""
    lse = jnp.where(jnp.isneginf(part.lse), 0, part.lse)
    return (part.out.astype(jnp.float32) * weights).sum() + (lse * weights[..., 0]).sum()


def check(qkv, mask=Mask(), *, visible_by=None, tile=None, **data):  # noqa: B008
    q, k, v = qkv
    scale = q.shape[-1] ** -0.5
    # exact in bfloat16, as the kernel rounds the gradient of out to the type of q
    weights = jnp.asarray(np.random.default_rng(9).standard_normal(q.shape), q.dtype).astype(jnp.float32)

    def loss(q, k, v):
        return probe(attend_with_gradient(q, k, v, scale=scale, mask=mask, tile=tile, **data), weights)

    about = {key: value for key, value in data.items() if key != "blocks"}
    about |= dict(causal=mask.causal, window=mask.window, sink=mask.sink) | (visible_by or {})
    seen = jnp.asarray(visible((*q.shape[:4], k.shape[-1]), **about))
    grads = interpreted(jax.grad(loss, (0, 1, 2)), seconds=200)(q, k, v)
    wide = [x.astype(jnp.float32) for x in qkv]
    expected = jax.grad(lambda *qkv: probe(reference(*qkv, seen, scale), weights), (0, 1, 2))(*wide)
    # P and dS are rounded to the type of q before their products, and so are the results
    tolerance = 1.5e-2 if q.dtype == jnp.bfloat16 else 3e-3
    for name, grad, want, x in zip("qkv", grads, expected, qkv, strict=True):
        assert grad.shape == x.shape and grad.dtype == x.dtype
        error = np.abs(np.asarray(grad, np.float32) - np.asarray(want)).max()
        assert error <= tolerance * max(np.abs(want).max(), 1e-6), f"d{name} is off by {error} of {np.abs(want).max()}"
    return grads


@pytest.mark.parametrize("D", [64, 128, 256])
def test_causal_gradients_equal_those_of_the_reference(D):
    check(random_qkv(T=128, S=192, D=D), q_offset=64)


def test_dense_gradients():
    check(random_qkv(T=128, S=128), FULL)


def test_the_gqa_group_is_summed():
    check(random_qkv(K=2, G=2, T=70, S=70))


def test_odd_lengths_and_lengths_by_sequence():
    check(random_qkv(B=2, T=131, S=200), q_offset=jnp.asarray([60, 0]), kv_len=jnp.asarray([191, 0]))


def test_window_with_sink():
    check(random_qkv(T=128, S=512), Mask(window=100, sink=3), q_offset=384)


def test_spans():
    check(random_qkv(K=2, T=256, S=256), Mask(spans=True), spans=jnp.asarray([60, 1 << 30]))


def test_segments():
    segments = jnp.asarray(np.repeat([0, 1], [50, 78])[None])
    check(random_qkv(T=128, S=128), Mask(segments=True), segments=(segments, segments))


def test_positions_with_a_list():
    rng = np.random.default_rng(1)
    kv_pos = np.concatenate([rng.permutation(128), 500 + np.arange(128), 128 + rng.permutation(128)])[None]
    kv_pos[:, rng.random(384) < 0.2] = EMPTY
    q_pos = np.arange(150, 250)[None].copy()
    q_pos[0, 7] = EMPTY
    mask, data = Mask(positions=True), dict(q_pos=jnp.asarray(q_pos), kv_pos=jnp.asarray(kv_pos))
    check(random_qkv(T=100, S=384), mask, blocks=from_mask(mask, 100, 384, **data), **data)


@pytest.mark.parametrize("heads", [pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow), 4])
def test_block_list_by_head(heads):
    """Rows and keys that no tile lists get a gradient of 0."""
    tiles = some_blocks(np.random.default_rng(2), (1, heads, 2, 4), 0.3).at[:, :, 0].set(False)
    blocks = from_blocks(tiles, Mask(), 256, 512, q_offset=256)
    # every head visits the tiles of a list for all: one KV head has enough of them
    qkv = random_qkv(K=1 if heads == 1 else 2, G=2, T=256, S=512)
    dq, dk, dv = check(qkv, blocks=blocks, q_offset=256, visible_by=dict(tiles=tiles))
    assert not np.asarray(dq[:, :, :, :128], np.float32).any()


def test_float16_gradients():
    check(random_qkv(T=128, S=128, dtype=jnp.float16))


@pytest.mark.slow
@pytest.mark.parametrize("D", [80, 96, 200])
def test_other_head_dims_are_padded(D):
    check(random_qkv(T=128, S=128, D=D))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("D", list(ATTEND_GRAD))
@pytest.mark.parametrize("mask", [FULL, Mask(), Mask(window=100, sink=10)])
@pytest.mark.parametrize("listed", [False, True])
def test_every_combination(D, mask, listed):
    data = dict(q_offset=jnp.asarray([100, 60]), kv_len=jnp.asarray([300, 260]))
    about = {}
    if listed:
        tiles = some_blocks(np.random.default_rng(6), (2, 4, 2, 3), 0.5)
        data["blocks"] = from_blocks(tiles, mask, 200, 300, **data)
        about = dict(tiles=tiles)
    check(random_qkv(B=2, K=2, G=2, T=200, S=300, D=D), mask, visible_by=about, **data)


def test_gradients_pass_through_a_merge():
    """lse is differentiated too: the gradient of two merged halves is that of the whole."""
    q, k, v = random_qkv(T=64, S=256)
    weights = jnp.asarray(np.random.default_rng(9).standard_normal(q.shape), jnp.float32)

    def halves(q, k, v):
        run = partial(attend_with_gradient, scale=0.125, mask=FULL)
        return (merge([run(q, k[..., :128], v[:, :, :128]), run(q, k[..., 128:], v[:, :, 128:])]).out * weights).sum()

    grads = interpreted(jax.grad(halves, (0, 1, 2)), seconds=200)(q, k, v)
    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    expected = jax.grad(lambda *qkv: (reference(*qkv, True, 0.125).out * weights).sum(), (0, 1, 2))(*wide)
    for grad, want in zip(grads, expected, strict=True):
        assert np.abs(np.asarray(grad, np.float32) - want).max() <= 1.5e-2 * np.abs(want).max()


def test_the_walk_by_key_visits_what_the_walk_by_query_visits():
    for mask in [FULL, Mask(), Mask(window=1), Mask(window=130, sink=1), Mask(window=300, sink=500)]:
        for offset in (0, 77, 512):
            T, kv_len = 384, min(900, offset + 384)
            forward, backward = np.zeros((3, 8), bool), np.zeros((3, 8), bool)
            for i in range(3):
                walk = mask.walk(offset + 128 * i, offset + 128 * i + 127, kv_len, 128)
                forward[i, [int(walk.tile(j)) for j in range(int(walk.steps))]] = True
            for n in range(8):
                walk = mask.walk_queries(128 * n, 128 * n + 127, offset, T, kv_len, 128)
                backward[[int(walk.tile(j)) for j in range(int(walk.steps))], n] = True
            # by key, the last tile's end is not cut to kv_len: it may name a tile more, never one less
            assert not (forward & ~backward).any(), (mask, offset)
            assert (backward & ~forward).sum() <= 1, (mask, offset)


def test_what_cannot_be_honoured_is_refused():
    q, k, v = random_qkv()
    with pytest.raises(UserError, match="spans"):
        attend_with_gradient(q, k, v, scale=0.125, mask=Mask(spans=True))


CHEAP = {("causal", True), ("all", False)}


def cases():
    for D in ATTEND_GRAD:
        for variant in VARIANTS:
            for listed in (False, True):
                yield pytest.param(D, variant, listed, marks=() if (variant, listed) in CHEAP else pytest.mark.slow)


def compiled(D, variant, listed, tile=None):
    mask, data, static = VARIANTS[variant]
    data = data | (dict(blocks=LIST) if listed else {})
    q, k, v = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in [(B, K, G, T, D), (B, K, D, S), (B, K, S, D)])

    def run(q, k, v, data):
        def loss(q, k, v):
            part = attend_with_gradient(q, k, v, scale=0.1, mask=mask, tile=tile, **data, **static)
            return part.out.astype(jnp.float32).sum() + part.lse.sum()

        return jax.grad(loss, (0, 1, 2))(q, k, v)

    return compile_kernel(run, q, k, v, data)


@pytest.mark.parametrize("D, variant, listed", list(cases()))
def test_every_table_entry_compiles_for_the_h200(D, variant, listed):
    report = compiled(D, variant, listed).check()
    assert report.kernels == (3 if ATTEND_GRAD[D].together else 4), "forward, dq, dk and dv"
