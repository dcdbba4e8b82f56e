"""Checkpoints of each family give the logits of transformers on the same weights, and README says which families load."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pretrained_support import write_hf

import lcx.pretrained.model_configs as model_configs
from experiments.peers import small_checkpoints as small
from lcx.errors import UserError
from lcx.model import Layers, Model
from lcx.pretrained.checkpoints import load_hf
from lcx.pretrained.model_configs import config_from_hf
from lcx.recipe import Recipe
from lcx.schedules.chunked import Chunked
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


@pytest.mark.parametrize("name", small.CASES)
def test_logits_are_those_of_transformers(tmp_path, name):
    ids = small.ids(name)
    got = logits(layers_of(tmp_path / "m", name), ids)
    np.testing.assert_allclose(got[(len(ids) - 1) % 3 :: 3], WANT[name], atol=ATOL)
