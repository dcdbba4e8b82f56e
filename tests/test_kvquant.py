"""KVQuant: what is stored and read back, its calibration, its file, and with what it goes together.

The float64 oracle is `oracles.kvquant`, written from the paper.
"""

import json
import struct
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import kvquant, positions
from safetensors.numpy import save

from lcx.artefacts import kvquant as calibration
from lcx.artefacts import store
from lcx.artefacts.head_split import split_by_score
from lcx.artefacts.kvquant import Bins, KVQuantTables, Settings
from lcx.axes import Exact
from lcx.cache import Edit, Size, Store, Tokens, shape_bytes
from lcx.codecs.kvquant import BITS, KVQuant, chain
from lcx.codecs.outliers import extremes, num_outliers
from lcx.codecs.packing import codes_per_byte, pack, unpack
from lcx.config_files import load_config
from lcx.ctx import Ctx
from lcx.errors import UserError
from lcx.experiment import Experiment
from lcx.model_config import ModelConfig, Rope
from lcx.models.decoder import Layers, Model, embed_program, logits_program, random_weights
from lcx.ops.attention import EMPTY
from lcx.patterns.quest import Quest
from lcx.policies.duo import duo
from lcx.policies.first import First
from lcx.policies.h2o import H2O
from lcx.policies.snapkv import SnapKV
from lcx.recipe import Recipe, Segment
from lcx.schedules.chunked import Chunked
from lcx.session import Session

TINY = ModelConfig("tiny", 2, 48, 6, 2, 32, 40, 97, 512)
PROMPT, SHORT, NEW = 37, 16, 3
ATOL = 3e-4  # f32 through 2 layers
AGAIN = "again"


@contextmanager
def optimisations(wanted: bool):
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", not wanted)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Programs run once or twice here."""
    with optimisations(False):
        yield


@cache
def layers_of(model=TINY):
    return Layers.of(Model(model, random_weights(model, 1)))


def aux_of(model=TINY):
    """Ranges that the random model's keys leave now and then."""
    aux, _ = KVQuantTables().stand_in(model)
    return [{"arrays": a["arrays"] | {"key_scale": a["arrays"]["key_scale"] * 2.5}} for a in aux]


IDS = np.random.default_rng(0).integers(0, TINY.vocab_size, (2, PROMPT + NEW))


def play(recipe, aux=None, chunk=None, order="attend", model=TINY):
    """Logits [1 + NEW,B,V] of two texts of different lengths, and the session."""
    schedule = None if chunk is None else Chunked(chunk)
    session = Session(layers_of(model), recipe, PROMPT, NEW, aux=aux, batch=2, schedule=schedule, order=order)
    found = [session.prefill(IDS[:, :PROMPT], [PROMPT, SHORT])]
    found += [session.step(IDS[:, i : i + 1]) for i in range(PROMPT, PROMPT + NEW)]
    return np.stack(found), session


# ---- codes


def test_codes_of_three_bits_take_three_eighths_of_a_byte():
    codes = np.random.default_rng(0).integers(0, 8, (2, 48, 5)).astype(np.uint8)
    packed = pack(jnp.asarray(codes), 3, 1)
    assert packed.shape == (2, 18, 5) and packed.dtype == jnp.uint8
    np.testing.assert_array_equal(unpack(packed, 3, 1), codes)
    assert [codes_per_byte(bits) for bits in (8, 4, 3, 2, 1)] == [1, 2, 8, 4, 8]


def tables_of(K, D, seed=0):
    """The codec's arrays of one layer, as a step has them; zeros and widths that float16 holds, levels of no pattern."""
    rng = np.random.default_rng(seed)
    arrays = {
        "key_zero": rng.integers(-64, 65, (K, D)).astype(np.float32) / 64,
        "key_scale": rng.integers(16, 129, (K, D)).astype(np.float32) / 64,
    }
    for name in ("key_levels", "value_levels"):
        arrays[name] = np.zeros((3, 2, 16), np.float32)
        for row, bits in zip(arrays[name], BITS, strict=True):
            levels = np.sort(rng.uniform(-1, 1, 2**bits))
            row[:, : 2**bits] = levels, levels * 1.1 + 0.01
    return arrays


def ctx_of(arrays):
    none = jnp.zeros((1, 1, 1, 1, 1))
    return Ctx(q=none, pos=jnp.zeros((1, 1), jnp.int32), scale=1.0, rotate=lambda x, pos, axis: x, aux=arrays)


