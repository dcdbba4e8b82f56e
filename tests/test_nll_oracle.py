"""The NLL of a sweep's row and of `score_continuation` against a float64 decoder that shares no code with lcx.

The methods act once, at the end of the prompt, so that their NLL does not depend on how the continuation is fed.  The tokenizer gives
exactly the tokens of one passage: every passage of every text is the same.
"""

import numpy as np
import pytest
from naive_model import NaiveModel
from tiny import TINY, layers, quick_compilation, weights  # noqa: F401, the fixture is for every test

import lcx
from lcx.policies.knorm import KNorm
from lcx.recipe import Recipe, Segment
from lcx.sweep.points import Settings

PROMPT, CONTINUATION, BUDGET = 40, 12, 10
SETTINGS = Settings(continuation=CONTINUATION, decode_steps=1, repeats=1, warmups=0)
TOKENS = PROMPT + CONTINUATION + 3  # a timed step, room for a token, and its target
# no token twice: in the first layer its keys would tie in their norm
IDS = np.random.default_rng(5).permutation(TINY.vocab_size)[:TOKENS]
METHODS = {"dense": Recipe(), "knorm": Recipe((Segment(compress=KNorm(BUDGET, skip_layers=())),))}


class OnePassage:
    """A tokenizer that finds the same tokens in every text."""

    front = ()

    def encode(self, text):
        return IDS.tolist()


def smallest_keys(heads):
    """Places of the keys with the smallest norms, `BUDGET` a KV head; the last kept and the first dropped are told apart by f32."""
    chosen = []
    for held in heads:
        norm = np.sqrt((held.key**2).sum(-1))
        order = np.argsort(norm, kind="stable")
        assert norm[order[BUDGET]] - norm[order[BUDGET - 1]] > 1e-4 * norm[order[BUDGET]]
        chosen.append(order[:BUDGET])
    return chosen


def oracle_nll(method, shift=1):
    """float64 [CONTINUATION]: -log p of the token `shift` places after each token that follows the prompt."""
    naive = NaiveModel(TINY, weights(TINY), keep=smallest_keys if method == "knorm" else None)
    naive.step(IDS[:PROMPT])
    naive.keep = None
    logits = naive.logits(naive.step(IDS[PROMPT : PROMPT + CONTINUATION]))
    top = logits.max(-1, keepdims=True)
    log_p = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    return -log_p[np.arange(CONTINUATION), IDS[PROMPT + shift : PROMPT + shift + CONTINUATION]]


@pytest.fixture(scope="module")
def rows():
    model = lcx.Pretrained(layers(TINY), OnePassage(), "tiny", "0" * 64, "none")
    return lcx.run_methods(model, METHODS, [PROMPT + CONTINUATION], settings=SETTINGS, on_row=lambda row: None)


@pytest.mark.parametrize("method", METHODS)
def test_nll_of_a_row_is_that_of_the_oracle(rows, method):
    of_method = [row for row in rows if row["method"] == method]
    assert of_method
    want = oracle_nll(method).mean()
    for row in of_method:
        assert row["status"] == "ok", row["message"]
        assert row["nll"] == pytest.approx(want, abs=1e-4)  # f32 through 3 layers
    # targets that are one token early or late would be somewhere else
    for shift in (0, 2):
        assert abs(oracle_nll(method, shift).mean() - want) > 0.1


def test_the_method_changes_the_oracle():
    assert abs(oracle_nll("knorm").mean() - oracle_nll("dense").mean()) > 0.01


@pytest.mark.parametrize("method", METHODS)
def test_score_continuation_is_that_of_the_oracle(method):
    ids = IDS[: PROMPT + CONTINUATION + 1]
    score = lcx.score_continuation(layers(TINY), lcx.Experiment(METHODS[method]), ids, PROMPT)
    np.testing.assert_allclose(score.nll, oracle_nll(method), atol=5e-4)  # f32, logits with a spread of 7
