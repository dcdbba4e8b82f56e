"""Attention through the kernels is attention through XLA: whatever a source holds, and what cannot be honoured is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import quick_compilation as quick_compilation

from lcx.backends import pallas
from lcx.backends.choose import AUTO, attend, attend_visits, resolve, score_minmax, score_probe
from lcx.bench.interpret import interpreted
from lcx.errors import UserError
from lcx.model_config import ModelConfig
from lcx.models.decoder import Layers, Model, random_weights
from lcx.ops.attention import EMPTY, Source, tokens_source
from lcx.ops.masks import Mask, Near
from lcx.ops.visits import Visit
from lcx.patterns.minference import MInference
from lcx.recipe import Recipe
from lcx.session import Session

B, K, D = 2, 2, 64
SCALE = D**-0.5


def tokens(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.bfloat16)


def slots(S, pos, plain=True):
    """Slots in any order."""
    k, v = tokens(1, B, K, D, S), tokens(2, B, K, S, D)

    def tile(start, size):
        return jax.lax.dynamic_slice_in_dim(k, start, size, 3), jax.lax.dynamic_slice_in_dim(v, start, size, 2)

    def gather(pages, size):
        at = jnp.minimum((pages[..., None] * size + jnp.arange(size)).reshape(*pages.shape[:2], -1), S - 1)
        return jnp.take_along_axis(k, at[:, :, None], 3), jnp.take_along_axis(v, at[..., None], 2)

    return Source(pos=jnp.asarray(pos, jnp.int32), tile=tile, gather=gather, plain=plain)


class EvenKeys(Mask):
    """A mask that the kernels do not know."""

    def allow(self, q_pos, kv_pos):
        return kv_pos % 2 == 0


def held_positions(S, used, rows):
    """`used` tokens of the text's first S, shuffled over the slots; the rest is EMPTY."""
    rng = np.random.default_rng(3)
    return np.stack(
        [[rng.permutation(np.where(np.arange(S) < used, np.arange(S), EMPTY)) for _ in range(rows)] for _ in range(B)]
    )


def compare(q, sources, pos, mask=None):
    want = attend(q, sources, pos, scale=SCALE, mask=mask)
    run = lambda q, pos: attend(q, sources, pos, scale=SCALE, mask=mask, implementation="pallas")
    agree(interpreted(run)(q, pos), want)


def agree(got, want):
    some = np.isfinite(np.asarray(want.lse))
    np.testing.assert_array_equal(np.isfinite(np.asarray(got.lse)), some)
    np.testing.assert_allclose(np.asarray(got.lse)[some], np.asarray(want.lse)[some], atol=2e-3)
    # bfloat16 probabilities: 2^-9 relative, of values of about 1
    np.testing.assert_allclose(np.float32(got.out), np.float32(want.out), atol=1e-2)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("rows,mask", [(1, None), (K, Near(60, 4))])
def test_decode_over_slots_in_any_order(rows, mask):
    """A held cache and the step's own tokens; the queries of a group share a tile, and several blocks share the keys."""
    G, T = 4, 3
    q = tokens(0, B, K, G, T, D)
    pos = jnp.asarray([[200, 201, 202], [200, 201, EMPTY]], jnp.int32)
    sources = [
        slots(256, held_positions(256, 200, rows)),
        tokens_source(tokens(4, B, K, T, D), tokens(5, B, K, T, D), pos),
    ]
    compare(q, sources, pos, mask)


@pytest.mark.timeout(300)
def test_a_chunk_of_a_prompt_that_is_padded():
    """More rows than a tile has; the last row of the batch ends early."""
    G, T = 1, 130
    pos = jnp.stack([jnp.arange(100, 230), jnp.where(jnp.arange(T) < 77, jnp.arange(100, 230), EMPTY)]).astype(
        jnp.int32
    )
    sources = [
        slots(128, held_positions(128, 100, 1)),
        tokens_source(tokens(4, B, K, T, D), tokens(5, B, K, T, D), pos),
    ]
    compare(tokens(0, B, K, G, T, D), sources, pos)


