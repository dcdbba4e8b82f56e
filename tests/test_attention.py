"""`attend`, `merge`, `attend_visits` and `mass` against a dense float64 oracle in numpy that shares no code with lcx."""

from dataclasses import dataclass
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import quick_compilation as quick_compilation

from lcx.ops.attention import Partial, Source, attend, mass, merge, naive_attend, tokens_source
from lcx.ops.masks import Mask, Near
from lcx.ops.visits import Visit, attend_visits

EMPTY = -1
# f32: at most 200 keys, sums in another order; bf16, f16: the probabilities are rounded to the model's type before they meet the values
ATOL = {"float32": 2e-5, "bfloat16": 3e-2, "float16": 4e-3}


@dataclass(frozen=True)
class Case:
    """One compiled shape: T queries, S slots, walked in tiles of `q_tile` and `kv_tile`."""

    T: int
    S: int
    q_tile: int
    kv_tile: int
    B: int = 1
    R: int = 1
    G: int = 1
    D: int = 8
    dtype: str = "float32"

    def __str__(self):
        return f"T{self.T}-S{self.S}-q{self.q_tile}-kv{self.kv_tile}-B{self.B}R{self.R}G{self.G}D{self.D}-{self.dtype}"


def oracle(q, k, v, q_pos, kv_pos, *, scale, window=None):
    """Dense float64 attention.  q [B,R,G,T,D]; k, v [B,R,S,D]; kv_pos [B,R,S] -> out, lse, probabilities [B,R,G,T,S]."""
    q, k, v = (np.asarray(x).astype(np.float64) for x in (q, k, v))
    B, R, G, T, D = q.shape
    out, lse = np.zeros((B, R, G, T, D)), np.full((B, R, G, T), -np.inf)
    prob = np.zeros((B, R, G, T, k.shape[2]))
    for b in range(B):
        for r in range(R):
            for t in range(T):
                sees = [s for s in range(k.shape[2]) if 0 <= kv_pos[b, r, s] <= q_pos[b, t]]
                if window is not None:
                    sees = [s for s in sees if q_pos[b, t] - kv_pos[b, r, s] < window]
                if not sees:
                    continue
                logits = q[b, r, :, t] @ k[b, r, sees].T * scale
                top = logits.max(1, keepdims=True)
                weight = np.exp(logits - top)
                lse[b, r, :, t] = top[:, 0] + np.log(weight.sum(1))
                weight /= weight.sum(1, keepdims=True)
                prob[b, r, :, t, sees] = weight.T
                out[b, r, :, t] = weight @ v[b, r, sees]
    return out, lse, prob