@partial(jax.jit, static_argnames=("codec", "total"))
def write_and_read(codec, arrays, written, tokens, *, total):
    B, R, _, D = tokens.k.shape
    keep = Store(codec, Size(R, D, jnp.float32), ctx_of(arrays))
    held = keep.commit(keep.empty(B, 1, total, {}), Edit(written, tokens))
    return held, *keep.tile(held, 0, total)


def through(codec, arrays, k, v, pos, slots=None):
    """Keys and values [B,R,N,D] after they were written to slots in an odd order and read back, and the slots."""
    B, R, N, D = k.shape
    total = N + 4 if slots is None else slots
    at = np.stack([np.random.default_rng(b).permutation(total)[:N] for b in range(B)])[:, None].astype(np.int32)
    written = jnp.where(pos[:, None] == EMPTY, total, at)
    tokens = Tokens(jnp.asarray(k), jnp.asarray(v), jnp.asarray(pos[:, None], jnp.int32))
    held, got_k, got_v = write_and_read(codec, arrays, written, tokens, total=total)
    back = lambda x: np.take_along_axis(np.asarray(x), at[..., None], 2)
    return back(got_k.swapaxes(2, 3)), back(got_v), held


@pytest.mark.parametrize("K", [1, 3, 8])
@pytest.mark.parametrize("bits", BITS)
def test_what_is_read_back_is_the_oracles(bits, K):
    """Odd length, a batch of two with padding, numbers and outliers of several sizes."""
    D, N, share = 16, 33, 0.05
    rng = np.random.default_rng(K)
    k, v = (rng.standard_t(3, (2, K, N, D)).astype(np.float32) for _ in range(2))
    pos, arrays = positions([N, 21], N), tables_of(K, D)
    spare = K - 1
    got_k, got_v, _ = through(KVQuant(bits, share, spare), arrays, k, v, pos)
    side = kvquant.outliers_a_side(K * D, share)
    assert side == num_outliers(share, K * D)
    row = BITS.index(bits)
    levels = lambda name: dict(zip(("table", "levels"), np.float64(arrays[name][row, :, : 2**bits]), strict=True))
    zero, width = (np.float64(arrays[n]).reshape(-1) for n in ("key_zero", "key_scale"))
    settings = {"sinks": 0, "stored": np.float16}
    book = levels("key_levels") | settings
    want_k = kvquant.read_keys(k, pos, zero - width, zero + width, a_side=side + spare, **book)
    want_v = kvquant.read_values(v, pos, a_side=side, **levels("value_levels"), **settings)
    assert want_k.outlier.any() and want_v.outlier.sum() == 2 * side * (N + 21)
    for got, want in ((got_k, want_k), (got_v, want_v)):
        real = np.broadcast_to((pos != EMPTY)[:, None, :, None], got.shape)
        # float32 against float64: a number within 1e-6 of the middle of two levels may take either
        wrong = np.abs(got - want.x)[real] > 1e-5 * (1 + np.abs(want.x[real]))
        assert wrong.mean() < 1e-3


@pytest.mark.parametrize("bits", BITS)
def test_no_number_is_further_off_than_half_a_gap_and_outliers_are_exact(bits):
    K, D, N = 2, 32, 40
    rng = np.random.default_rng(1)
    k, v = (rng.standard_t(3, (1, K, N, D)).astype(np.float16).astype(np.float32) for _ in range(2))
    arrays = tables_of(K, D)
    for name in ("key_levels", "value_levels"):
        arrays[name][:, 1] = arrays[name][:, 0]
    codec = KVQuant(bits, 0.1, 0)
    got_k, got_v, held = through(codec, arrays, k, v, positions([N], N))
    row, n = BITS.index(bits), num_outliers(0.1, K * D)
    for name, x, got, zero, scale in (
        ("key", k, got_k, arrays["key_zero"][:, None], arrays["key_scale"][:, None]),
        ("value", v, got_v, None, None),
    ):
        levels = np.float64(arrays[f"{name}_levels"][row, 0, : 2**bits])
        gap = max(np.diff(levels).max() / 2, levels[0] + 1, 1 - levels[-1])
        flat = np.moveaxis(x, 1, 2).reshape(N, -1)
        if zero is None:
            rest = np.sort(flat, -1)[:, n:-n]
            low, high = rest[:, 0][None, None, :, None], rest[:, -1][None, None, :, None]
            scale, inside = (high - low) / 2, (x >= low) & (x <= high)
            bound = scale * (gap + 2e-3) + 2e-3 * np.abs(x).max()  # float16 zero and width
        else:
            inside, bound = np.abs(x - zero) <= scale, np.broadcast_to(scale * gap + 1e-5, x.shape)
        assert (np.abs(got - x) <= bound)[inside].all()
        # of what lies outside the range, at most n at each end are kept as they are
        above = x > (high if zero is None else zero + scale)
        some = lambda beyond: np.minimum(np.moveaxis(beyond, 1, 2).reshape(N, -1).sum(-1), n).sum()
        exact = (got == x) & ~inside
        assert exact.sum() == some(above) + some(~above & ~inside)
    assert {"k_out", "k_at", "v_out", "v_at"} < held.payload.keys()


