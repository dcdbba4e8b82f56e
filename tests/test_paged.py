"""Pages in a cache: what is written equals float64 oracles, and a decode step over them goes through the kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_kernel_decode import PAYLOADS, dequantised

from lcx.artefacts.head_split import split_by_score
from lcx.axes import KeepAll
from lcx.backends.choose import AUTO, attend
from lcx.bench.interpret import interpreted
from lcx.cache import Edit, Size, Store, Tokens
from lcx.codecs.paged import Paged, chain
from lcx.ctx import Step
from lcx.errors import UserError
from lcx.layer import held_source
from lcx.model_config import ModelConfig
from lcx.models.decoder import Layers, Model, random_weights
from lcx.ops.attention import EMPTY
from lcx.ops.masks import Near
from lcx.policies.duo import duo
from lcx.policies.flush import Flush
from lcx.programs import block_program
from lcx.recipe import Recipe, Segment
from lcx.session import Session
from lcx.storage import Shape
from pallas_kernels.payloads import FLOATS, pack_pages, page_bytes, read_pages

CODECS = [Paged(p.kind, p.by) for p in PAYLOADS if not p.exact]
B, R, N = 2, 2, 192
each_codec = pytest.mark.parametrize("codec", CODECS, ids=lambda c: f"{c.kind}-{c.by}")


def normal(seed, *shape):
    """float32 normal numbers; channels differ in mean and spread, as those of real keys do."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=shape) * np.exp(rng.normal(size=shape[-1])) + 2 * rng.normal(size=shape[-1])).astype(
        np.float32
    )


def written(codec, k, v, used=None):
    """(store, slots) that hold k, v [B,R,N,D]: the first used[b] tokens of row b."""
    used = np.full(len(k), k.shape[2]) if used is None else np.asarray(used)
    store = Store(codec, Size(k.shape[1], k.shape[3], jnp.float32))
    places = np.arange(k.shape[2])
    pos = jnp.asarray(np.where(places < used[:, None], places, EMPTY)[:, None], jnp.int32)
    empty = store.empty(len(k), 1, k.shape[2], {})
    tokens = Tokens(jnp.asarray(k), jnp.asarray(v), pos)
    return store, store.commit(empty, Edit(jnp.asarray(places)[None, None], tokens))


def oracle(store, slots):
    """float64 k, v [B,R,N,D] by the formulas of `pack_pages`, one value at a time in effect; codes as they lie are read."""
    B, R, n = slots.payload["k"].shape[:3]
    found = dequantised(store.codec.pages(slots.payload))
    return [x[..., : store.size.head_dim].reshape(B, R, n * 64, -1) for x in found]


