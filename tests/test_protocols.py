"""The two protocols of quality against an independent numpy decoder, and what the figures say of methods that do nothing."""

import numpy as np
import pytest
from tiny import TINY, layers, text
from tiny import quick_compilation as quick_compilation

import lcx
from lcx.codecs.int_token import Int
from lcx.codecs.kivi import chain
from lcx.errors import UserError
from lcx.experiment import Experiment
from lcx.measure import protocols
from lcx.measure.paired import apart, difference
from lcx.measure.quality import make_session, score_continuation, score_text, token_nll
from lcx.policies.h2o import H2O
from lcx.policies.sink_window import SinkWindow
from lcx.policies.snapkv import SnapKV
from lcx.policies.tova import TOVA
from lcx.recipe import Recipe, Segment

PROMPT, COUNT = 37, 24
IDS = text(PROMPT + COUNT + 1, seed=5)
RECIPES = {
    "dense": Recipe(),
    "snapkv": Recipe((Segment(compress=SnapKV(12, window=4)),)),
    "int4": Recipe((Segment(codec=Int(4)),)),
    "snapkv_int8": Recipe((Segment(compress=SnapKV(12, window=4), codec=Int(8)),)),
    "h2o": Recipe((Segment(policy=H2O(12)),)),
    "tova": Recipe((Segment(policy=TOVA(12)),)),
    "sink_window": Recipe((Segment(policy=SinkWindow(2, 10)),)),
    "kivi": Recipe((chain(4, 8, 8),)),
}
BY_STEP = ("h2o", "tova", "sink_window", "kivi")


def score(name, protocol):
    return score_continuation(layers(), Experiment(RECIPES[name]), IDS, PROMPT, protocol=protocol).nll


def one_by_one(name):
    """NLLs [COUNT] of single steps, which no protocol has a say in."""
    session = make_session(layers(), Experiment(RECIPES[name]), PROMPT, COUNT)
    session.prefill(IDS[:PROMPT])
    rows = [session.step(IDS[None, t : t + 1], rows="all")[0] for t in range(PROMPT, PROMPT + COUNT)]
    return np.concatenate([token_nll(layers(), x, IDS[t + 1 : t + 2]) for t, x in enumerate(rows, PROMPT)])


@pytest.mark.parametrize("name", RECIPES)
def test_decode_is_a_step_a_token(name):
    """One step that reads its own tokens as they are stored is the same, where a method's steps are no more than their tokens."""
    np.testing.assert_allclose(score(name, "decode"), one_by_one(name), atol=5e-3 if "int" in name else 2e-4)
    session = make_session(layers(), Experiment(RECIPES[name]), PROMPT, COUNT)
    widths = protocols.widths(session, "decode", COUNT)
    assert widths == ([1] * COUNT if name in BY_STEP else [COUNT])
    assert protocols.widths(session, "prompt", COUNT) == [COUNT]


@pytest.mark.parametrize("name", RECIPES)
def test_the_protocols_differ_where_a_method_acts_in_decode(name):
    session = make_session(layers(), Experiment(RECIPES[name]), PROMPT, COUNT)
    gap = np.abs(score(name, "decode") - score(name, "prompt")).max()
    assert protocols.differ(session) == (name not in ("dense", "snapkv"))
    assert (gap > 1e-3) == protocols.differ(session)


def test_a_peeked_continuation_is_dropped_and_the_cache_stays():
    session = make_session(layers(), Experiment(RECIPES["int4"]), PROMPT, COUNT)
    session.prefill(IDS[:PROMPT])
    protocols.continuation(session, IDS[None, PROMPT:-1], "decode")
    session.discard()
    x = protocols.continuation(session, IDS[None, PROMPT:-1], "prompt")[0]
    np.testing.assert_array_equal(token_nll(layers(), x, IDS[PROMPT + 1 :]), score("int4", "prompt"))


