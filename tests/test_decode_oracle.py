"""The decode protocol against independent numpy decoders: mean NLL of 128 tokens, for methods that act at every step."""

import numpy as np
import pytest
from naive_model import NaiveModel
from test_patterns import SparseModel, quest_rule
from test_policies import METHODS, Keep
from tiny import TINY, layers, text, weights
from tiny import quick_compilation as quick_compilation

from lcx.experiment import Experiment
from lcx.measure.quality import score_continuation
from lcx.patterns.quest import Quest
from lcx.recipe import Recipe

PROMPT, COUNT, BUDGET = 96, 128, 40
IDS = text(PROMPT + COUNT + 1, seed=11)
BAR = 0.002  # nats a token


def nll_of(naive):
    """-log p of each token of the continuation, fed one by one, float64."""
    naive.step(IDS[:PROMPT])
    return _rest(naive)


def _rest(naive):
    result = []
    for t in range(PROMPT, PROMPT + COUNT):
        logits = naive.logits(naive.step(IDS[t : t + 1])[-1:])[0].astype(np.float64)
        logits -= logits.max()
        result.append(np.log(np.exp(logits).sum()) - logits[IDS[t + 1]])
    return np.array(result)


def ours(recipe, protocol="decode"):
    return score_continuation(layers(), Experiment(recipe), IDS, PROMPT, protocol=protocol).nll


@pytest.mark.parametrize("name", ["h2o", "tova", "sink_window", "streaming_llm", "window"])
def test_policies_that_act_at_every_step(name):
    method = METHODS[name]
    naive = NaiveModel(TINY, weights(), keep=Keep(method.rule, BUDGET), cache_positions=method.cache_positions)
    want, got = nll_of(naive), ours(method.recipe(BUDGET))
    assert abs(got.mean(dtype=np.float64) - want.mean()) <= BAR
    # one step, in which nothing is evicted, is far from it
    assert abs(ours(method.recipe(BUDGET), "prompt").mean() - want.mean()) > 10 * BAR


def test_quest_chooses_for_every_query():
    pattern = Quest(budget=BUDGET, page=4, dense_layers=1)
    naive = SparseModel(TINY, weights())
    choose = quest_rule(pattern)
    naive.choose = choose(naive, "prefill")
    naive.step(IDS[:PROMPT])
    naive.choose = choose(naive, "decode")
    want, got = _rest(naive), ours(Recipe(pattern=pattern))
    assert abs(got.mean(dtype=np.float64) - want.mean()) <= BAR
