"""Checkpoints of each family give the logits of transformers on the same weights, and README says which families load."""

from pathlib import Path

import numpy as np
import pytest
from pretrained_support import write_hf

from experiments.peers import small_checkpoints as small
from lcx.model import Layers, Model
from lcx.pretrained.checkpoints import load_hf
from lcx.pretrained.model_configs import config_from_hf
from lcx.recipe import Recipe
from lcx.rope import inverse_frequencies
from lcx.session import Session

ROOT = Path(__file__).parent.parent
WANT = np.load(Path(__file__).parent / "data" / "peers_families.npz", allow_pickle=False)
ATOL = 1e-4  # float32 on both sides, logits with a spread of 1; 7e-6 measured


def layers_of(folder, name):
    config, arrays, _ = load_hf(write_hf(folder, small.config_json(name), small.weights(name)))
    return Layers.of(Model(config, arrays))


def logits(layers, ids, new_tokens=0, **settings):
    session = Session(layers, Recipe(), len(ids) - new_tokens, new_tokens, **settings)
    x = [session.prefill(ids[: len(ids) - new_tokens], rows="all")[0]]
    x += [session.step([token], rows="all")[0] for token in ids[len(ids) - new_tokens :]]
    return np.asarray(layers.logits(np.concatenate(x)))


# variants whose RoPE the fast test compares as well
SLOW = set(
    "llama_tied llama_linear_new llama_yarn_betas llama_yarn_no_truncate llama_yarn_context_ratio llama_yarn_attention_factor "
    "llama_yarn_biases llama_longrope_factor mistral_wide_head mistral_window_one qwen2_window_off qwen2_yarn qwen3_yarn "
    "qwen3_layer_types phi3_longrope_window gemma3_linear".split()
)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in small.CASES])
def test_logits_are_those_of_transformers(tmp_path, name):
    ids = small.ids(name)
    got = logits(layers_of(tmp_path / "m", name), ids)
    np.testing.assert_allclose(got[(len(ids) - 1) % 3 :: 3], WANT[name], atol=ATOL)


@pytest.mark.parametrize("name", small.CASES)
def test_rope_is_that_of_transformers(name):
    config = config_from_hf(small.config_json(name), "config.json").at_length(small.CASES[name][2])
    # float32 powers on one side, float64 on the other
    np.testing.assert_allclose(inverse_frequencies(config), WANT[f"{name}/inverse"], rtol=2e-6)
    assert config.rope.scale == pytest.approx(float(WANT[f"{name}/scale"]), rel=1e-12)
