"""The doors of a session beside prefill and step: peek and commit, ragged acceptance, forget, rows in different phases, order."""

from dataclasses import replace
from functools import cache

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import TINY, layers, quick_compilation, text  # noqa: F401, a fixture

from lcx.cache import Size, Store
from lcx.codecs.int_token import Int
from lcx.codecs.kivi import chain
from lcx.errors import UserError
from lcx.ops.attention import EMPTY
from lcx.patterns.sink_window import AShape
from lcx.patterns.streaming import CachePositions
from lcx.policies.h2o import H2O
from lcx.policies.sink_window import SinkWindow
from lcx.policies.snapkv import SnapKV
from lcx.policies.tova import TOVA
from lcx.programs import block_program, commit_program, peek_program, repack_program
from lcx.recipe import Recipe, Segment
from lcx.schedules.chunked import Chunked
from lcx.session import Session

ATOL = 1e-5  # f32, the same sums in another order
RECIPES = {
    "dense": Recipe(),
    "kivi": Recipe((chain(bits=2, group_size=8, residual=8),)),
    "snapkv": Recipe((Segment(compress=SnapKV(budget=9, window=3)),)),
    "h2o": Recipe((Segment(policy=H2O(budget=9)),)),
    "streaming_llm": Recipe((Segment(policy=SinkWindow(2, 7)),), pattern=CachePositions()),
    "int4": Recipe((Segment(codec=Int(4, 16)),)),
    "int8": Recipe((Segment(codec=Int(8)),)),
    "window": Recipe(pattern=AShape(sink=2, window=7)),
}
DOOR = ["dense", "kivi", "snapkv", "h2o", "streaming_llm"]
PROMPT, NEW, STEP = 20, 12, 5
LENGTHS = (20, 13)


def started(name, batch=2, **settings):
    """A session that has read prompts of different lengths."""
    session = Session(layers(), RECIPES[name], PROMPT, NEW, batch=batch, **settings)
    rows = np.stack([text(PROMPT, seed) for seed in range(batch)])
    session.prefill(rows, LENGTHS[:batch])
    return session


@cache
def step_tokens(seed=5):
    return np.stack([text(STEP, seed), text(STEP, seed + 1)])


def logits(session, x):
    """Logits [B,T,V] of a residual stream."""
    return np.stack([session.layers.logits(row) for row in x])


def held(session):
    """(segment, pos, k, v, state) of every layer, all in numpy; what an empty slot holds is set to 0."""
    found = []
    for i, layer in enumerate(session.cache):
        for s in (s for links in session.recipes["decode"][i].chains for s in links):
            slots = layer[s.name]
            if not slots.pos.shape[-1]:
                continue
            store = Store(s.codec, Size(TINY.num_kv_heads, TINY.head_dim, jnp.float32))
            k, v = store.tile(slots, 0, slots.pos.shape[-1])
            pos = np.broadcast_to(slots.pos, (len(slots.pos), TINY.num_kv_heads, slots.pos.shape[-1]))
            some = pos != EMPTY
            state = {n: np.where(some, x, 0) for n, x in slots.state.items() if x.shape == pos.shape}
            found.append((s.name, pos, np.where(some[:, :, None], k, 0), np.where(some[..., None], v, 0), state))
    return found


def assert_same_caches(one, other, atol=ATOL):
    for a, b in zip(held(one), held(other), strict=True):
        np.testing.assert_array_equal(a[1], b[1])
        for x, y in ((a[2], b[2]), (a[3], b[3]), *((a[4][n], b[4][n]) for n in a[4])):
            np.testing.assert_allclose(x, y, atol=atol)


# ---- peek and commit


@pytest.mark.parametrize("name", DOOR)
def test_peek_and_commit_equal_a_step(name):
    one, other = started(name), started(name)
    before = held(one)
    peeked = one.peek(step_tokens())
    for a, b in zip(before, held(one), strict=True):
        np.testing.assert_array_equal(a[1], b[1])  # nothing is written yet
    one.commit([STEP, STEP])
    np.testing.assert_allclose(logits(one, peeked), logits(other, other.step(step_tokens(), rows="all")), atol=ATOL)
    assert_same_caches(one, other)
    np.testing.assert_allclose(one.step([[3], [4]]), other.step([[3], [4]]), atol=ATOL)


