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

from lcx.axes import KeepAll
from lcx.model_config import ModelConfig, Rope, num_params, param_shapes
from lcx.models.decoder import Layers, Model, random_weights
from lcx.models.rope import inverse_frequencies, rotate
from lcx.policies.sink_window import SinkWindow
from lcx.recipe import Recipe, Segment
from lcx.session import Session, generate

LLAMA = ModelConfig("llama", 3, 48, 6, 2, 16, 40, 97, 512)
GEMMA = replace(
    LLAMA,
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
    LLAMA,
    replace(LLAMA, name="llama31", rope=Rope(5e5, (1.0, 1.0, 1.5, 2.0, 3.0, 8.0, 8.0, 8.0)), tied=False),
    replace(LLAMA, name="yarn", rope=Rope(divisors=(1.0, 1.0, 1.2, 1.5, 2.0, 3.0, 4.0, 4.0), scale=1.14)),
    replace(LLAMA, name="phi3", rope=Rope(divisors=(1.0, 1.1, 1.2, 2.0, 5.0), scale=1.19, dim=10), window=5),
    replace(LLAMA, name="biases", qkv_bias=True, o_bias=True, window=4, local_layers=(False, True, True)),
    replace(LLAMA, name="qwen2", qkv_bias=True),
    replace(LLAMA, name="qwen3", qk_norm=True, head_dim=20, tied=False),
    GEMMA,
    replace(LLAMA, name="mha", num_heads=3, num_kv_heads=3),
    replace(LLAMA, name="mqa", num_heads=8, num_kv_heads=1, num_layers=1),
]
NAMES = [c.name for c in CONFIGS]
ATOL = 3e-4  # f32 through 3 layers; logits have a spread of 7


def weights_of(config):
    return random_weights(config, seed=len(config.name))


def text(length, seed=0):
    return np.random.default_rng(seed).integers(0, LLAMA.vocab_size, length)


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_prefill_and_decode_equal_numpy_decoder(config):
    weights, tokens = weights_of(config), text(14)
    naive = NaiveModel(config, weights)
    layers = Layers.of(Model(config, weights))
    session = Session(layers, Recipe(), prompt=11, new_tokens=3)
    x = session.prefill(tokens[:11], rows="all")
    want = naive.step(tokens[:11])
    np.testing.assert_allclose(x[0], want, atol=ATOL)
    np.testing.assert_allclose(layers.logits(x[0]), naive.logits(want), atol=ATOL)
    for token in tokens[11:13]:
        np.testing.assert_allclose(session.step([token])[0], naive.logits(naive.step([token]))[-1], atol=ATOL)


@pytest.mark.parametrize("config", [LLAMA, GEMMA], ids=["llama", "gemma3"])
def test_forgetting_keeps_true_positions(config):
    """Fed token by token, sinks and a window are a mask on the text's positions; the query's own token comes on top."""
    weights, tokens = weights_of(config), text(12, 1)
    naive = NaiveModel(config, weights, allow=lambda q, k: (k < 2) | (q - k <= 3))
    recipe = Recipe((Segment(policy=SinkWindow(2, 3)),))
    session = Session(Model(config, weights), recipe, prompt=1, new_tokens=11)
    got = [session.prefill(tokens[:1])] + [session.step([t]) for t in tokens[1:]]
    want = [naive.logits(naive.step([t])) for t in tokens]
    np.testing.assert_allclose(np.concatenate(got), np.concatenate(want), atol=ATOL)


def test_streaming_llm_counts_positions_in_the_cache():
    streaming = pytest.importorskip("lcx.patterns.streaming")
    weights, tokens = weights_of(LLAMA), text(16, 2)

    def keep(heads):
        found = []
        for h in heads:
            order = np.argsort(h.pos)
            found.append(order if len(order) <= 5 else np.concatenate([order[:2], order[-3:]]))
        return found

    naive = NaiveModel(LLAMA, weights, keep=keep, cache_positions=True)
    recipe = Recipe((Segment(policy=SinkWindow(2, 3)),), pattern=streaming.CachePositions())
    session = Session(Model(LLAMA, weights), recipe, prompt=7, new_tokens=9)
    got = [session.prefill(tokens[:7])] + [session.step([t]) for t in tokens[7:14]] + [session.step(tokens[14:])]
    want = [naive.step(tokens[:7])[-1]] + [naive.step([t])[-1] for t in tokens[7:14]] + [naive.step(tokens[14:])[-1]]
    np.testing.assert_allclose(np.concatenate(got), naive.logits(np.stack(want)), atol=ATOL)


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("config", [CONFIGS[1], GEMMA], ids=["divisors", "scaled"])
def test_rope_turns_pairs_half_a_head_apart(config, local):
    x = np.random.default_rng(0).normal(size=(5, config.head_dim)).astype(np.float32)
    pos = np.array([0, 1, 7, 300, 4_000], np.int32)
    inverse = inverse_frequencies(config, local)
    want = turn(x.astype(np.float64), pos, NaiveModel(config, weights_of(config)).frequencies(local))
    # float32 angles: position 4,000 has 2.4e-4 of spacing
    np.testing.assert_allclose(rotate(x, pos, inverse), want, atol=2e-3)
    np.testing.assert_allclose(rotate(x[:4], pos[:4], inverse), want[:4], atol=2e-4)
    channel_major = rotate(np.ascontiguousarray(x.T), pos, inverse, axis=-2)
    np.testing.assert_allclose(channel_major.T, rotate(x, pos, inverse), atol=1e-6)


def test_rope_keeps_its_angles_in_bfloat16_models():
    inverse = inverse_frequencies(LLAMA)
    x = jnp.ones((1, LLAMA.head_dim), jnp.bfloat16)
    a, b = (np.asarray(rotate(x, jnp.array([p]), inverse), np.float32) for p in (1_000, 1_001))
    assert np.abs(a - b).max() > 0.1  # bfloat16 cannot tell these positions apart


def test_logits_of_one_row_equal_those_of_many():
    for config in CONFIGS[:2]:
        layers = Layers.of(Model(config, weights_of(config)))
        x = jax.random.normal(jax.random.key(0), (4, config.d_model))
        np.testing.assert_allclose(layers.logits(x[2:3])[0], layers.logits(x)[2], atol=1e-5)


def test_generate_follows_the_largest_logit_and_stops():
    weights, prompt = weights_of(LLAMA), text(6, 3)
    model, naive = Model(LLAMA, weights), NaiveModel(LLAMA, weights)
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
        found = jax.tree.leaves(nnx.state(Model(config, weights_of(config)), nnx.Param))
        assert sum(x.size for x in found) == num_params(config)
        assert len(found) == len(param_shapes(config))


def test_segment_default_is_the_exact_cache_of_every_token():
    segment = Recipe().chains[0][0]
    assert isinstance(segment.policy, KeepAll) and segment.compress is None


NNX_SCRIPT = """
import numpy as np
from test_model import LLAMA, text, weights_of
from lcx.models.decoder import Model
from lcx.recipe import Recipe
from lcx.session import Session
session = Session(Model(LLAMA, weights_of(LLAMA)), Recipe(), 5, 1)
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
    session = Session(Model(LLAMA, weights_of(LLAMA)), Recipe(), 5, 1)
    session.prefill(text(5))
    np.testing.assert_allclose(float(done.stdout), np.asarray(session.step([3])).sum(), rtol=1e-5)
