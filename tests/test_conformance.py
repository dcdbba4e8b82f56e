"""What must hold for every config: each file in configs/ is found by itself, shrunk to a tiny random model, and checked.

A new config needs one line in CASES: sizes that make the method act on 37 tokens, and its exact limit, where it must equal dense
attention.  Which tokens a method chooses is compared with an oracle elsewhere (test_policies, test_patterns).
"""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcx.artefacts.head_split import split_by_score
from lcx.axes import Exact
from lcx.cache import Slots, Store, device_bytes, shape_bytes
from lcx.codecs.int_token import Int
from lcx.codecs.kivi import chain
from lcx.config_files import all_configs, change, load_config
from lcx.errors import UserError
from lcx.experiment import Experiment
from lcx.model_config import ModelConfig
from lcx.models.decoder import Layers, Model, embed_program, last_rows, logits_program, random_weights
from lcx.ops.attention import EMPTY
from lcx.policies.base import Evict
from lcx.policies.duo import duo
from lcx.policies.sink_window import SinkWindow
from lcx.policies.snapkv import SnapKV
from lcx.programs import block_program, repack_program
from lcx.recipe import Recipe, Segment
from lcx.schedules.chunked import Chunked, OneShot
from lcx.session import Session

TINY = ModelConfig("tiny", 3, 48, 6, 2, 32, 40, 97, 512)  # head_dim suits groups of 32
# compiling is what this file costs: one chunk size, one batch and one length serve nearly all checks
PROMPT, SHORT, CHUNK, NEW, BATCH = 37, 16, 16, 2, 2
LONG = 131_072  # slots of the programs that are compiled and not run
ATOL = 3e-4  # f32 through 3 layers; logits have a spread of 7
SPLIT = split_by_score([[1, 0], [0, 1], [1, 0]], 0.5)  # a retrieval and a streaming head in every layer
PROGRAMS = (block_program, repack_program, embed_program, logits_program, last_rows)


# ---- what a line of the table is made of: changes of an Experiment


def budget(tokens: int):
    return lambda e: e.with_budget(PROMPT, budget=tokens)


def fields(**values):
    """Fields by their dotted names, `__` for the dots, `recipe` left out: pattern__page=4."""

    def apply(e: Experiment):
        for name, value in values.items():
            e = change(e, "recipe." + name.replace("__", "."), str(value))
        return e

    return apply


def codec(exact):
    """Every slot written by `exact`."""

    def swap(segment):
        return tuple(map(swap, segment)) if isinstance(segment, tuple) else replace(segment, codec=exact)

    return lambda e: replace(e, recipe=replace(e.recipe, segments=swap(e.recipe.segments)))


def same(e: Experiment):
    return e


def both(*changes):
    def apply(e):
        for one in changes:
            e = one(e)
        return e

    return apply


KIVI_SMALL = {"0__0__policy__keep": 8, "0__0__policy__page": 8, "0__1__codec__group_size": 8}
KIVI_SMALL = fields(**{"segments__" + k: v for k, v in KIVI_SMALL.items()})
NO_PAGES = lambda n: fields(segments__0__0__policy__keep=n)
WIDE = lambda n: fields(segments__1__policy__window=n)


@dataclass(frozen=True)
class Case:
    """One config.

    Attributes:
      limit: tokens -> change, on top of `small`, to the setting at which the method is dense attention for so many tokens.
      small: change to sizes at which the method acts on `prompt` tokens.
      any_chunk: how the prompt is cut does not matter even at `small`.
      causal: at `small` too, a token does not matter to those before it.
      aux: the method's arrays for TINY.
      prompt: tokens of the longer prompt.
      config: the experiment itself, where no file in configs/ has it.
    """

    limit: Callable[[int], Callable]
    small: Callable = same
    any_chunk: bool = False
    causal: bool = True
    aux: list | None = field(default=None, hash=False)
    prompt: int = PROMPT
    config: Experiment | None = None