@pytest.mark.parametrize("name", DOOR)
def test_rejected_tokens_leave_no_trace(name):
    """Rows accept 3 and 1 tokens; others in the rejected places change nothing, and a step of the accepted ones alone is the same."""
    accept = np.arange(STEP) < np.array([[3], [1]])
    one, other, fed = started(name), started(name), started(name)
    first, second = step_tokens(), np.where(accept, step_tokens(), (step_tokens() + 7) % TINY.vocab_size)
    one.peek(first)
    one.commit([3, 1])
    other.peek(second)
    other.commit(accept)
    assert_same_caches(one, other, atol=0)
    pos = fed.next_pos[:, None] + np.arange(STEP)
    fed.feed(first, np.where(accept, pos, EMPTY))
    assert_same_caches(one, fed)
    assert one.next_pos.tolist() == fed.next_pos.tolist() == [LENGTHS[0] + 3, LENGTHS[1] + 1]
    want = fed.step([[3], [4]])
    np.testing.assert_allclose(one.step([[3], [4]]), want, atol=ATOL)


def test_rows_of_a_batch_go_on_alone():
    """After ragged acceptance each row is the text that it would be without the other."""
    both = started("dense")
    both.peek(step_tokens())
    both.commit([3, 0])
    got = np.asarray(both.step([[3], [4]]))
    for row, (accepted, token) in enumerate(((3, 3), (0, 4))):
        ids = [*text(PROMPT, row)[: LENGTHS[row]], *step_tokens()[row, :accepted], token]
        alone = Session(layers(), Recipe(), len(ids)).prefill(np.array(ids))
        np.testing.assert_allclose(got[row], alone[0], atol=ATOL)


def test_peek_as_stored_equals_steps_of_one_token():
    tokens = step_tokens()
    for name in ("dense", "int4", "int8", "snapkv", "window"):
        single, whole = started(name), started(name)
        want = np.stack([single.step(tokens[:, i : i + 1]) for i in range(STEP)], 1)
        got = logits(whole, whole.peek(tokens, as_stored=True))
        np.testing.assert_allclose(got, want, atol=5 * ATOL, err_msg=name)
        whole.commit([STEP, STEP])
        assert_same_caches(single, whole, atol=1e-2 if name.startswith("int") else ATOL)
    # as they are, int4's own tokens are read without loss, which is another number
    plain = started("int4")
    single = started("int4")
    want = np.stack([single.step(tokens[:, i : i + 1]) for i in range(STEP)], 1)
    assert np.abs(logits(plain, plain.peek(tokens)) - want).max() > 1e-2


def test_a_session_has_room_for_what_it_was_made_for_and_no_more():
    # what is kept of a short prompt has no more slots behind it than what is kept of a long one
    short = Session(layers(), RECIPES["snapkv"], PROMPT, 3)
    short.prefill(text(10))
    for _ in range(3):
        short.step([[1]])
    with pytest.raises(
        UserError, match=r"a step of 1 tokens is beyond .* row 0 has 0 left; make it with more new_tokens"
    ):
        short.step([[1]])
    # without compression the prompt's room is left
    dense = Session(layers(), Recipe(), PROMPT, 3)
    dense.prefill(text(PROMPT)[:10])
    got = dense.step([text(PROMPT)[10:]])
    np.testing.assert_allclose(got, Session(layers(), Recipe(), PROMPT).prefill(text(PROMPT)), atol=ATOL)
    # rejected tokens and padding take none
    ragged = Session(layers(), Recipe(), PROMPT, 2, batch=2)
    ragged.prefill(np.stack([text(PROMPT, 0), text(PROMPT, 1)]))
    ragged.peek(step_tokens()[:, :2])
    ragged.commit([1, 0])
    ragged.feed(step_tokens()[:, :2], [[PROMPT + 1, EMPTY], [PROMPT, PROMPT + 1]])
    with pytest.raises(UserError, match="row 0 has 0 left"):
        ragged.step([[1], [1]])


# ---- forget


@pytest.mark.parametrize("name", ["dense", "int8", "window"])
def test_a_forgotten_end_was_never_there(name):
    one, other = started(name), started(name)
    one.step(step_tokens())
    one.forget(LENGTHS[0], rows=[0])
    one.forget(LENGTHS[1], rows=[1])
    assert one.next_pos.tolist() == other.next_pos.tolist()
    want = other.step(step_tokens(9))
    np.testing.assert_allclose(one.step(step_tokens(9)), want, atol=ATOL)


