"""KIVI's residual rules: which keys and values are exact after every step, and the logits, against a float64 decoder."""

from dataclasses import replace
from itertools import cycle

import numpy as np
import pytest
from naive_model import NaiveModel
from oracles import kivi as oracle
from tiny import ATOL, TINY, layers, quick_compilation, text, weights  # noqa: F401, the fixture is for every test

from lcx.cache import Size, Store
from lcx.codecs.kivi import Kivi, KiviKeys, chain
from lcx.config_files import load_config
from lcx.errors import UserError
from lcx.ops.attention import EMPTY
from lcx.recipe import Recipe
from lcx.schedules.chunked import Chunked
from lcx.session import Session
from lcx.storage import Shape

CONFIG = replace(TINY, num_layers=2)
K, D = CONFIG.num_kv_heads, CONFIG.head_dim
GROUP, RESIDUAL = 8, 16
PROMPT, NEW, CHUNK = 37, 24, 20


class Rounds:
    """`NaiveModel.keep` that rounds what each KV head of each layer holds, and keeps every token."""

    def __init__(self, bits):
        caches = [[oracle.Cache(bits, GROUP, RESIDUAL) for _ in range(K)] for _ in range(CONFIG.num_layers)]
        self.layer = cycle(caches)

    def __call__(self, heads):
        for held, cache in zip(heads, next(self.layer), strict=True):
            held.key, held.value = cache.after_step(held.key, held.value)
        return [np.arange(len(held.pos)) for held in heads]


def stored(session, recipe, layer, row):
    """(pos [K,T], keys, values [K,T,D]) that a session holds of one text, in the order of the text."""
    parts = []
    for s in (s for links in recipe.chains for s in links):
        slots = session.cache[layer][s.name]
        k, v = Store(s.codec, Size(K, D, np.float32)).tile(slots, 0, slots.pos.shape[-1])
        pos = np.broadcast_to(slots.pos[row], (K, slots.pos.shape[-1]))
        parts.append((pos, np.asarray(k[row]).swapaxes(1, 2), np.asarray(v[row])))
    pos, key, value = (np.concatenate(x, 1) for x in zip(*parts, strict=True))
    order = np.argsort(np.where(pos == EMPTY, 1 << 20, pos), 1)[:, : (pos[0] != EMPTY).sum()]
    take = lambda x: np.take_along_axis(x, order[..., None], 1)
    return np.take_along_axis(pos, order, 1), take(key), take(value)


def follow(recipe, bits):
    """Two texts of 37 and 22 tokens in chunks of 20, then steps of 1 and 3, each against an oracle that reads its text alone.

    Yields:
      (got, want) after every step: logits, then keys and values of every layer.
    """
    lengths, steps = [PROMPT, 22], [1] * 6 + [3] + [1] * 15
    tokens = np.stack([text(PROMPT + NEW, seed) for seed in (3, 4)])
    session = Session(layers(CONFIG), recipe, PROMPT, NEW, batch=2, schedule=Chunked(CHUNK))
    rows = [NaiveModel(CONFIG, weights(CONFIG), keep=Rounds(bits)) for _ in lengths]
    logits = session.prefill(tokens[:, :PROMPT], lengths)
    for width in (0, *steps):
        if width:
            part = np.stack([tokens[b, naive.last_pos + 1 :][:width] for b, naive in enumerate(rows)])
            logits = session.step(part)
        for b, naive in enumerate(rows):
            if width:
                x = naive.step(part[b])
            else:
                for start in range(0, lengths[b], CHUNK):
                    x = naive.step(tokens[b, start : min(start + CHUNK, lengths[b])])
            yield logits[b], naive.logits(x[-1:])[0]
            for layer, heads in enumerate(naive.held):
                pos, key, value = stored(session, recipe, layer, b)
                np.testing.assert_array_equal(pos, np.broadcast_to(np.arange(naive.last_pos + 1), pos.shape))
                yield key, np.stack([h.key for h in heads])
                yield value, np.stack([h.value for h in heads])


@pytest.mark.parametrize("bits", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_authors_rule_equals_the_oracle_after_every_step(bits):
    for got, want in follow(Recipe((chain(bits, GROUP, RESIDUAL),)), bits):
        np.testing.assert_allclose(got, want, atol=ATOL)


def test_the_other_rule_keeps_more_exact():
    """The rules differ, and by what the docstring says."""
    with pytest.raises(AssertionError):
        for got, want in follow(Recipe((chain(2, GROUP, RESIDUAL, rule="together"),)), 2):
            np.testing.assert_allclose(got, want, atol=ATOL)


@pytest.mark.parametrize("rule, exact", [("authors", (9, 16)), ("together", (25, 25))])
def test_number_of_exact_tokens(rule, exact):
    """Of 57 tokens: 57 % 16 keys and 16 values by the authors' rule; 16 + 57 % 16 of both by the other."""
    recipe, tokens = Recipe((chain(2, GROUP, RESIDUAL, rule=rule),)), text(57, 5)
    session, naive = Session(layers(CONFIG), recipe, 57), NaiveModel(CONFIG, weights(CONFIG))
    session.prefill(tokens)
    naive.step(tokens)
    _, key, value = stored(session, recipe, 0, 0)
    for got, name, count in ((key, "key", exact[0]), (value, "value", exact[1])):
        want = np.stack([getattr(h, name) for h in naive.held[0]])
        same = np.abs(got - want).max((0, 2)) < ATOL
        assert same.tolist() == [False] * (57 - count) + [True] * count


def test_capacities_and_bytes_of_the_authors_rule():
    recipe = Recipe((chain(2, GROUP, RESIDUAL),))
    for tokens, sizes in (
        (5, (5, 0, 0)),
        (16, (16, 16, 0)),
        (31, (16, 16, 0)),
        (32, (16, 16, 16)),
        (100, (16, 16, 80)),
    ):
        got = recipe.capacities("decode", 0, Shape(CONFIG, tokens))
        assert tuple(got.values()) == sizes, tokens
    # tail: 16 exact keys and values; page: 16 exact values and keys of 2 bits with scales; 80 tokens of 2 bits; positions
    codes, scales = D * 2 // 8, 2 * 2
    coded = lambda n: n * codes + n // GROUP * D * scales
    values = lambda n: n * codes + n * D // GROUP * scales
    head = 16 * D * 4 * 3 + coded(96) + values(80)
    assert recipe.bytes(CONFIG, 100) == CONFIG.num_layers * (K * head + 4 * 112)


def test_slots_are_whole_pages_where_capacities_are_rounded():
    recipe = replace(Recipe((chain(2, GROUP, RESIDUAL),)), rounding=3)
    sizes = recipe.capacities("decode", 0, Shape(CONFIG, 100))
    assert sizes["recent"] % GROUP == 0 and sizes["recent"] >= RESIDUAL


def test_segments_of_both_rules():
    tail, recent, pages = chain()
    assert (tail.policy.page, tail.policy.keep, recent.policy.page, recent.policy.keep) == (128, 0, 128, 128)
    assert (recent.codec, pages.codec) == (KiviKeys(2, 32), Kivi(2, 32))
    assert (recent.policy.bits, recent.policy.group_size) == (2, 32)
    tail, pages = chain(rule="together")
    assert (tail.policy.page, tail.policy.keep, pages.codec) == (128, 128, Kivi(2, 32))
    with pytest.raises(UserError, match="rule='paper': allowed are authors, together") as caught:
        chain(rule="paper")
    assert "\n" not in str(caught.value)
    assert load_config("configs/kivi2.py").recipe.chains == (chain(2, 32, 128),)
