"""MInference: what is read and attended against an independent float64 oracle, through both of its lists."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import minference as oracle
from tiny import quick_compilation as quick_compilation

from lcx.ctx import Ctx
from lcx.ops.attention import EMPTY, merge
from lcx.ops.vertical_slash import vertical_slash
from lcx.ops.visits import attend_visits
from lcx.patterns.minference import MInference

D = 16


def case(lengths, K, G, seed):
    rng = np.random.default_rng(seed)
    T = max(lengths)
    q, k, v = (rng.standard_normal((len(lengths), K, *shape, T, D)).astype(np.float32) for shape in ((G,), (), ()))
    # some keys stand out, so that columns and distances differ between heads
    k *= np.exp(rng.standard_normal((T, 1)) / 2).astype(np.float32)
    return q * 2, k, v, np.where(np.arange(T) < np.asarray(lengths)[:, None], np.arange(T), EMPTY).astype(np.int32)


@partial(jax.jit, static_argnums=0)
def attended(method, q, k, v, pos, sizes):
    ctx = Ctx(q, pos, D**-0.5, rotate=None, k=k, v=v, aux=sizes)
    parts = [attend_visits(q, ctx.own, pos, x, scale=ctx.scale) for x in method.visit(ctx, {}, ctx.own).pages["own"]]
    return merge([part for part, _ in parts]).out, sum(overflow for _, overflow in parts)


@pytest.mark.parametrize(
    ("method", "lengths", "K", "G", "sizes"),
    [
        (MInference(45, 115), (333, 253), 2, 3, None),
        (MInference(), (490, 70), 1, 8, (60, 130)),
        (MInference(200, 1), (257, 1), 2, 1, None),
        (MInference(35, 64), (333, 253), 1, 2, None),
        (MInference(35, 65), (130, 253), 1, 2, None),
    ],
    ids=["group of 3", "sizes by head", "columns", "64 distances", "65 distances"],
)
def test_attention_equals_the_oracle(method, lengths, K, G, sizes):
    """Texts of different lengths, no multiples of a block; sizes by head as data."""
    q, k, v, pos = case(lengths, K, G, seed=G)
    vertical, slash, aux = method.vertical, method.slash, {}
    if sizes:
        rng = np.random.default_rng(0)
        vertical, slash = rng.integers(1, sizes[0], (K, G)), rng.integers(40, sizes[1], (K, G))
        aux = {"vertical": jnp.asarray(vertical), "slash": jnp.asarray(slash)}
    out, overflow = attended(method, q, k, v, pos, aux)
    want = oracle.attend(q, k, v, pos, oracle.read_keys(q, k, pos, vertical, slash))
    np.testing.assert_allclose(out, want, atol=2e-5)
    assert overflow == 0


def listed(visit, blocks):
    """Key lists of every block of one head."""
    at = jax.jit(visit.at)
    lists = [jax.tree.map(np.asarray, tuple(at(i))) for i in range(blocks)]
    return [index[0, 0, 0, : count[0, 0, 0]] for index, count in lists]


def test_distances_that_fill_tiles_are_read_as_tiles():
    """Distances 0 ... 255 and 400: offsets 1 ... 319 and 401 ... 464 from the end of a block; 192 in a row, from 65 on, fill a tile."""
    T = 640
    distance, column = np.zeros(T, bool), np.zeros(T, bool)
    distance[:256], distance[400], column[[5, 600]] = True, True, True
    chosen = (jnp.asarray(x)[None, None, None] for x in (column, distance))
    tiles, keys = vertical_slash(*chosen, columns=2, distances=257, near=100)
    # the tile 2 before wants offsets 193 ... 384
    assert [x.tolist() for x in listed(tiles, 5)] == [[0], [1, 0], [2, 1], [3, 2], [4, 3]]
    singles = listed(keys, 10)
    # blocks 6 and 7 end at 448 and 512 and share tiles 3 and 2, keys from 256 on
    # the 64 keys before 448 - 400 are the first 64
    assert sorted(singles[6].tolist()) == [*range(64), *range(129, 256)]
    assert sorted(singles[7].tolist()) == [5, *range(48, 112), *range(193, 256)]
    # block 9: column 600 lies in a tile; 400 from the end
    assert sorted(singles[9].tolist()) == [5, *range(176, 240), *range(321, 384)]