@pytest.mark.parametrize("name", ["dense", "int8"])
def test_a_forgotten_span_leaves_a_gap_in_the_positions(name):
    """Tokens that nothing has read yet are forgotten: later ones stand where they stood."""
    one, other = started(name), started(name)
    one.step(step_tokens())
    start = one.next_pos.copy()
    one.forget(LENGTHS[0], int(start[0]), rows=[0])
    pos = np.stack([start[0] + np.arange(STEP), start[1] + np.arange(STEP)])
    other.feed(step_tokens(), np.stack([np.full(STEP, EMPTY), LENGTHS[1] + np.arange(STEP)]))
    got, want = one.feed(step_tokens(9), pos), other.feed(step_tokens(9), pos)
    np.testing.assert_allclose(logits(one, got), logits(other, want), atol=ATOL)


# ---- rows in different phases


@pytest.mark.parametrize("name", ["dense", "int8", "kivi", "window"])
def test_a_row_decodes_while_another_reads_its_prompt(name):
    """Row 0 has 4 prompt tokens and decodes 3; row 1 reads 12 in three chunks and decodes one; every step has 4 places."""
    long, short, width = text(13, 1), text(7, 0), 4
    both = Session(layers(), RECIPES[name], 12, 8, batch=2)
    plan = [((0, 4), (0, 4)), ((4, 5), (4, 8)), ((5, 6), (8, 12)), ((6, 7), (12, 13))]
    streams = [[], []]
    sizes = []
    for spans in plan:
        tokens, pos = np.zeros((2, width), int), np.full((2, width), EMPTY)
        for row, (ids, (a, b)) in enumerate(zip((short, long), spans, strict=True)):
            tokens[row, : b - a], pos[row, : b - a] = ids[a:b], np.arange(a, b)
        left = [0, max(0, 12 - spans[1][1])]
        x = both.feed(tokens, pos, left=left)
        for row, (a, b) in enumerate(spans):
            streams[row].append(np.asarray(x)[row, : b - a])
        sizes.append(block_program._cache_size())
    assert len(set(sizes)) == 1  # one program for prefill, decode and both together
    for row, ids in enumerate((short, long)):
        alone = Session(layers(), RECIPES[name], 12, 8)
        for (a, b), got in zip((spans[row] for spans in plan), streams[row], strict=True):
            want = alone.feed([ids[a:b]], [np.arange(a, b)])[0]
            np.testing.assert_allclose(logits(both, [got]), logits(both, [want]), atol=ATOL)


# ---- order


def test_writing_before_reading_makes_chunks_exact():
    ids = text(PROMPT)

    def stream(schedule, order):
        session = Session(layers(), RECIPES["int4"], PROMPT, schedule=schedule, order=order)
        return logits(session, session.prefill(ids, rows="all"))

    want = stream(None, "write")
    for size in (7, 1):
        # f32, 20 keys, other widths of the same sums
        np.testing.assert_allclose(stream(Chunked(size), "write"), want, atol=2e-5)
    # in the other order a chunk reads its own tokens without loss
    assert np.abs(stream(Chunked(7), "attend") - stream(None, "attend")).max() > 1e-2


@pytest.mark.parametrize(
    "policy",
    [H2O(budget=9), TOVA(budget=9), SinkWindow(2, 7)],
    ids=lambda policy: type(policy).__name__,
)
def test_recipes_that_evict_cannot_write_before_they_read(policy):
    with pytest.raises(UserError) as error:
        Session(layers(), Recipe((Segment(policy=policy),)), PROMPT, order="write")
    assert "order='write'" in str(error.value) and type(policy).__name__ in str(error.value)
    assert "use order='attend'" in str(error.value) and "\n" not in str(error.value)


# ---- programs


@pytest.mark.parametrize(
    "part",
    [{"policy": H2O(budget=9)}, {"policy": SinkWindow(2, 7)}, {"compress": SnapKV(budget=9, window=3)}],
    ids=["H2O", "SinkWindow", "SnapKV"],
)
def test_budgets_of_equal_capacity_compile_nothing_new(part):
    programs = (block_program, repack_program, peek_program, commit_program)

    def run(budget):
        recipe = replace(Recipe((Segment(**part),)), rounding=16).with_budget(budget)
        session = Session(layers(), recipe, PROMPT, NEW)
        session.prefill(text(PROMPT))
        session.peek(step_tokens()[:1])
        session.commit([2])
        got = session.step([[1]])
        kept = max((np.asarray(layer[s].pos) != EMPTY).sum(-1).max() for layer in session.cache for s in layer.segments)
        return np.asarray(got), int(kept)

    first, kept = run(9)
    before = [p._cache_size() for p in programs]
    second, more = run(12)
    assert [p._cache_size() for p in programs] == before
    assert more == kept + 3 and np.abs(first - second).max() > 1e-3
