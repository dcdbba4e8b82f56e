"""What a notebook shows: the public names after `lcx.`, and a model in at most five lines."""

import subprocess
import sys
from pathlib import Path

from tiny import TINY, layers, weights

import lcx
from lcx.model_config import num_params, weight_bytes
from lcx.models.decoder import Layers, Model
from lcx.models.loading import Pretrained

ROOT = Path(__file__).parent.parent


def test_dir_has_the_public_names_alone():
    assert dir(lcx) == sorted(lcx.__all__)
    assert {"check", "look", "load", "Recipe", "run_methods", "load_config"} <= set(dir(lcx))
    for name in lcx.__all__:
        assert getattr(lcx, name) is not None, name
    assert [name for name in lcx.__all__ if name not in lcx._HOME] == ["__version__"]


def test_names_stay_the_same_objects_after_their_modules_are_imported():
    """A submodule of the name of a function would take its place."""
    code = "import lcx, lcx.conformance.run, lcx.measure.kept; print(callable(lcx.check), callable(lcx.look), 'jax' in dir(lcx))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "True True False\n", done.stderr


def pretrained(**changes):
    settings = {"layers": layers(), "tokenizer": None, "name": "tiny", "sha256": "ab" * 32, "licence": "mit"} | changes
    return Pretrained(**settings)


def test_a_model_is_five_lines_with_its_sizes():
    text = repr(pretrained())
    lines = text.splitlines()
    assert len(lines) == 5 and max(map(len, lines)) < 100
    assert lines[0] == "Pretrained tiny, mit"
    for word in ("float32", f"{num_params(TINY):,} weights", f"{weight_bytes(TINY, 'float32'):,} bytes", "512 tokens"):
        assert word in text, word
    for word in ("3 layers", "6 query and 2 KV heads of 32", "d_model 48", "MLP 40", "vocabulary 97", "ab" * 32):
        assert word in text, word


def test_the_type_and_bytes_are_those_of_the_weights():
    half = Layers.of(Model(TINY, {name: w.astype("bfloat16") for name, w in weights().items()}))
    text = repr(pretrained(layers=half))
    assert f"in bfloat16, {sum(w.size * 2 for w in weights().values()):,} bytes" in text


def test_a_name_of_a_stranger_stays_one_line():
    assert len(repr(pretrained(name="a\nb\x1b[2J")).splitlines()) == 5


def test_layers_are_one_line():
    assert repr(layers()) == "Layers('tiny', 3 layers, float32)"
