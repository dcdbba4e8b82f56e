"""Patterns against the same rule written in numpy without lcx: which keys each query reads, and a float64 decoder that reads them."""

import math
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from naive_model import Held as Memory
from naive_model import NaiveModel, activation, rms, turn
from tiny import ATOL, TINY, layers, poison, text, weights
from tiny import quick_compilation as quick_compilation

from lcx.axes import CAUSAL, Causal, Exact, KeepAll
from lcx.cache import Held, Size, Store, Tokens
from lcx.codecs.int_token import Int
from lcx.ctx import Ctx
from lcx.errors import UserError
from lcx.ops.attention import EMPTY
from lcx.patterns.minference import MInference
from lcx.patterns.quest import Quest, Summaries
from lcx.recipe import Recipe
from lcx.schedules.chunked import Chunked
from lcx.session import Session

CONFIG = replace(TINY, num_layers=2)
K, G = CONFIG.num_kv_heads, CONFIG.group


# ---- a decoder whose query heads read keys of their own choice


class SparseModel(NaiveModel):
    """`NaiveModel` for Llama's architecture where `choose(layer, head, query [G,T,D], memory, num_new)` -> bool [G,T,held] restricts."""

    choose = None

    def block(self, layer, x, pos):
        c, D = self.config, self.config.head_dim
        w = {n.split(".", 2)[2]: a for n, a in self.weights.items() if n.startswith(f"layers.{layer}.")}
        frequencies = self.frequencies(False)
        wide = rms(x, w["attn_norm"], c.norm_eps) @ w["qkv"]
        columns = [wide[:, i * D : (i + 1) * D] for i in range(c.num_heads + 2 * c.num_kv_heads)]
        outs = []
        for head in range(K):
            old, key, value = self.held[layer][head], columns[c.num_heads + head], columns[c.num_heads + K + head]
            joined = [
                np.concatenate(pair)
                for pair in ((old.pos, pos), (old.raw, key), (old.key, turn(key, pos, frequencies)), (old.value, value))
            ]
            now = self.held[layer][head] = Memory(*joined, mass=np.zeros(len(joined[0])))
            query = np.stack([turn(columns[head * G + g], pos, frequencies) for g in range(G)])
            sees = np.broadcast_to(now.pos <= pos[:, None], (G, len(pos), len(now.pos)))
            if self.choose is not None:
                sees = sees & self.choose(layer, head, query, now, len(pos))
            logits = np.where(sees, query @ now.key.T / math.sqrt(D), -np.inf)
            prob = np.exp(logits - logits.max(-1, keepdims=True))
            outs += list(prob / prob.sum(-1, keepdims=True) @ now.value)
        x = x + np.concatenate(outs, -1) @ w["o"]
        wide = rms(x, w["mlp_norm"], c.norm_eps) @ w["gate_up"]
        return x + (activation(c.activation, wide[:, : c.d_ff]) * wide[:, c.d_ff :]) @ w["down"]


def follow(recipe, choose, lengths, steps, *, prompt, aux=None, schedule=None, dirty=False):
    """Two texts of these lengths, then steps of tokens, each row against a numpy decoder; `choose(naive)` makes its rule."""
    tokens = np.stack([text(prompt + sum(steps), seed) for seed in (3, 4)])
    session = Session(layers(CONFIG), recipe, prompt, sum(steps), batch=2, aux=aux, schedule=schedule)
    got = session.prefill(tokens[:, :prompt], lengths)
    rows = [SparseModel(CONFIG, weights(CONFIG)) for _ in lengths]
    for b, (naive, length) in enumerate(zip(rows, lengths, strict=True)):
        naive.choose = choose(naive, "prefill")
        np.testing.assert_allclose(got[b], naive.logits(naive.step(tokens[b, :length])[-1:])[0], atol=ATOL)
    for length in steps:
        if dirty:
            poison(session)
        part = np.stack([tokens[b, naive.last_pos + 1 :][:length] for b, naive in enumerate(rows)])
        want = []
        for b, naive in enumerate(rows):
            naive.choose = choose(naive, "decode")
            want.append(naive.logits(naive.step(part[b])[-1:])[0])
        np.testing.assert_allclose(session.step(part), want, atol=ATOL)
    assert session.overflow == 0
    return session, rows


# ---- causal