def test_what_cannot_be_honoured_is_refused_or_left_to_xla():
    pos = jnp.arange(3)[None].repeat(B, 0)
    own = tokens_source(tokens(4, B, K, 3, D), tokens(5, B, K, 3, D), pos)
    q = tokens(0, B, K, 1, 3, D)
    held = slots(64, held_positions(64, 0, 1), plain=False)
    want = attend(q, [held, own], pos, scale=SCALE)
    for wrong, source, mask, name in (
        ("decoded by XLA", held, None, "pallas"),
        ("not a window with sinks", own, EvenKeys(), "pallas"),
        ("cuDNN serves plain causal attention", own, Near(2), "cudnn"),
    ):
        with pytest.raises(UserError, match=f"implementation='{name}'.*{wrong}"):
            attend(q, [source], pos, scale=SCALE, mask=mask, implementation=name)
    with pytest.raises(UserError, match="queries of float32"):
        attend(q.astype(jnp.float32), [own], pos, scale=SCALE, implementation="pallas")
    got = attend(q, [held], pos, scale=SCALE, implementation=AUTO)
    assert np.isneginf(np.asarray(got.lse)).all() and np.isfinite(np.asarray(want.lse)).all()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("implementation", ["pallas", AUTO])
def test_scores_of_patterns_go_through_the_kernels(implementation):
    q, k = tokens(0, B, K, 2, 16, D), tokens(1, B, K, D, 100)
    for score, args, asked in (
        (score_minmax, (q, k - 1, k + 1), {}),
        (score_probe, (q, k), {"scale": SCALE, "q_offset": jnp.asarray([84, -3]), "kv_len": jnp.asarray([100, 13])}),
    ):
        run = lambda *args: score(*args, implementation=implementation, **asked)  # noqa: B023, E731
        # `interpreted` fails where no kernel runs
        got, want = interpreted(run)(*args), score(*args, **asked)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max()), got, want)
        wide = [x.astype(jnp.float32) for x in args]
        if implementation == "pallas":
            with pytest.raises(UserError, match="implementation='pallas': scores of float32"):
                run(*wide)
        else:
            jax.tree.map(np.testing.assert_array_equal, run(*wide), score(*wide, **asked))


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("form", "g", "mask"),
    [
        ("blocks", 2, None),
        ("lists", 1, Near(150, 4)),
        ("listing", 2, None),
        ("listing of each block", 1, Near(150, 4)),
        *(
            pytest.param(form, g, mask, marks=pytest.mark.slow)
            for form, g, mask in [
                ("blocks", 1, Near(150, 4)),
                ("lists", 2, None),
                ("listing", 1, Near(150, 4)),
                ("listing of each block", 2, None),
            ]
        ),
    ],
)
def test_blocks_that_a_pattern_lists_go_through_the_kernel(form, g, mask, monkeypatch):
    """Two blocks of queries, the second cut off and padded; three of keys, with holes; one block of queries that lists nothing."""
    G, T, S = 2, 150, 300
    q, source = tokens(0, B, K, G, T, D), slots(S, held_positions(S, 280, K))
    real = np.arange(T) < np.asarray([[T], [140]])
    pos = jnp.asarray(np.where(real, 200 + np.arange(T), EMPTY), jnp.int32)
    rng = np.random.default_rng(7)
    blocks = rng.random((B, K, g, 2, 3)) < 0.6
    blocks[0, 0, 0] = [[False] * 3, [True] * 3]
    visit = Visit(128, 128, blocks=jnp.asarray(blocks))
    most = None
    if form == "lists":
        # two find a place
        index, count = np.argsort(~blocks, -1, kind="stable")[..., :2], blocks.sum(-1)
        visit = Visit(128, 128, lists=(jnp.asarray(index, jnp.int32), jnp.asarray(count, jnp.int32)))
        most = 2
    if form.startswith("listing"):
        visit = Visit(128, 128, listing=Visit(128, 128, blocks=jnp.asarray(blocks)).at, most=3)
        if form != "listing":
            # the queries of a prompt longer than this are read in parts, here of 128 and 22
            monkeypatch.setattr(pallas, "LISTED_ROWS", 128)
    run = lambda q, pos, implementation: attend_visits(
        q, source, pos, visit, scale=SCALE, mask=mask, implementation=implementation
    )
    got, overflow = interpreted(lambda q, pos: run(q, pos, AUTO))(q, pos)
    want, none = run(q, pos, "xla")
    agree(got, want)
    assert overflow == none == (0 if most is None else np.maximum(blocks.sum(-1) - most, 0).sum())


