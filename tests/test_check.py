"""`lcx.check` on methods of one's own: seeded faults are named, sound methods pass, limits that do not exist are skipped."""

from dataclasses import dataclass, replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from command_line import run_command
from tiny import quick_compilation as quick_compilation

import lcx
from lcx.axes import Compress, Exact, Pattern
from lcx.cache import Leaf, Size
from lcx.conformance import Subject, run_check
from lcx.conformance.small_model import TINY
from lcx.errors import UserError
from lcx.ops.masks import Mask
from lcx.policies.base import Evict
from lcx.recipe import Recipe, Segment

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class LargeKeys(Evict):
    """Keeps the keys with the largest norm."""

    budget: int = 9
    exact = "While the budget covers the context."

    def score(self, ctx, held, new):
        k, _ = held.source.tile(0, held.pos.shape[-1])
        return jnp.linalg.norm(k, axis=2), jnp.linalg.norm(new.k, axis=-1)


@dataclass(frozen=True)
class WrongAxis(LargeKeys):
    """The norm of held keys [B,R,D,S] over S: where S == D the shapes agree."""

    def score(self, ctx, held, new):
        k, _ = held.source.tile(0, held.pos.shape[-1])
        return jnp.linalg.norm(k, axis=-1), jnp.linalg.norm(new.k, axis=-1)


@dataclass(frozen=True)
class WrongEnd(Compress):
    """The same mistake at the end of the prompt."""

    budget: int = 32

    def score(self, ctx, held):
        k, _ = held.source.tile(0, held.pos.shape[-1])
        return -jnp.linalg.norm(k, axis=-1)


@dataclass(frozen=True)
class ReadsPadding(LargeKeys):
    """Ranks by the distance to the mean of the step's keys, those of padding among them."""

    def score(self, ctx, held, new):
        mean = new.k.mean(2)
        k, _ = held.source.tile(0, held.pos.shape[-1])
        return jnp.einsum("BRDS,BRD->BRS", k, mean), jnp.einsum("BRND,BRD->BRN", new.k, mean)


@dataclass(frozen=True)
class Loud(Mask):
    """Keys within a window that depends on the data of the step."""

    window: object

    def allow(self, q_pos, kv_pos):
        return q_pos - kv_pos < self.window


@dataclass(frozen=True)
class LooksAhead(Pattern):
    """The window is as wide as the step's keys are large, those after the query among them."""

    exact = "Never."

    def mask(self, ctx):
        size = jnp.where(ctx.pos[:, None, :, None] >= 0, ctx.k, 0.0).sum((1, 2, 3))
        return Loud(4 + (jnp.abs(size) * 50).astype(jnp.int32)[:, None, None, None, None] % 16)


@dataclass(frozen=True)
class Narrow(Exact):
    """Codes of 8 bits, which the leaves declare as 4."""

    exact = "Never: values are rounded."
    plain = False

    def leaves(self, size):
        return {
            "k": Leaf(jnp.int4, before=(size.head_dim,)),
            "v": Leaf(jnp.int8, after=(size.head_dim,)),
        }

    def encode(self, ctx, tokens, pick):
        code = lambda x: jnp.clip(jnp.round(x * 16), -127, 127).astype(jnp.int8)
        return {"k": code(tokens.k).swapaxes(2, 3), "v": code(tokens.v)}

    def decode(self, ctx, payload, pick):
        return payload["k"].astype(jnp.float32) / 16, payload["v"].astype(jnp.float32) / 16


@dataclass(frozen=True)
class Surplus(Narrow):
    """A scale that no leaf declares."""

    def leaves(self, size: Size):
        return super().leaves(size) | {"k": Leaf(jnp.int8, before=(size.head_dim,))}

    def encode(self, ctx, tokens, pick):
        return super().encode(ctx, tokens, pick) | {"scale": jnp.ones((*tokens.k.shape[:3], 1))}


@dataclass(frozen=True)
class Dilated(Mask):
    def allow(self, q_pos, kv_pos):
        return (q_pos - kv_pos) % 2 == 0


@dataclass(frozen=True)
class EverySecond(Pattern):
    """Every second key; it states a limit only where `exact` is set."""

    def mask(self, ctx):
        return Dilated()


@dataclass(frozen=True)
class NeverExact(EverySecond):
    exact = "Never: it reads every second key."


@dataclass(frozen=True)
class LosesOne(LargeKeys):
    """Has room for one token less than its budget."""

    def capacity(self, tokens, page):
        return min(self.budget - 1, tokens)


@dataclass(frozen=True)
class Wide(Compress):
    """Keeps the first tokens, more than there are in the prompt of a check."""

    budget: int = 4_096
    exact = "While the prompt is within the budget."

    def __post_init__(self):
        if self.budget < 512:
            raise UserError(f"budget={self.budget} must be at least 512")

    def score(self, ctx, held):
        return -held.pos.astype(jnp.float32)


def policy(part):
    return Recipe((Segment(policy=part),))


def codec(part):
    return Recipe((Segment(codec=part),))


def result(recipe, name, **settings):
    return run_check(Subject(recipe, **settings), name)


# ---- seeded faults: the check that must find each, and words of its line


@pytest.mark.parametrize(
    "recipe", [policy(WrongAxis(9)), policy(WrongAxis(32)), Recipe((Segment(compress=WrongEnd()),))]
)
def test_a_norm_over_the_wrong_axis_is_found_where_a_run_raises_nothing(recipe):
    """With as many slots as channels, 32, the shapes agree; a check never has as many."""
    assert TINY.head_dim == 32
    for name in ("acts", "limit", "padding"):
        line = result(recipe, name)
        assert line.status == "fail" and line.error is not None
        assert "hape" in line.why and "held keys are [B,R,D,S]" in line.why


