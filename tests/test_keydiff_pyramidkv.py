"""KeyDiff's scores and PyramidKV's budgets against their oracles, without a model."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from oracles import EMPTY, keydiff, pyramidkv

from lcx.policies.keydiff import KeyDiff
from lcx.policies.pyramidkv import PyramidKV

D = 6


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("used", [(11, 6), (0, 11)], ids=str)
def test_keydiff_scores_what_is_held_and_what_is_new_against_one_anchor_a_head(heads, used):
    """Two texts with padding in the slots and in the step, full of garbage; heads whose keys lean to different sides."""
    rng = np.random.default_rng(heads)
    S, N = 11, 5
    lean = 3 * rng.normal(size=(2, heads, 1, D))
    held_k, new_k = (rng.normal(size=(2, heads, n, D)) + lean for n in (S, N))
    held_pos = np.where(np.arange(S) < np.array(used)[:, None], np.arange(S), EMPTY)[:, None]
    new_pos = np.stack([np.arange(N) + used[0], np.where(np.arange(N) < 3, np.arange(N) + used[1], EMPTY)])[:, None]
    for k, pos in ((held_k, held_pos), (new_k, new_pos)):
        k[np.broadcast_to(pos == EMPTY, k.shape[:3])] = 1e3
    narrow = lambda x: jnp.asarray(x, jnp.float32)
    source = SimpleNamespace(tile=lambda start, size: (narrow(held_k).swapaxes(2, 3)[..., start : start + size], None))
    held = SimpleNamespace(source=source, pos=jnp.asarray(held_pos))
    got = KeyDiff(9).score(None, held, SimpleNamespace(k=narrow(new_k), pos=jnp.asarray(new_pos)))
    for b, h in np.ndindex(2, heads):
        real = [pos[b, 0] != EMPTY for pos in (held_pos, new_pos)]
        want = keydiff.scores(np.concatenate([k[b, h][mask] for k, mask in zip((held_k, new_k), real, strict=True)]))
        ours = np.concatenate([np.asarray(x)[b, h][mask] for x, mask in zip(got, real, strict=True)])
        np.testing.assert_allclose(ours, want, atol=1e-6)  # float32, 16 keys


LENGTHS = np.arange(1, 257)  # one shape, so that JAX compiles once


def budgets(method):
    """int [LENGTHS, layers]: the tokens that each of five layers keeps of prompts of these lengths."""
    model = SimpleNamespace(num_layers=5)
    layers = [method.at("prefill", layer, model) for layer in range(5)]
    kept = [m.keep(SimpleNamespace(data=m.data()), jnp.asarray(LENGTHS)) for m in layers]
    return np.stack([np.broadcast_to(k, LENGTHS.shape) for k in kept], -1)


@pytest.mark.parametrize(("budget", "beta"), [(50, 10), (50, 2), (37, 10), (31, 3)])
def test_pyramidkv_keeps_the_budgets_of_kvpress(budget, beta):
    """Prompts above the budget; kvpress takes it as a share, which must give back the budget: a half is rounded either way else."""
    got, window = budgets(PyramidKV(budget, window=4, beta=beta, rule="kvpress")), 4
    compared = [n for n in range(budget + 1, 257) if (window + n * (budget / n)) - window == budget]
    assert len(compared) > 100
    want = [pyramidkv.budgets_kvpress(n, budget / n, window, beta, 5) for n in compared]
    np.testing.assert_array_equal(got[np.array(compared) - 1], want)


@pytest.mark.parametrize(("budget", "window", "beta"), [(132, 32, 20), (57, 8, 3)])
def test_pyramidkv_keeps_the_budgets_of_the_authors(budget, window, beta):
    want = [pyramidkv.budgets_authors(int(n), budget, window, beta, 5) for n in LENGTHS]
    np.testing.assert_array_equal(budgets(PyramidKV(budget, window=window, beta=beta)), want)