def make(case, seed, *, holes=0.0, shuffle=True, one_set=False, offset=0, padding=True):
    """Queries at positions offset ..., keys anywhere before and after them: (q, k, v, q_pos, kv_pos)."""
    rng = np.random.default_rng(seed)
    B, R, G, T, S, D = case.B, case.R, case.G, case.T, case.S, case.D
    q = rng.normal(size=(B, R, G, T, D))
    k, v = rng.normal(size=(2, B, R, S, D))
    q, k, v = (jnp.asarray(x, case.dtype) for x in (q, k, v))
    q_pos = np.broadcast_to(offset + np.arange(T), (B, T)).astype(np.int32).copy()
    if padding:
        for b in range(B):
            q_pos[b, rng.integers(T // 2, T + 1) :] = EMPTY
    rows = 1 if one_set else R
    kv_pos = np.broadcast_to(np.arange(S), (B, rows, S)).astype(np.int32).copy()
    for b in range(B):
        for r in range(rows):
            if shuffle:
                rng.shuffle(kv_pos[b, r])
    kv_pos[rng.random(kv_pos.shape) < holes] = EMPTY
    return q, k, v, q_pos, kv_pos


def slots_source(k, v, pos, held=True):
    """Arrays [B,R,S,D] as a source; written here so that it shares nothing with the cache."""
    channel = k.swapaxes(2, 3)

    def tile(start, size):
        cut = partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=size)
        return cut(channel, axis=3), cut(v, axis=2)

    def gather(pages, size):
        idx = (pages[..., None] * size + jnp.arange(size)).reshape(*pages.shape[:-1], -1)
        idx = jnp.minimum(idx, pos.shape[-1] - 1)
        return jnp.take_along_axis(channel, idx[:, :, None], 3), jnp.take_along_axis(v, idx[..., None], 2)

    return Source(pos=pos, tile=tile, gather=gather, held=held)


@dataclass(frozen=True)
class NoBounds(Mask):
    """A mask that says nothing of whole tiles."""

    mask: Mask

    def allow(self, q_pos, kv_pos):
        return self.mask.allow(q_pos, kv_pos)


@cache
def attend_program(case, held, with_bounds):
    @jax.jit
    def run(q, k, v, q_pos, kv_pos, window):
        # the window may be traced
        mask = Near(window) if with_bounds else NoBounds(Near(window))
        source = slots_source(k, v, kv_pos, held)
        return attend(q, source, q_pos, scale=0.3, mask=mask, q_tile=case.q_tile, kv_tile=case.kv_tile)

    return run


# T around the tile sizes, S below and above T, whole and overlapping last tiles
HELD_CASES = [
    Case(1, 1, 4, 4),
    Case(1, 129, 16, 64, B=2, R=2, G=3, D=64, dtype="bfloat16"),
    Case(2, 63, 4, 16, R=3, G=8),
    Case(8, 5, 4, 4, B=2, R=2),
    Case(9, 17, 4, 8, B=2, R=1, G=8, D=80, dtype="float16"),
    Case(16, 16, 16, 16, R=8, G=1),
    Case(17, 64, 16, 16, B=2, R=1, G=3),
    Case(63, 127, 16, 64, R=1, G=1, D=64),
    Case(64, 65, 64, 64, B=2, R=3, G=1),
    Case(65, 15, 16, 16, B=2),
    Case(127, 128, 128, 64, R=1, G=3, D=80, dtype="bfloat16"),
    Case(129, 130, 64, 128, R=1, G=1),
]
OWN_CASES = [
    Case(3, 3, 4, 4, B=2, R=3, G=1),
    Case(4, 4, 4, 4, dtype="bfloat16"),
    Case(5, 5, 4, 4, B=2, G=3),
    Case(6, 6, 2, 4, R=8),
    Case(7, 7, 4, 2, B=2, G=8),
    Case(15, 15, 16, 16, D=80),
    Case(65, 65, 16, 64, B=2, R=1, G=3, D=64, dtype="float16"),
    Case(129, 129, 64, 16, R=2),
]
drawn = {
    "seed": st.integers(0, 10_000),
    "holes": st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    "shuffle": st.booleans(),
    "window": st.sampled_from([1, 2, 7, 1_000]),
    "offset": st.sampled_from([0, 3, 60, 500]),
}


@pytest.mark.parametrize("case", HELD_CASES, ids=str)
@settings(max_examples=8)
@given(**drawn)
def test_attend_over_held_slots_equals_oracle(case, seed, holes, shuffle, window, offset):
    q, k, v, q_pos, kv_pos = make(case, seed, holes=holes, shuffle=shuffle, offset=offset)
    got = attend_program(case, held=True, with_bounds=True)(q, k, v, q_pos, kv_pos, window)
    out, lse, _ = oracle(q, k, v, q_pos, kv_pos, scale=0.3, window=window)
    np.testing.assert_allclose(got.out, out, atol=ATOL[case.dtype], rtol=0)
    np.testing.assert_allclose(got.lse, lse, atol=5e-5, rtol=0)  # f32 logits whatever the type
    blind = np.isneginf(lse)
    assert not np.asarray(got.out)[blind].any() and np.isneginf(np.asarray(got.lse)[blind]).all()


@cache
def own_program(case):
    @jax.jit
    def run(q, k, v, pos, window):
        tiles = {"q_tile": case.q_tile, "kv_tile": case.kv_tile}
        return attend(q, tokens_source(k, v, pos), pos, scale=0.3, mask=Near(window), **tiles)

    return run


@pytest.mark.parametrize("case", OWN_CASES, ids=str)
@settings(max_examples=8)
@given(seed=drawn["seed"], window=drawn["window"], offset=drawn["offset"])
def test_attend_over_own_tokens_equals_oracle(case, seed, window, offset):
    q, k, v, pos, _ = make(case, seed, offset=offset)

    got = own_program(case)(q, k, v, pos, window)
    kv_pos = np.broadcast_to(pos[:, None], (case.B, case.R, case.T))
    out, lse, _ = oracle(q, k, v, pos, kv_pos, scale=0.3, window=window)
    np.testing.assert_allclose(got.out, out, atol=ATOL[case.dtype], rtol=0)
    np.testing.assert_allclose(got.lse, lse, atol=5e-5, rtol=0)


@pytest.mark.parametrize("case", [HELD_CASES[6], HELD_CASES[7], HELD_CASES[11]], ids=str)
@settings(max_examples=6)
@given(**drawn)
def test_bounds_skip_tiles_without_changing_results(case, seed, holes, shuffle, window, offset):
    data = make(case, seed, holes=holes, shuffle=shuffle, offset=offset)
    fast = attend_program(case, held=True, with_bounds=True)(*data, window)
    plain = attend_program(case, held=True, with_bounds=False)(*data, window)
    # a tile without a visible key leaves the running sums alone: only the order of maxima may differ
    np.testing.assert_allclose(fast.out, plain.out, atol=1e-6)
    np.testing.assert_allclose(fast.lse, plain.lse, atol=1e-6)


@pytest.mark.parametrize("case", [HELD_CASES[0], HELD_CASES[2], HELD_CASES[4], HELD_CASES[6], HELD_CASES[7]], ids=str)
@pytest.mark.parametrize("mask", [None, Near(7), Near(5, 3)], ids=["all", "window", "window and sinks"])
def test_the_formula_in_five_lines_equals_the_tiles(case, mask):
    q, k, v, q_pos, kv_pos = make(case, 1, holes=0.3, offset=20)
    got = attend(q, slots_source(k, v, kv_pos), q_pos, scale=0.3, mask=mask, q_tile=case.q_tile, kv_tile=case.kv_tile)
    want = naive_attend(q, k.swapaxes(2, 3), v, q_pos, kv_pos, scale=0.3, mask=mask)
    np.testing.assert_allclose(got.out, want.out, atol=ATOL[case.dtype], rtol=0)
    np.testing.assert_allclose(got.lse, want.lse, atol=5e-5, rtol=0)
    blind = np.isneginf(np.asarray(want.lse))
    assert not np.asarray(want.out)[blind].any()


@pytest.mark.parametrize("case", [HELD_CASES[3], HELD_CASES[6]], ids=str)
def test_one_position_set_for_all_rows_is_broadcast(case):
    q, k, v, q_pos, kv_pos = make(case, 0, holes=0.3, one_set=True, offset=20)
    got = attend(q, slots_source(k, v, kv_pos), q_pos, scale=0.3, q_tile=case.q_tile, kv_tile=case.kv_tile)
    wide = np.broadcast_to(kv_pos, (case.B, case.R, case.S))
    out, lse, _ = oracle(q, k, v, q_pos, wide, scale=0.3)
    np.testing.assert_allclose(got.out, out, atol=2e-5)
    np.testing.assert_allclose(got.lse, lse, atol=2e-5)


def test_no_slots_or_no_queries_give_zero_rows():
    q = jnp.ones((2, 1, 3, 4, 8))
    none = slots_source(jnp.zeros((2, 1, 0, 8)), jnp.zeros((2, 1, 0, 8)), jnp.zeros((2, 1, 0), jnp.int32))
    part = attend(q, none, jnp.zeros((2, 4), jnp.int32), scale=1.0)
    assert part.out.shape == (2, 1, 3, 4, 8) and not part.out.any() and np.isneginf(part.lse).all()
    assert mass(q, none, jnp.zeros((2, 4), jnp.int32), part.lse, scale=1.0).shape == (2, 1, 3, 0)


# ---- garbage


POISON_CASE = Case(9, 20, 4, 8, B=2, R=2, G=3)


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", ["empty", "future", "outside_window"])
def test_garbage_in_slots_that_a_row_cannot_see_does_not_touch_it(garbage, place):
    q, k, v, q_pos, kv_pos = make(POISON_CASE, 3, holes=0.3, offset=6)
    hidden = {"empty": kv_pos == EMPTY, "future": kv_pos > 10, "outside_window": (kv_pos != EMPTY) & (kv_pos < 4)}[
        place
    ]
    assert hidden.any()
    k_bad, v_bad = (jnp.where(hidden[..., None], garbage, x) for x in (k, v))
    run = attend_program(POISON_CASE, held=True, with_bounds=True)
    clean, dirty = run(q, k, v, q_pos, kv_pos, 7), run(q, k_bad, v_bad, q_pos, kv_pos, 7)
    distance = q_pos[:, None, :, None] - kv_pos[:, :, None, :]
    visible = (kv_pos != EMPTY)[:, :, None] & (q_pos != EMPTY)[:, None, :, None] & (distance >= 0) & (distance < 7)
    touched = np.broadcast_to((visible & hidden[:, :, None]).any(-1)[:, :, None], clean.lse.shape)
    assert not touched.all()
    np.testing.assert_array_equal(np.asarray(dirty.out)[~touched], np.asarray(clean.out)[~touched])
    np.testing.assert_array_equal(np.asarray(dirty.lse)[~touched], np.asarray(clean.lse)[~touched])
    probs = [mass(q, slots_source(x, v, kv_pos), q_pos, clean.lse, scale=0.3, mask=Near(7)) for x in (k, k_bad)]
    if not touched.any():
        np.testing.assert_array_equal(*probs)


@pytest.mark.parametrize("what", ["k", "v"])
@pytest.mark.parametrize("window", [7, 1_000])
def test_visible_nan_gives_nan(what, window):
    q, k, v, q_pos, kv_pos = make(POISON_CASE, 3, offset=30, padding=False)
    kv_pos = (
        kv_pos + 15
    )  # every slot is before every query: the whole walk goes without masks where the window allows it
    q_pos = q_pos + 5
    bad = kv_pos == 34
    k, v = (jnp.where(bad[..., None], np.nan, x) if what == n else x for n, x in (("k", k), ("v", v)))
    got = attend_program(POISON_CASE, held=True, with_bounds=True)(q, k, v, q_pos, kv_pos, window)
    sees = np.broadcast_to((q_pos - 34 < window)[:, None, None], got.lse.shape)
    assert sees.any()
    np.testing.assert_array_equal(np.isnan(got.out).all(-1), sees)
    np.testing.assert_array_equal(np.isnan(got.out).any(-1), sees)
    # and it survives a merge with a part that is fine
    fine = Partial(jnp.ones_like(got.out), jnp.zeros_like(got.lse))
    np.testing.assert_array_equal(np.isnan(merge([fine, got]).out).all(-1), sees)


def test_garbage_in_padded_queries_does_not_touch_others():
    q, k, v, q_pos, kv_pos = make(POISON_CASE, 5, offset=30, padding=False)
    q_pos[:, 5:] = EMPTY
    dirty_q = q.at[:, :, :, 5:].set(np.nan)
    run = attend_program(POISON_CASE, held=True, with_bounds=True)
    clean, dirty = run(q, k, v, q_pos, kv_pos, 1_000), run(dirty_q, k, v, q_pos, kv_pos, 1_000)
    np.testing.assert_array_equal(dirty.out, clean.out)
    got, want = (
        mass(x, slots_source(k, v, kv_pos), q_pos, clean.lse, scale=0.3, q_tile=4, kv_tile=8) for x in (dirty_q, q)
    )
    np.testing.assert_array_equal(got, want)


# ---- gradients


@pytest.mark.parametrize("case", [Case(7, 7, 4, 4, B=2, R=2, G=3), Case(17, 17, 8, 4)], ids=str)
def test_gradients_equal_dense_softmax_and_vanish_for_blind_rows(case):
    q, k, v, pos, _ = make(case, 1, offset=2, padding=False)
    pos[0, case.T - 2 :] = EMPTY  # padding sees nothing and is seen by nobody
    weight = jax.random.normal(jax.random.key(0), q.shape)
    window = 5

    def ours(q, k, v):
        source = tokens_source(k, v, jnp.asarray(pos))
        part = attend(q, source, pos, scale=0.3, mask=Near(window), q_tile=case.q_tile, kv_tile=case.kv_tile)
        lse = jnp.where(jnp.isneginf(part.lse), 0.0, part.lse)
        return jnp.sum(part.out * weight) + jnp.sum(lse * weight[..., 0])

    def dense(q, k, v):
        logits = jnp.einsum("brgtd,brsd->brgts", q, k) * 0.3
        gap = pos[:, :, None] - pos[:, None, :]
        mask = (pos != EMPTY)[:, :, None] & (pos != EMPTY)[:, None, :] & (gap >= 0) & (gap < window)
        some = mask.any(-1)[:, None, None]
        logits = jnp.where(mask[:, None, None], logits, -1e4)
        lse = jax.nn.logsumexp(logits, -1)
        out = jnp.einsum("brgts,brsd->brgtd", jnp.exp(logits - lse[..., None]), v)
        return jnp.sum(jnp.where(some[..., None], out * weight, 0)) + jnp.sum(jnp.where(some, lse * weight[..., 0], 0))

    with jax.enable_x64(True):
        wide = [np.asarray(x, np.float64) for x in (q, k, v)]
        want = jax.jit(jax.grad(dense, (0, 1, 2)))(*wide)
    got = jax.jit(jax.grad(ours, (0, 1, 2)))(q, k, v)
    for a, b in zip(got, want, strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, atol=5e-5)  # f32 against f64
    blind = pos[0] == EMPTY
    assert not np.asarray(got[0])[0, :, :, blind].any()  # queries
    assert not np.asarray(got[1])[0, :, blind].any() and not np.asarray(got[2])[0, :, blind].any()


def test_gradient_of_rows_that_see_nothing_at_all_is_zero():
    case = Case(6, 6, 4, 4)
    q, k, v, _, _ = make(case, 0)
    pos = jnp.full((1, 6), EMPTY)
    loss = lambda q, k, v: attend(q, tokens_source(k, v, pos), pos, scale=1.0, q_tile=4, kv_tile=4).out.sum()
    for grad in jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v):
        assert not np.asarray(grad).any()


