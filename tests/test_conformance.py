"""What must hold for every config: each file in configs/ is found by itself, shrunk to a tiny random model, and checked.

A new config needs no line here: its classes say at which sizes they act (`small`) and where they equal dense attention (`at_limit`).
CASES has the few that need a longer text or more.  Which tokens a method chooses is compared with an oracle elsewhere.
"""

from dataclasses import dataclass, field, replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import ATOL, TINY, poison
from tiny import layers as layers_of
from tiny import quick_compilation as quick_compilation

from lcx.artefacts.head_split import split_by_score
from lcx.cache import device_bytes, shape_bytes
from lcx.codecs.int_token import Int
from lcx.codecs.kivi import chain
from lcx.config_files import all_configs, change, load_config
from lcx.errors import UserError
from lcx.experiment import Experiment
from lcx.models.decoder import embed_program, last_rows, logits_program
from lcx.ops.attention import EMPTY
from lcx.policies.duo import duo
from lcx.policies.sink_window import SinkWindow
from lcx.policies.snapkv import SnapKV
from lcx.programs import block_program, repack_program
from lcx.recipe import Recipe, Segment
from lcx.schedules.chunked import Chunked, OneShot
from lcx.session import Session

# compiling is what this file costs: one chunk size, one batch and one length serve nearly all checks, and slots in multiples of ROUNDING
# let the settings of a method share programs where budgets are data
PROMPT, SHORT, CHUNK, NEW, BATCH, ROUNDING = 37, 16, 16, 2, 2, 64
LONG = 131_072  # slots of the programs that are compiled and not run
SPLIT = split_by_score([[1, 0], [0, 1], [1, 0]], 0.5)  # a retrieval and a streaming head in every layer
PROGRAMS = (block_program, repack_program, embed_program, logits_program, last_rows)


@dataclass(frozen=True)
class Case:
    """What a config needs beyond what its classes say.

    Attributes:
      prompt: tokens of the longer prompt.
      changes: dotted field of the experiment -> text, on top of the classes' small sizes.
      shrink: whether the classes' small sizes are taken.
      causal: at small sizes too, a token does not matter to those before it; not where the end of the prompt chooses for all queries.
      together: neighbouring queries that choose together at small sizes: a token may matter to those of its own group before it.
      any_chunk: how the prompt is cut does not matter even at small sizes.
      config: the experiment itself, where no file in configs/ has it.
    """

    prompt: int = PROMPT
    changes: dict[str, str] = field(default_factory=dict, hash=False)
    shrink: bool = True
    causal: bool = True
    together: int = 1
    any_chunk: bool = False
    config: Experiment | None = field(default=None, hash=False)


CASES = {
    "dense": Case(any_chunk=True),
    "knorm": Case(any_chunk=True),
    "snapkv": Case(any_chunk=True),
    "pyramidkv": Case(any_chunk=True),
    "quest": Case(any_chunk=True),
    "xattention": Case(any_chunk=True, together=4),
    "minference": Case(prompt=200, causal=False),
    # pages of 64 tokens
    "int4_pages": Case(prompt=150, shrink=False, changes={"recipe.segments.0.0.policy.keep": "16"}),
}
# methods that no file in configs/ joins
COMPOSED = {
    "snapkv+kivi2": Case(config=Experiment(Recipe((chain(2, 8, 8, compress=SnapKV(21, window=3)),)))),
    "sink_window+int8": Case(config=Experiment(Recipe((Segment(policy=SinkWindow(2, 7), codec=Int(8)),)))),
    "duo+snapkv+kivi4": Case(
        config=Experiment(
            Recipe((chain(4, 8, 8, heads="retrieval", compress=SnapKV(21, window=3)), duo(2, 7, Int(4))[1])),
        ),
    ),
}
CONFIGS = [p.stem for p in all_configs() if isinstance(load_config(p), Experiment)]
NAMES = [*CONFIGS, *COMPOSED]
each_config = pytest.mark.parametrize("name", NAMES)


def case_of(name) -> Case:
    return COMPOSED.get(name) or CASES.get(name) or Case()


def few(*quick):
    """Every config; those not named here are `slow`, as the programs that they need are compiled for one test alone."""
    return pytest.mark.parametrize(
        "name", [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in NAMES]
    )


ANY_CHUNK = [n for n in NAMES if case_of(n).any_chunk or n == "minference"]