@pytest.mark.parametrize("head_dim", [80, *(pytest.param(d, marks=pytest.mark.slow) for d in (64, 128, 256))])
@each_codec
def test_a_tile_is_what_the_pages_say(codec, head_dim):
    k, v = normal(0, B, R, N, head_dim), normal(1, B, R, N, head_dim)
    store, slots = written(codec, k, v)
    want = oracle(store, slots)
    k_read, v_read = store.tile(slots, 64, 128)
    for x, got in zip(want, (np.asarray(k_read).swapaxes(2, 3), v_read), strict=True):
        np.testing.assert_allclose(got, x[:, :, 64:], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("payload", PAYLOADS, ids=lambda p: f"{p.kind}-{p.by}")
def test_every_payload_is_read_back(payload):
    k, v = normal(0, B, R, 100, 64), normal(1, B, R, 100, 64)
    pages, table = pack_pages(jnp.asarray(k).swapaxes(2, 3), jnp.asarray(v), payload)
    for got, want in zip(read_pages(pages), dequantised(pages), strict=True):
        np.testing.assert_allclose(np.asarray(got)[table[1, 1, 0]], want[table[1, 1, 0]], rtol=1e-6, atol=1e-5)


def groups(codec, name, x):
    """`x` [B,R,N,D] with the values that share a scale on the last axis."""
    if name == "k" and codec.by == "channel":
        x = x.reshape(*x.shape[:2], -1, 64, x.shape[3]).swapaxes(3, 4)
    return x


@pytest.mark.parametrize("shift", [0.0, 100.0])
@each_codec
def test_the_error_is_half_a_step_and_float16_rounding(codec, shift):
    k, v = normal(0, B, R, N, 80) + np.float32(shift), normal(1, B, R, N, 80)
    for name, x, read in zip("kv", (k, v), oracle(*written(codec, k, v)), strict=True):
        x, read = groups(codec, name, x.astype(np.float64)), groups(codec, name, read)
        low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
        largest = np.maximum(np.abs(low), np.abs(high))
        if codec.kind == "fp8":
            # 3 bits of mantissa; below 2^-6 of the type, half of its smallest step of 2^-9
            bound = np.maximum(np.abs(x) * 2.0**-4, largest / 448 * 2.0**-10) + largest * 2.0**-11
        else:
            step = (high - low) / (2**codec.payload.bits - 1)
            # of the zero point, and of the scale for the largest code
            bound = step / 2 + np.maximum(np.abs(low), step) * 2.0**-11 + (high - low) * 2.0**-10
        assert (np.abs(x - read) <= bound + 1e-6).all()
        # and not better than what such a format can be: it does round
        assert np.abs(x - read).max() >= bound.max() / 50


@pytest.mark.parametrize("garbage", [np.nan, *(pytest.param(x, marks=pytest.mark.slow) for x in (1e4, -1e4, np.inf))])
@each_codec
def test_places_without_a_token_do_not_widen_a_page(codec, garbage):
    k, v = normal(0, B, R, N, 64), normal(1, B, R, N, 64)
    hidden = (np.arange(N) >= np.asarray([[70], [128]]))[:, None, :, None]
    clean = written(codec, np.where(hidden, 0, k), np.where(hidden, 0, v), [70, 128])[1]
    dirty = written(codec, np.where(hidden, garbage, k), np.where(hidden, garbage, v), [70, 128])[1]
    jax.tree.map(np.testing.assert_array_equal, dirty.payload, clean.payload)
    for x, read in zip((k, v), oracle(*written(codec, k, v, [70, 128])), strict=True):
        alone = oracle(*written(codec, x[:1, :, :64], x[:1, :, :64]))[0 if x is k else 1]
        np.testing.assert_array_equal(read[:1, :, :64], alone)


@pytest.mark.parametrize("sign", [1, -1])
@each_codec
def test_numbers_beyond_float16_stay_finite(codec, sign):
    k = normal(0, B, R, N, 64)
    k[:, :, ::7, ::3] = sign * 3e38
    for read in oracle(*written(codec, k, k)):
        assert np.isfinite(read).all()
        assert (read[:, :, ::7, ::3] * sign > 6e4).all()


def test_bits_a_value_are_the_documented_ones():
    for codec, bits in ((Paged("int4"), 4.375), (Paged("int4", "token"), 4.25), (Paged("fp8", "token"), 8.125)):
        store = Store(codec, Size(1, 128, jnp.bfloat16))
        arrays = store.empty(1, 1, 256, {}).payload.values()
        assert sum(x.nbytes for x in arrays) * 8 == bits * 2 * 256 * 128 == 8 * 4 * page_bytes(codec.payload, 128)


# through the kernel


def queries(G, T, D, pos):
    q = jnp.asarray(np.random.default_rng(5).normal(size=(B, R, G, T, D)), jnp.bfloat16)
    return q, jnp.asarray(pos, jnp.int32)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("codec", "head_dim", "T", "implementation"),
    [
        pytest.param(Paged("int4"), 64, 1, "pallas", marks=pytest.mark.slow),
        (Paged("int4", "token"), 80, 3, AUTO),
        pytest.param(Paged("fp8"), 64, 3, AUTO, marks=pytest.mark.slow),
        pytest.param(Paged("int8"), 128, 1, "pallas", marks=pytest.mark.slow),
        pytest.param(Paged("int2", "token"), 128, 9, AUTO, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_decode_step_reads_the_pages(codec, head_dim, T, implementation):
    """Rows of unequal length, one query of padding; every query sees all that is held."""
    used = [192, 65]
    k, v = normal(0, B, R, N, head_dim), normal(1, B, R, N, head_dim)
    store, slots = written(codec, k, v, used)
    pos = np.asarray(used)[:, None] + np.arange(T)
    if T > 1:
        pos[1, -1] = EMPTY
    q, pos = queries(2, T, head_dim, pos)
    scale = 0.3 * head_dim**-0.5
    # `interpreted` fails where no kernel runs
    run = lambda q, slots, pos: attend(q, [held_source(store, slots)], pos, scale=scale, implementation=implementation)
    got = interpreted(run)(q, slots, pos)
    keys, values = oracle(store, slots)
    for b, r, t in np.ndindex(B, R, T):
        if pos[b, t] == EMPTY:
            assert (got.out[b, r, :, t] == 0).all() and np.isneginf(got.lse[b, r, :, t]).all()
            continue
        s = np.asarray(q[b, r, :, t], np.float64) @ keys[b, r, : used[b]].T * scale
        top = s.max(-1, keepdims=True)
        p = np.exp(s - top)
        want = p @ values[b, r, : used[b]] / p.sum(-1, keepdims=True)
        assert np.abs(got.out[b, r, :, t] - want).max() <= 1e-2 * np.abs(want).max()
        np.testing.assert_allclose(got.lse[b, r, :, t], np.log(p.sum(-1)) + top[:, 0], atol=2e-3)


@pytest.mark.timeout(300)
def test_a_layer_of_a_session_decodes_through_the_kernels():
    """Retrieval heads in pages beside streaming heads: every source of the step goes through a kernel, and the cache is written alike."""
    config = ModelConfig("paged", 1, 64, 4, 2, 64, 64, 97, 512)
    weights = {n: x.astype(jnp.bfloat16) for n, x in random_weights(config, seed=0).items()}
    recipe = Recipe((chain("int4", "token", residual=8, heads="retrieval"), duo(4, 20)[1]))
    session = Session(Layers.of(Model(config, weights)), recipe, 150, 4, aux=split_by_score([[1, 0]], 0.5))
    session.prefill(np.random.default_rng(0).integers(0, 97, 150))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 1, 64)), jnp.bfloat16)
    step = Step(jnp.full((1, 1), 150, jnp.int32), jnp.zeros(1, jnp.int32))
    args, static = session.block_call("decode", 0, x, step, session.cache[0])
    assert int((session.cache[0]["pages"].pos != EMPTY).sum()) == 128
    run = {name: static | {"implementation": name} for name in ("xla", "pallas")}
    want = jax.jit(lambda *a: block_program(*a, **run["xla"]))(*args)
    got = interpreted(lambda *a: block_program(*a, **run["pallas"]))(*args)
    np.testing.assert_allclose(np.float32(got[0]), np.float32(want[0]), atol=0.02 * np.abs(np.float32(want[0])).max())
    jax.tree.map(np.testing.assert_array_equal, got[1], want[1])


