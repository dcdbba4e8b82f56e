"""Methods that read or keep by phase, against float64 decoders that change their rule at the end of the prompt; and two methods as one."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from naive_model import NaiveModel
from test_decode_oracle import BAR, nll_of, ours
from test_policies import votes
from tiny import TINY, layers, text, weights
from tiny import quick_compilation as quick_compilation

import lcx
from lcx import methods
from lcx.axes import CAUSAL
from lcx.codecs.int_token import Int
from lcx.codecs.kivi import chain
from lcx.composition import compose
from lcx.errors import UserError
from lcx.experiment import Experiment
from lcx.measure.quality import score_continuation
from lcx.patterns.by_phase import ByPhase
from lcx.patterns.minference import MInference
from lcx.patterns.quest import Quest
from lcx.patterns.sink_window import AShape
from lcx.patterns.streaming import CachePositions
from lcx.policies.duo import duo
from lcx.policies.h2o import H2O
from lcx.policies.keydiff import KeyDiff
from lcx.policies.snapkv import SnapKV
from lcx.policies.tova import TOVA
from lcx.recipe import Recipe, Segment

ROOT = Path(__file__).parent.parent
BUDGET, WINDOW = 40, 8


class ThenDecode:
    """Keeps by SnapKV at the end of the prompt, then by another rule after each step; sums begin as `start` says."""

    def __init__(self, start, rule):
        self.start, self.rule, self.prompts = start, rule, TINY.num_layers
        self.first = votes(WINDOW, 5, np.mean)

    def __call__(self, heads):
        if self.prompts:
            self.prompts -= 1
            scores = self.first(heads, BUDGET)
            for h in heads:
                h.mass = self.start(h)
        else:
            scores = self.rule(heads)
        return [np.argsort(-s, kind="stable")[:BUDGET] for s in scores]


def heavy(heads):
    recent = BUDGET - BUDGET // 2
    return [np.where(h.pos > h.pos[-1] - recent, np.inf, h.mass) for h in heads]


def last_query(heads):
    return [h.prob[:, -1].mean(0) for h in heads]


paid = lambda h: h.prob[:, -WINDOW:].sum(1).mean(0)
nothing = lambda h: np.zeros(len(h.pos))
AFTER = {
    "h2o, votes": (H2O(BUDGET, sums="votes"), paid, heavy),
    "h2o, decode": (H2O(BUDGET, sums="decode"), nothing, heavy),
    "tova": (TOVA(BUDGET, per_head=True), nothing, last_query),
}


@pytest.mark.parametrize("name", AFTER)
def test_a_policy_goes_on_from_what_snapkv_kept(name):
    policy, start, rule = AFTER[name]
    want = nll_of(NaiveModel(TINY, weights(), keep=ThenDecode(start, rule)))
    got = ours(Recipe((Segment(compress=SnapKV(BUDGET, window=WINDOW), policy=policy),)))
    assert abs(got.mean(dtype=np.float64) - want.mean()) <= BAR
    # SnapKV alone keeps every token of decode
    assert abs(ours(Recipe((Segment(compress=SnapKV(BUDGET, window=WINDOW)),))).mean() - want.mean()) > 2 * BAR


def test_where_sums_begin_matters():
    first, second = (
        ours(Recipe((Segment(compress=SnapKV(BUDGET, window=WINDOW), policy=AFTER[n][0]),))) for n in list(AFTER)[:2]
    )
    assert np.abs(first - second).max() > 10 * BAR


SPARSE, QUEST = MInference(30, 50), Quest(12, 4, 1)


def test_each_phase_reads_as_its_pattern():
    """At one pattern's limit the joined method is the other alone; between them it is neither."""
    prompt, ids = 200, text(233, seed=12)  # MInference reads prompts of some 100 tokens densely
    nll = lambda p: score_continuation(layers(), Experiment(Recipe(pattern=p)), ids, prompt).nll
    alone = {"prefill": nll(SPARSE), "decode": nll(QUEST), "none": nll(CAUSAL)}
    np.testing.assert_allclose(nll(ByPhase(SPARSE, QUEST.at_limit(233))), alone["prefill"], atol=2e-4)
    np.testing.assert_allclose(nll(ByPhase(SPARSE.at_limit(233), QUEST)), alone["decode"], atol=2e-4)
    both = nll(ByPhase(SPARSE, QUEST))
    assert min(np.abs(both - want).max() for want in alone.values()) > 5 * BAR


