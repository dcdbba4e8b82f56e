"""What must hold for every config: each file in configs/ is found by itself, shrunk to a tiny random model, and checked by lcx.conformance.

A new config needs no line here: its classes say at which sizes they act (`small`) and where they equal dense attention (`at_limit`).
CASES has the few that need a longer text or more.  Which tokens a method chooses is compared with an oracle elsewhere.
"""

from dataclasses import dataclass, field
from functools import cache

import pytest
from tiny import quick_compilation as quick_compilation

from lcx.codecs.int_token import Int
from lcx.codecs.kivi import chain
from lcx.config_files import all_configs, change, load_config
from lcx.conformance import CHECKS, Subject, run_check
from lcx.conformance.run import THOROUGH
from lcx.conformance.subject import PROMPT
from lcx.experiment import Experiment
from lcx.policies.duo import duo
from lcx.policies.sink_window import SinkWindow
from lcx.policies.snapkv import SnapKV
from lcx.recipe import Recipe, Segment


@dataclass(frozen=True)
class Case:
    """What a config needs beyond what its classes say.

    Attributes:
      prompt: tokens of the longer prompt.
      changes: dotted field of the experiment -> text, on top of the classes' small sizes.
      shrink: whether the classes' small sizes are taken.
      any_chunk: how the prompt is cut does not matter even at small sizes.
      config: the experiment itself, where no file in configs/ has it.
    """

    prompt: int = PROMPT
    changes: dict[str, str] = field(default_factory=dict, hash=False)
    shrink: bool = True
    any_chunk: bool = False
    config: Experiment | None = field(default=None, hash=False)


CASES = {
    "dense": Case(any_chunk=True),
    "knorm": Case(any_chunk=True),
    "snapkv": Case(any_chunk=True),
    "pyramidkv": Case(any_chunk=True),
    "quest": Case(any_chunk=True),
    "xattention": Case(any_chunk=True),
    "minference": Case(prompt=200),
    "minference_quest": Case(prompt=200),
    # pages of 64 tokens
    "int4_pages": Case(prompt=150, shrink=False, changes={"recipe.segments.0.0.policy.keep": "16"}),
}
# methods that no file in configs/ joins
COMPOSED = {
    "snapkv+kivi2": Case(shrink=False, config=Experiment(Recipe((chain(2, 8, 8, compress=SnapKV(21, window=3)),)))),
    "sink_window+int8": Case(
        shrink=False, config=Experiment(Recipe((Segment(policy=SinkWindow(2, 7), codec=Int(8)),)))
    ),
    "duo+snapkv+kivi4": Case(
        shrink=False,
        config=Experiment(
            Recipe((chain(4, 8, 8, heads="retrieval", compress=SnapKV(21, window=3)), duo(2, 7, Int(4))[1])),
        ),
    ),
}
CONFIGS = [p.stem for p in all_configs() if isinstance(load_config(p), Experiment)]
NAMES = [*CONFIGS, *COMPOSED]
each_config = pytest.mark.parametrize("name", NAMES)


def few(*quick):
    """Every config; those not named here are `slow`, as the programs that they need are compiled for one test alone."""
    return pytest.mark.parametrize(
        "name", [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in NAMES]
    )


ANY_CHUNK = [n for n in NAMES if CASES.get(n, Case()).any_chunk or n.startswith("minference")]


@cache
def subject(name) -> Subject:
    case = COMPOSED.get(name) or CASES.get(name) or Case()
    experiment = load_config(f"configs/{name}.py") if case.config is None else case.config
    for key, text in case.changes.items():
        experiment = change(experiment, key, text)
    return Subject(experiment.recipe, prompt=case.prompt, shrink=case.shrink, any_chunk=case.any_chunk)


def conforms(name, check, **settings):
    result = run_check(subject(name), check, **settings)
    assert result.passed, str(result)
    return result


def test_every_line_has_a_config():
    assert set(CASES) <= set(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_part_says_when_it_is_exact(name):
    for _, _, part in load_config(f"configs/{name}.py").recipe.parts():
        assert part.exact.endswith("."), type(part)


def test_every_check_runs_on_every_config():
    """Each name of the two tables is the literal of a test below."""
    with open(__file__, encoding="utf-8") as file:
        source = file.read()
    for name in CHECKS | THOROUGH:
        assert f'conforms(name, "{name}"' in source, name


# ---- equality with dense attention


@each_config
def test_equals_dense_at_the_exact_limit(name):
    assert conforms(name, "limit").status == "pass"


@each_config
def test_one_token_at_a_time_equals_one_pass_at_the_exact_limit(name):
    assert conforms(name, "one by one").status == "pass"


@each_config
def test_prompts_of_1_to_9_tokens_equal_dense_at_the_exact_limit_and_are_finite_below(name):
    conforms(name, "short prompts")


@few("h2o")
def test_bfloat16_is_near_float32(name):
    conforms(name, "bfloat16")


@few()
def test_chunks_of_any_size_equal_dense_at_the_exact_limit(name):
    conforms(name, "chunk sizes")


@few()
def test_steps_of_many_tokens_equal_dense_at_the_exact_limit_and_are_finite_below(name):
    conforms(name, "long steps")


@few()
def test_any_number_of_heads_equals_dense_at_the_exact_limit(name):
    conforms(name, "heads")


def test_three_heads_without_groups_equal_dense_at_the_exact_limit():
    name = "h2o"
    assert conforms(name, "heads", sizes=[(3, 3)]).status == "pass"


# ---- below the limit


@each_config
def test_finite(name):
    conforms(name, "finite")


@each_config
def test_acts_on_the_small_sizes(name):
    """Classes whose `small` changes nothing would make the other checks empty."""
    assert conforms(name, "acts").status == ("skip" if name == "dense" else "pass")


@each_config
def test_a_token_does_not_matter_to_those_before_it(name):
    conforms(name, "causality")


@few(*ANY_CHUNK)
def test_chunk_size_does_not_matter_where_the_method_says_so(name):
    conforms(name, "any chunk")


@each_config
def test_batch_mates_and_padding_do_not_matter(name):
    conforms(name, "batch mates")


@few()
def test_texts_of_a_batch_equal_each_text_alone(name):
    conforms(name, "alone")


@each_config
def test_tokens_in_padding_do_not_matter(name):
    conforms(name, "padding")


@each_config
def test_what_lies_in_empty_slots_does_not_matter(name):
    conforms(name, "empty slots")


@each_config
def test_a_second_session_compiles_nothing(name):
    conforms(name, "no recompilation")


# ---- what is held


@each_config
def test_bytes_are_those_of_the_arrays(name):
    conforms(name, "bytes")


@each_config
@pytest.mark.parametrize("setting", ["small", "limit"])
def test_budgets_hold_after_every_step_and_other_tokens_are_held_once(name, setting):
    """The number of tokens is exact: a method that loses one in its budget fails as well."""
    conforms(name, "budgets", settings=(setting,))


@few("kivi2", "duo_int4", "quest")
def test_a_long_cache_is_written_in_place(name):
    conforms(name, "in place")