CASES = {
    "dense": Case(limit=lambda n: same, any_chunk=True),
    "window": Case(limit=budget, small=budget(9)),
    "sink_window": Case(limit=budget, small=budget(9)),
    "streaming_llm": Case(limit=budget, small=budget(9)),
    "h2o": Case(limit=budget, small=budget(9)),
    "tova": Case(limit=budget, small=budget(9)),
    "knorm": Case(limit=budget, small=budget(9), any_chunk=True),
    "snapkv": Case(limit=budget, small=both(fields(segments__0__compress__window=3), budget(9)), any_chunk=True),
    "quest": Case(limit=lambda n: budget(n + 4), small=both(fields(pattern__page=4), budget(12)), any_chunk=True),
    # the end of the prompt chooses what every query reads
    "minference": Case(
        limit=lambda n: fields(pattern__vertical=n),
        small=fields(pattern__vertical=30, pattern__slash=50),
        causal=False,
        prompt=200,
    ),
    "int8": Case(limit=lambda n: codec(Exact())),
    "int4": Case(limit=lambda n: codec(Exact())),
    "kivi2": Case(limit=lambda n: codec(Exact()), small=KIVI_SMALL),
    "kivi4": Case(limit=NO_PAGES, small=KIVI_SMALL),
    "int4_pages": Case(limit=NO_PAGES, small=NO_PAGES(16), prompt=150),  # pages of 64 tokens
    "duo_int4": Case(
        limit=lambda n: both(codec(Exact()), WIDE(n)),
        small=fields(segments__1__policy__sink=2, segments__1__policy__window=7),
        aux=SPLIT,
    ),
}
# methods that no file in configs/ joins
COMPOSED = {
    "snapkv+kivi2": Case(
        config=Experiment(Recipe((chain(2, 8, 8, compress=SnapKV(21, window=3)),))),
        limit=lambda n: both(budget(n), codec(Exact())),
    ),
    "sink_window+int8": Case(
        config=Experiment(Recipe((Segment(policy=SinkWindow(2, 7), codec=Int(8)),))),
        limit=lambda n: both(budget(n), codec(Exact())),
    ),
    "duo+snapkv+kivi4": Case(
        config=Experiment(
            Recipe((chain(4, 8, 8, heads="retrieval", compress=SnapKV(21, window=3)), duo(2, 7, Int(4))[1])),
        ),
        limit=lambda n: both(fields(segments__0__0__compress__budget=n), codec(Exact()), WIDE(n)),
        aux=SPLIT,
    ),
}
CONFIGS = [p.stem for p in all_configs() if isinstance(load_config(p), Experiment)]
ALL = CASES | COMPOSED
NAMES = [n for n in CONFIGS if n in CASES] + list(COMPOSED)
each_config = pytest.mark.parametrize("name", NAMES)


def few(*quick):
    """Every config; those not named here are `slow`, as the programs that they need are compiled for one test alone."""
    return pytest.mark.parametrize(
        "name", [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in NAMES]
    )


ANY_CHUNK = [n for n in NAMES if ALL[n].any_chunk or n == "minference"]


@contextmanager
def optimisations(wanted: bool):
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", not wanted)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Programs run once or twice here, so two thirds of the time to compile them is worth more than their speed."""
    with optimisations(False):
        yield


# ---- running


@cache
def layers_of(model=TINY, dtype="float32"):
    return Layers.of(Model(model, random_weights(model, 1, jnp.dtype(dtype))))


@cache
def recipe_of(name, setting, tokens=PROMPT + NEW):
    """The recipe of a config: "small", or "limit" for `tokens` in all."""
    case = ALL[name]
    config = load_config(f"configs/{name}.py") if case.config is None else case.config
    config = case.small(config)
    return (config if setting == "small" else case.limit(max(tokens, case.prompt + NEW))(config)).recipe


def session_of(
    name, recipe, *, batch=BATCH, chunk: int | None = CHUNK, dtype="float32", model=TINY, prompt=None, new_tokens=NEW
):
    case = ALL[name]
    schedule = OneShot() if recipe.one_shot or chunk is None else Chunked(chunk)
    prompt = case.prompt if prompt is None else prompt
    aux = case.aux if any(c[0].heads != "all" for c in recipe.chains) else None
    return Session(layers_of(model, dtype), recipe, prompt, new_tokens, batch=batch, aux=aux, schedule=schedule)


