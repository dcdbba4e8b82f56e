"""Codecs against plain numpy that shares no code with lcx: what is stored, what is read back, and attention over it.

The oracles work number by number in float64.  Exact comparisons use a lattice of numbers whose scales stay away from the ties of float16
and whose quotients are ties or far from one: there float32 and float64 must agree, and at a tie both codes are right.  Other numbers are
held to the bound on the error.
"""

import itertools
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from naive_model import Held as Memory
from naive_model import NaiveModel
from tiny import ATOL, TINY, layers, poison, text, weights
from tiny import quick_compilation as quick_compilation

from lcx.axes import Exact, KeepAll
from lcx.cache import Edit, Held, Size, Store, Tokens
from lcx.codecs.exact import Cast
from lcx.codecs.int_token import Int
from lcx.codecs.kivi import Kivi, chain
from lcx.codecs.packing import pack, unpack
from lcx.errors import UserError
from lcx.layer import held_source
from lcx.ops.attention import EMPTY, attend
from lcx.policies.flush import Flush
from lcx.policies.snapkv import SnapKV
from lcx.recipe import Recipe, Segment
from lcx.schedules.chunked import Chunked
from lcx.session import Session
from lcx.storage import Shape

CONFIG = replace(TINY, num_layers=2)
TOP16 = 65_504.0  # float16's largest
B, R, N, D = 2, 3, 24, 16

INTS = [Int(8), Int(4), Int(2), Int(4, group_size=4), Int(2, group_size=8)]
KIVIS = [Kivi(2, 8), Kivi(4, 8), Kivi(2, 4)]
# exponent and mantissa bits, code of the largest finite number
FLOATS = {
    "float32": None,
    "bfloat16": (8, 7, 0x7F7F),
    "float16": (5, 10, 0x7BFF),
    "float8_e4m3": (4, 3, 0x7E),
    "float8_e5m2": (5, 2, 0x7B),
}


# ---- oracles


def half(x):
    """float16 of one number, kept inside its range."""
    return np.float16(min(max(x, -TOP16), TOP16))


def step16(x):
    """The distance between neighbours of float16 at x."""
    return max(2.0 ** (np.frexp(float(x))[1] - 11), 2.0**-24)


def group_quotients(x, bits):
    """(x - minimum) / scale of the numbers that share them, scale and minimum; 8 bits are symmetric and have no minimum."""
    x = [float(value) for value in x]
    if bits == 8:
        scale, minimum, low, high = half(max(abs(v) for v in x) / 127), np.float16(0), -127, 127
    else:
        minimum, low, high = half(min(x)), 0, 2**bits - 1
        scale = half(max(0.0, max(x) - float(minimum)) / high)
    step = float(scale)
    return np.array([min(max((v - float(minimum)) / step, low), high) if step > 0 else 0.0 for v in x]), scale, minimum