# ---- merge


@settings(max_examples=20)
@given(seed=st.integers(0, 10_000), holes=st.sampled_from([0.0, 0.5, 1.0]))
def test_merge_is_the_union_of_disjoint_keys(seed, holes):
    case = Case(5, 21, 4, 4, B=2, R=2, G=3)
    q, k, v, q_pos, kv_pos = make(case, seed, holes=holes, offset=8)
    want, lse, _ = oracle(q, k, v, q_pos, kv_pos, scale=0.3)
    parts = []
    for cut in (slice(0, 6), slice(6, 7), slice(7, 21)):
        out, part_lse, _ = oracle(q, k[:, :, cut], v[:, :, cut], q_pos, kv_pos[:, :, cut], scale=0.3)
        parts.append(Partial(jnp.asarray(out, jnp.float32), jnp.asarray(part_lse, jnp.float32)))
    got = merge(parts)
    np.testing.assert_allclose(got.out, want, atol=2e-6)  # one division of f32 numbers
    np.testing.assert_allclose(got.lse, lse, atol=2e-6)


def test_merge_of_parts_without_keys_is_zero_with_zero_gradient():
    blind = Partial(jnp.zeros((1, 1, 1, 2, 4)), jnp.full((1, 1, 1, 2), -jnp.inf))
    part = merge([blind, blind])
    assert not part.out.any() and np.isneginf(part.lse).all()
    seen = Partial(jnp.ones((1, 1, 1, 2, 4)), jnp.zeros((1, 1, 1, 2)))
    np.testing.assert_array_equal(merge([blind, seen]).out, seen.out)
    grad = jax.grad(lambda out: merge([Partial(out, blind.lse), blind]).out.sum())(blind.out)
    assert not grad.any()