@pytest.mark.parametrize("name", ["h2o", "int4", "snapkv"])
def test_one_pass_of_a_method_that_does_not_act_in_it_is_refused(name):
    with pytest.raises(UserError, match=r"one pass over 61 tokens never reads what \w+ of 'all' holds") as error:
        score_text(layers(), Experiment(RECIPES[name]), IDS)
    assert "\n" not in str(error.value)


def test_one_pass_in_chunks_acts():
    chunked = score_text(layers(), Experiment(RECIPES["h2o"]).with_chunks(8), IDS)
    assert np.abs(chunked.nll - score_text(layers(), Experiment(Recipe()), IDS).nll).max() > 0.01


def test_a_wrong_protocol_is_named():
    with pytest.raises(UserError, match="protocol='steps': allowed are decode, prompt"):
        score("dense", "steps")
    with pytest.raises(UserError, match=r"allowed is \[B,M\]"):
        protocols.continuation(make_session(layers(), Experiment(Recipe()), 4, 2), [1, 2], "prompt")


# ---- paired differences


def test_differences_are_paired_by_token_and_by_passage():
    rng = np.random.default_rng(0)
    dense = rng.normal(3, 2, (4, 50))
    gaps = rng.normal(0.1, 0.2, (4, 50)) + np.array([0.3, -0.3, 0.0, 0.0])[:, None]
    d = difference(dense + gaps, dense)
    assert d.mean == pytest.approx(gaps.mean()) and d.largest == pytest.approx(np.abs(gaps).max())
    assert d.se_tokens == pytest.approx(gaps.std(ddof=1) / np.sqrt(200))
    assert d.se_passages == pytest.approx(gaps.mean(1).std(ddof=1) / 2) and d.se == d.se_passages > d.se_tokens
    some = np.zeros((4, 50), bool)
    some[0, :2] = some[2, 5] = True
    few = difference(dense + gaps, dense, some)
    assert few.mean == pytest.approx(np.mean([*gaps[0, :2], gaps[2, 5]]))
    assert difference(dense, dense, np.zeros((4, 50), bool)) is None
    assert difference(dense[:1, :1], dense[:1, :1]).se is None


def test_a_ranking_needs_more_than_the_errors():
    assert not apart((0.038, 0.017), (0.023, 0.018)) and apart((0.97, 0.19), (0.10, 0.03))
    assert not apart((1.0, None), (0.0, 0.1))


# ---- what did nothing says so


def test_rows_say_where_a_method_did_nothing():
    from test_sweep_points import TINY as MODEL
    from test_sweep_points import pretrained

    from lcx.sweep.settings import Settings

    assert MODEL == TINY
    methods = {
        "dense": Recipe(),
        "covered": Recipe((Segment(policy=H2O(500)),)),
        "window": Recipe((Segment(compress=SnapKV(16, window=16)),)),
        "acts": Recipe((Segment(policy=H2O(16)),)),
        "unbudgeted": Recipe((Segment(codec=Int(8)),)),
    }
    settings = Settings(continuation=8, repeats=1, decode_steps=1, passages=1)
    quiet = {"settings": settings, "texts": ["ledger"], "on_row": lambda row: None}
    rows = {r["method"]: r for r in lcx.run_methods(pretrained(), methods, [60], **quiet)}
    notes = {name: " | ".join(row["notes"]) for name, row in rows.items()}
    assert "did nothing: every token's NLL is dense attention's" in notes["covered"]
    assert "budget 500 covers the prompt of 52 tokens" in notes["covered"]
    assert "budget 16 is the window" in notes["window"]
    assert not [n for n in ("dense", "acts", "unbudgeted") if "nothing" in notes[n] or "covers" in notes[n]]
    with_budget = lcx.run_methods(
        pretrained(), {"dense": Recipe(), "int8": methods["unbudgeted"]}, [60], budget=20, **quiet
    )
    assert "has no single budget: budget or keep_ratio was ignored" in with_budget[1]["notes"]