@cache
def texts(prompt):
    """int [2, prompt + NEW]."""
    return np.random.default_rng(0).integers(0, TINY.vocab_size, (BATCH, prompt + NEW))


def play(session, tokens, lengths=None, poisoned=False):
    """Logits [1 + NEW,B,V] after the prompt and after each of NEW steps, and what was held then."""
    prompt = tokens.shape[1] - NEW
    if poisoned:
        session.cache = [poison(session, "prefill", i, session.empty("prefill", i)) for i in range(TINY.num_layers)]
    logits = [session.prefill(tokens[:, :prompt], lengths)]
    found = [held(session)]
    if poisoned:
        session.cache = [poison(session, "decode", i, layer) for i, layer in enumerate(session.cache)]
    for i in range(prompt, prompt + NEW):
        logits.append(session.step(tokens[:, i : i + 1]))
        found.append(held(session))
    return np.stack(logits), found


@cache
def ragged(name, setting, dtype="float32", poisoned=False):
    """`play` for two texts of different lengths; beside it the session."""
    case = ALL[name]
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
            rows = layer[links[0].name].payload["k"].shape[1]
            pos = [np.asarray(layer[s.name].pos) for s in links]
            pos = np.concatenate([np.broadcast_to(p, (p.shape[0], rows, p.shape[2])) for p in pos], 2)
            chains.append([[np.sort(row[row != EMPTY]) for row in text] for text in pos])
        found.append(chains)
    return found


def poison(session, phase, layer, cache):
    """The cache with nan, or the largest integer, wherever no token is: payload, the policy's and the pattern's state."""
    cache = dict(cache)
    for links in session.recipes[phase][layer].chains:
        for s in links:
            store = Store(s.codec, session.config.head_dim, session.layers.dtype)
            slots: Slots = cache[s.name]
            payload = {n: spoil(x, slots.pos, store.leaves[n].axis) for n, x in slots.payload.items()}
            state = {n: spoil(x, slots.pos, x.ndim - 1) for n, x in slots.state.items()}
            cache[s.name] = replace(slots, payload=payload, state=state)
    return cache


