"""Bits a value: the bytes of the cache over the keys and values of the tokens that it holds, counted in a session."""

from dataclasses import replace

import numpy as np
import pytest
from tiny import TINY, layers, quick_compilation, text  # noqa: F401, the fixture is for every test

from lcx.artefacts.head_split import split_by_score
from lcx.codecs import kivi, paged
from lcx.measure.memory import bits_per_value
from lcx.model_config import ModelConfig
from lcx.ops.attention import EMPTY
from lcx.policies.duo import duo
from lcx.policies.first import First
from lcx.policies.h2o import H2O
from lcx.policies.pyramidkv import PyramidKV
from lcx.recipe import Recipe, Segment
from lcx.session import Session

CONFIG = replace(TINY, num_layers=2)
PROMPT, NEW = 45, 4
SPLIT = split_by_score([[0, 1]] * 2, 0.5)
RECIPES = {
    "kivi": Recipe((kivi.chain(2, 8, 16),)),
    "kivi together": Recipe((kivi.chain(2, 8, 16, rule="together"),)),
    "first": Recipe(((Segment("first", policy=First(3)), Segment("rest")),)),
    "h2o": Recipe((Segment(policy=H2O(12)),)),
    "pyramidkv, rounded": Recipe((Segment(compress=PyramidKV(12, window=4, beta=2)),), rounding=16),
    "duo": Recipe(duo(2, 7)),
}


@pytest.mark.parametrize("name", RECIPES)
def test_bits_are_those_of_the_cache_over_the_values_that_it_holds(name):
    recipe, aux = RECIPES[name], SPLIT if name == "duo" else None
    session = Session(layers(CONFIG), recipe, PROMPT, NEW, aux=aux)
    tokens = text(PROMPT + NEW, 1)
    session.prefill(tokens[:PROMPT])
    session.step(tokens[PROMPT:])
    held = 0
    for layer in session.cache:
        for slots in layer.segments.values():
            rows = max(x.shape[1] for x in slots.payload.values())
            pos = np.broadcast_to(slots.pos, (1, rows, slots.pos.shape[-1]))
            held += 2 * CONFIG.head_dim * int((pos != EMPTY).sum())
    got = bits_per_value(recipe, CONFIG, PROMPT, NEW, aux=aux, dtype=np.float32)
    assert got == pytest.approx(8 * session.cache_bytes / held, rel=1e-12)


def test_a_chain_of_800_tokens_is_not_counted_as_896():
    """896 slots of KIVI's two segments hold 800 tokens: 12.73 bits for each of their values, 11.37 for each slot."""
    model = ModelConfig("smollm2", 30, 576, 9, 3, 64, 1536, 49152, 8192)
    recipe = Recipe((kivi.chain(2, 32, 128, rule="together"),))
    got = bits_per_value(recipe, model, 700, 100, dtype=np.float32)
    assert got == pytest.approx(12.73, abs=0.01)
    assert got * 800 / 896 == pytest.approx(11.37, abs=0.01)
    # pages of 64 behind a tail: int4_pages is a chain as well
    assert bits_per_value(Recipe((paged.chain("int4"),)), model, 700, 100, dtype=np.float32) > 4.375
