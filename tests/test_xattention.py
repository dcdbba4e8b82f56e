"""XAttention: blocks against an independent float64 oracle, in one shot and in chunks."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import xattention as oracle
from tiny import quick_compilation as quick_compilation

from lcx.axes import Exact, KeepAll
from lcx.cache import Held, Size, Store, Tokens
from lcx.ctx import Ctx
from lcx.errors import UserError
from lcx.layer import held_source
from lcx.ops.antidiagonal import antidiagonal_mass
from lcx.ops.attention import EMPTY, merge, tokens_source
from lcx.ops.visits import attend_visits
from lcx.patterns.xattention import XAttention

D, SCALE = 16, 16**-0.5


def case(T, group, seed=0):
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((2, 2, group, T, D)).astype(np.float32) * 2
    k, v = (rng.standard_normal((2, 2, T, D)).astype(np.float32) for _ in range(2))
    # padded on the right, as a session pads its last chunk
    pos = np.where(np.arange(T) < np.array([[T - 3], [T - T // 3]]), np.arange(T), EMPTY)
    return q, k, v, pos


def held_of(k, v, pos, upto, slots):
    """What a segment holds of the first `upto` tokens of each text."""
    size = Size(k.shape[1], D, jnp.float32)
    store = Store(Exact(), size)
    empty = store.empty(k.shape[0], 1, slots, {})
    blank = Held(empty, held_source(store, empty), store)
    if upto == 0:
        return blank
    new = Tokens(jnp.asarray(k[:, :, :upto]), jnp.asarray(v[:, :, :upto]), jnp.asarray(pos[:, None, :upto]))
    slots, edit, _ = KeepAll().edit(None, blank, new)
    slots = store.commit(slots, edit)
    return Held(slots, held_source(store, slots), store)


def chunk_of(q, k, v, pos, start, stop):
    cut = lambda x: jnp.asarray(x[..., start:stop, :])
    places = jnp.asarray(pos[:, start:stop])
    return Ctx(cut(q), places, SCALE, rotate=lambda x, pos, axis: x, k=cut(k), v=cut(v))


@partial(jax.jit, static_argnums=0)
def step(method, ctx_arrays, held_slots):
    """(masses, blocks, out) of one chunk over what is held and its own tokens."""
    q, k, v, pos = ctx_arrays
    ctx = Ctx(q, pos, SCALE, rotate=lambda x, pos, axis: x, k=k, v=v)
    store = Store(Exact(), Size(k.shape[1], D, jnp.float32))
    held = Held(held_slots, held_source(store, held_slots), store)
    asked = {"stride": method.stride, "block": method.block}
    masses = ctx.antidiagonal_mass([held.source, ctx.own], **asked)
    pages = method.visit(ctx, {"all": held}, ctx.own).pages
    sources = {"all": held.source, "own": ctx.own}
    parts = [attend_visits(q, sources[n], pos, pages[n], scale=SCALE)[0] for n in sources]
    return masses, [pages[n].blocks for n in sources], merge(parts).out


@pytest.mark.parametrize(("group", "chunk", "tau"), [(1, 24, 0.8), (3, 48, 0.3), (3, 24, 0.6), (8, 24, 0.8)])
def test_masses_blocks_and_outputs_equal_the_oracle(group, chunk, tau):
    """In one shot and in chunks; padding in both texts, a third of the second."""
    T, stride, block = 48, 2, 8
    q, k, v, pos = case(T, group, seed=group)
    method = XAttention(tau, stride, block)
    for start in range(0, T, chunk):
        stop = start + chunk
        cut = lambda x, start=start, stop=stop: jnp.asarray(x[..., start:stop, :])
        places = jnp.asarray(pos[:, start:stop])
        masses, blocks, out = step(method, (cut(q), cut(k), cut(v), places), held_of(k, v, pos, start, 72).slots)
        told = (pos[:, start:stop], pos[:, :stop])
        want = oracle.block_scores(q[..., start:stop, :], k[..., :stop, :], *told, stride, block)
        rows = oracle.chosen_blocks(q[..., start:stop, :], k[..., :stop, :], *told, stride, block, tau)
        for b, ((first, scores), (_, chosen)) in enumerate(zip(want, rows, strict=True)):
            if not (pos[b, start:stop] != EMPTY).any():
                assert not any(np.asarray(x)[b].any() for x in masses)
                continue
            Q = scores.shape[2]
            mine = lambda past, own, b=b, first=first, Q=Q: np.concatenate(
                [np.asarray(past)[b, ..., :first], np.asarray(own)[b, ..., :Q]], -1
            )[:, :, :Q]
            np.testing.assert_allclose(mine(*masses), scores, atol=2e-5)  # float32 against float64
            np.testing.assert_array_equal(mine(*blocks), chosen)
        wanted = oracle.attend(q[..., start:stop, :], k[..., :stop, :], v[..., :stop, :], *told, block, rows)
        np.testing.assert_allclose(out, wanted, atol=1e-5)


def test_density_falls_with_tau_and_tau_1_reads_everything():
    q, k, v, pos = case(96, 2, seed=2)
    ctx = chunk_of(q, k, v, pos, 0, 96)
    held = held_of(k, v, pos, 0, 0)
    read = [
        int(XAttention(tau, 4, 8).visit(ctx, {"all": held}, ctx.own).pages["own"].blocks.sum())
        for tau in (0.2, 0.6, 0.9, 1.0)
    ]
    assert read == sorted(read) and read[0] < read[-1] == 2 * 2 * 2 * 12 * 12


def test_chunks_must_begin_at_blocks():
    from lcx import Recipe
    from lcx.checks import schedule
    from lcx.schedules.chunked import Chunked, OneShot

    recipe = Recipe(pattern=XAttention())
    with pytest.raises(UserError, match="blocks of 128 tokens; schedule .*200.* cuts the prompt at 200"):
        schedule(recipe, Chunked(200), 500)
    schedule(recipe, Chunked(256), 500)
    schedule(recipe, OneShot(), 500)


@pytest.mark.parametrize(
    "wrong", [{"tau": 0}, {"tau": 1.2}, {"tau": True}, {"stride": 3}, {"stride": 0}, {"block": 4, "stride": 8}]
)
def test_settings_out_of_range_are_named(wrong):
    with pytest.raises(UserError, match="XAttention"):
        XAttention(**wrong)


def test_the_kernels_reference_has_the_same_masses():
    """`ops.block_scores.score_antidiagonal` averages over the groups of a block where this sums."""
    from lcx.ops.block_scores import score_antidiagonal

    q, k, _, _ = case(256, 2, seed=3)
    pos = jnp.broadcast_to(jnp.arange(256), (2, 256))
    own = tokens_source(jnp.asarray(k), jnp.asarray(k), pos)
    (mass,) = antidiagonal_mass(jnp.asarray(q), [own], pos, stride=8, block=128, scale=SCALE)
    want = score_antidiagonal(jnp.asarray(q), jnp.moveaxis(jnp.asarray(k), 3, 2), stride=8, scale=SCALE)
    np.testing.assert_allclose(mass / 16, want, atol=1e-5)
