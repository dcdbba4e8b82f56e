"""What every policy keeps, and the two position patterns, against the float64 decoder of tests/naive_model.py.

The rules below are written from the papers and share no code with lcx.  Every lcx run is a batch of two prompts of
different lengths, padded to one shape; the oracle reads each text alone and unpadded, so equality also says that
neither batch mate nor padding matters.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import cycle

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from naive_model import NaiveModel
from tiny import ATOL, TINY, layers, quick_compilation, weights  # noqa: F401, the fixture is for every test

from lcx.axes import KeepAll
from lcx.cache import device_bytes
from lcx.config_files import load_config
from lcx.errors import UserError
from lcx.model_config import ModelConfig, Rope
from lcx.ops.attention import attend, tokens_source
from lcx.ops.masks import Bounds
from lcx.patterns.sink_window import AShape
from lcx.patterns.streaming import CachePositions
from lcx.policies.flush import Flush
from lcx.policies.h2o import H2O
from lcx.policies.knorm import KNorm
from lcx.policies.sink_window import SinkWindow
from lcx.policies.snapkv import SnapKV
from lcx.policies.tova import TOVA
from lcx.recipe import Recipe, Segment
from lcx.schedules.chunked import Chunked
from lcx.session import Session
from lcx.storage import Shape

# every layer has a window
LOCAL = replace(TINY, name="local", window=6, global_every=4, rope=Rope(1e6), rope_local=Rope(1e4))
# compiling is what this file costs: prompts are padded to 37 tokens and read in steps of 17 or 1, so that two programs
# serve all lengths; up to 17 tokens a prompt is read in one step, beyond that in chunks
PROMPT, CHUNK, NEW = 37, 17, 4
BUDGET = 9
MARGIN = 1e-4  # f32 may order scores otherwise that differ by less, relative to the larger one


# ---- the rules: scores of what each KV head holds; inf always stays, -inf always goes


def recency(sink):
    return lambda heads, budget: [np.where(h.pos < sink, np.inf, h.pos) for h in heads]


def tova(keep_last):
    def rule(heads, budget):
        last = np.mean([prob[-1] for h in heads for prob in h.prob], 0)
        if keep_last:
            last[-1] = np.inf
        return [last] * len(heads)

    return rule


def heavy_hitters(heads, budget):
    recent = budget - budget // 2
    return [np.where(h.pos > h.pos[-1] - recent, np.inf, h.mass) for h in heads]


def key_norm(heads, budget):
    return [-np.sqrt((h.key**2).sum(-1)) for h in heads]


def votes(window, kernel, pool):
    """SnapKV: the last `window` queries vote; each head's sums over them are pooled, then averaged over the group."""

    def rule(heads, budget):
        scores = []
        for h in heads:
            past = max(0, len(h.pos) - window)
            wide = np.pad(h.prob[:, -window:, :past].sum(1), ((0, 0), (kernel // 2, kernel // 2)))
            pooled = [[pool(one[i : i + kernel]) for i in range(past)] for one in wide]
            scores.append(np.concatenate([np.mean(pooled, 0), np.full(len(h.pos) - past, np.inf)]))
        return scores

    return rule


def whole_pages(page, keep):
    def rule(heads, budget):
        gone = max(0, (len(heads[0].pos) - keep) // page) * page
        return [np.where(np.arange(len(h.pos)) < gone, -np.inf, np.inf) for h in heads]

    return rule


class Keep:
    """`NaiveModel.keep` from a rule; of equal scores the earlier token stays.

    `margin`: how narrow the closest decision was, relative to the score.
    """

    def __init__(self, rule, budget):
        self.rule, self.budget, self.margin = rule, budget, np.inf

    def __call__(self, heads):
        chosen = []
        for score in self.rule(heads, self.budget):
            order = np.argsort(-score, kind="stable")
            order = order[score[order] > -np.inf]
            if len(order) > self.budget:
                low, high = score[order[self.budget]], score[order[self.budget - 1]]
                # pooling with max copies numbers: an exact tie is one in f32 too
                if high < np.inf and not low == high:
                    self.margin = min(self.margin, (high - low) / max(abs(low), abs(high)))
            chosen.append(order[: self.budget])
        return chosen


def keep_everything(heads):
    return [np.arange(len(h.pos)) for h in heads]


@dataclass(frozen=True)
class Method:
    """A method of lcx for a budget, and its rule.  `once`: it acts at the end of the prompt only."""

    recipe: Callable[[int], Recipe]
    rule: Callable | None = None
    once: bool = False
    cache_positions: bool = False


def act_each_step(policy, rule, **settings):
    return Method(lambda n: Recipe((Segment(policy=policy(n)),)), rule, **settings)


def act_once(compress, rule):
    return Method(lambda n: Recipe((Segment(compress=compress(n)),)), rule, once=True)


def in_cache_positions(policy, rule):
    return Method(lambda n: Recipe((Segment(policy=policy(n)),), CachePositions()), rule, cache_positions=True)


METHODS = {
    "keep_all": Method(lambda n: Recipe((Segment(policy=KeepAll()),))),
    "flush": act_each_step(lambda n: Flush(page=3, keep=n - 2), lambda heads, n: whole_pages(3, n - 2)(heads, n)),
    "window": act_each_step(lambda n: SinkWindow(0, n), recency(0)),
    "sink_window": act_each_step(lambda n: SinkWindow(2, n - 2), recency(2)),
    "streaming_llm": in_cache_positions(lambda n: SinkWindow(2, n - 2), recency(2)),
    "snapkv": act_once(lambda n: SnapKV(n, window=3, kernel=5), votes(3, 5, np.mean)),
    "snapkv_max": act_once(lambda n: SnapKV(n, window=3, kernel=3, pooling="max"), votes(3, 3, np.max)),
    "knorm": act_once(lambda n: KNorm(n, skip_layers=()), key_norm),
    "tova": act_each_step(TOVA, tova(False)),
    "tova_keep_last": act_each_step(lambda n: TOVA(n, keep_last=True), tova(True)),
    "h2o": act_each_step(H2O, heavy_hitters),
}


# ---- both sides


@dataclass(frozen=True)
class Case:
    """Two texts: prompts of these lengths, read in steps of `chunk` tokens, then `steps` more."""

    lengths: tuple[int, int] = (PROMPT, 16)
    chunk: int = CHUNK
    seed: int = 0
    weights_seed: int = 0
    steps: tuple[int, ...] = (1,) * NEW
    config: ModelConfig = TINY

    @property
    def text(self):
        """int [2, PROMPT + NEW]; no token twice in a text: in the first layer its keys would tie in their norm."""
        rng = np.random.default_rng(self.seed)
        return np.stack([rng.permutation(self.config.vocab_size)[: PROMPT + NEW] for _ in range(2)])

    @property
    def prompts(self):
        return self.text[:, :PROMPT]

    @property
    def continuations(self):
        """int [2,N] for each step of N tokens."""
        ends = PROMPT + np.cumsum(self.steps, dtype=int)
        return [self.text[:, end - n : end] for end, n in zip(ends, self.steps, strict=True)]


def kept_positions(session, segment="all"):
    """[L][B][K], each the positions held in ascending order; no slot is left out on the way to the last one."""
    found = []
    for layer in session.cache:
        pos = np.asarray(layer[segment].pos)
        assert ((pos[..., :-1] >= 0) | (pos[..., 1:] < 0)).all()
        pos = np.broadcast_to(pos, (pos.shape[0], TINY.num_kv_heads, pos.shape[2]))
        found.append([[np.sort(row[row >= 0]) for row in text] for text in pos])
    return found


def run(recipe, case, dtype="float32"):
    """lcx: the logits [B,V] and the kept positions after the prompt and after each step."""
    model = layers(case.config, case.weights_seed, dtype)
    session = Session(model, recipe, PROMPT, NEW, batch=2, schedule=Chunked(case.chunk))
    logits = [np.asarray(session.prefill(case.prompts, case.lengths))]
    kept = [kept_positions(session)]
    for tokens in case.continuations:
        logits.append(np.asarray(session.step(tokens)))
        kept.append(kept_positions(session))
    return logits, kept


def run_oracle(case, row, keep=None, after=None, **hooks):
    """The oracle for one text alone: logits [V] and kept positions [L][K] after the prompt and after each step.

    `after` None: `keep` acts after every step.  Otherwise the prompt is read whole, `keep` acts once, then `after`.
    """
    naive = NaiveModel(case.config, weights(case.config, case.weights_seed), keep=keep, **hooks)
    prompt = case.prompts[row, : case.lengths[row]]
    chunk = case.chunk if after is None else len(prompt)
    for start in range(0, len(prompt), chunk):
        x = naive.step(prompt[start : start + chunk])
    naive.keep = keep if after is None else after
    logits, kept = [], []
    for tokens in [None, *(c[row] for c in case.continuations)]:
        x = x if tokens is None else naive.step(tokens)
        logits.append(naive.logits(x[-1]))
        kept.append([[h.pos for h in layer] for layer in naive.held])
    return logits, kept


def oracle_of(method, budget, case, row):
    """(logits, kept, margin)"""
    keep = Keep(method.rule, budget) if method.rule else None
    after = keep_everything if method.once else None
    found = run_oracle(case, row, keep, after, cache_positions=method.cache_positions)
    return *found, np.inf if keep is None else keep.margin


def assert_equal(got, want, row):
    for i, (logits, kept) in enumerate(zip(*want, strict=True)):
        for layer, heads in enumerate(kept):
            for head, pos in enumerate(heads):
                np.testing.assert_array_equal(got[1][i][layer][row][head], pos, f"{row=} step={i} {layer=} {head=}")
        np.testing.assert_allclose(got[0][i][row], logits, atol=ATOL, err_msg=f"{row=} step={i}")


def follows_rule(method, budget, case):
    """Whether the comparison could be made: False when two scores are too close for f32."""
    wanted = [oracle_of(method, budget, case, row) for row in range(2)]
    if min(margin for *_, margin in wanted) < MARGIN:
        return False
    got = run(method.recipe(budget), case)
    for row, (*want, _) in enumerate(wanted):
        assert_equal(got, want, row)
    return True


@pytest.mark.parametrize("skipped", [(0, 1), (1,)])
def test_key_norm_skips_the_layers_of_its_setting(skipped):
    """Layers that are skipped keep the whole prompt; the others keep the budget of what they see then."""
    case = Case()
    got = run(Recipe((Segment(compress=KNorm(BUDGET, skip_layers=skipped)),)), case)
    for row in range(2):
        layer, rule = cycle(range(TINY.num_layers)), Keep(key_norm, BUDGET)
        keep = lambda heads, layer=layer, rule=rule: keep_everything(heads) if next(layer) in skipped else rule(heads)
        want = run_oracle(case, row, keep, keep_everything)
        assert rule.margin > MARGIN
        assert_equal(got, want, row)
    assert KNorm().skip_layers == (0, 1)


def most_kept(kept):
    """Tokens of the fullest KV head after the prompt and after each step."""
    return [max(len(pos) for layer in held for text in layer for pos in text) for held in kept]


# ---- every method


@pytest.mark.parametrize("name", METHODS)
@settings(max_examples=8)
@given(
    lengths=st.tuples(st.integers(1, PROMPT), st.integers(1, PROMPT)),
    chunk=st.sampled_from([CHUNK, 1]),
    seed=st.integers(0, 10_000),
    weights_seed=st.integers(0, 2),
)
@example(lengths=(CHUNK, 14), chunk=CHUNK, seed=0, weights_seed=0)
@example(lengths=(PROMPT, 9), chunk=CHUNK, seed=1, weights_seed=1)
@example(lengths=(PROMPT, 2), chunk=1, seed=2, weights_seed=2)
def test_kept_tokens_and_logits_equal_the_oracle(name, lengths, chunk, seed, weights_seed):
    assume(follows_rule(METHODS[name], BUDGET, Case(lengths, chunk, seed, weights_seed)))


@pytest.mark.parametrize("chunk", [CHUNK, 1])
@pytest.mark.parametrize("name", METHODS)
def test_no_more_is_held_than_the_budget(name, chunk):
    method = METHODS[name]
    _, kept = run(method.recipe(BUDGET), Case((PROMPT, 3), chunk, seed=3))
    steps = np.arange(NEW + 1)
    limits = PROMPT + steps if method.rule is None else BUDGET + steps * method.once
    most = most_kept(kept)
    assert (most <= limits).all()
    assert name == "flush" or (most == limits).all()


@pytest.mark.parametrize("chunk", [CHUNK, 1])
@pytest.mark.parametrize("name", METHODS)
def test_a_budget_that_covers_the_text_is_exact(name, chunk):
    case = Case((BUDGET - NEW, 2), chunk, seed=4)
    logits, kept = run(METHODS[name].recipe(BUDGET), case)
    dense, _ = run(Recipe(), case)
    for ours, exact in zip(logits, dense, strict=True):
        np.testing.assert_allclose(ours, exact, atol=2e-5)  # the same numbers, summed in the order of the slots
    for row, length in enumerate(case.lengths):
        for layer in kept[-1]:
            for pos in layer[row]:
                np.testing.assert_array_equal(pos, np.arange(length + NEW))


@pytest.mark.parametrize("name", ["window", "sink_window", "streaming_llm", "tova", "h2o", "snapkv", "knorm"])
def test_a_budget_above_the_text_takes_no_more_bytes_than_dense(name):
    """At the budget of the method's config: slots that no token can reach are not made."""
    recipe = load_config(f"configs/{name}.py").recipe
    dense = Recipe().bytes(TINY, PROMPT, NEW, batch=2)
    # positions of each row, and the sums of H2O, come on top: 8 bytes beside the 256 of a key and a value
    assert dense <= recipe.bytes(TINY, PROMPT, NEW, batch=2) <= 1.1 * dense
    session = Session(layers(), recipe, PROMPT, NEW, batch=2)
    assert device_bytes([session.empty("decode", i) for i in range(TINY.num_layers)]) <= 1.1 * dense


def test_steps_after_a_cut_may_have_several_tokens():
    assert follows_rule(METHODS["snapkv"], BUDGET, Case((PROMPT, 11), seed=5, steps=(3, 1)))


@pytest.mark.parametrize("name", ["sink_window", "tova"])
def test_layers_with_a_window_of_their_own_follow_the_rule_too(name):
    method, case = METHODS[name], Case((PROMPT, 12), seed=6, steps=(), config=LOCAL)
    got, _ = run(method.recipe(BUDGET), case)
    for row in range(2):
        # what has left the window has mass 0 in TOVA, and it does not matter which of these tokens goes
        want, _, _ = oracle_of(method, BUDGET, case, row)
        for ours, exact in zip(got, want, strict=True):
            np.testing.assert_allclose(ours[row], exact, atol=ATOL)


def test_h2o_counts_positions_in_the_cache_where_the_pattern_does():
    """KV heads hold different tokens then, and each ranks its own."""
    method = in_cache_positions(H2O, heavy_hitters)
    assert follows_rule(method, BUDGET, Case((PROMPT, 13), seed=7, steps=()))


@pytest.mark.parametrize("name", ["snapkv", "h2o"])
def test_bfloat16_models_are_exact_at_the_limit_and_keep_their_budget(name):
    recipe = METHODS[name].recipe(BUDGET)
    short = Case((BUDGET, 2), seed=8, steps=())
    logits, dense = run(recipe, short, "bfloat16")[0], run(Recipe(), short, "bfloat16")[0]
    np.testing.assert_allclose(logits[0], dense[0], atol=0.1)  # two roundings of values near 5
    logits, kept = run(recipe, replace(short, lengths=(PROMPT, 14)), "bfloat16")
    assert np.isfinite(logits).all() and most_kept(kept) == [BUDGET]


# ---- what single methods promise


def test_tova_keeps_one_set_for_the_layer_and_h2o_one_for_each_head():
    for name, same in (("tova", True), ("h2o", False)):
        _, kept = run(METHODS[name].recipe(BUDGET), Case(seed=9))
        assert all(np.array_equal(*text) for layer in kept[-1] for text in layer) == same


def test_tova_may_drop_the_newest_token_and_keep_last_may_not():
    for name, always in (("tova", False), ("tova_keep_last", True)):
        _, kept = run(METHODS[name].recipe(BUDGET), Case(seed=10))
        stays = [PROMPT - 1 + i in layer[0][0] for i, held in enumerate(kept) for layer in held]
        assert all(stays) == always


def test_h2o_protects_the_recent_half():
    _, kept = run(METHODS["h2o"].recipe(BUDGET), Case(seed=11))
    for i, held in enumerate(kept):
        for layer in held:
            for text, length in zip(layer, Case().lengths, strict=True):
                assert all(set(range(length + i - 5, length + i)) <= set(pos) for pos in text)


def test_snapkv_protects_its_window():
    _, kept = run(METHODS["snapkv"].recipe(BUDGET), Case(seed=12))
    for layer in kept[0]:
        for text, length in zip(layer, Case().lengths, strict=True):
            assert all(set(range(length - 3, length)) <= set(pos) for pos in text)


def test_a_cut_after_the_prompt_does_not_touch_its_logits_and_does_touch_the_next():
    dense, _ = run(Recipe(), Case(seed=13))
    for name in (n for n in METHODS if METHODS[n].once):
        logits, _ = run(METHODS[name].recipe(BUDGET), Case(seed=13))
        np.testing.assert_allclose(logits[0], dense[0], atol=2e-5)
        assert np.abs(logits[1] - dense[1]).max() > 1e-2


# ---- edges


@pytest.mark.parametrize(
    ("method", "budget"),
    [
        (METHODS["window"], 1),
        (METHODS["tova"], 1),
        (METHODS["knorm"], 1),
        (METHODS["h2o"], 2),
        (act_once(lambda n: SnapKV(n, window=1, kernel=1), votes(1, 1, np.mean)), 1),
        (act_once(lambda n: SnapKV(n, window=1, kernel=1), votes(1, 1, np.mean)), 2),
    ],
    ids=["window", "tova", "knorm", "h2o", "snapkv_window_alone", "snapkv"],
)
def test_the_smallest_budget(method, budget):
    assert follows_rule(method, budget, Case((PROMPT, 1), 1, seed=14, steps=() if method.once else (1, 1)))


def test_snapkv_keeps_prompts_that_are_shorter_than_its_window():
    """Then all their queries vote, and the rest of the probe is empty."""
    method = act_once(lambda n: SnapKV(n, window=50), votes(50, 5, np.mean))
    case = Case((PROMPT, 7), seed=15, steps=())
    assert follows_rule(method, 51, case)
    _, kept = run(method.recipe(51), case)
    for layer in kept[0]:
        assert [len(pos) for text in layer for pos in text] == [PROMPT, PROMPT, 7, 7]


def test_more_slots_than_the_budget_change_nothing():
    roomy = replace(METHODS["tova"], recipe=lambda n: replace(METHODS["tova"].recipe(n), rounding=13))
    assert roomy.recipe(BUDGET).capacities("decode", 0, Shape(TINY, PROMPT, NEW)) == {"all": 13}
    assert follows_rule(roomy, BUDGET, Case((PROMPT, 5), 1, seed=17))


def test_a_window_may_follow_snapkv():
    """The cut leaves each KV head tokens of its own; then the window takes its own from these."""
    cut, tail = Keep(votes(3, 5, np.mean), 12), Keep(recency(2), BUDGET)
    case = Case((PROMPT, 10), seed=19)
    segment = Segment(policy=SinkWindow(2, BUDGET - 2), compress=SnapKV(12, window=3))
    got = run(Recipe((segment,)), case)
    for row in range(2):

        def both(heads):
            survivors = [h.take(np.sort(i)) for h, i in zip(heads, cut(heads), strict=True)]
            chosen = tail(survivors)
            return [np.flatnonzero(np.isin(h.pos, s.pos[i])) for h, s, i in zip(heads, survivors, chosen, strict=True)]

        assert_equal(got, run_oracle(case, row, both, after=tail), row)
    assert min(cut.margin, tail.margin) > MARGIN


@pytest.mark.parametrize("lengths", [(PROMPT, 20), (CHUNK, 7), (6, 1)])
def test_pages_that_a_flush_hands_down_are_all_kept_by_the_next_segment(lengths):
    case = Case(lengths, seed=19, steps=())
    chain = (Segment("tail", policy=Flush(page=3, keep=4)), Segment("pages"))
    session = Session(layers(TINY, 0), Recipe((chain,)), PROMPT, batch=2, schedule=Chunked(CHUNK))
    logits = session.prefill(case.prompts, lengths)
    np.testing.assert_allclose(logits, run(Recipe(), case)[0][0], atol=2e-5)
    for tail, pages in zip(kept_positions(session, "tail"), kept_positions(session, "pages"), strict=True):
        for row, total in enumerate(lengths):
            split = max(0, (total - 4) // 3 * 3)
            for head in range(TINY.num_kv_heads):
                np.testing.assert_array_equal(pages[row][head], np.arange(split))
                np.testing.assert_array_equal(tail[row][head], np.arange(split, total))


# ---- A-shape


SHAPE = AShape(sink=2, window=5)


def a_shape(q_pos, kv_pos):
    return (kv_pos < 2) | (q_pos - kv_pos < 5)


@settings(max_examples=8)
@given(
    lengths=st.tuples(st.integers(1, PROMPT), st.integers(1, PROMPT)),
    chunk=st.sampled_from([CHUNK, 1]),
    seed=st.integers(0, 10_000),
)
@example(lengths=(PROMPT, 14), chunk=CHUNK, seed=0)
def test_a_shape_masks_and_forgets_nothing(lengths, chunk, seed):
    case = Case(lengths, chunk, seed)
    got = run(Recipe(pattern=SHAPE), case)
    for row in range(2):
        assert_equal(got, run_oracle(case, row, allow=a_shape), row)


def test_a_shape_that_covers_the_text_is_exact():
    case = Case((3, 2), 1, seed=20)
    for ours, exact in zip(run(Recipe(pattern=SHAPE), case)[0], run(Recipe(), case)[0], strict=True):
        np.testing.assert_allclose(ours, exact, atol=2e-5)


@settings(max_examples=200)
@given(
    st.integers(0, 40), st.integers(1, 9), st.integers(0, 40), st.integers(1, 9), st.integers(0, 9), st.integers(1, 30)
)
def test_a_shape_bounds_of_a_tile_agree_with_its_mask(q_lo, num_q, kv_lo, num_kv, sink, window):
    q_pos, kv_pos = q_lo + np.arange(num_q)[:, None], kv_lo + np.arange(num_kv)
    shape = AShape(sink, window).mask(None)
    mask = shape.allow(q_pos, kv_pos)
    some, every = shape.bounds(Bounds(q_lo, q_pos[-1, 0], kv_lo, kv_pos[-1]))
    assert some == mask.any()
    assert mask.all() or not every
    # a tile inside the sinks or inside the window is read without a mask
    assert every or not ((kv_pos < sink).all() or (q_pos - kv_pos < window).all())


def test_a_shape_over_many_tiles_equals_numpy():
    rng = np.random.default_rng(22)
    q, k, v = rng.normal(size=(1, 2, 3, 61, 8)), rng.normal(size=(1, 2, 61, 8)), rng.normal(size=(1, 2, 61, 8))
    pos = np.arange(61)
    source = tokens_source(jnp.float32(k), jnp.float32(v), pos[None])
    got = attend(jnp.float32(q), source, pos[None], scale=0.3, q_tile=7, kv_tile=8, mask=AShape(3, 20).mask(None))
    mask = (pos <= pos[:, None]) & ((pos < 3) | (pos[:, None] - pos < 20))
    weight = np.where(mask, np.exp(np.einsum("brgtd,brsd->brgts", q, k) * 0.3), 0)
    want = np.einsum("brgts,brsd->brgtd", weight / weight.sum(-1, keepdims=True), v)
    np.testing.assert_allclose(got.out, want, atol=2e-5)  # f32, 61 keys


# ---- long prompts: attention in several tiles of queries and of keys


LONG = replace(TINY, num_layers=1)


@pytest.mark.parametrize("name", ["snapkv", "h2o"])
def test_methods_score_alike_over_many_tiles(name):
    """601 tokens are three tiles of 256 queries and two of 512 keys, the last of which overlap the ones before."""
    text = np.random.default_rng(23).integers(0, TINY.vocab_size, 601)
    keep = Keep(METHODS[name].rule, 40)
    naive = NaiveModel(LONG, weights(LONG, 0), keep=keep)
    x = naive.step(text)
    session = Session(layers(LONG, 0), METHODS[name].recipe(40), 601, 1)
    np.testing.assert_allclose(session.prefill(text)[0], naive.logits(x[-1]), atol=ATOL)
    for head, pos in enumerate(kept_positions(session)[0][0]):
        np.testing.assert_array_equal(pos, naive.held[0][head].pos)
    assert keep.margin > MARGIN


# ---- arguments and budgets


BAD = [
    (lambda: SinkWindow(sink=-1), "sink=-1", "at least 0"),
    (lambda: SinkWindow(sink=True), "sink=True", "integer"),
    (lambda: SinkWindow(window=0), "window=0", "at least 1"),
    (lambda: SinkWindow(window="8"), "window='8'", "integer"),
    (lambda: SinkWindow(window=True), "window=True", "integer"),
    (lambda: SinkWindow(sink=4).with_budget(4), "budget=4", "at least 5"),
    (lambda: SnapKV(window=0), "window=0", "at least 1"),
    (lambda: SnapKV(window="64"), "window='64'", "integer"),
    (lambda: SnapKV(budget=63), "budget=63", "at least 64"),
    (lambda: SnapKV(budget=100.0), "budget=100.0", "integer"),
    (lambda: SnapKV(kernel=4), "kernel=4", "odd"),
    (lambda: SnapKV(kernel=0), "kernel=0", "at least 1"),
    (lambda: SnapKV(kernel=3.0), "kernel=3.0", "integer"),
    (lambda: SnapKV(pooling="mean"), "pooling='mean'", "avg, max"),
    (lambda: TOVA(0), "budget=0", "at least 1"),
    (lambda: TOVA("9"), "budget='9'", "integer"),
    (lambda: KNorm(0), "budget=0", "at least 1"),
    (lambda: KNorm(2.5), "budget=2.5", "integer"),
    (lambda: KNorm(9, skip_layers=[0]), "skip_layers=[0]", "tuple of layers"),
    (lambda: KNorm(9, skip_layers=(-1,)), "skip_layers=(-1,)", "at least 0"),
    (lambda: H2O(1), "budget=1", "at least 2"),
    (lambda: H2O(True), "budget=True", "integer"),
    (lambda: Flush(page=0), "page=0", "at least 1"),
    (lambda: Flush(page=2, keep=-1), "keep=-1", "at least 0"),
    (lambda: Flush(page="2"), "page='2'", "integer"),
    (lambda: AShape(sink=-1), "sink=-1", "at least 0"),
    (lambda: AShape(window=0), "window=0", "at least 1"),
    (lambda: AShape(window="8"), "window='8'", "integer"),
    (lambda: AShape(sink=4).with_budget(4), "budget=4", "at least 5"),
    (lambda: AShape(sink=4).with_budget(None), "budget=None", "integer"),
    (lambda: Recipe(pattern=AShape(sink=4)).with_budget(3), "budget=3", "at least 5"),
    (lambda: Recipe((Segment(compress=SnapKV()),)).with_budget(63), "budget=63", "at least 64"),
]


@pytest.mark.parametrize(("make", "given", "allowed"), BAD, ids=[f"{g}-{i}" for i, (_, g, _) in enumerate(BAD)])
def test_a_bad_argument_is_named_in_one_line_with_what_is_allowed(make, given, allowed):
    with pytest.raises(UserError) as caught:
        make()
    message = str(caught.value)
    assert given in message and allowed in message and "\n" not in message


@pytest.mark.parametrize("name", [n for n in METHODS if n not in ("keep_all", "flush")])
def test_with_budget_gives_the_recipe_of_that_budget(name):
    assert METHODS[name].recipe(20).with_budget(BUDGET) == METHODS[name].recipe(BUDGET)


def test_a_budget_of_a_shape_counts_sinks_and_a_recipe_without_budget_refuses_one():
    assert AShape(4, 20).with_budget(10) == AShape(4, 6)
    for name in ("keep_all", "flush"):
        with pytest.raises(UserError, match="budget"):
            METHODS[name].recipe(20).with_budget(BUDGET)


def test_snapkv_votes_with_the_window_of_the_model():
    case = Case((PROMPT, 30), seed=30, config=replace(LOCAL, window=12))
    assert follows_rule(METHODS["snapkv"], BUDGET, case)


def test_snapkv_votes_with_the_mask_of_the_pattern():
    case = Case((PROMPT, 30), seed=31)
    got = run(Recipe((Segment(compress=SnapKV(BUDGET, window=3)),), AShape(2, 12)), case)
    for row in range(2):
        keep = Keep(METHODS["snapkv"].rule, BUDGET)
        near = lambda q, k: (k < 2) | (q - k < 12)
        assert_equal(got, run_oracle(case, row, keep, keep_everything, allow=near), row)


@pytest.mark.parametrize(
    ("policy", "need"),
    [(TOVA(BUDGET), "one set of positions .*"), (H2O(BUDGET), "the attention over every key .*")],
    ids=["tova", "h2o"],
)
def test_policies_that_need_attention_are_refused_after_a_cut(policy, need):
    with pytest.raises(UserError, match=f"needs {need}, which SnapKV does not leave; choose one"):
        Recipe((Segment(policy=policy, compress=SnapKV(BUDGET, window=3)),))