# ---- running


@cache
def recipe_of(name, setting, tokens=PROMPT + NEW):
    """The recipe of a config: "small", or "limit" for `tokens` in all."""
    case = case_of(name)
    experiment = load_config(f"configs/{name}.py") if case.config is None else case.config
    if case.config is None:
        if case.shrink:
            shrink = lambda part: replace(part, **part.small)
            experiment = replace(experiment, recipe=experiment.recipe.map_parts(shrink))
        for key, text in case.changes.items():
            experiment = change(experiment, key, text)
    recipe = replace(experiment.recipe, rounding=ROUNDING)
    limit = max(tokens, case.prompt + NEW)
    return recipe if setting == "small" else recipe.map_parts(lambda part: part.at_limit(limit))


def aux_of(recipe):
    """The method's arrays for TINY: both kinds of heads in every layer, random numbers for what is declared."""
    split = any(c[0].heads != "all" for c in recipe.chains)
    declared = {n: a for n, a in recipe.arrays(TINY).items() if not a.optional}
    if not split and not declared:
        return None
    rng = np.random.default_rng(3)
    arrays = [{n: rng.standard_normal(a.full(TINY)).astype(a.dtype) for n, a in declared.items()} for _ in SPLIT]
    return [(heads if split else {}) | ({"arrays": a} if a else {}) for heads, a in zip(SPLIT, arrays, strict=True)]


def session_of(
    name, recipe, *, batch=BATCH, chunk: int | None = CHUNK, dtype="float32", model=TINY, prompt=None, new_tokens=NEW
):
    schedule = OneShot() if recipe.one_shot or chunk is None else Chunked(chunk)
    prompt = case_of(name).prompt if prompt is None else prompt
    layers = layers_of(model, 1, dtype)
    return Session(layers, recipe, prompt, new_tokens, batch=batch, aux=aux_of(recipe), schedule=schedule)


@cache
def texts(prompt):
    """int [2, prompt + NEW]."""
    return np.random.default_rng(0).integers(0, TINY.vocab_size, (BATCH, prompt + NEW))


def play(session, tokens, lengths=None, poisoned=False):
    """Logits [1 + NEW,B,V] after the prompt and after each of NEW steps, and what was held then."""
    prompt = tokens.shape[1] - NEW
    if poisoned:
        poison(session, "prefill")
    logits = [session.prefill(tokens[:, :prompt], lengths)]
    found = [held(session)]
    if poisoned:
        poison(session)
    for i in range(prompt, prompt + NEW):
        logits.append(session.step(tokens[:, i : i + 1]))
        found.append(held(session))
    return np.stack(logits), found


@cache
def ragged(name, setting, dtype="float32", poisoned=False):
    """`play` for two texts of different lengths; beside it the session."""
    case = case_of(name)
    session = session_of(name, recipe_of(name, setting), dtype=dtype)
    return *play(session, texts(case.prompt), [case.prompt, SHORT], poisoned), session


@cache
def dense(prompt):
    session = session_of("dense", Recipe(), chunk=None, prompt=prompt)
    return play(session, texts(prompt), [prompt, SHORT])[0]


@cache
def dense_stream(prompt):
    """The residual stream of dense attention [2,prompt,E], both texts whole."""
    session = session_of("dense", Recipe(), chunk=None, prompt=prompt)
    return np.asarray(session.prefill(texts(prompt)[:, :prompt], rows="all"))


def held(session):
    """[layer][chain][text][head]: the positions held in the chain's segments, in ascending order."""
    found = []
    for i, layer in enumerate(session.cache):
        chains = []
        for links in session.recipes["decode"][i].chains:
            rows = session.config.num_kv_heads if links[0].heads == "all" else 1
            pos = [np.asarray(layer[s.name].pos) for s in links]
            pos = np.concatenate([np.broadcast_to(p, (p.shape[0], rows, p.shape[2])) for p in pos], 2)
            chains.append([[np.sort(row[row != EMPTY]) for row in text] for text in pos])
        found.append(chains)
    return found


# ---- the table