def test_causal_reads_every_token_before_and_itself():
    session, _ = follow(Recipe(), lambda naive, phase: None, [21, 37], [1, 1], prompt=37, schedule=Chunked(13))
    assert Recipe().pattern is CAUSAL and CAUSAL == Causal() and CAUSAL.at("decode", 3, CONFIG) is CAUSAL
    assert set(session.cache[0]["all"].state) == set()


# ---- Quest


def bound(query, keys):
    """Quest's upper bound of q.k over the keys of a page, dimension by dimension."""
    return sum(max(q * column.min(), q * column.max()) for q, column in zip(query, keys.T, strict=True))


def quest_pages(queries, keys, pattern, distance=None, window=None):
    """Pages that each query head of a group reads, for one position of the query.

    Args:
      queries: [G,D].
      keys: [n,D] held, in the order of the text.
      distance: [n] from the query to each key, for layers with a window of their own.
    """
    page = pattern.page
    starts = range(0, len(keys), page)
    bounds = np.array([[bound(q, keys[i : i + page]) for i in starts] for q in queries]).reshape(len(queries), -1)
    if pattern.group_reduce == "max":
        bounds[:] = bounds.max(0)
    if window is not None:
        near = np.array([distance[i : i + page].min() < window for i in starts], bool)
        bounds[:, ~near] = -np.inf
    wanted = min(max(pattern.budget // page, 3), len(starts))
    found = []
    for row in bounds:
        if pattern.force_last and len(starts):
            row[-1] = np.inf
        found.append({int(i) for i in np.argsort(-row, kind="stable")[:wanted]})
    return found


def quest_rule(pattern):
    def choose(naive, phase):
        def read(layer, head, query, memory, num_new):
            held = len(memory.pos) - num_new
            mask = np.ones((*query.shape[:2], len(memory.pos)), bool)
            if phase == "prefill" or layer < pattern.dense_layers:
                return mask
            for t in range(num_new):
                for g, pages in enumerate(quest_pages(query[:, t], memory.key[:held], pattern)):
                    mask[g, t, :held] = np.isin(np.arange(held) // pattern.page, list(pages))
            return mask

        return read

    return choose


QUEST = Quest(budget=14, page=4, dense_layers=0)
FREE = replace(QUEST, force_last=False)
STEPS = [1] * 6 + [3, 3] + [1] * 3


@pytest.mark.parametrize("pattern, dirty", [(QUEST, False), (QUEST, True), (FREE, False)], ids=["", "dirty", "free"])
def test_quest_equals_a_decoder_that_reads_the_chosen_pages(pattern, dirty):
    """Chunks and steps that straddle pages, steps of three tokens that also read each other, texts of different lengths."""
    recipe = Recipe(pattern=pattern)
    session, rows = follow(recipe, quest_rule(pattern), [21, 37], STEPS, prompt=37, schedule=Chunked(13), dirty=dirty)
    # the extremes of every page are those of the keys that it holds
    for layer, head, b in np.ndindex(CONFIG.num_layers, K, 2):
        keys = rows[b].held[layer][head].key
        for p in range(-(-len(keys) // 4)):
            page = keys[4 * p : 4 * p + 4]
            state = session.cache[layer]["all"].state
            np.testing.assert_allclose(state["page_min"][b, head, :, p], page.min(0), atol=ATOL)
            np.testing.assert_allclose(state["page_max"][b, head, :, p], page.max(0), atol=ATOL)
    assert session.cache_bytes == recipe.bytes(CONFIG, 37, sum(STEPS), batch=2)


def test_quest_without_choice_misses_what_the_oracle_misses():
    """The rule matters: a decoder that reads everything is somewhere else."""
    with pytest.raises(AssertionError):
        follow(Recipe(pattern=QUEST), lambda naive, phase: None, [21, 37], STEPS, prompt=37, schedule=Chunked(13))


def test_quest_leaves_the_first_layers_dense():
    pattern = Quest()
    assert (pattern.budget, pattern.page, pattern.dense_layers, pattern.group_reduce) == (1_024, 16, 2, None)
    recipe = Recipe(pattern=pattern)
    for layer, phase in ((0, "decode"), (1, "decode"), (1, "prefill")):
        assert recipe.at(phase, layer, CONFIG).pattern is CAUSAL
    deep, size = replace(CONFIG, num_layers=4), Size(K, 8, jnp.float32)
    assert recipe.at("decode", 2, deep).pattern is pattern
    assert recipe.at("prefill", 2, deep).pattern == Summaries(16) and Summaries.visits == ()
    assert recipe.at("prefill", 3, deep).pattern.layout(50, size) == pattern.layout(50, size)
    cache_ = jax.eval_shape(lambda: recipe.init(deep, 100, 28))
    assert [set(layer["all"].state) for layer in cache_] == [set(), set()] + [{"page_min", "page_max"}] * 2
    # extremes of 16 keys: 1/16 of the bytes of keys and values
    dense = Recipe().bytes(deep, 100, 28)
    assert recipe.bytes(deep, 100, 28) - dense == 2 * 2 * K * 128 * CONFIG.head_dim * 4 / 16
    assert (
        pattern.with_budget(256) == Quest(budget=256) and Recipe(pattern=pattern).with_budget(64).pattern.budget == 64
    )


SLOTS, DIM = 50, 8  # not a multiple of 4 or 16
SIZE = Size(3, DIM, jnp.float32)


@cache
def append_program(page, codec):
    store = Store(codec, SIZE)
    pattern = Summaries(page)

    @jax.jit
    def append(slots, new):
        _, edit, _ = KeepAll().edit(None, Held(slots, None, store), new)
        return pattern.summarise(None, store, slots, store.commit(slots, edit), new.pos.shape[-1])

    empty = store.empty(2, 1, SLOTS, {})
    for name, (shape, kind) in pattern.layout(SLOTS, SIZE).items():
        empty.state[name] = jnp.zeros((2, 3, *shape), kind)
    return append, empty


@pytest.mark.parametrize(("page", "codec"), [(1, Exact()), (4, Exact()), (16, Exact()), (4, Int(8))], ids=str)
# shrinking a failure would take minutes
@settings(max_examples=10, phases=[Phase.generate])
@given(
    widths=st.lists(st.sampled_from([1, 3, 10]), min_size=2, max_size=12),
    real=st.lists(st.tuples(*[st.floats(0, 1)] * 2), min_size=12, max_size=12),
    seed=st.integers(0, 10_000),
)
def test_page_extremes_stay_right_after_any_appends(page, codec, widths, real, seed):
    """Padding of nan in any step; the bound is never below q.k of a key in the page, and equal for pages of one token."""
    append, slots = append_program(page, codec)
    rng = np.random.default_rng(seed)
    used = np.zeros(2, int)
    for width, shares in zip(widths, real, strict=False):
        count = np.round(np.array(shares) * width).astype(int)
        if max(used + count) > SLOTS:
            break
        inside = np.stack([rng.permutation(width) < n for n in count])
        pos = np.where(inside, used[:, None] + np.cumsum(inside, 1) - 1, EMPTY)
        k = np.where(inside[:, None, :, None], rng.normal(size=(2, 3, width, DIM)) - 3, np.nan)
        slots = append(slots, Tokens(*[jnp.asarray(k, jnp.float32)] * 2, jnp.asarray(pos[:, None], jnp.int32)))
        used += count
    stored = np.asarray(Store(codec, SIZE).tile(slots, 0, SLOTS)[0], np.float64).swapaxes(2, 3)
    low, high = (np.asarray(slots.state[n], np.float64) for n in ("page_min", "page_max"))
    query = rng.normal(size=DIM)
    for b, r in np.ndindex(2, 3):
        for p in range(-(-used[b] // page)):
            keys = stored[b, r, p * page : min((p + 1) * page, used[b])]
            np.testing.assert_array_equal(low[b, r, :, p], keys.min(0))
            np.testing.assert_array_equal(high[b, r, :, p], keys.max(0))
            top = np.maximum(query * low[b, r, :, p], query * high[b, r, :, p]).sum()
            assert top >= (keys @ query).max() - 1e-12
            if page == 1:
                np.testing.assert_allclose(top, keys[0] @ query, atol=1e-12)


@cache
def quest_visit_program(pattern, window, queries):
    append, empty = append_program(pattern.page, Exact())

    @jax.jit
    def visit(q, slots, pos):
        ctx = Ctx(q=q, pos=pos, scale=0.3, rotate=None, window=window)
        visits = pattern.visit(ctx, {"all": Held(slots, None, None)}, None)
        visit = visits.pages["all"]
        assert set(visits.pages) == {"all"} and (visit.size, visit.rows) == (pattern.page, 1)
        return visit.lists

    return append, empty, visit


@pytest.mark.parametrize(
    ("pattern", "window", "queries"),
    [
        (Quest(budget=14, page=4), None, 1),
        (Quest(budget=24, page=4, group_reduce="max"), None, 1),
        (Quest(budget=4, page=4), None, 3),  # three pages at least
        (Quest(budget=12, page=4, force_last=False), None, 2),
        (Quest(budget=16, page=16), None, 2),
        (Quest(budget=6, page=1), None, 3),
        (Quest(budget=12, page=4), 21, 3),  # a layer with a window of its own
        (Quest(budget=500, page=4), None, 2),  # covers the context
    ],
    ids=str,
)
def test_quest_visits_the_pages_with_the_highest_bounds(pattern, window, queries):
    append, slots, visit = quest_visit_program(pattern, window, queries)
    pages = -(-SLOTS // pattern.page)
    for seed, used in enumerate([(50, 17), (16, 33), (5, 0), (1, 49)]):
        rng = np.random.default_rng(seed)
        k = rng.normal(size=(2, 3, SLOTS, DIM))
        pos = np.where(np.arange(SLOTS) < np.array(used)[:, None], np.arange(SLOTS), EMPTY)[:, None]
        full = append(slots, Tokens(*[jnp.asarray(k, jnp.float32)] * 2, jnp.asarray(pos, jnp.int32)))
        q = rng.normal(size=(2, 3, 2, queries, DIM))
        q_pos = np.array(used)[:, None] + np.arange(queries)
        index, count = visit(jnp.asarray(q, jnp.float32), full, jnp.asarray(q_pos, jnp.int32))
        # a list that the heads of a group share is there once
        assert index.shape[:4] == count.shape == (2, 3, 1 if pattern.group_reduce else 2, queries)
        index, count = (np.broadcast_to(x, (2, 3, 2, *x.shape[3:])) for x in (index, count))
        assert index.shape[4] == min(pages, max(3, pattern.budget // pattern.page))
        for b, r, t in np.ndindex(2, 3, queries):
            keys = k[b, r, : used[b]].astype(np.float32).astype(np.float64)
            want = quest_pages(q[b, r, :, t], keys, pattern, q_pos[b, t] - np.arange(used[b]), window)
            for g in range(2):
                got = list(np.asarray(index[b, r, g, t, : count[b, r, g, t]]))
                assert len(got) == len(set(got)) and max(got, default=0) < -(-max(used[b], 1) // pattern.page)
                if window is None:
                    assert set(got) == want[g]
                    continue
                # pages out of the window fill what is left of the budget and are hidden by the mask
                seen = {p for p in range(pages) if q_pos[b, t] - min((p + 1) * 4, used[b]) + 1 < window}
                assert set(got) & seen == want[g] & seen
            if pattern.page == 1 and used[b]:
                # exact top-k, the newest token in
                logits = q[b, r, :, t] @ keys[:-1].T
                for g in range(2):
                    best = set(np.argsort(-logits[g])[: pattern.budget - 1]) | {used[b] - 1}
                    assert set(np.asarray(index[b, r, g, t, : count[b, r, g, t]])) == best


# ---- MInference


def minference_keys(q, k, vertical, slash, window=10**6):
    """Keys that each block of 64 queries of one head reads, from explicit columns and ranges.  q, k [T,D] of a whole prompt."""
    T = len(k)
    columns, diagonals = np.zeros(T), np.zeros(T)
    for i in range(max(0, T - 64), T):
        first = max(0, i - window + 1)
        logits = k[first : i + 1] @ q[i]
        p = np.exp(logits - logits.max())
        p /= p.sum()
        columns[first : i + 1] += p
        diagonals[i - np.arange(first, i + 1)] += p
    columns[:30], diagonals[:100] = np.inf, np.inf
    chosen = np.argsort(-columns, kind="stable")[: max(vertical, 30)]
    distances = np.argsort(-diagonals, kind="stable")[: max(slash, 50)]
    blocks = []
    for end in range(64, T + 64, 64):
        keys = {int(c) for c in chosen if c < end}
        for d in distances[distances < end]:
            stop = max(end - int(d), 64)
            keys |= set(range(stop - 64, min(stop, T)))
        blocks.append(keys)
    return blocks


@cache
def minference_visit_program(pattern, window, with_sizes):
    @jax.jit
    def visit(q, k, pos, sizes):
        ctx = Ctx(q=q, k=k, v=k, pos=pos, scale=0.5, rotate=None, aux=sizes if with_sizes else {}, window=window)
        visits = pattern.visit(ctx, {}, ctx.own)
        tiles, keys = visits.pages["own"]
        assert set(visits.pages) == {"own"}
        assert (tiles.size, tiles.rows, keys.size, keys.rows) == (128, 128, 1, 64)
        lists = [jax.lax.map(v.at, jnp.arange(-(-q.shape[3] // v.rows))) for v in (tiles, keys)]
        return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 3), lists)

    return visit


def assert_reads(pattern, T, lengths, *, window=None, sizes=None, k=None, q=None, seed=0):
    """What `visit` lists, block by block, is the oracle's set, each key once; sizes [R,G] of both kinds, as data.

    Returns:
      bool [B,R,G,blocks,T], the keys that are read of those that a block sees.
    """
    rng = np.random.default_rng(seed)
    shape = (len(lengths), 2, 3) if q is None else q.shape[:3]
    # some keys stand out, so that columns and diagonals differ between heads
    q = 2 * rng.normal(size=(*shape, T, 4)) if q is None else q
    k = rng.normal(size=(*shape[:2], T, 4)) * np.exp(rng.normal(size=(T, 1)) / 2) if k is None else k
    q, k = q.astype(np.float32), k.astype(np.float32)
    pos = np.where(np.arange(T) < np.array(lengths)[:, None], np.arange(T), EMPTY)
    visit = minference_visit_program(pattern, window, sizes is not None)
    given_sizes = None if sizes is None else {n: jnp.asarray(s) for n, s in sizes.items()}
    (tiles, tile_count), (keys, key_count) = jax.tree.map(
        np.asarray, visit(q, k, jnp.asarray(pos, jnp.int32), given_sizes)
    )
    blocks = -(-T // 64)
    assert tiles.shape[:4] == tile_count.shape == (*shape, -(-T // 128))
    assert keys.shape[:4] == key_count.shape == (*shape, blocks)
    assert tile_count.max() <= tiles.shape[4] <= -(-T // 128) and key_count.max() <= keys.shape[4] <= T
    read = np.zeros((*shape, blocks, T), bool)
    for b, r, g in np.ndindex(*shape):
        n = lengths[b]
        wanted = (
            [pattern.vertical, pattern.slash]
            if sizes is None
            else [sizes[name][r, g] for name in ("vertical", "slash")]
        )
        head = [x.astype(np.float64) for x in (q[b, r, g, :n] / 2, k[b, r, :n])]
        for i, want in enumerate(minference_keys(*head, *wanted, window=window or 10**6)):
            at = b, r, g, i // 2
            whole = tiles[at][: tile_count[at], None] * 128 + np.arange(128)
            got = [*whole.ravel().tolist(), *keys[b, r, g, i, : key_count[b, r, g, i]].tolist()]
            assert len(got) == len(set(got))
            # padding may be listed, as it is EMPTY; and keys behind the block, which no query of it sees
            assert {j for j in got if j < min(n, 64 * (i + 1))} == want, (b, r, g, i)
            read[b, r, g, i, list(want)] = True
    return read


@pytest.mark.parametrize(
    ("pattern", "T", "lengths", "window"),
    [
        (MInference(35, 110), 300, (300, 181), None),
        (MInference(1, 1), 300, (300, 40), None),  # raised to the first 30 columns and the nearest 50 distances
        (MInference(33, 77), 333, (333, 260), None),  # of the 100 nearest distances only 77
        (MInference(90, 101), 300, (257, 300), 90),  # a layer with a window of its own
    ],
    ids=str,
)
def test_minference_reads_the_columns_and_diagonals_of_the_rule(pattern, T, lengths, window):
    assert_reads(pattern, T, lengths, window=window)


def test_minference_sizes_per_head_are_data():
    rng = np.random.default_rng(0)
    for low, high in ((1, 40), (100, 130), (250, 400)):
        sizes = {"vertical": rng.integers(1, 80, (2, 3)), "slash": rng.integers(low, high, (2, 3))}
        assert_reads(MInference(1, 1), 300, (300, 199), sizes=sizes)


@pytest.mark.parametrize(
    ("pattern", "T"),
    [
        (MInference(1, 1), 1),
        (MInference(1, 1), 64),
        (MInference(300, 1), 300),
        (MInference(1, 300), 300),
        (MInference(), 300),
    ],
    ids=str,
)
def test_minference_reads_everything_at_its_exact_limits(pattern, T):
    read = assert_reads(pattern, T, (T, T))
    for i in range(read.shape[3]):
        assert read[:, :, :, i, : 64 * (i + 1)].all()


def test_minference_lists_have_room_for_the_worst_case():
    """Columns that lie outside of every diagonal: with as many keys as the static width of the list allows, none is dropped."""
    for T, pattern in ((640, MInference(300, 101)), (640, MInference(1, 102)), (7_040, MInference(6_490, 100))):
        k = np.where(np.arange(T) < T - 170, 1.0, -3.0)[:, None] * np.ones(4)
        k[:-170] += 1e-2 * np.random.default_rng(0).normal(size=(T - 170, 4))
        read = assert_reads(pattern, T, (T,), q=np.full((1, 1, 1, T, 4), 2.0), k=k[None, None])
        assert read[..., -1, :].sum(-1).max() >= max(pattern.vertical, 30) + 163


def minference_rule(sizes):
    def choose(naive, phase):
        def read(layer, head, query, memory, num_new):
            mask = np.ones((*query.shape[:2], len(memory.pos)), bool)
            if phase == "decode":
                return mask
            for g in range(G):
                wanted = [sizes[layer]["arrays"][n][head * G + g] for n in ("vertical", "slash")]
                blocks = minference_keys(query[g] / math.sqrt(CONFIG.head_dim), memory.key, *wanted)
                for i, keys in enumerate(blocks):
                    mask[g, 64 * i : 64 * i + 64] = np.isin(memory.pos, list(keys))
            return mask

        return read

    return choose


def test_minference_equals_a_decoder_that_reads_the_chosen_keys():
    """Sizes per layer and query head as data, texts of different lengths, decode dense."""
    rng = np.random.default_rng(5)
    sizes = [
        {"arrays": {"vertical": rng.integers(30, 60, G * K), "slash": rng.integers(100, 110, G * K)}} for _ in range(2)
    ]
    sizes[1]["arrays"]["slash"][2] = 300  # one head reads everything
    recipe = Recipe(pattern=MInference())
    follow(recipe, minference_rule(sizes), [300, 235], [1, 1], prompt=300, aux=sizes)
    with pytest.raises(AssertionError):
        follow(recipe, lambda naive, phase: None, [300, 235], [], prompt=300, aux=sizes)


def test_minference_is_for_the_prompt_alone():
    recipe = Recipe(pattern=MInference())
    assert (recipe.pattern.vertical, recipe.pattern.slash) == (1_000, 6_096)
    assert (
        recipe.at("prefill", 0, CONFIG).pattern is recipe.pattern and recipe.at("decode", 0, CONFIG).pattern is CAUSAL
    )
    assert recipe.one_shot and recipe.bytes(CONFIG, 100) == Recipe().bytes(CONFIG, 100)
    with pytest.raises(UserError, match="MInference needs the whole prompt at once"):
        Session(layers(CONFIG), recipe, 300, schedule=Chunked(128))
    with pytest.raises(UserError, match="this recipe needs the whole prompt at once; call prefill"):
        Session(layers(CONFIG), recipe, 300).feed(np.arange(4)[None], np.arange(4)[None], phase="prefill")


# ---- errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Quest(budget=8), "budget=8 must be at least one page, page=16"),
        (lambda: Quest(page=0), "page=0 at least 1"),
        (lambda: Quest(dense_layers=-1), "dense_layers=-1 must be at least 0"),
        (lambda: Quest(group_reduce="mean"), "group_reduce='mean': allowed are None, 'max'"),
        (lambda: Recipe(pattern=Quest()).with_budget(3), "budget=3 must be at least one page"),
        (lambda: Quest(force_last=0), "force_last=0: allowed are True, False"),
        (lambda: MInference(vertical=0), "vertical=0 and slash=6096 must be at least 1"),
        (lambda: MInference(slash=-2), "slash=-2 must be at least 1"),
        (lambda: Recipe(pattern=MInference()).with_budget(100), "budget=100: this recipe has no single budget"),
    ],
)
def test_bad_arguments_give_one_line(make, message):
    with pytest.raises(UserError, match=message) as found:
        make()
    assert "\n" not in str(found.value)