def test_a_pattern_that_looks_ahead_is_found():
    line = result(Recipe(pattern=LooksAhead()), "causality")
    assert line.status == "fail" and "tokens before token 21" in line.why and line.difference > 1e-3


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (Narrow(), "Narrow.encode returns k as int8, its leaf declares int4"),
        (Surplus(), "Surplus.encode returns scale, which its leaves do not declare"),
    ],
    ids=["narrow", "surplus"],
)
def test_a_codec_whose_leaves_are_not_what_it_stores_is_found(part, words):
    line = result(codec(part), "bytes")
    assert line.status == "fail" and words in line.why


def test_a_policy_that_reads_padding_is_found():
    line = result(policy(ReadsPadding()), "padding")
    assert line.status == "fail" and line.difference > 1e-3


@pytest.mark.slow
def test_a_policy_that_loses_a_token_is_found():
    line = result(policy(LosesOne()), "budgets")
    assert line.status == "fail" and "9 tokens are held, the capacity is 8" in line.why


# ---- limits


def test_a_method_that_is_never_exact_skips_its_limit_and_says_so():
    recipe = Recipe(pattern=NeverExact())
    for name in ("limit", "one by one", "chunk sizes"):
        line = result(recipe, name)
        assert line.status == "skip" and line.passed
        assert "NeverExact says that it is never exact: Never: it reads every second key." in line.why
    assert result(recipe, "causality").status == "pass"


@pytest.mark.slow
def test_a_method_that_states_no_limit_is_asked_for_it():
    line = result(Recipe(pattern=EverySecond()), "limit")
    assert line.status == "fail" and "EverySecond states no limit: override at_limit(tokens), or set exact" in line.why


# ---- sizes


def test_a_budget_above_the_prompt_is_made_smaller():
    """Its class has no `small`, and its own 4,096 tokens would keep everything."""
    subject = Subject(policy(LargeKeys(4_096)))
    assert subject.at("small").segments[0].policy.budget == 9


@pytest.mark.slow
def test_a_method_that_does_nothing_is_named_and_acts_on_a_longer_prompt():
    recipe = Recipe((Segment(compress=Wide()),))
    line = result(recipe, "acts")
    assert line.status == "fail" and "Wide(budget=4096) equals dense attention on 37 tokens" in line.why


@pytest.mark.slow
def test_a_method_that_needs_a_longer_prompt_acts_there():
    recipe = Recipe((Segment(compress=Wide()),))
    assert result(replace(recipe, segments=(Segment(compress=Wide(512)),)), "acts", prompt=600).status == "pass"


# ---- the public function and the command


@pytest.mark.slow
def test_a_sound_method_passes_every_check():
    lines = []
    results = lcx.check(policy(LargeKeys()), on_result=lines.append)
    assert [r.status for r in results] == ["pass"] * len(results), [str(r) for r in results]
    assert lines == results and len({r.check for r in results}) == len(results) == 13
    by_name = {r.check: r for r in results}
    assert by_name["limit"].difference < 3e-4 < 1e-2 < by_name["acts"].difference


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"prompt": 32}, "prompt=32 must be an integer of at least 33"),
        ({"chunk": 0}, "chunk=0 must be an integer of at least 1"),
        ({"aux": [{}]}, "aux has 1 layers, model 'tiny' has 3"),
        ({"method": "configs/h2o.py"}, "allowed is a Recipe or Experiment"),
    ],
)
def test_wrong_arguments_are_refused(settings, words):
    with pytest.raises(UserError, match=words):
        lcx.check(**{"method": Recipe()} | settings)


def test_garbage_and_nan_are_differences():
    from lcx.conformance.measure import Failed, Measure

    with pytest.raises(Failed, match="differ by inf"):
        Measure().near(np.array([1.0, np.nan]), np.ones(2), 1.0, "they")
    Measure().equal(np.array([np.nan]), np.array([np.nan]), "they")


CONFIG = """from dataclasses import dataclass

from lcx.experiment import Experiment
from lcx.policies.base import Evict
from lcx.recipe import Recipe, Segment


@dataclass(frozen=True)
class Mine(Evict):
    budget: int = 8

    def score(self, ctx, held, new):
        return held.pos, SCORE


def get_config():
    return Experiment(Recipe((Segment(policy=Mine()),)))
"""


def test_the_command_prints_a_line_a_check_and_ends_with_1(tmp_path, monkeypatch, capsys):
    path = tmp_path / "mine.py"
    path.write_text(CONFIG.replace("SCORE", "new.no_such_field"))
    code, out, err = run_command(monkeypatch, capsys, "check", f"--config={path}")
    assert code == 1 and err == ""
    lines = out.strip().splitlines()
    assert len(lines) == 14 and lines[-1] == "0 of 13 checks pass, 13 fail, 0 say nothing of this method"
    assert lines[0].startswith("FAIL  acts") and f"({path}:13)" in lines[0] and "no_such_field" in lines[0]


@pytest.mark.slow
def test_the_command_passes_a_sound_config(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    code, out, _ = run_command(monkeypatch, capsys, "check", "--config=int4", "--thorough", "--prompt=40", "--chunk=8")
    assert code == 0 and "19 of 19 checks pass" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "config: missing"),
        (("--config=smollm2_quick",), "is a sweep; allowed here is the config of one method"),
        (("--config=h2o", "--prompt=8"), "prompt"),
    ],
)
def test_wrong_input_of_the_command_is_one_line(words, message, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    code, out, err = run_command(monkeypatch, capsys, "check", *words)
    (line,) = err.strip().splitlines()
    assert code == 2 and out == "" and line.startswith("check: ") and message in line