def test_budgets_reach_the_part_that_has_one():
    recipe = Recipe(pattern=ByPhase(SPARSE, QUEST))
    assert recipe.budget == 12 and recipe.with_budget(20).pattern == ByPhase(SPARSE, replace(QUEST, budget=20))
    joined = Recipe((Segment(compress=SnapKV(40, window=8), policy=H2O(40, sums="votes")),)).with_budget(24)
    assert joined.segments[0].compress.budget == joined.segments[0].policy.budget == 24


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Recipe((Segment(policy=H2O(9, sums="votes")),)),
            "H2O needs the votes of a part that acts at the end of the prompt",
        ),
        (
            lambda: Recipe((Segment(compress=SnapKV(9, window=3), policy=H2O(9)),)),
            "H2O needs the attention over every key from the first",
        ),
        (lambda: Recipe((Segment(compress=SnapKV(9, window=3), policy=TOVA(9)),)), "TOVA needs one set of positions"),
        (lambda: Recipe((Segment(policy=H2O(9)),), ByPhase(SPARSE, QUEST)), "H2O needs"),
        (lambda: H2O(9, sums="all"), "sums='all': allowed are prompt, votes, decode"),
        (lambda: ByPhase(SPARSE, CachePositions()), "CachePositions stores keys before RoPE"),
        (lambda: ByPhase(SPARSE, 3), "ByPhase: decode=3: allowed is a pattern"),
        (
            lambda: Recipe(((Segment("a", policy=H2O(9)), Segment("b", codec=Int(4))),)),
            "H2O of segment 'a' hands nothing down",
        ),
        (lambda: Recipe(((Segment("a"), Segment("b", codec=Int(4))),)), "KeepAll of segment 'a' hands nothing down"),
    ],
)
def test_what_does_not_go_together_is_one_line(make, message):
    with pytest.raises(UserError) as caught:
        make()
    assert message in str(caught.value) and "\n" not in str(caught.value)


# ---- two methods as one


def one(*segments, pattern=None):
    return Recipe(segments) if pattern is None else Recipe(pattern=pattern)


def test_composed_methods_make_both_choices():
    snapkv, h2o = one(Segment(compress=SnapKV(20, window=4))), one(Segment(policy=H2O(20)))
    assert compose(snapkv, h2o).recipe.segments[0] == Segment(
        compress=SnapKV(20, window=4), policy=H2O(20, sums="votes")
    )
    assert compose(h2o, snapkv).recipe == compose(snapkv, h2o).recipe
    assert compose(snapkv, one(Segment(policy=TOVA(20)))).recipe.segments[0].policy == TOVA(20, per_head=True)
    for pair in ((SPARSE, QUEST), (QUEST, SPARSE)):
        assert compose(*(Recipe(pattern=p) for p in pair)).recipe.pattern == ByPhase(SPARSE, QUEST)
    assert compose(one(Segment(codec=Int(4))), Recipe(pattern=QUEST)).recipe == Recipe((Segment(codec=Int(4)),), QUEST)
    assert compose(Recipe(), h2o).recipe == h2o
    (kivi,) = compose(Recipe((chain(2, 8, 8),)), snapkv).recipe.chains
    assert kivi[0].compress == SnapKV(20, window=4) and len(kivi) == 3
    # heads that keep a window have chosen; the others take SnapKV
    retrieval, streaming = compose(Recipe(duo(2, 7)), snapkv).recipe.segments
    assert retrieval.compress == SnapKV(20, window=4) and streaming.compress is None


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (one(Segment(policy=H2O(9))), one(Segment(policy=KeyDiff(9))), "both choose which tokens stay"),
        (one(Segment(codec=Int(4))), one(Segment(codec=Int(8))), "both choose how tokens are written"),
        (Recipe(pattern=QUEST), Recipe(pattern=AShape(2, 5)), "both choose what is read in one phase"),
        (
            one(Segment(policy=H2O(9))),
            Recipe(pattern=QUEST),
            "Quest",
        ),
        (Recipe((chain(2, 8, 8),)), Recipe((chain(4, 8, 8),)), "both methods have several segments"),
    ],
)
def test_methods_that_exclude_each_other_say_why(first, second, message):
    for pair in ((first, second), (second, first)):
        with pytest.raises(UserError, match=message):
            compose(*pair)


def test_the_command_says_whether_and_why_not(capsys):
    assert methods.main(["--compose=snapkv,tova"]) == 0
    told = capsys.readouterr().out
    assert "snapkv and tova go together" in told and "per_head=True" in told
    assert methods.main(["--compose=h2o,quest"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("methods: h2o and quest do not go together: ") and told.count("\n") == 1
    for wrong, message in (("snapkv", "two methods"), ("snapkv,tovaa", "did you mean 'tova'?")):
        assert methods.main([f"--compose={wrong}"]) == 2
        assert message in capsys.readouterr().err


def test_the_matrix_in_the_docs_is_the_generated_one():
    page = (ROOT / "docs" / "compositions.md").read_text(encoding="utf-8")
    assert methods.matrix() in page, "put the output of `python -m lcx.methods --matrix` into docs/compositions.md"


@pytest.mark.parametrize("name", ["minference_quest", "snapkv_h2o"])
def test_a_config_of_two_methods_is_what_compose_makes(name):
    pair = (lcx.load_config(f"{part}") for part in name.split("_"))
    assert lcx.compose(*pair).recipe == lcx.load_config(name).recipe