def test_equal_numbers_are_not_all_outliers():
    same = jnp.full((3, 20), 2.0)
    at = np.asarray(extremes(same, 2))
    assert all(len(set(row)) == 4 for row in at.tolist())
    v = np.full((1, 2, 5, 16), -3.5, np.float32)
    _, got, held = through(KVQuant(4), tables_of(2, 16), v, v, positions([5], 5))
    np.testing.assert_array_equal(got, v)
    assert held.payload["v_at"].shape[-1] == 2


@pytest.mark.parametrize(
    ("bits", "channels", "keys", "values"),
    [
        (3, (32, 128), 3.328, 3.336),  # the sheet's figures for C = 4,096: index and float16 value of 21 a side
        (4, (8, 128), 4.375, 4.406),  # n = 6 of 1,024 a side
        (2, (8, 128), 2.375, 2.406),
        (4, (3, 64), 4.25, 4.417),  # SmolLM2: n = 1 of 192 a side, indices of 8 bits
    ],
)
def test_bits_are_those_of_index_value_and_range(bits, channels, keys, values):
    R, D = channels
    N = 64
    leaves = KVQuant(bits, spare=0).leaves(Size(R, D, jnp.bfloat16))
    size = {"k": 0, "v": 0}
    for name, leaf in leaves.items():
        size[name[0]] += shape_bytes(jax.eval_shape(lambda leaf=leaf: leaf.zeros(1, R, N)))
    assert 8 * size["k"] / (R * D * N) == pytest.approx(keys, abs=6e-4)
    assert 8 * size["v"] / (R * D * N) == pytest.approx(values, abs=6e-4)


def test_no_outliers_leave_no_places():
    k, v = (np.random.default_rng(i).normal(size=(1, 2, 9, 16)).astype(np.float32) for i in range(2))
    arrays = tables_of(2, 16)
    got_k, got_v, held = through(KVQuant(4, 0.0), arrays, k, v, positions([9], 9))
    assert held.payload.keys() == {"k", "v", "v_zero", "v_scale"}
    many_k, many_v, _ = through(KVQuant(4, 0.1), arrays, k, v, positions([9], 9))
    assert (
        np.abs(got_k - k).mean() >= np.abs(many_k - k).mean() and np.abs(got_v - v).mean() > np.abs(many_v - v).mean()
    )


# ---- in a session


@pytest.mark.parametrize("chunk", [None, 16])
@pytest.mark.parametrize("count", [1, 5, 60])
def test_first_tokens_in_a_segment_of_their_own_change_nothing(count, chunk):
    recipe = Recipe(((Segment("first", policy=First(count)), Segment("rest")),))
    got, session = play(recipe, chunk=chunk)
    np.testing.assert_allclose(got, play(Recipe())[0], atol=ATOL)
    for layer in session.cache:
        pos = np.asarray(layer["first"].pos)[:, 0]
        for row, length in zip(pos, (PROMPT + NEW, SHORT + NEW), strict=True):
            np.testing.assert_array_equal(row[row != EMPTY], np.arange(min(count, length)))


def test_raw_keys_without_rounding_equal_dense_attention():
    exact = [replace(s, codec=Exact()) if s.name == "first" else s for s in chain()]
    exact[1] = replace(exact[1], codec=load_raw())
    np.testing.assert_allclose(play(Recipe((tuple(exact),)))[0], play(Recipe())[0], atol=ATOL)