def test_every_line_has_a_config():
    assert set(CASES) <= set(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_part_says_when_it_is_exact(name):
    for _, _, part in load_config(f"configs/{name}.py").recipe.parts():
        assert part.exact.endswith("."), type(part)


# ---- equality with dense attention


@each_config
def test_equals_dense_at_the_exact_limit(name):
    """Read in chunks where the method allows it, so that cutting does not matter either; and in a batch with padding."""
    np.testing.assert_allclose(ragged(name, "limit")[0], dense(case_of(name).prompt), atol=ATOL)


@each_config
def test_one_token_at_a_time_equals_one_pass_at_the_exact_limit(name):
    case = case_of(name)
    tokens, width = texts(case.prompt), case.prompt if recipe_of(name, "limit").one_shot else CHUNK
    session = session_of(name, recipe_of(name, "limit"))
    stream = [session.prefill(tokens[:, :width], [1, 1], rows="all")[:, :1]]
    stream += [session.step(tokens[:, i : i + 1], rows="all") for i in range(1, 24)]
    np.testing.assert_allclose(np.concatenate(stream, 1), dense_stream(case.prompt)[:, :24], atol=ATOL)


@each_config
def test_prompts_of_1_to_9_tokens_equal_dense_at_the_exact_limit_and_are_finite_below(name):
    """Shorter than windows, groups and pages."""
    case = case_of(name)
    tokens, width = texts(case.prompt), case.prompt if recipe_of(name, "limit").one_shot else CHUNK
    want = np.asarray(layers_of(TINY, 1).logits(dense_stream(case.prompt)[:, :10].reshape(-1, TINY.d_model)))
    want = want.reshape(BATCH, 10, -1)
    for setting in ("limit", "small"):
        for lengths in [(1, 2), (3, 4), (5, 6), (7, 8), (9, 1)]:
            session = session_of(name, recipe_of(name, setting))
            logits = session.prefill(tokens[:, :width], lengths)
            after = session.step(np.stack([tokens[b, n : n + 1] for b, n in enumerate(lengths)]))
            assert np.isfinite(logits).all() and np.isfinite(after).all()
            if setting == "limit":
                for b, n in enumerate(lengths):
                    np.testing.assert_allclose(logits[b], want[b, n - 1], atol=ATOL)
                    np.testing.assert_allclose(after[b], want[b, n], atol=ATOL)


@few("dense", "h2o")
def test_bfloat16_is_near_float32(name):
    logits, _, session = ragged(name, "limit", "bfloat16")
    # bfloat16 through 3 layers: 8 bits of each activation; logits have a spread of 7
    error = np.abs(logits - dense(case_of(name).prompt))
    assert error.max() < 0.8 and error.mean() < 0.15
    assert device_bytes(session.cache) == size_of(session, "decode", "bfloat16")


@few()
@pytest.mark.parametrize("size", [1, 7, CHUNK + 1])
def test_chunks_of_any_size_equal_dense_at_the_exact_limit(name, size):
    case, recipe = case_of(name), recipe_of(name, "limit")
    if recipe.one_shot:
        pytest.skip("reads the prompt whole")
    logits, _ = play(session_of(name, recipe, chunk=size), texts(case.prompt), [case.prompt, SHORT])
    np.testing.assert_allclose(logits, dense(case.prompt), atol=ATOL)


@few()
@pytest.mark.parametrize("size", [2, 5, 9])
def test_steps_of_many_tokens_equal_dense_at_the_exact_limit_and_are_finite_below(name, size):
    case = case_of(name)
    tokens, width = texts(case.prompt), case.prompt if recipe_of(name, "limit").one_shot else CHUNK
    for setting in ("limit", "small"):
        recipe = recipe_of(name, setting)
        session = session_of(name, recipe, new_tokens=size)
        session.prefill(tokens[:, :width], [11, 11])
        stream = session.step(tokens[:, 11 : 11 + size], rows="all")
        assert np.isfinite(stream).all()
        if setting == "limit":
            np.testing.assert_allclose(stream, dense_stream(case.prompt)[:, 11 : 11 + size], atol=ATOL)


HEADS = [(1, 1), (3, 3), (3, 1), (8, 8), (8, 1)]
SOME = ("dense", "h2o", "tova", "snapkv", "quest", "int4", "kivi2", "streaming_llm")


@pytest.mark.parametrize(
    ("name", "heads"),
    [pytest.param(n, h, marks=[] if (n, h) == ("h2o", (3, 3)) else [pytest.mark.slow]) for n in SOME for h in HEADS],
)
def test_any_number_of_heads_equals_dense_at_the_exact_limit(name, heads):
    model = replace(TINY, name="heads", num_heads=heads[0], num_kv_heads=heads[1])
    want, _ = play(session_of("dense", Recipe(), chunk=None, model=model), texts(PROMPT), [PROMPT, SHORT])
    logits, _ = play(session_of(name, recipe_of(name, "limit"), model=model), texts(PROMPT), [PROMPT, SHORT])
    np.testing.assert_allclose(logits, want, atol=ATOL)


# ---- below the limit


@each_config
def test_finite(name):
    assert np.isfinite(ragged(name, "small")[0]).all()


@each_config
def test_acts_on_the_small_sizes(name):
    """Classes whose `small` changes nothing would make the other checks empty."""
    if recipe_of(name, "limit") == recipe_of(name, "small"):
        assert name == "dense"
    else:
        assert np.abs(ragged(name, "small")[0] - ragged(name, "limit")[0]).max() > 10 * ATOL


@each_config
def test_a_token_does_not_matter_to_those_before_it(name):
    case = case_of(name)
    setting = "small" if case.causal else "limit"
    streams = []
    for where in ((), (0, 21), (1, case.prompt - 1)):
        tokens = texts(case.prompt)[:, : case.prompt].copy()
        if where:
            tokens[where] = (tokens[where] + 1) % TINY.vocab_size
        streams.append(np.asarray(session_of(name, recipe_of(name, setting)).prefill(tokens, rows="all")))
    first, early, late = streams
    before = lambda n: n - n % case.together
    np.testing.assert_allclose(early[0, : before(21)], first[0, : before(21)], atol=1e-5)
    np.testing.assert_array_equal(early[1], first[1])
    assert np.abs(early[0, 21] - first[0, 21]).max() > 1e-4
    end = before(case.prompt - 1)
    np.testing.assert_allclose(late[1, :end], first[1, :end], atol=1e-5)
    np.testing.assert_array_equal(late[0], first[0])


@few(*ANY_CHUNK)
def test_chunk_size_does_not_matter_where_the_method_says_so(name):
    """And never gives what is not finite."""
    case, recipe = case_of(name), recipe_of(name, "small")
    if recipe.one_shot:
        with pytest.raises(UserError, match="whole prompt"):
            Session(layers_of(), recipe, case.prompt, schedule=Chunked(CHUNK))
        return
    logits, _ = play(session_of(name, recipe, chunk=None), texts(case.prompt), [case.prompt, SHORT])
    assert np.isfinite(logits).all()
    if case.any_chunk:
        np.testing.assert_allclose(logits, ragged(name, "small")[0], atol=ATOL)


@each_config
def test_batch_mates_and_padding_do_not_matter(name):
    """Each text again, in the other row, beside another text of another length."""
    case, got = case_of(name), ragged(name, "small")[0]
    other = (texts(case.prompt)[0] + 7) % TINY.vocab_size
    tokens = np.stack([texts(case.prompt)[1], other])
    again, _ = play(session_of(name, recipe_of(name, "small")), tokens, [SHORT, case.prompt - 3])
    np.testing.assert_allclose(again[:, 0], got[:, 1], atol=ATOL)
    tokens = np.stack([other, texts(case.prompt)[0]])
    again, _ = play(session_of(name, recipe_of(name, "small")), tokens, [5, case.prompt])
    np.testing.assert_allclose(again[:, 1], got[:, 0], atol=ATOL)


@few("snapkv+kivi2")
def test_texts_of_a_batch_equal_each_text_alone(name):
    case, got = case_of(name), ragged(name, "small")[0]
    for row, length in enumerate((case.prompt, SHORT)):
        tokens = texts(case.prompt)[row]
        alone = np.concatenate([tokens[:length], tokens[case.prompt :]])[None]
        want, _ = play(session_of(name, recipe_of(name, "small"), batch=1), alone)
        np.testing.assert_allclose(got[:, row], want[:, 0], atol=ATOL)


@each_config
def test_tokens_in_padding_do_not_matter(name):
    case = case_of(name)
    tokens = texts(case.prompt).copy()
    tokens[1, SHORT : case.prompt] = 5
    logits, _ = play(session_of(name, recipe_of(name, "small")), tokens, [case.prompt, SHORT])
    np.testing.assert_array_equal(logits, ragged(name, "small")[0])


@each_config
def test_what_lies_in_empty_slots_does_not_matter(name):
    np.testing.assert_array_equal(ragged(name, "small", poisoned=True)[0], ragged(name, "small")[0])


@each_config
def test_a_second_session_compiles_nothing(name):
    case = case_of(name)
    ragged(name, "small")
    before = [p._cache_size() for p in PROGRAMS]
    play(session_of(name, recipe_of(name, "small")), texts(case.prompt), [case.prompt, SHORT])
    assert [p._cache_size() for p in PROGRAMS] == before


# ---- what is held


def size_of(session, phase, dtype="float32"):
    s = session
    return s.recipe.bytes(
        s.config, s.prompt, s.new_tokens, phase=phase, aux=s._raw_aux, batch=s.batch, dtype=jnp.dtype(dtype)
    )


@each_config
def test_bytes_are_those_of_the_arrays(name):
    session = ragged(name, "small")[2]
    leaves = jax.tree.leaves(session.cache)
    assert size_of(session, "decode") == session.cache_bytes == sum(x.nbytes for x in leaves)
    for phase in ("prefill", "decode"):
        for dtype in ("float32", "bfloat16"):
            fresh = session_of(name, session.recipe, dtype=dtype)
            empty = [fresh.empty(phase, i) for i in range(TINY.num_layers)]
            assert size_of(fresh, phase, dtype) == device_bytes(empty)
    after_prompt = session_of(name, session.recipe)
    after_prompt.prefill(texts(case_of(name).prompt)[:, : case_of(name).prompt], [case_of(name).prompt, SHORT])
    assert after_prompt.cache_bytes == size_of(session, "decode") <= after_prompt.peak_cache_bytes


@each_config
@pytest.mark.parametrize("setting", ["small", "limit"])
def test_budgets_hold_after_every_step_and_other_tokens_are_held_once(name, setting):
    """The number of tokens is exact: a method that loses one in its budget fails as well."""
    case = case_of(name)
    _, steps, session = ragged(name, setting)
    for since, layers in enumerate(steps):
        for layer, chains in enumerate(layers):
            links_of = session.recipe.at("decode", layer, TINY).chains
            for links, rows in zip(links_of, chains, strict=True):
                for text, length in zip(rows, (case.prompt, SHORT), strict=True):
                    for pos in text:
                        assert_holds(links, pos, length, since)


def assert_holds(links, pos, length, since):
    """What one KV head holds of a prompt of `length` tokens and `since` more."""
    first = links[0]
    assert len(np.unique(pos)) == len(pos) and pos.max() < length + since
    if first.compress is not None:
        kept = int(np.asarray(first.compress.keep(CtxOf(first.compress), np.array([length]))).reshape(-1)[0])
        assert len(pos) == min(kept, length) + since
        np.testing.assert_array_equal(pos[len(pos) - since :], np.arange(length, length + since))
    elif "every token" in first.policy.lacks:
        assert len(pos) == min(first.policy.budget, length + since)
    else:
        np.testing.assert_array_equal(pos, np.arange(length + since))


class CtxOf:
    """The data of one part, as a step has it."""

    def __init__(self, part):
        self.data = part.data()


@few("dense", "window", "h2o", "tova", "snapkv", "quest", "int4", "kivi2", "duo_int4", "streaming_llm")
def test_a_long_cache_is_written_in_place(name):
    """A copy of the cache would show in the scratch memory of the compiled step, which reads it tile by tile."""
    experiment = load_config(f"configs/{name}.py") if name in CONFIGS else case_of(name).config
    recipe = replace(experiment.recipe, rounding=1)
    if recipe.has_budget and recipe.pattern.with_budget(LONG) is None:
        recipe = recipe.with_budget(LONG)
    session = session_of(name, recipe, prompt=LONG, batch=1)
    layer = TINY.num_layers - 1
    cache = jax.eval_shape(lambda: session.empty("decode", layer))
    args, static = session.block_call("decode", layer, *session.step_shape(1), cache)
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        report = block_program.lower(*args, **static).compile().memory_analysis()
    finally:
        jax.config.update("jax_disable_most_optimizations", True)
    assert report.alias_size_in_bytes >= shape_bytes(cache)
    assert report.temp_size_in_bytes < shape_bytes(cache) / 3