def test_page_lists_are_refused_where_another_implementation_is_named():
    config = ModelConfig("lists", 1, 48, 6, 2, 16, 40, 97, 512)
    layers = Layers.of(Model(config, random_weights(config, seed=0, dtype=jnp.bfloat16)))
    session = Session(layers, Recipe(pattern=MInference(4, 4)), 9, 1)
    session.implementation = "cudnn"
    with pytest.raises(UserError, match="implementation='cudnn' cannot attend this step's own tokens by page list"):
        session.prefill(np.arange(9))
    q, source = tokens(0, B, K, 2, 3, D), slots(64, held_positions(64, 60, 1))
    pos = jnp.arange(60, 63)[None].repeat(B, 0)
    own = tokens_source(tokens(4, B, K, 3, D), tokens(5, B, K, 3, D), pos)
    lists = jnp.zeros((B, K, 2, 1, 1), jnp.int32), jnp.ones((B, K, 2, 1), jnp.int32)
    pages = Visit(16, 3, lists=lists)
    blocks = Visit(128, 128, lists=lists)
    weighed = Visit(128, 128, lists=lists, weigh=lambda logits, slot: logits)
    for name, keys, visit, mask, why in (
        ("pallas", source, pages, None, "lists of 16 slots for 3 queries; the kernels take 128 slots for 128 queries"),
        ("pallas", source, weighed, None, "XLA alone does that"),
        ("pallas", source, blocks, EvenKeys(), "a mask that is not a window with sinks"),
        ("pallas", slots(64, source.pos, plain=False), blocks, None, "slots in another type"),
        ("cudnn", own, blocks, None, "cannot attend this step's own tokens by page list"),
    ):
        with pytest.raises(UserError, match=f"implementation='{name}'.*{why}"):
            attend_visits(q, keys, pos, visit, scale=SCALE, mask=mask, implementation=name)
    # what is held is XLA's with cuDNN in any case
    for name, keys in (("cudnn", source), ("xla", own), (AUTO, own), (AUTO, source)):
        got, _ = attend_visits(q, keys, pos, pages, scale=SCALE, implementation=name)
        want, _ = attend_visits(q, keys, pos, pages, scale=SCALE)
        jax.tree.map(np.testing.assert_array_equal, got, want)


def test_a_device_that_is_not_hopper_gets_xla():
    assert resolve(None, (9, 0)) == AUTO
    assert resolve(None, (8, 0)) == resolve(None) == "xla"
    assert resolve("pallas", (9, 0)) == "pallas" and resolve("cudnn", (8, 0)) == "cudnn"
    with pytest.raises(UserError, match=r"the kernels are for Hopper \(H100, H200\), not compute capability 8.0"):
        resolve("pallas", (8, 0))
    for name in ("pallas", "cudnn"):
        with pytest.raises(UserError, match=f"implementation='{name}': .*not this cpu"):
            resolve(name)
    with pytest.raises(UserError, match="implementation='triton': allowed are xla, pallas, cudnn"):
        resolve("triton")