def load_raw():
    from lcx.axes import RawExact

    return RawExact()


@pytest.mark.parametrize("bits", [3, *(pytest.param(bits, marks=pytest.mark.slow) for bits in (4, 2))])
def test_how_the_prompt_is_cut_does_not_matter_where_all_is_read_as_stored(bits):
    """Positions are right after chunked prefill, and no chunk sees another range."""
    whole, _ = play(Recipe((chain(bits),)), aux_of(), order="write")
    np.testing.assert_allclose(play(Recipe((chain(bits),)), aux_of(), 16, "write")[0], whole, atol=ATOL)
    assert np.abs(whole - play(Recipe())[0]).max() > 10 * ATOL


@pytest.mark.slow
def test_fewer_bits_are_further_from_dense():
    dense = play(Recipe())[0]
    off = [np.abs(play(Recipe((chain(bits),)), aux_of())[0] - dense).mean() for bits in BITS]
    assert off[0] < off[1] < off[2]


def test_bytes_are_those_of_the_arrays():
    _, session = play(Recipe((chain(3),)), aux_of())
    recipe = session.recipe
    assert session.cache_bytes == recipe.bytes(TINY, PROMPT, NEW, aux=aux_of(), batch=2, dtype=jnp.float32)
    assert {x.dtype for x in session.cache[0]["codes"].payload.values()} == {jnp.dtype(t) for t in ("uint8", "float16")}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Recipe((Segment(policy=H2O(9), codec=KVQuant()),)), "KVQuant needs one set of positions.*H2O"),
        (lambda: Recipe((replace_first(compress=SnapKV(21, window=3)),)), "KVQuant needs one set of positions.*SnapKV"),
        (lambda: Recipe((Segment(codec=KVQuant()),), Quest(16)), "KVQuant needs one set of positions.*Quest"),
        (lambda: KVQuant(5), "bits=5: allowed are 4, 3, 2"),
        (lambda: KVQuant(4, 0.5), "outliers=0.5 must be a share"),
        (lambda: KVQuant(spare=-1), "spare=-1"),
        (lambda: First(0), "count=0"),
        (lambda: KVQuant(3).check(Size(2, 12, None)), "head_dim=12 is not a multiple of 8"),
        (lambda: KVQuant(4).check(Size(1_024, 64, None)), "allowed are 65,535 channels"),
        (lambda: KVQuantTables(q_norm=(5,)), "q_norm"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(make, message):
    with pytest.raises(UserError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def replace_first(**changes):
    first, codes = chain()
    return replace(first, **changes), codes


def test_a_recipe_without_its_arrays_is_refused():
    with pytest.raises(UserError, match="aux has no array 'key_zero' in layer 0"):
        Session(layers_of(), Recipe((chain(),)), PROMPT)


def test_duo_attention_with_kvquant():
    """Each segment quantises values over its own heads, and takes its own rows of the key ranges."""
    split = split_by_score([[1, 0], [0, 1]], 0.5)
    aux = [a | b for a, b in zip(aux_of(), split, strict=True)]
    quantised, _ = play(Recipe(duo(2, 60, KVQuant(4))), aux)
    exact, _ = play(Recipe(duo(2, 60)), split)
    assert 10 * ATOL < np.abs(quantised - exact).max() < 3
    assert np.isfinite(quantised).all()


def test_config_and_flag():
    assert load_config("configs/kvquant.py").recipe == Recipe((chain(4, 0.01, 3, 1),))
    changed = load_config("configs/kvquant.py", {"recipe.segments.0.1.codec.bits": "3"})
    assert changed.recipe == Recipe((chain(3),))


# ---- calibration


def test_gradients_are_those_of_the_loss():
    """Against differences of the summed NLL, computed by the same layers without gradients; residual streams against a session's."""
    layers = layers_of()
    ids = IDS[0, :21]
    config = layers.config
    streams, _ = calibration.forward(layers, ids)
    want = Session(layers, Recipe(), 21).prefill(ids, rows="all")
    np.testing.assert_allclose(streams[-1], want, atol=ATOL)
    grads = {i: (dk, dv) for i, _, _, dk, dv in calibration.gradients(layers, ids)}

    def loss(layer, which, token, channel, step):
        x = embed_program(layers.embed, jnp.asarray(ids)[None], scale=config.embed_scale)
        for i in range(config.num_layers):
            state, static = calibration._statics(layers, i)
            shift = np.zeros((1, config.num_kv_heads, len(ids), config.head_dim), np.float32)
            moved = shift.copy()
            if i == layer:
                moved[0, channel // config.head_dim, token, channel % config.head_dim] = step
            pair = (moved, shift) if which == 0 else (shift, moved)
            x, _, _ = calibration.layer_program(state, x, *pair, **static)
        logits = logits_program(x[0, :-1], layers.norm, layers.head, eps=config.norm_eps, tied=config.tied)
        logits = np.asarray(logits, np.float64)
        top = logits.max(-1)
        return (np.log(np.exp(logits - top[:, None]).sum(-1)) + top - logits[np.arange(20), ids[1:]]).sum()

    for layer, which, token, channel in [(0, 0, 3, 5), (0, 1, 0, 40), (1, 0, 11, 63), (1, 1, 19, 17)]:
        step = 1e-2
        difference = (loss(layer, which, token, channel, step) - loss(layer, which, token, channel, -step)) / (2 * step)
        assert grads[layer][which][token, channel] == pytest.approx(difference, rel=2e-2, abs=2e-3)


@pytest.mark.parametrize("bits", BITS)
def test_codebooks_are_as_good_as_the_oracles(bits):
    rng = np.random.default_rng(bits)
    x = np.clip(rng.normal(0, 0.4, 6_000), -1, 1)
    weight = rng.exponential(size=6_000) * (1 + 3 * (x > 0.3))
    inlier = rng.uniform(size=6_000) < 0.9
    bins = Bins()
    for part in np.array_split(np.arange(6_000), 3):
        bins.add(x[part], weight[part], inlier[part])
    book = bins.codebook(bits, 50)
    x, weight = x[inlier], weight[inlier]
    want = kvquant.kmeans(x, weight, kvquant.quantile_start(x, weight, 2**bits), 50)
    np.testing.assert_allclose(book, want, atol=3e-3)  # bins are 2.4e-4 wide
    errors = [kvquant.weighted_error(x, weight, t) for t in (book, want)]
    assert errors[0] <= errors[1] * 1.002
    np.testing.assert_allclose(bins.levels(book), kvquant.q_norm(x, book), atol=2e-3)


def test_calibration_of_a_tiny_model_equals_the_oracles():
    """Ranges, and the codebook of one layer, from the same keys, values and gradients."""
    layers, bits = layers_of(), 2
    pieces = np.random.default_rng(3).integers(0, TINY.vocab_size, (3, 64))
    settings = Settings(tokens=192, piece=64, outliers=0.05)
    arrays = calibration.tables(layers, pieces, settings)
    one = [dict((i, rest) for i, *rest in calibration.gradients(layers, ids)) for ids in pieces]
    as_heads = lambda x: np.moveaxis(np.stack(x).reshape(3, 64, TINY.num_kv_heads, TINY.head_dim), 2, 1)
    pos, side = positions([64] * 3, 64), num_outliers(0.05, 64)
    for layer in range(TINY.num_layers):
        k, v, dk, dv = (as_heads([piece[layer][j] for piece in one]) for j in range(4))
        low, high = kvquant.key_ranges(k, pos, 0.05)
        np.testing.assert_allclose(arrays["key_zero"][layer].reshape(-1), (low + high) / 2, atol=1e-5)
        np.testing.assert_allclose(arrays["key_scale"][layer].reshape(-1), (high - low) / 2, atol=1e-5)
        for name, (x, w) in {
            "key": kvquant.key_samples(k, pos, low, high, dk**2),
            "value": kvquant.value_samples(v, pos, side, dv**2),
        }.items():
            want = kvquant.kmeans(x, w, kvquant.quantile_start(x, w, 2**bits))
            got = arrays[f"{name}_codebook_{bits}"][layer]
            assert kvquant.weighted_error(x, w, got) <= 1.01 * kvquant.weighted_error(x, w, want)
            np.testing.assert_allclose(arrays[f"{name}_levels_{bits}"][layer], kvquant.q_norm(x, got), atol=5e-3)


@pytest.mark.parametrize(
    "changes", [{"tokens": 100}, {"piece": 1}, {"outliers": 0.5}, {"weight": "mass"}, {"tokens": 0}]
)
def test_settings_out_of_range_are_refused(changes):
    with pytest.raises(UserError, match=next(iter(changes))):
        Settings(**changes)


# ---- the file


def record_of(**changes):
    text = "pride_and_prejudice"
    found = {
        "format": store.FORMAT,
        "method": "kvquant",
        "model": "tiny",
        "config_name": "tiny",
        "config_sha256": store.config_sha256(TINY),
        "model_sha256": "ab" * 32,
        "text": text,
        "text_sha256": store.texts.TEXTS[text].sha256,
        "settings": {},
        "seed": 0,
        "versions": {},
        "command": "python -m experiments.calibrate",
    }
    return found | changes


def arrays_of():
    L, K, D = TINY.num_layers, TINY.num_kv_heads, TINY.head_dim
    found = {"key_zero": np.zeros((L, K, D), np.float32), "key_scale": np.ones((L, K, D), np.float32)}
    for name in ("key", "value"):
        for bits in BITS:
            for kind in ("codebook", "levels"):
                found[f"{name}_{kind}_{bits}"] = np.tile(np.linspace(-1, 1, 2**bits, dtype=np.float32), (L, 1))
    return found


def test_a_file_is_read_as_it_was_written(tmp_path):
    file, arrays = tmp_path / "a.safetensors", arrays_of()
    arrays["key_levels_2"] = arrays["key_levels_2"] * 2
    assert store.write(file, arrays, record_of()) == file.stat().st_size
    found = store.read(file, "kvquant", AGAIN)
    assert found.record == record_of()
    for name, x in arrays.items():
        np.testing.assert_array_equal(found.arrays[name], x)
    aux = KVQuantTables(str(file)).load(TINY)
    Recipe((chain(),)).check(TINY, aux)
    levels = aux[1]["arrays"]["key_levels"]
    want = [[-1, -1 / 3, 1 / 3, 1], [-2, -2 / 3, 2 / 3, 2]]
    np.testing.assert_allclose(levels[BITS.index(2), :, :4], want, rtol=1e-6)
    np.testing.assert_array_equal(KVQuantTables(str(file), q_norm=()).load(TINY)[1]["arrays"]["key_levels"][2, 1, 3], 1)
    KVQuantTables(str(file)).check_weights(TINY, "ab" * 32)


MORE = {"key_zero": np.full((2, 2, 32), np.nan, np.float32)}
RECORDS = [
    ({"method": "gates"}, "allowed is format 1 of 'kvquant'"),
    ({"format": 2}, "has format 2"),
    ({"model_sha256": 3}, "its record has no 'model_sha256' of type str"),
    ({"seed": True}, "'seed' of type int"),
    ({"text": "moby_dick"}, "text 'moby_dick'"),
    ({"text_sha256": "00"}, "sha256 00"),
    ({"config_sha256": "00"}, "whose sizes and settings are not those of 'tiny'"),
]


@pytest.mark.parametrize(("changes", "message"), RECORDS)
def test_a_record_that_does_not_fit_is_refused_in_one_line(tmp_path, changes, message):
    file = tmp_path / "a.safetensors"
    store.write(file, arrays_of(), record_of(**changes))
    with pytest.raises(UserError, match=message) as error:
        KVQuantTables(str(file)).load(TINY)
    assert "\n" not in str(error.value)


def test_other_weights_are_refused(tmp_path):
    file = tmp_path / "a.safetensors"
    store.write(file, arrays_of(), record_of())
    with pytest.raises(UserError, match=r"is for model 'tiny' with sha256 abab.*the weights have cdcd"):
        Experiment(Recipe((chain(),)), aux=KVQuantTables(str(file))).check_weights(TINY, "cd" * 32)
    Experiment(Recipe()).check_weights(TINY, "cd" * 32)


def header(text: str, length=None) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw


HOSTILE = {
    "empty": b"",
    "text": b"not a safetensors file at all",
    "pickle": b"\x80\x04cos\nsystem\n(S'true'\ntR.",
    "a length beyond the file": header("{}", 1 << 62),
    "no record": save({"x": np.zeros(3, np.float32)}),
    "a record that is no JSON": save({"x": np.zeros(3, np.float32)}, {"lcx": "{"}),
    "a record that is a list": save({"x": np.zeros(3, np.float32)}, {"lcx": "[]"}),
    "a record of many brackets": save({"x": np.zeros(3, np.float32)}, {"lcx": "[" * 60_000}),
    "a long record": save({"x": np.zeros(3, np.float32)}, {"lcx": json.dumps({"a": "b" * 70_000})}),
    "metadata that is no mapping": header('{"__metadata__":[1]}'),
    "offsets outside": header('{"x":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}'),
    "nan": save(arrays_of() | MORE, {"lcx": json.dumps(record_of())}),
    "another shape": save(arrays_of() | {"key_zero": np.zeros(4, np.float32)}, {"lcx": json.dumps(record_of())}),
    "an unknown array": save(arrays_of() | {"x": np.zeros(4, np.float32)}, {"lcx": json.dumps(record_of())}),
    "no array": save({}, {"lcx": json.dumps(record_of())}),
    "another type": save(arrays_of() | {"key_zero": np.zeros((2, 2, 32))}, {"lcx": json.dumps(record_of())}),
    "scale of zero": save(
        arrays_of() | {"key_scale": np.zeros((2, 2, 32), np.float32)}, {"lcx": json.dumps(record_of())}
    ),
    "falling levels": save(
        arrays_of() | {"key_codebook_2": -arrays_of()["key_codebook_2"]}, {"lcx": json.dumps(record_of())}
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_gives_one_line(tmp_path, name):
    file = tmp_path / "a.safetensors"
    file.write_bytes(HOSTILE[name])
    with pytest.raises(UserError) as error:
        KVQuantTables(str(file)).load(TINY)
    assert (
        "\n" not in str(error.value) and str(file) in str(error.value) and len(str(error.value)) < 400 + len(str(file))
    )


def test_missing_and_oversized_files_give_one_line(tmp_path):
    for path, message in ((tmp_path / "none", "cannot be read"), (tmp_path, "cannot be read")):
        with pytest.raises(UserError, match=message):
            KVQuantTables(str(path)).load(TINY)
    big = tmp_path / "big"
    with big.open("wb") as file:
        file.truncate(store.MAX_BYTES + 1)
    with pytest.raises(UserError, match="allowed are"):
        KVQuantTables(str(big)).load(TINY)
    with pytest.raises(UserError, match="cannot be written"):
        store.write(tmp_path / "no" / "a", arrays_of(), record_of())


def test_a_model_without_a_file_is_told_how_to_make_one():
    with pytest.raises(UserError, match=r"model='tiny' has no calibrated file.*--method=kvquant"):
        KVQuantTables().load(TINY)
    aux, note = KVQuantTables().stand_in(TINY)
    Recipe((chain(),)).check(TINY, aux)
    assert "not calibrated" in note


# ---- memory


LLAMA3_8B = ModelConfig("llama3-8b", 1, 4_096, 32, 8, 128, 14_336, 128_256, 131_072, rope=Rope(5e5), tied=False)


@pytest.mark.parametrize(("phase", "tokens", "gib"), [("decode", 1, 0.1), ("prefill", 2_048, 0.75)])
def test_a_long_cache_is_written_in_place(phase, tokens, gib):
    """Llama-3-8B's shapes, 131,072 slots, compiled for the CPU and not run: a copy of the codes would show as scratch memory."""
    with optimisations(True):
        plan, cache_bytes = memory_plan(phase, tokens, jnp.float32, None)
    assert plan.alias_size_in_bytes > 0.95 * cache_bytes
    assert plan.temp_size_in_bytes <= gib * 2**30, f"{plan.temp_size_in_bytes / 2**30:.3f} GiB"


def memory_plan(phase, tokens, dtype, target, bits=4):
    """XLA's memory plan of one block, and the bytes of its cache."""
    from test_memory import shapes_of

    from lcx.backends.choose import resolve
    from lcx.plan.targets import compile_for
    from lcx.programs import block_program

    aux, _ = KVQuantTables().stand_in(LLAMA3_8B)
    implementation = resolve(None, target.capability if target else None)
    layers, recipe = shapes_of(LLAMA3_8B, dtype), Recipe((chain(bits),))
    session = Session(layers, recipe, LLAMA3_8B.context, 0, aux=aux, implementation=implementation)
    held = jax.eval_shape(lambda: session.empty(phase, 0))
    x, step = session.step_shape(tokens)
    args, static = session.block_call(phase, 0, x, step, held)
    return compile_for(target, block_program, args, static).memory_analysis(), shape_bytes(held)