def test_merge_holds_for_logits_far_apart():
    low = Partial(jnp.full((1, 1, 1, 1, 2), 3.0), jnp.full((1, 1, 1, 1), -2e4))
    high = Partial(jnp.full((1, 1, 1, 1, 2), 5.0), jnp.full((1, 1, 1, 1), 2e4))
    np.testing.assert_array_equal(merge([low, high]).out, high.out)
    np.testing.assert_allclose(merge([low, low]).lse, -2e4 + np.log(2), rtol=1e-6)


# ---- mass


MASS_CASES = [
    Case(1, 1, 4, 4),
    Case(1, 65, 4, 16, B=2, R=2, G=3),
    Case(9, 20, 4, 8, B=2, R=2, G=3),
    Case(8, 16, 4, 16, R=3),
    Case(17, 5, 16, 4, dtype="bfloat16"),
    Case(63, 129, 16, 64, G=8),
]


@cache
def mass_program(case, held):
    @jax.jit
    def run(q, k, v, q_pos, kv_pos, lse, window):
        source = slots_source(k, v, kv_pos, held)
        tiles = {"q_tile": case.q_tile, "kv_tile": case.kv_tile}
        return mass(q, source, q_pos, lse, scale=0.3, mask=Near(window), **tiles)

    return run


@pytest.mark.parametrize("case", MASS_CASES, ids=str)
@settings(max_examples=8)
@given(**drawn)
def test_mass_is_the_column_sum_of_probabilities(case, seed, holes, shuffle, window, offset):
    q, k, v, q_pos, kv_pos = make(case, seed, holes=holes, shuffle=shuffle, offset=offset)
    _, lse, prob = oracle(q, k, v, q_pos, kv_pos, scale=0.3, window=window)
    for held in (True, False):
        got = mass_program(case, held)(q, k, v, q_pos, kv_pos, jnp.asarray(lse, jnp.float32), window)
        np.testing.assert_allclose(got, prob.sum(3), atol=1e-4)  # up to 63 f32 probabilities
        # a last tile that overlaps the one before counts once: the whole is the number of queries that saw something
        np.testing.assert_allclose(got.sum(-1), np.isfinite(lse).sum(-1), atol=2e-4)