def spoil(x, pos, axis):
    """`x` [B,R,...] whose `axis` has an entry for each slot or each page of slots."""
    count = x.shape[axis]
    if count == 0 or x.shape[1] == 0:
        return x
    per = -(-pos.shape[2] // count)
    free = np.pad(np.asarray(pos), ((0, 0), (0, 0), (0, count * per - pos.shape[2])), constant_values=EMPTY) == EMPTY
    free = free.reshape(*free.shape[:2], count, per).all(-1)
    free = free.reshape(*free.shape[:2], *(1,) * (axis - 2), count, *(1,) * (x.ndim - axis - 1))
    bad = jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else jnp.iinfo(x.dtype).max
    return jnp.where(free, jnp.asarray(bad, x.dtype), x)


# ---- the table


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_has_a_line_that_states_its_exact_limit(name):
    assert name in CASES, (
        f"configs/{name}.py has no line in CASES of tests/test_conformance.py: add its limit and small sizes"
    )
    wants_aux = load_config(f"configs/{name}.py").aux is not None
    assert wants_aux == (CASES[name].aux is not None), (
        f"{name}: aux of its line must be given, by hand, where the config has one"
    )


def test_every_line_has_a_config():
    assert set(CASES) <= set(CONFIGS)


# ---- equality with dense attention


@each_config
def test_equals_dense_at_the_exact_limit(name):
    """Read in chunks where the method allows it, so that cutting does not matter either; and in a batch with padding."""
    np.testing.assert_allclose(ragged(name, "limit")[0], dense(ALL[name].prompt), atol=ATOL)


@each_config
def test_one_token_at_a_time_equals_one_pass_at_the_exact_limit(name):
    case = ALL[name]
    tokens, width = texts(case.prompt), case.prompt if recipe_of(name, "limit").one_shot else CHUNK
    session = session_of(name, recipe_of(name, "limit"))
    stream = [session.prefill(tokens[:, :width], [1, 1], rows="all")[:, :1]]
    stream += [session.step(tokens[:, i : i + 1], rows="all") for i in range(1, 24)]
    np.testing.assert_allclose(np.concatenate(stream, 1), dense_stream(case.prompt)[:, :24], atol=ATOL)


@each_config
def test_prompts_of_1_to_9_tokens_equal_dense_at_the_exact_limit_and_are_finite_below(name):
    """Shorter than windows, groups and pages."""
    case = ALL[name]
    tokens, width = texts(case.prompt), case.prompt if recipe_of(name, "limit").one_shot else CHUNK
    want = np.asarray(layers_of().logits(dense_stream(case.prompt)[:, :10].reshape(-1, TINY.d_model)))
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
    error = np.abs(logits - dense(ALL[name].prompt))
    assert error.max() < 0.8 and error.mean() < 0.15
    assert device_bytes(session.cache) == size_of(session, "decode", "bfloat16")


@few()
@pytest.mark.parametrize("size", [1, 7, CHUNK + 1])
def test_chunks_of_any_size_equal_dense_at_the_exact_limit(name, size):
    case, recipe = ALL[name], recipe_of(name, "limit")
    if recipe.one_shot:
        pytest.skip("reads the prompt whole")
    logits, _ = play(session_of(name, recipe, chunk=size), texts(case.prompt), [case.prompt, SHORT])
    np.testing.assert_allclose(logits, dense(case.prompt), atol=ATOL)


@few()
@pytest.mark.parametrize("size", [2, 5, 9])
def test_steps_of_many_tokens_equal_dense_at_the_exact_limit_and_are_finite_below(name, size):
    case = ALL[name]
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
    """A line whose `small` changes nothing would make the other checks empty."""
    if recipe_of(name, "limit") == recipe_of(name, "small"):
        assert name == "dense"
    else:
        assert np.abs(ragged(name, "small")[0] - ragged(name, "limit")[0]).max() > 10 * ATOL


@each_config
def test_a_token_does_not_matter_to_those_before_it(name):
    case = ALL[name]
    setting = "small" if case.causal else "limit"
    streams = []
    for where in ((), (0, 21), (1, case.prompt - 1)):
        tokens = texts(case.prompt)[:, : case.prompt].copy()
        if where:
            tokens[where] = (tokens[where] + 1) % TINY.vocab_size
        streams.append(np.asarray(session_of(name, recipe_of(name, setting)).prefill(tokens, rows="all")))
    first, early, late = streams
    np.testing.assert_allclose(early[0, :21], first[0, :21], atol=1e-5)
    np.testing.assert_array_equal(early[1], first[1])
    assert np.abs(early[0, 21] - first[0, 21]).max() > 1e-4
    np.testing.assert_allclose(late[1, :-1], first[1, :-1], atol=1e-5)
    np.testing.assert_array_equal(late[0], first[0])


@few(*ANY_CHUNK)
def test_chunk_size_does_not_matter_where_the_method_says_so(name):
    """And never gives what is not finite."""
    case, recipe = ALL[name], recipe_of(name, "small")
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
    case, got = ALL[name], ragged(name, "small")[0]
    other = (texts(case.prompt)[0] + 7) % TINY.vocab_size
    tokens = np.stack([texts(case.prompt)[1], other])
    again, _ = play(session_of(name, recipe_of(name, "small")), tokens, [SHORT, case.prompt - 3])
    np.testing.assert_allclose(again[:, 0], got[:, 1], atol=ATOL)
    tokens = np.stack([other, texts(case.prompt)[0]])
    again, _ = play(session_of(name, recipe_of(name, "small")), tokens, [5, case.prompt])
    np.testing.assert_allclose(again[:, 1], got[:, 0], atol=ATOL)


@few("snapkv+kivi2")
def test_texts_of_a_batch_equal_each_text_alone(name):
    case, got = ALL[name], ragged(name, "small")[0]
    for row, length in enumerate((case.prompt, SHORT)):
        tokens = texts(case.prompt)[row]
        alone = np.concatenate([tokens[:length], tokens[case.prompt :]])[None]
        want, _ = play(session_of(name, recipe_of(name, "small"), batch=1), alone)
        np.testing.assert_allclose(got[:, row], want[:, 0], atol=ATOL)


@each_config
def test_tokens_in_padding_do_not_matter(name):
    case = ALL[name]
    tokens = texts(case.prompt).copy()
    tokens[1, SHORT : case.prompt] = 5
    logits, _ = play(session_of(name, recipe_of(name, "small")), tokens, [case.prompt, SHORT])
    np.testing.assert_array_equal(logits, ragged(name, "small")[0])


@each_config
def test_what_lies_in_empty_slots_does_not_matter(name):
    np.testing.assert_array_equal(ragged(name, "small", poisoned=True)[0], ragged(name, "small")[0])


@each_config
def test_a_second_session_compiles_nothing(name):
    case = ALL[name]
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
    after_prompt.prefill(texts(ALL[name].prompt)[:, : ALL[name].prompt], [ALL[name].prompt, SHORT])
    assert after_prompt.cache_bytes == size_of(session, "decode") <= after_prompt.peak_cache_bytes


@each_config
@pytest.mark.parametrize("setting", ["small", "limit"])
def test_budgets_hold_after_every_step_and_other_tokens_are_held_once(name, setting):
    """The number of tokens is exact: a method that loses one in its budget fails as well."""
    case = ALL[name]
    _, steps, session = ragged(name, setting)
    for since, layers in enumerate(steps):
        for layer, chains in enumerate(layers):
            for links, rows in zip(session.recipes["decode"][layer].chains, chains, strict=True):
                for text, length in zip(rows, (case.prompt, SHORT), strict=True):
                    for pos in text:
                        assert_holds(links[0], pos, length, since)


def assert_holds(first, pos, length, since):
    """What one KV head holds of a prompt of `length` tokens and `since` more."""
    assert len(np.unique(pos)) == len(pos) and pos.max() < length + since
    if first.compress is not None:
        assert len(pos) == min(first.compress.budget, length) + since
        np.testing.assert_array_equal(pos[len(pos) - since :], np.arange(length, length + since))
    elif isinstance(first.policy, Evict):
        assert len(pos) == min(first.policy.budget, length + since)
    else:
        np.testing.assert_array_equal(pos, np.arange(length + since))


@few("dense", "window", "h2o", "tova", "snapkv", "quest", "int4", "kivi2", "duo_int4", "streaming_llm")
def test_a_long_cache_is_written_in_place(name):
    """A copy of the cache would show in the scratch memory of the compiled step, which reads it tile by tile."""
    recipe = recipe_of(name, "small")
    held = recipe.chains[0][0]
    if held.compress is not None or isinstance(held.policy, Evict):
        held = replace(
            held,
            compress=held.compress and replace(held.compress, budget=LONG),
            policy=held.policy.with_budget(LONG) or held.policy,
        )
        recipe = replace(recipe, segments=((held, *recipe.chains[0][1:]), *recipe.segments[1:]))
    session = session_of(name, recipe, prompt=LONG, batch=1)
    layer = TINY.num_layers - 1
    cache = jax.eval_shape(lambda: session.empty("decode", layer))
    x, pos = jax.ShapeDtypeStruct((1, 1, TINY.d_model), jnp.float32), jax.ShapeDtypeStruct((1, 1), jnp.int32)
    args, static = session.block_call("decode", layer, x, pos, cache)
    with optimisations(True):
        report = block_program.lower(*args, **static).compile().memory_analysis()
    assert report.alias_size_in_bytes >= shape_bytes(cache)
    assert report.temp_size_in_bytes < shape_bytes(cache) / 3