def test_what_the_kernel_does_not_serve_is_left_to_xla_or_refused():
    k, v = normal(0, B, R, N, 64), normal(1, B, R, N, 64)
    store, slots = written(Paged("int4"), k, v)
    for G, T, mask in ((2, 65, None), (1, 1, Near(9))):
        q, pos = queries(G, T, 64, np.full((B, 1), N) + np.arange(T))
        source = held_source(store, slots)
        want = attend(q, [source], pos, scale=0.1, mask=mask)
        got = attend(q, [source], pos, scale=0.1, mask=mask, implementation=AUTO)
        jax.tree.map(np.testing.assert_array_equal, got, want)
        with pytest.raises(UserError, match="decoded by XLA, but for decode over pages"):
            attend(q, [source], pos, scale=0.1, mask=mask, implementation="pallas")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Paged("int3"), "kind='int3': allowed are fp8, int8, int4, int2"),
        (lambda: Paged("bf16"), "kind='bf16': allowed are fp8, int8, int4, int2"),
        (lambda: Paged("int4", "head"), "by='head': allowed are channel, token"),
        (lambda: Paged().check(Size(1, 320, jnp.float32)), "head_dim=320: pages hold 1 ... 256 channels"),
        (lambda: chain(residual=-1), "keep=-1 must be an integer of at least 0"),
        (lambda: Recipe((Segment(codec=Paged()),)), "Paged encodes pages of 64 tokens; put a segment before it"),
    ],
)
def test_bad_arguments_give_one_line(make, message):
    with pytest.raises(UserError, match=message) as found:
        make()
    assert "\n" not in str(found.value)


def test_the_chain_holds_every_token_once():
    tail, pages = chain()
    assert tail.policy == Flush(page=64, keep=64) and isinstance(pages.policy, KeepAll)
    assert pages.codec == Paged("int4", "channel") and FLOATS["fp8"] == jnp.float8_e4m3fn
    config = ModelConfig("paged", 1, 64, 4, 2, 64, 64, 97, 512)
    sizes = Recipe((chain(residual=10),)).capacities("decode", 0, Shape(config, 200))
    assert sizes == {"tail": 74, "pages": 128}