def groups_of(codec, name, tokens, channels):
    """((token, channel) slices, place of its scale [token or page, channel or group]) of every group of a head."""
    per = channels if isinstance(codec, Int) and codec.group_size is None else codec.group_size
    if isinstance(codec, Kivi) and name == "k":
        return [((slice(i * per, i * per + per), j), (i, j)) for i, j in np.ndindex(tokens // per, channels)]
    return [((i, slice(j * per, j * per + per)), (i, j)) for i, j in np.ndindex(tokens, channels // per)]


def packed(codes, bits):
    """Codes [D,N] in bytes: byte i holds the codes i, i + n, i + 2n ..., the first in its lowest bits."""
    if bits == 8:
        return codes.astype(np.int8)
    n = len(codes) * bits // 8
    found = np.zeros((n, codes.shape[1]), int)
    for i, j in itertools.product(range(n), range(8 // bits)):
        found[i] += codes[i + j * n] * 2 ** (bits * j)
    return found.astype(np.uint8)


def unpacked(found, bits):
    return np.concatenate([found.astype(int) // 2 ** (bits * j) % 2**bits for j in range(8 // bits)])


def head_parts(codec, payload):
    """(name, codes, scale, minimum) of keys and of values, tokens first, from one KV head's payload, whose keys are channel-major."""
    for name in ("k", "v"):
        turn = np.transpose if name == "k" else np.asarray
        codes = turn(payload[name])
        codes = codes.astype(int) if codec.bits == 8 else unpacked(codes.T, codec.bits).T
        scale = turn(payload[name + "_scale"])
        minimum = turn(payload[name + "_min"]) if codec.bits < 8 else np.zeros_like(scale)
        assert scale.dtype == minimum.dtype == np.float16
        yield name, codes, scale, minimum


@cache
def finite_numbers(name):
    """The non-negative numbers of a float type, in the order of their codes."""
    exponent_bits, mantissa_bits, last = FLOATS[name]
    bias = 2 ** (exponent_bits - 1) - 1
    code = np.arange(last + 1)
    exponent, mantissa = code >> mantissa_bits, (code % 2**mantissa_bits) / 2.0**mantissa_bits
    return np.where(exponent == 0, mantissa * 2.0 ** (1 - bias), (1 + mantissa) * 2.0 ** (exponent - float(bias)))


def head_values(codec, payload):
    """k, v [n,D] of one head's payload, and how far each may be from what was encoded: half a step and float16's rounding."""
    if isinstance(codec, Exact):
        k, v = (np.asarray(x).astype(np.float64) for x in (payload["k"].T, payload["v"]))
        if not isinstance(codec, Cast):
            return k, v, 0 * k, 0 * v
        _, digits, _ = FLOATS[codec.dtype]
        return k, v, *(np.abs(x) * 2.0**-digits + finite_numbers(codec.dtype)[1] for x in (k, v))
    values, slacks = [], []
    for name, codes, scale, minimum in head_parts(codec, payload):
        value, slack = np.zeros(codes.shape), np.zeros(codes.shape)
        for numbers, place in groups_of(codec, name, *codes.shape):
            value[numbers] = codes[numbers] * float(scale[place]) + float(minimum[place])
            rounding = (2**codec.bits - 1) * step16(scale[place]) + step16(minimum[place])
            slack[numbers] = (float(scale[place]) + rounding) / 2
        values.append(value)
        slacks.append(slack)
    return *values, *slacks


@cache
def program(codec):
    """(encode, decode) as layers run them: compiled."""
    encode = lambda tokens: codec.encode(None, tokens, None)
    return jax.jit(encode), jax.jit(lambda payload: codec.decode(None, payload, None))


def encode(codec, k, v, valid=None):
    valid = np.ones((len(k), 1, k.shape[2]), bool) if valid is None else valid
    pos = np.where(valid, np.arange(k.shape[2]), EMPTY).astype(np.int32)
    return jax.tree.map(np.asarray, program(codec)[0](Tokens(*(jnp.asarray(x, jnp.float32) for x in (k, v)), pos)))


def decode(codec, payload):
    """k and v as [B,R,N,D] float64."""
    k, v = program(codec)[1](payload)
    return np.asarray(k, np.float64).swapaxes(2, 3), np.asarray(v, np.float64)


def lattice(seed, exponent):
    """Multiples of 2**(exponent - 3) in +-16 * 2**exponent; some groups constant, some channels far off."""
    rng = np.random.default_rng(seed)
    x = rng.integers(-128, 129, (2, B, R, N, D)) / 8.0
    x[:, :, :, :, rng.integers(D)] = rng.integers(-128, 129) / 8.0
    x[:, :, 0, rng.integers(N)] = rng.integers(-128, 129) / 8.0
    x[:, 0, 1, :8] = 0.0
    return x * 2.0**exponent


numbers = {"seed": st.integers(0, 10_000), "exponent": st.integers(-6, 7)}


# ---- packing


@given(data=st.data(), bits=st.sampled_from([2, 4]), axis=st.integers(0, 2))
def test_packing_keeps_every_code(data, bits, axis):
    shape = [3, 2, 5]
    shape[axis] = 8
    size = int(np.prod(shape))
    codes = np.array(data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=size, max_size=size)), np.uint8).reshape(
        shape
    )
    found = pack(codes, bits, axis)
    assert found.dtype == jnp.uint8 and found.shape[axis] == 8 * bits // 8
    np.testing.assert_array_equal(unpack(found, bits, axis), codes)
    flat = np.moveaxis(codes, axis, 0).reshape(8, -1).astype(int)
    np.testing.assert_array_equal(np.moveaxis(np.asarray(found), axis, 0).reshape(bits, -1), packed(flat, bits))


# ---- what is stored and what is read


@pytest.mark.parametrize("codec", INTS + KIVIS, ids=str)
@settings(max_examples=8)
@given(**numbers)
def test_codes_scales_and_minima_equal_the_oracle(codec, seed, exponent):
    k, v = lattice(seed, exponent)
    got = encode(codec, k, v)
    k_read, v_read = decode(codec, got)
    for b, r in np.ndindex(B, R):
        payload = {n: a[b, r] for n, a in got.items()}
        for name, codes, scale, minimum in head_parts(codec, payload):
            x = {"k": k, "v": v}[name][b, r]
            for group, place in groups_of(codec, name, N, D):
                quotients, *wanted = group_quotients(x[group], codec.bits)
                assert [scale[place], minimum[place]] == wanted, (name, group)
                assert (np.abs(codes[group] - quotients) <= 0.5 + 1e-5).all(), (name, group)
        # codes of 8 bits times float16 need 19 bits, so that float32 rounds at most once, in the sum
        k_want, v_want, *_ = head_values(codec, payload)
        np.testing.assert_array_equal(k_read[b, r], k_want.astype(np.float32))
        np.testing.assert_array_equal(v_read[b, r], v_want.astype(np.float32))


def assert_nearest_level(codec, k, v):
    """Every number is read back as its nearest level, and the levels reach from the lowest to the highest of the group."""
    got = encode(codec, k, v)
    for b, r in np.ndindex(B, R):
        payload = {n: a[b, r] for n, a in got.items()}
        k_read, v_read, k_slack, v_slack = head_values(codec, payload)
        for x, read, slack in ((k, k_read, k_slack), (v, v_read, v_slack)):
            x = x[b, r].astype(np.float32).astype(np.float64)
            assert np.isfinite(read).all()
            # float32 quotients: 1e-6 of the number itself
            assert (np.abs(x - read) <= slack + 1e-6 * np.abs(x)).all()


@pytest.mark.parametrize("codec", INTS + KIVIS, ids=str)
@settings(max_examples=10)
@given(
    seed=st.integers(0, 10_000),
    size=st.sampled_from([1e-9, 1e-7, 1e-5, 1e-2, 1.0, 50.0, 4_000.0]),
    shift=st.floats(-3, 3),
)
def test_error_is_half_a_step_and_float16_rounding(codec, seed, size, shift):
    rng = np.random.default_rng(seed)
    k, v = (rng.normal(size=(2, B, R, N, D)) + shift * rng.normal(size=D)) * size
    assert_nearest_level(codec, k, v)


@pytest.mark.parametrize("codec", INTS + KIVIS, ids=str)
@pytest.mark.parametrize("value", [0.0, 1.0, -3.7, 1_000.3, 60_000.0, -TOP16, 1e-7, -3e-6, 1e-30])
def test_constant_groups_come_back_up_to_float16(codec, value):
    k = v = np.full((B, R, N, D), value)
    assert_nearest_level(codec, k, v)
    got = encode(codec, k, v)
    k_read, v_read = decode(codec, got)
    wanted = float(np.float16(value))
    if codec.bits < 8 and np.float32(value) == np.float32(wanted):
        assert (k_read == wanted).all() and (v_read == wanted).all()
    if value == 0.0:
        assert not k_read.any() and not v_read.any()
    for b, r in np.ndindex(B, R):
        for _, codes, scale, _ in head_parts(codec, {n: a[b, r] for n, a in got.items()}):
            assert scale.any() or not codes.any()  # no step, no code


@pytest.mark.parametrize("codec", [c for c in INTS + KIVIS if c.bits < 8], ids=str)
def test_scales_start_from_the_minimum_as_it_is_stored(codec):
    """1,000.3 is stored as 1,000.5: half a unit of a range of 3 that no code is wasted on."""
    k = v = (1_000.3 + np.random.default_rng(0).integers(0, 4, (B, R, N, D))).astype(np.float32)
    for b, r in np.ndindex(B, R):
        payload = {n: a[b, r] for n, a in encode(codec, k, v).items()}
        for name, _, scale, minimum in head_parts(codec, payload):
            for group, place in groups_of(codec, name, N, D):
                assert [scale[place], minimum[place]] == list(group_quotients(k[b, r][group], codec.bits)[1:])


@pytest.mark.parametrize("codec", INTS + KIVIS, ids=str)
@pytest.mark.parametrize("huge", [7e4, 3e5, 1e7, 3e38])
@pytest.mark.parametrize("sign", [1, -1])
def test_numbers_beyond_float16_stay_finite_and_in_order(codec, huge, sign):
    k = v = np.random.default_rng(0).normal(size=(B, R, N, D))
    k[:, :, ::7, ::3] = sign * huge
    for read, x in zip(decode(codec, encode(codec, k, v)), (k, v), strict=True):
        assert np.isfinite(read).all()
        # the largest that the format has: 127 scales, or a minimum and 2**bits - 1 scales
        most = TOP16 * (127 if codec.bits == 8 else 2**codec.bits - 1)
        lowest = -most if codec.bits == 8 else max(x.min(), -TOP16)
        reach = min(huge, most) if sign > 0 else -min(huge, -lowest)
        np.testing.assert_allclose(read[x == sign * huge], reach, rtol=0.02 if codec.bits == 8 else 2e-3)
        assert (np.abs(read[x != sign * huge]) <= np.abs(reach) / (254 if codec.bits == 8 else 2) + 1e4).all()


@pytest.mark.parametrize("garbage", [1e4, -1e4, np.nan, np.inf])
@pytest.mark.parametrize("codec", KIVIS, ids=str)
def test_places_without_a_token_do_not_widen_a_page(codec, garbage):
    k, v = lattice(3, 0)
    page = codec.page
    empty = np.zeros((B, 1, N), bool)
    empty[0, :, 3] = empty[1, :, page + 1 : page + 3] = empty[1, :, -page:] = True  # one, two, a whole page
    hidden = np.broadcast_to(empty, (B, R, N))
    dirty = np.where(hidden[..., None], garbage, k)
    got = encode(codec, dirty, v, ~empty)
    k_read, _ = decode(codec, got)
    for b, r in np.ndindex(B, R):
        for group, place in groups_of(codec, "k", N, D):
            seen = ~hidden[b, r][group[0]]
            x = k[b, r][group][seen] if seen.any() else np.zeros(1)
            quotients, scale, minimum = group_quotients(x, codec.bits)
            assert (got["k_scale"][b, r][place[::-1]], got["k_min"][b, r][place[::-1]]) == (scale, minimum)
            levels = (k_read[b, r][group][seen] - float(minimum)) / max(float(scale), 1e-9)
            assert (np.abs(levels - quotients[: seen.sum()]) <= 0.5 + 1e-4).all()
    clean = encode(codec, np.where(hidden[..., None], 0.0, k), v, ~empty)
    jax.tree.map(np.testing.assert_array_equal, got, clean)


def test_rows_of_one_token_do_not_depend_on_their_neighbours():
    """Per token means: another token, head or text changes nothing."""
    k, v = lattice(5, 0)
    for codec in INTS:
        whole = encode(codec, k, v)
        alone = encode(codec, k[1:, 2:, 7:8], v[1:, 2:, 7:8])
        for name, array in alone.items():
            axis = 2 if name.startswith("v") else 3
            np.testing.assert_array_equal(np.take(whole[name][1:, 2:], [7], axis), array)


# relative squared error on normal numbers, computed outside lcx: per token with groups of 128, 64, 32, symmetric int8, float8
KNOWN_MSE = [
    (Int(4), 0.0100),
    (Int(4, group_size=64), 0.0081),
    (Int(4, group_size=32), 0.0061),
    (Int(2), 0.251),
    (Int(2, group_size=64), 0.203),
    (Int(2, group_size=32), 0.154),
    (Int(8), 4.2e-5),
    (Kivi(4, 32), 0.0061),
    (Kivi(2, 32), 0.154),
    (Kivi(2, 64), 0.203),
    (Cast("float8_e4m3"), 7.0e-4),
]


@pytest.mark.parametrize(("codec", "known"), KNOWN_MSE, ids=str)
def test_error_on_normal_numbers_is_the_known_one(codec, known):
    k, v = np.random.default_rng(0).normal(size=(2, 1, 1, 1_024, 128)).astype(np.float32).astype(np.float64)
    for x, read in zip((k, v), decode(codec, encode(codec, k, v)), strict=True):
        np.testing.assert_allclose(np.mean((x - read) ** 2) / np.mean(x**2), known, rtol=0.04)  # two digits are known


@pytest.mark.parametrize(
    ("codec", "bits"),
    [
        (Exact(), 32),
        (Cast("bfloat16"), 16),
        (Cast("float8_e5m2"), 8),
        (Int(8), 8 + 16 / 128),
        (Int(4), 4.25),
        (Int(4, group_size=64), 4.5),  # FlexGen
        (Int(2, group_size=32), 3.0),
        (Kivi(2, 32), 3.0),
        (Kivi(2, 64), 2.5),
        (Kivi(4, 32), 5.0),
    ],
    ids=str,
)
def test_payload_has_the_documented_bits_a_value(codec, bits):
    slots = Store(codec, Size(3, 128, jnp.float32)).empty(2, 1, 256, {})
    assert sum(a.nbytes for a in slots.payload.values()) * 8 == bits * 2 * 2 * 3 * 256 * 128
    # and encoding gives these shapes and types
    k = jnp.zeros((2, 3, 256, 128))
    made = jax.eval_shape(program(codec)[0], Tokens(k, k, jnp.zeros((2, 1, 256), jnp.int32)))
    assert {n: (a.shape, a.dtype) for n, a in made.items() if not isinstance(codec, Exact)} == {
        n: (a.shape, a.dtype) for n, a in slots.payload.items() if not isinstance(codec, Exact)
    }


# ---- float types


def nearest(x, name):
    """The nearest number of the type, ties to the even code, beyond its range the largest."""
    if FLOATS[name] is None:
        return x
    table = finite_numbers(name)
    size = np.minimum(np.abs(x), table[-1])
    above = np.clip(np.searchsorted(table, size), 1, len(table) - 1)
    low, high = table[above - 1], table[above]
    up = (high - size < size - low) | ((high - size == size - low) & (above % 2 == 0))
    return np.sign(x) * np.where(up, high, low)


@pytest.mark.parametrize("name", FLOATS)
@settings(max_examples=10)
@given(seed=st.integers(0, 10_000), exponent=st.integers(-16, 20))
def test_cast_is_the_nearest_number_of_the_type(name, seed, exponent):
    rng = np.random.default_rng(seed)
    k, v = rng.normal(size=(2, B, R, N, D)) * 2.0**exponent
    if FLOATS[name] is not None:
        # between two neighbours, exactly and almost
        table = finite_numbers(name)
        i = rng.integers(0, len(table) - 1, (B, R, N, D))
        between = (table[i] + table[i + 1]) / 2 * (1 + rng.integers(-1, 2, i.shape) * 2.0**-20)
        v = np.where((between > 1e-37) & (rng.random(i.shape) < 0.5), between, v)  # below that float32 is flushed to 0
    k, v = k.astype(np.float32), v.astype(np.float32)
    for x, read in zip((k, v), decode(Cast(name), encode(Cast(name), k, v)), strict=True):
        np.testing.assert_array_equal(read, nearest(x.astype(np.float64), name))


@pytest.mark.parametrize("name", FLOATS)
def test_cast_saturates(name):
    most = {"float32": 3.4028234663852886e38, "bfloat16": 3.3895313892515355e38, "float16": TOP16}
    most |= {"float8_e4m3": 448.0, "float8_e5m2": 57_344.0}
    k = v = np.full((B, R, N, D), 1.0)
    k[..., 0], k[..., 1], k[..., 2] = np.inf, -np.inf, most[name]
    for read in decode(Cast(name), encode(Cast(name), k, v)):
        assert (
            (read[..., 0] == most[name]).all()
            and (read[..., 1] == -most[name]).all()
            and (read[..., 2] == most[name]).all()
        )
        assert (read[..., 3:] == 1.0).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_exact_stores_what_it_is_given(dtype):
    k, v = (jnp.asarray(x, dtype) for x in np.random.default_rng(0).normal(size=(2, B, R, N, D)))
    payload = Exact().encode(None, Tokens(k, v, None), None)
    assert payload["k"].dtype == payload["v"].dtype == dtype and payload["k"].shape == (B, R, D, N)
    k_read, v_read = Exact().decode(None, payload, None)
    np.testing.assert_array_equal(k_read.swapaxes(2, 3), k)
    np.testing.assert_array_equal(v_read, v)


# ---- in a model


class Stored(NaiveModel):
    """The numpy decoder with the memory of an lcx session, decoded here."""

    def load(self, session, row=0):
        self.slack = [[None] * self.config.num_kv_heads for _ in self.held]
        for layer, held in enumerate(session.cache):
            for parts in session.recipe.chains:
                heads = range(self.config.num_kv_heads)
                if parts[0].heads != "all":
                    heads = np.asarray(session.aux[layer]["heads"][parts[0].heads])
                for i, head in enumerate(heads):
                    found = [read_head(s.codec, held[s.name], row, i) for s in parts]
                    pos, k, v, k_slack, v_slack = (np.concatenate(x) for x in zip(*found, strict=True))
                    self.held[layer][head] = Memory(pos, 0 * k, k, v, np.zeros(len(pos)))
                    self.slack[layer][head] = k_slack, v_slack


def read_head(codec, slots, row, i):
    """(pos, k, v, how far k and v may be off) of the tokens that one row of a segment holds."""
    pos = np.asarray(slots.pos)[row, min(i, slots.pos.shape[1] - 1)]
    values = head_values(codec, {n: np.asarray(a[row, i]) for n, a in slots.payload.items()})
    return [pos[pos != EMPTY], *(x[pos != EMPTY] for x in values)]


def assert_holds(session, naive, row=0):
    """Every token is in one segment, once, and no further from what `naive` computed than its codec allows."""
    found = Stored(naive.config, naive.weights)
    found.load(session, row)
    for layer, head in np.ndindex(naive.config.num_layers, naive.config.num_kv_heads):
        want, got = naive.held[layer][head], found.held[layer][head]
        order, place = np.argsort(want.pos), np.argsort(got.pos)
        np.testing.assert_array_equal(got.pos[place], want.pos[order])
        for x, read, slack in zip((want.key, want.value), (got.key, got.value), found.slack[layer][head], strict=True):
            assert (np.abs(x[order] - read[place]) <= slack[place] + ATOL).all()
    return found


def expected(session, naive, tokens, row=0):
    """Logits after `tokens` of a numpy decoder that reads what the session has stored so far."""
    naive.load(session, row)
    return naive.logits(naive.step(tokens)[-1:])[0]


RECIPES = {
    "float8_e4m3": Recipe((Segment(codec=Cast("float8_e4m3")),)),
    "int8": Recipe((Segment(codec=Int(8)),)),
    "int4": Recipe((Segment(codec=Int(4, group_size=8)),)),
    "kivi2": Recipe((chain(2, 8, 16, rule="together"),)),
}
PROMPT, NEW = 22, 17


@pytest.mark.parametrize("name", RECIPES)
def test_attention_over_the_stored_cache_equals_an_oracle_that_decodes_it(name):
    """A prompt in two chunks, of which the second reads what was stored, then token by token."""
    tokens = text(PROMPT + NEW, 1)
    session = Session(layers(CONFIG), RECIPES[name], PROMPT, NEW)
    naive = Stored(CONFIG, weights(CONFIG))
    want = naive.step(tokens[:11])
    np.testing.assert_allclose(session.prefill(tokens[:11])[0], naive.logits(want[-1:])[0], atol=ATOL)
    assert_holds(session, naive)
    at = 11
    for length in (11, *(1,) * 17):
        want = expected(session, naive, tokens[at : at + length])
        np.testing.assert_allclose(session.step(tokens[at : at + length])[0], want, atol=ATOL)
        assert_holds(session, naive)
        at += length
    assert session.cache_bytes == RECIPES[name].bytes(CONFIG, PROMPT, NEW)


@pytest.mark.parametrize("name", ["int4", "kivi2"])
def test_chunked_prefill_is_the_same_as_feeding_the_chunks(name):
    tokens = text(PROMPT, 2)
    chunked = Session(layers(CONFIG), RECIPES[name], PROMPT, NEW, schedule=Chunked(11))
    fed = Session(layers(CONFIG), RECIPES[name], PROMPT, NEW)
    fed.prefill(tokens[:11])
    np.testing.assert_array_equal(chunked.prefill(tokens), fed.step(tokens[11:]))
    jax.tree.map(np.testing.assert_array_equal, chunked.cache, fed.cache)


def test_kivi_is_exact_until_the_first_page_falls():
    tokens = text(31, 8)
    session, naive = Session(layers(CONFIG), RECIPES["kivi2"], PROMPT, NEW), NaiveModel(CONFIG, weights(CONFIG))
    session.prefill(tokens[:11])
    naive.step(tokens[:11])
    for part in (tokens[11:22], *([token] for token in tokens[22:])):
        np.testing.assert_allclose(session.step(part)[0], naive.logits(naive.step(part)[-1:])[0], atol=ATOL)


def test_split_heads_and_batch_mates_of_other_lengths():
    """KIVI on one KV head, int8 on the other; each text against the oracle that reads its row, pages falling at different steps."""
    recipe = Recipe((chain(2, 8, 8, heads="long", rule="together"), Segment("rest", heads="rest", codec=Int(8))))
    aux = [{"heads": {"long": np.array([i]), "rest": np.array([1 - i])}} for i in (1, 0)]
    tokens = np.stack([text(PROMPT + NEW, seed) for seed in (3, 4)])
    lengths = [9, PROMPT]
    session = Session(layers(CONFIG), recipe, PROMPT, NEW, aux=aux, batch=2)
    got = session.prefill(tokens[:, :PROMPT], lengths)
    rows = [Stored(CONFIG, weights(CONFIG)) for _ in lengths]
    for b, (naive, length) in enumerate(zip(rows, lengths, strict=True)):
        np.testing.assert_allclose(got[b], naive.logits(naive.step(tokens[b, :length])[-1:])[0], atol=ATOL)
        assert_holds(session, naive, b)
    for _ in range(12):
        step = np.array([[tokens[b, naive.last_pos + 1]] for b, naive in enumerate(rows)])
        want = [expected(session, naive, step[b], b) for b, naive in enumerate(rows)]
        np.testing.assert_allclose(session.step(step), want, atol=ATOL)
        for b, naive in enumerate(rows):
            assert_holds(session, naive, b)


def test_prompt_compression_may_feed_kivi():
    recipe = Recipe((chain(2, 8, 8, compress=SnapKV(budget=22, window=4), rule="together"),))
    tokens = text(46, 6)
    session = Session(layers(CONFIG), recipe, 40, 6)
    naive = Stored(CONFIG, weights(CONFIG))
    naive.step(tokens[:40])
    session.prefill(tokens[:40])
    for token in tokens[40:]:
        found = Stored(CONFIG, weights(CONFIG))
        found.load(session)
        kept = [
            [np.isin(h.pos, g.pos) for h, g in zip(*both, strict=True)]
            for both in zip(naive.held, found.held, strict=True)
        ]
        naive.held = [[h.take(i) for h, i in zip(*both, strict=True)] for both in zip(naive.held, kept, strict=True)]
        assert all(len(h.pos) == 22 + naive.last_pos - 39 for heads in naive.held for h in heads)
        assert_holds(session, naive)
        np.testing.assert_allclose(expected(session, naive, [token]), session.step([token])[0], atol=ATOL)


@pytest.mark.parametrize("name", RECIPES)
def test_garbage_where_no_token_is_does_not_matter(name):
    tokens = text(PROMPT + 8, 7)
    clean, dirty = (Session(layers(CONFIG), RECIPES[name], PROMPT, NEW) for _ in range(2))
    for session in (clean, dirty):
        session.prefill(tokens[:11])
        session.step(tokens[11:22])
    poison(dirty)
    for token in tokens[22:]:
        # a hidden nan makes attention sum once more without it, in another order
        np.testing.assert_allclose(clean.step([token]), dirty.step([token]), atol=2e-5)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_cast_to_the_models_own_type_is_exact(name):
    k, v = (jnp.asarray(x, name) for x in np.random.default_rng(0).normal(size=(2, B, R, N, D)))
    cast, exact = (codec.encode(None, Tokens(k, v, None), None) for codec in (Cast(name), Exact()))
    jax.tree.map(np.testing.assert_array_equal, cast, exact)
    size = Size(R, D, jnp.dtype(name))
    assert Cast(name).leaves(size) == Exact().leaves(size)


# ---- the chain


def flushed(tail, new, keep, page):
    """Tokens in the tail after `new` more came, and how many left."""
    total, gone = tail + new, 0
    while total - gone >= keep + page:
        gone += page
    return total - gone, gone


CHAINS = {
    "kivi": chain(4, 4, 8, rule="together"),
    "exact": (Segment("tail", policy=Flush(page=4, keep=5)), Segment("pages")),
    "no_tail": (Segment("tail", policy=Flush(page=4)), Segment("pages", codec=Kivi(2, 2))),
}
MOST = 64  # tokens of a text


@cache
def write_program(name):
    """Two texts, three heads: new tokens enter the first segment, what it hands down enters the second."""
    tail, pages = CHAINS[name]
    stores = [Store(s.codec, Size(3, 8, jnp.float32)) for s in (tail, pages)]
    slots = tail.policy.capacity(MOST, 1), pages.policy.capacity(tail.policy.handed(MOST), pages.codec.page)

    @jax.jit
    def write(tail_slots, page_slots, new):
        tail_slots, edit, handed = tail.policy.edit(None, Held(tail_slots, None, stores[0]), new)
        tail_slots = stores[0].commit(tail_slots, edit)
        if handed is not None:
            page_slots, edit, _ = pages.policy.edit(None, Held(page_slots, None, stores[1]), handed)
            page_slots = stores[1].commit(page_slots, edit)
        return tail_slots, page_slots

    return write, [store.empty(2, 1, n, {}) for store, n in zip(stores, slots, strict=True)]


@pytest.mark.parametrize("name", CHAINS)
# shrinking a failure would take minutes
@settings(max_examples=10, phases=[Phase.generate])
@given(
    widths=st.lists(st.sampled_from([1, 3, 10]), min_size=4, max_size=14),
    real=st.lists(st.tuples(*[st.floats(0, 1)] * 2), min_size=14, max_size=14),
    seed=st.integers(0, 10_000),
)
def test_tail_hands_down_its_oldest_whole_pages_and_loses_nothing(name, widths, real, seed):
    """Any steps, with any padding: after each one every token is there once, the oldest in pages, the newest in the tail."""
    segments = CHAINS[name]
    keep, page = segments[0].policy.keep, segments[0].policy.page
    write, slots = write_program(name)
    rng = np.random.default_rng(seed)
    content = rng.normal(size=(2, 2, 3, MOST, 8)).astype(np.float32)
    tails, pages = [0, 0], [0, 0]
    for width, shares in zip(widths, real, strict=False):
        first = np.add(tails, pages)
        count = np.round(np.array(shares) * width).astype(int)
        if max(first + count) > MOST:
            break
        inside = np.stack([rng.permutation(width) < n for n in count])
        number = first[:, None] + np.maximum(np.cumsum(inside, 1) - 1, 0)
        pos = np.where(inside, number, EMPTY)
        k, v = (np.stack([x[b][:, number[b] % MOST] for b in range(2)]) for x in content)
        k, v = (np.where((pos == EMPTY)[:, None, :, None], np.nan, x) for x in (k, v))
        slots = write(
            *slots, Tokens(*(jnp.asarray(x, jnp.float32) for x in (k, v)), jnp.asarray(pos[:, None], jnp.int32))
        )
        for b in range(2):
            tails[b], gone = flushed(tails[b], count[b], keep, page)
            pages[b] += gone
            assert tails[b] < keep + page and (tails[b] >= keep or pages[b] == 0)
            for s, held, start, size in zip(segments, slots, (pages[b], 0), (tails[b], pages[b]), strict=True):
                wanted = start + np.arange(size)
                np.testing.assert_array_equal(held.pos[b, 0, :size], wanted)
                assert (held.pos[b, 0, size:] == EMPTY).all()
                for r in range(3):
                    _, *values = read_head(s.codec, held, b, r)
                    for x, read, slack in zip(content[:, b, r][:, wanted], values[:2], values[2:], strict=True):
                        assert (np.abs(x - read) <= slack + 1e-6 * np.abs(x)).all()


@pytest.mark.parametrize("residual", [32, 128])
def test_capacities_of_a_chain_are_what_its_tokens_need(residual):
    for tokens in (1, 31, 32, residual, 2 * residual - 1, 2 * residual, 2 * residual + 1, 1_000):
        sizes = Recipe((chain(2, 32, residual, rule="together"),)).capacities("decode", 0, Shape(CONFIG, tokens))
        tail, gone = flushed(0, tokens, residual, residual)
        assert sizes["pages"] == gone and min(2 * residual - 1, tokens) <= sizes["tail"] <= 2 * residual
    assert Flush(page=4, keep=3).handed(6) == 0 and Flush(page=4, keep=3).handed(7) == 4


@pytest.mark.parametrize(
    ("codec", "queries"), [(Kivi(2, 32), 1), (Kivi(4, 16), 17), (Int(4, group_size=16), 17)], ids=str
)
def test_tiles_that_overlap_read_the_right_scales(codec, queries):
    """More slots than one tile of attention, and not a multiple of it."""
    slots, used, D = 17 * 32, 16 * 32, 32
    store = Store(codec, Size(1, D, jnp.float32))
    rng = np.random.default_rng(0)
    k, v = jnp.asarray(rng.normal(size=(2, 1, 1, slots, D)) * np.exp(rng.normal(size=(slots, 1))), jnp.float32)
    pos = np.where(np.arange(slots) < used, np.arange(slots), EMPTY)[None, None].astype(np.int32)
    q = jnp.asarray(rng.normal(size=(1, 1, 2, queries, D)), jnp.float32)

    @jax.jit
    def run(q, k, v, pos):
        empty = store.empty(1, 1, slots, {})
        held = store.commit(empty, Edit(jnp.arange(slots)[None, None], Tokens(k, v, pos)))
        q_pos = used + jnp.arange(queries)[None]
        return attend(q, held_source(store, held), q_pos, scale=0.2), held

    part, held = run(q, k, v, pos)
    _, k_read, v_read, *_ = read_head(codec, held, 0, 0)
    logits = np.asarray(q[0, 0], np.float64) @ k_read.T * 0.2
    prob = np.exp(logits - logits.max(-1, keepdims=True))
    want = prob / prob.sum(-1, keepdims=True) @ v_read
    np.testing.assert_allclose(part.out[0, 0], want, atol=2e-4 * np.abs(want).max())  # f32 with values of up to 60


# ---- errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Cast("int8"), "dtype='int8': allowed are float32, bfloat16, float16, float8_e4m3, float8_e5m2"),
        (lambda: Int(3), "bits=3: allowed are 2, 4, 8"),
        (lambda: Int(4, group_size=0), "group_size=0 must be an integer of at least 1"),
        (lambda: Int(4, group_size=2.5), "group_size=2.5 must be an integer of at least 1"),
        (lambda: Int(8, group_size=64), "group_size=64 .* only 2 and 4 bits have groups"),
        (lambda: Kivi(8), "bits=8: allowed are 2, 4"),
        (lambda: Kivi(2, True), "group_size=True must be an integer"),
        (lambda: Kivi(2, 48), "group_size=48 does not divide 256"),
        (lambda: chain(2, 0), "group_size=0 must be an integer of at least 1"),
        (lambda: chain(2, 32, 100), "residual=100 is not a positive multiple of group_size=32; use 128"),
        (lambda: chain(2, 32, 0), "residual=0 is not a positive multiple of group_size=32; use 32"),
        (lambda: Flush(page=0), "page=0 must be an integer of at least 1"),
        (lambda: Flush(page=4, keep=-1), "keep=-1 must be an integer of at least 0"),
        (lambda: Int(4, group_size=32).check(Size(2, 80, None)), "head_dim=80 is not a multiple of group_size=32"),
        (lambda: Int(2).check(Size(2, 6, None)), "head_dim=6 is not a multiple of group_size=6 and of 4 codes a byte"),
        (lambda: Kivi(2, 2).check(Size(2, 6, None)), "head_dim=6 .* of 4 codes a byte"),
        (
            lambda: Recipe((chain(2, 32),)).check(replace(TINY, head_dim=16)),
            "head_dim=16 is not a multiple of group_size=32",
        ),
        (lambda: Recipe((Segment(codec=Kivi()),)), "Kivi encodes pages of 32 tokens; put a segment before it"),
    ],
)
def test_bad_arguments_give_one_line(make, message):
    with pytest.raises(UserError, match=message) as found:
        make()
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
def test_head_sizes_of_the_supported_models_suit_the_defaults(head_dim):
    for codec in (Cast(), Int(8), Int(4), Int(2), Kivi(4, 16), Kivi(2, 16)):
        codec.check(Size(2, head_dim, None))


def test_defaults_are_the_papers():
    tail, recent, pages = chain()
    assert (pages.codec.bits, pages.codec.group_size, pages.codec.page) == (2, 32, 32)
    assert (recent.codec.bits, recent.codec.group_size, recent.policy.page) == (2, 32, 128)
    assert tail.policy.page == 128 and isinstance(pages.policy, KeepAll) and tail.codec == Exact()
