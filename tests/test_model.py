"""The model file against the numpy decoder of tests/naive_model.py, for every architecture switch."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from naive_model import NaiveModel, turn
from tiny import ATOL, TINY, layers, text, weights
from tiny import quick_compilation as quick_compilation

from lcx.axes import KeepAll
from lcx.greedy import generate
from lcx.model_config import Rope, num_params, param_shapes
from lcx.models.decoder import Model
from lcx.models.rope import inverse_frequencies, rotate
from lcx.patterns.streaming import CachePositions
from lcx.policies.sink_window import SinkWindow
from lcx.recipe import Recipe, Segment
from lcx.session import Session

GEMMA = replace(
    TINY,
    name="gemma3",
    head_dim=20,  # H * D is not E
    rope=Rope(1e6, (8.0,)),
    rope_local=Rope(),
    qk_norm=True,
    post_norms=True,
    activation="gelu_tanh",
    embed_scale=48**0.5,
    attention_scale=0.3,
    window=4,
    global_every=3,
    norm_eps=1e-6,
)
CONFIGS = [
    TINY,
    replace(TINY, name="llama31", rope=Rope(5e5, (1.0,) * 4 + (1.5, 1.8, 2.0, 2.5, 3.0, 4.0) + (8.0,) * 6), tied=False),
    replace(
        TINY,
        name="yarn",
        rope=Rope(divisors=(1.0,) * 4 + (1.1, 1.2, 1.3, 1.5, 1.7, 2.0, 2.5, 3.0) + (4.0,) * 4, scale=1.14),
    ),
    replace(TINY, name="phi3", rope=Rope(divisors=(1.0, 1.1, 1.2, 2.0, 5.0), scale=1.19, dim=10), window=5),
    replace(TINY, name="biases", qkv_bias=True, o_bias=True, window=4, local_layers=(False, True, True)),
    replace(TINY, name="qwen2", qkv_bias=True),
    replace(TINY, name="qwen3", qk_norm=True, head_dim=20, tied=False),
    GEMMA,
    replace(TINY, name="mha", num_heads=3, num_kv_heads=3),
    replace(TINY, name="mqa", num_heads=8, num_kv_heads=1, num_layers=1),
]
NAMES = [c.name for c in CONFIGS]


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_prefill_and_decode_equal_numpy_decoder(config):
    tokens, naive = text(14), NaiveModel(config, weights(config))
    session = Session(layers(config), Recipe(), prompt=11, new_tokens=3)
    x = session.prefill(tokens[:11], rows="all")
    want = naive.step(tokens[:11])
    np.testing.assert_allclose(x[0], want, atol=ATOL)
    np.testing.assert_allclose(session.layers.logits(x[0]), naive.logits(want), atol=ATOL)
    for token in tokens[11:13]:
        np.testing.assert_allclose(session.step([token])[0], naive.logits(naive.step([token]))[-1], atol=ATOL)


@pytest.mark.parametrize("config", [TINY, GEMMA], ids=["llama", "gemma3"])
def test_forgetting_keeps_true_positions(config):
    """Fed token by token, sinks and a window are a mask on the text's positions; the query's own token comes on top."""
    tokens = text(12, 1)
    naive = NaiveModel(config, weights(config), allow=lambda q, k: (k < 2) | (q - k <= 3))
    recipe = Recipe((Segment(policy=SinkWindow(2, 3)),))
    session = Session(Model(config, weights(config)), recipe, prompt=1, new_tokens=11)
    got = [session.prefill(tokens[:1])] + [session.step([t]) for t in tokens[1:]]
    want = [naive.logits(naive.step([t])) for t in tokens]
    np.testing.assert_allclose(np.concatenate(got), np.concatenate(want), atol=ATOL)


def test_streaming_llm_counts_positions_in_the_cache():
    tokens = text(16, 2)

    def keep(heads):
        found = []
        for h in heads:
            order = np.argsort(h.pos)
            found.append(order if len(order) <= 5 else np.concatenate([order[:2], order[-3:]]))
        return found

    naive = NaiveModel(TINY, weights(), keep=keep, cache_positions=True)
    recipe = Recipe((Segment(policy=SinkWindow(2, 3)),), pattern=CachePositions())
    session = Session(layers(), recipe, prompt=7, new_tokens=9)
    got = [session.prefill(tokens[:7])] + [session.step([t]) for t in tokens[7:14]] + [session.step(tokens[14:])]
    want = [naive.step(tokens[:7])[-1]] + [naive.step([t])[-1] for t in tokens[7:14]] + [naive.step(tokens[14:])[-1]]
    np.testing.assert_allclose(np.concatenate(got), naive.logits(np.stack(want)), atol=ATOL)


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("config", [CONFIGS[1], GEMMA], ids=["divisors", "scaled"])
def test_rope_turns_pairs_half_a_head_apart(config, local):
    x = np.random.default_rng(0).normal(size=(5, config.head_dim)).astype(np.float32)
    pos = np.array([0, 1, 7, 300, 4_000], np.int32)
    inverse = inverse_frequencies(config, local)
    want = turn(x.astype(np.float64), pos, NaiveModel(config, weights(config)).frequencies(local))
    # float32 angles: position 4,000 has 2.4e-4 of spacing
    np.testing.assert_allclose(rotate(x, pos, inverse), want, atol=2e-3)
    np.testing.assert_allclose(rotate(x[:4], pos[:4], inverse), want[:4], atol=2e-4)
    channel_major = rotate(np.ascontiguousarray(x.T), pos, inverse, axis=-2)
    np.testing.assert_allclose(channel_major.T, rotate(x, pos, inverse), atol=1e-6)


def test_rope_keeps_its_angles_in_bfloat16_models():
    inverse = inverse_frequencies(TINY)
    x = jnp.ones((1, TINY.head_dim), jnp.bfloat16)
    a, b = (np.asarray(rotate(x, jnp.array([p]), inverse), np.float32) for p in (1_000, 1_001))
    assert np.abs(a - b).max() > 0.1  # bfloat16 cannot tell these positions apart


def test_logits_of_one_row_equal_those_of_many():
    for config in CONFIGS[:2]:
        model = layers(config)
        x = jax.random.normal(jax.random.key(0), (4, config.d_model))
        np.testing.assert_allclose(model.logits(x[2:3])[0], model.logits(x)[2], atol=1e-5)


def test_generate_follows_the_largest_logit_and_stops():
    prompt, model, naive = text(6, 3), layers(), NaiveModel(TINY, weights())
    want, x = [], naive.step(prompt)
    for _ in range(4):
        want.append(int(naive.logits(x[-1:]).argmax()))
        x = naive.step(want[-1:])
    assert list(generate(Session(model, Recipe(), 6, 4), prompt, 4)) == want
    cut = want[: want.index(want[1]) + 1]
    assert list(generate(Session(model, Recipe(), 6, 4), prompt, 4, stop=[want[1]])) == cut


def test_model_holds_exactly_the_weights_of_param_shapes():
    from flax import nnx

    for config in CONFIGS:
        found = jax.tree.leaves(nnx.state(Model(config, weights(config)), nnx.Param))
        assert sum(x.size for x in found) == num_params(config)
        assert len(found) == len(param_shapes(config))


def test_segment_default_is_the_exact_cache_of_every_token():
    segment = Recipe().chains[0][0]
    assert isinstance(segment.policy, KeepAll) and segment.compress is None


NNX_SCRIPT = """
import numpy as np
from tiny import TINY, text, weights
from lcx.models.decoder import Model
from lcx.recipe import Recipe
from lcx.session import Session
session = Session(Model(TINY, weights()), Recipe(), 5, 1)
session.prefill(text(5))
print(float(np.asarray(session.step([3])).sum()))
"""


def test_parameters_alone_need_no_nnx_graph():
    """nnx may drop graph mode and in-place updates of graphs: lcx uses neither."""
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here.parent), str(here)])
    flags = {"PYTHONPATH": paths, "JAX_PLATFORMS": "cpu", "NNX_GRAPH_MODE": "false", "NNX_GRAPH_UPDATES": "false"}
    done = subprocess.run([sys.executable, "-c", NNX_SCRIPT], env=os.environ | flags, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    session = Session(Model(TINY, weights()), Recipe(), 5, 1)
    session.prefill(text(5))
    np.testing.assert_allclose(float(done.stdout), np.asarray(session.step([3])).sum(), rtol=1e-5)