def test_mass_takes_the_lse_over_all_keys_that_the_query_saw():
    case = Case(5, 12, 4, 4, B=2, R=2, G=3)
    q, k, v, q_pos, kv_pos = make(case, 2, offset=9)
    _, lse, prob = oracle(q, k, v, q_pos, kv_pos, scale=0.3)
    part = slots_source(k[:, :, :7], v[:, :, :7], kv_pos[:, :, :7])
    got = mass(q, part, q_pos, jnp.asarray(lse, jnp.float32), scale=0.3, q_tile=4, kv_tile=4)
    np.testing.assert_allclose(got, prob.sum(3)[..., :7], atol=1e-5)


# ---- pages


@pytest.mark.parametrize(
    ("case", "size", "Q", "M"),
    [
        (Case(1, 24, 4, 4, B=2, R=2, G=3), 4, 1, 3),
        (Case(8, 23, 4, 4, R=2, G=3), 4, 2, 4),
        (Case(7, 9, 4, 4, B=2, G=8), 1, 3, 5),
        (Case(4, 16, 4, 4, D=80, dtype="bfloat16"), 16, 4, 1),
    ],
    ids=str,
)
def test_attend_visits_reads_the_listed_pages_alone(case, size, Q, M):
    pages = -(-case.S // size)

    @jax.jit
    def run(q, k, v, q_pos, kv_pos, index, count, window):
        source = slots_source(k, v, kv_pos)
        visit = Visit(size, -(-case.T // Q), lists=(index, count))
        return attend_visits(q, source, q_pos, visit, scale=0.3, mask=Near(window))

    for seed in range(6):
        q, k, v, q_pos, kv_pos = make(case, seed, holes=0.2 * (seed % 2), offset=4 * seed)
        rng = np.random.default_rng(seed)
        shape = (case.B, case.R, case.G, Q)
        index = np.stack([rng.permutation(pages)[:M] for _ in range(np.prod(shape))]).reshape(*shape, -1)
        index = np.pad(index, [(0, 0)] * 4 + [(0, M - index.shape[-1])], constant_values=7 * pages).astype(np.int32)
        count = rng.integers(0, min(M, pages) + 1, shape).astype(np.int32)
        window = [1_000, 9][seed % 2]
        got, overflow = run(q, k, v, q_pos, kv_pos, index, count, window)
        assert overflow == 0
        block = -(-case.T // Q)
        for b, r, g, i in np.ndindex(*shape):
            listed = index[b, r, g, i, : count[b, r, g, i]]
            slots = [s for p in listed for s in range(p * size, min((p + 1) * size, case.S))]
            rows = slice(i * block, (i + 1) * block)
            out, lse, _ = oracle(
                q[b : b + 1, r : r + 1, g : g + 1, rows],
                k[b : b + 1, r : r + 1, slots],
                v[b : b + 1, r : r + 1, slots],
                q_pos[b : b + 1, rows],
                kv_pos[b : b + 1, r : r + 1, slots],
                scale=0.3,
                window=window,
            )
            np.testing.assert_allclose(got.out[b, r, g, rows], out[0, 0, 0], atol=ATOL[case.dtype])
            np.testing.assert_allclose(got.lse[b, r, g, rows], lse[0, 0, 0], atol=2e-5)


@pytest.mark.parametrize("Q", [2, 4])
@pytest.mark.parametrize("form", ["lists", "blocks"])
def test_attend_visits_refuses_lists_that_do_not_fit_the_queries(Q, form):
    """Five queries in blocks of two are three blocks."""
    q, k, v, q_pos, kv_pos = make(Case(5, 8, 4, 4), 0)
    index = jnp.zeros((1, 1, 1, Q, 2), jnp.int32)
    given = {"lists": (index, index[..., 0])} if form == "lists" else {"blocks": index == 0}
    with pytest.raises(ValueError, match=f"for Q={Q} blocks of queries; T=5 with rows=2 has 3"):
        attend_visits(q, slots_source(k, v, kv_pos), q_pos, Visit(4, 2, **given), scale=1.0)


@pytest.mark.parametrize(
    "given", [{}, {"lists": (0, 0), "blocks": 0}, {"listing": int}], ids=["none", "two", "no most"]
)
def test_a_visit_has_one_form(given):
    with pytest.raises(ValueError, match="give one of lists, blocks, and listing with most"):
        Visit(4, 1, **given)


def test_all_pages_equal_attend():
    case = Case(4, 20, 4, 8, B=2, R=2, G=3)
    q, k, v, q_pos, kv_pos = make(case, 0, holes=0.2, offset=9)
    source = slots_source(k, v, kv_pos)
    index = jnp.broadcast_to(jnp.arange(5, dtype=jnp.int32), (2, 2, 3, 1, 5))
    visit = Visit(4, 4, lists=(index, jnp.full((2, 2, 3, 1), 5)))
    pages, _ = attend_visits(q, source, q_pos, visit, scale=0.3)
    tiles = attend(q, source, q_pos, scale=0.3, q_tile=4, kv_tile=8)
    np.testing.assert_allclose(pages.out, tiles.out, atol=1e-6)


LISTED = Case(40, 1_030, 4, 4, B=2, R=2, G=3)
LISTED_SIZE, LISTED_ROWS, MOST = 16, 16, 64  # 65 pages, the last one of 6 slots; 3 blocks of queries, the last one of 8


def listed(g, count, seed=0, wide=MOST):
    """Different pages in ascending order for every block of queries: index [B,R,g,Q,wide] and count [B,R,g,Q] of at most `count`."""
    rng = np.random.default_rng(seed)
    shape = (LISTED.B, LISTED.R, g, 3)
    pages = [np.sort(rng.permutation(65)[:count]) for _ in range(np.prod(shape))]
    index = np.stack([np.pad(p, (0, max(0, wide - count)), constant_values=10**6)[:wide] for p in pages])
    return jnp.asarray(index.reshape(*shape, wide), jnp.int32), jnp.asarray(
        rng.integers(0, count + 1, shape), jnp.int32
    )


def visited(visit, source=None, q_pos=None, **more):
    q, k, v, pos, kv_pos = make(LISTED, 7, holes=0.1, offset=900)
    source = slots_source(k, v, jnp.asarray(kv_pos)) if source is None else source
    return attend_visits(q, source, pos, visit, scale=0.3, mask=Near(700), **more)


def assert_same_part(got, want):
    np.testing.assert_allclose(got.out, want.out, atol=1e-6)
    np.testing.assert_allclose(got.lse, want.lse, atol=2e-6)
    assert np.isfinite(np.asarray(want.lse)).any()


def test_lists_longer_than_their_count_are_those_of_the_count():
    (long, count), (short, _) = listed(3, 3), listed(3, 3, wide=3)
    (got, over), (want, _) = (visited(Visit(LISTED_SIZE, LISTED_ROWS, lists=(x, count))) for x in (long, short))
    assert long.shape[-1] == MOST and short.shape[-1] == 3 and over == 0
    assert_same_part(got, want)


@pytest.mark.parametrize(("count", "reads"), [(0, 0), (3, 1), (4, 1), (9, 3), (64, 16)])
def test_the_work_of_lists_follows_the_longest_count(count, reads):
    """512 keys are read at a time: 4 pages of 128."""
    case = Case(16, 8_192, 4, 4, G=2, D=4)
    q, k, v, q_pos, kv_pos = make(case, 0, offset=9_000, padding=False)
    plain = slots_source(k, v, jnp.asarray(kv_pos))
    calls = []

    def gather(pages, size):
        jax.debug.callback(lambda p: calls.append(p.shape), pages)
        return plain.gather(pages, size)

    index = jnp.broadcast_to(jnp.arange(64, dtype=jnp.int32), (1, 1, 2, 1, 64))
    lists = (index, jnp.asarray([[[[count], [count // 2]]]], jnp.int32))
    run = jax.jit(
        lambda *lists: attend_visits(q, Source(plain.pos, plain.tile, gather), q_pos, Visit(128, 16, lists), scale=0.3)
    )
    jax.block_until_ready(run(*lists))
    jax.effects_barrier()
    assert calls == [(1, 1, 8)] * reads


@pytest.mark.parametrize("form", ["lists", "blocks"])
def test_what_finds_no_place_in_a_list_is_counted(form):
    """The first pages are read, and every page beyond is counted."""
    index, count = listed(3, 9)
    wanted = jnp.full_like(count, 2).at[0, 1, 2].set(9).at[1, 0, 0, 1].set(7)
    if form == "lists":
        visit = Visit(LISTED_SIZE, LISTED_ROWS, lists=(index[..., :5], wanted))
    else:
        visit = Visit(LISTED_SIZE, LISTED_ROWS, blocks=blocks_of(index, wanted), most=5)
    got, overflow = visited(visit)
    want, none = visited(Visit(LISTED_SIZE, LISTED_ROWS, lists=(index, jnp.minimum(wanted, 5))))
    assert overflow == 3 * (9 - 5) + (7 - 5) and none == 0
    assert_same_part(got, want)


def test_query_heads_share_lists():
    index, count = listed(1, 20)
    got, _ = visited(Visit(LISTED_SIZE, LISTED_ROWS, lists=(index, count)))
    wide = (jnp.broadcast_to(x, (*x.shape[:2], LISTED.G, *x.shape[3:])) for x in (index, count))
    want, _ = visited(Visit(LISTED_SIZE, LISTED_ROWS, lists=tuple(wide)))
    assert_same_part(got, want)


def blocks_of(index, count):
    """The pages that lists mean, as bool [B,R,g,Q,65]."""
    live = jnp.arange(index.shape[-1]) < count[..., None]
    return ((index[..., None] == jnp.arange(65)) & live[..., None]).any(-2)


@pytest.mark.parametrize("g", [1, 3])
def test_the_three_forms_of_a_visit_are_one(g):
    index, count = listed(g, 20)
    want, _ = visited(Visit(LISTED_SIZE, LISTED_ROWS, lists=(index, count)))
    worked_out = lambda i: (index[:, :, :, i], count[:, :, :, i])
    for form in ({"blocks": blocks_of(index, count)}, {"listing": worked_out, "most": MOST}):
        got, overflow = visited(Visit(LISTED_SIZE, LISTED_ROWS, **form))
        assert overflow == 0
        assert_same_part(got, want)


@pytest.mark.parametrize("g", [1, 3])
def test_weights_of_a_visit_meet_the_slots_that_are_read(g):
    """Hiding the odd slots by their logits is a source without them."""
    q, k, v, pos, kv_pos = make(LISTED, 7, holes=0.1, offset=900)
    even = slots_source(k, v, jnp.where(jnp.arange(LISTED.S) % 2, EMPTY, kv_pos))
    hide = lambda logits, slot: jnp.where(slot[:, :, :, None] % 2, -1e30, logits)
    lists = listed(g, 20)
    got, _ = visited(Visit(LISTED_SIZE, LISTED_ROWS, lists=lists, weigh=hide))
    want, _ = visited(Visit(LISTED_SIZE, LISTED_ROWS, lists=lists), even)
    assert_same_part(got, want)


# ---- cost


def tiles_read(q, k, v, q_pos, kv_pos, *, held=True, **settings):
    """Starts of the tiles that a run of `attend` really read."""
    starts = []

    @jax.jit
    def run(q, k, v, q_pos, kv_pos):
        plain = slots_source(k, v, kv_pos, held)

        def tile(start, size):
            jax.debug.callback(lambda s: starts.append(int(s)), start)
            return plain.tile(start, size)

        return attend(q, Source(kv_pos, tile, held=held), q_pos, scale=0.3, **settings)

    jax.block_until_ready(run(q, k, v, q_pos, kv_pos))
    jax.effects_barrier()
    return sorted(starts)


def test_a_large_cache_with_few_tokens_reads_few_tiles():
    case = Case(1, 65_536, 256, 512, D=4)
    q, k, v, q_pos, kv_pos = make(case, 0, shuffle=False, offset=99, padding=False)
    kv_pos[..., 100:] = EMPTY
    assert tiles_read(q, k, v, q_pos, kv_pos, kv_tile=512) == [0]
    kv_pos[..., :513] = np.arange(513)
    assert tiles_read(q, k, v, q_pos + 500, kv_pos, kv_tile=512) == [0, 512]


def test_causal_tiles_above_the_diagonal_and_outside_the_window_are_not_read():
    case = Case(64, 64, 16, 16)
    q, k, v, pos, kv_pos = make(case, 0, shuffle=False, padding=False)
    causal = tiles_read(q, k, v, pos, kv_pos, held=False, q_tile=16, kv_tile=16)
    assert causal == sorted([0] * 4 + [16] * 3 + [32] * 2 + [48])
    windowed = tiles_read(q, k, v, pos, kv_pos, held=False, q_tile=16, kv_tile=16, mask=Near(10))
    assert windowed == sorted([0] * 2 + [16] * 2 + [32] * 2 + [48])


@pytest.mark.parametrize("grad", [False, True])
def test_logits_of_a_long_step_are_never_held_at_once(grad):
    T, D = 8_192, 16
    q, k = jnp.zeros((1, 1, 1, T, D)), jnp.zeros((1, 1, T, D))
    pos = jnp.arange(T)[None]
    run = lambda q, k, v: attend(q, tokens_source(k, v, pos), pos, scale=1.0).out.sum()
    run = jax.grad(run, (0, 1, 2)) if grad else run
    temp = jax.jit(run).lower(q, k, k).compile().memory_analysis().temp_size_in_bytes
    # all logits are 256 MiB; one tile row in the backward pass, 512 x 8,192, is 16 MiB and has a few companions
    assert temp < (T * T * 4 / 2 if grad else T * T * 4 / 8)
