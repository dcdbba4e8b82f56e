"""The sizes in configs/ are those of tests/published.py, and a changed one is noticed."""

import dataclasses
from pathlib import Path

import pytest
from published import PUBLISHED

from lcx.codecs.kivi import chain
from lcx.config_files import load_config
from lcx.experiment import Experiment
from lcx.recipe import Recipe

CONFIGS = Path(__file__).parent.parent / "configs"
FILES = {path.relative_to(CONFIGS).with_suffix("").as_posix(): path for path in sorted(CONFIGS.rglob("[!_]*.py"))}
METHODS = {name: config for name, path in FILES.items() if isinstance(config := load_config(path), Experiment)}


def stated(experiment):
    """Key -> value, as text, of every field of a config's parts, arrays and schedule."""
    texts = {}
    for choice in experiment.recipe.describe():
        for field, value in choice.settings.items():
            texts[f"{choice.axis}: {choice.name}.{field}"] = value
    for name, part in (("schedule", experiment.schedule), ("aux", experiment.aux)):
        if part is not None:
            texts |= {f"{name}.{f.name}": repr(getattr(part, f.name)) for f in dataclasses.fields(part)}
    return texts


def differences(name, experiment):
    """Keys at which a config is not what the table says."""
    want = {key: repr(value) for key, (value, _) in PUBLISHED[name].items()}
    got = stated(experiment)
    return {key for key in want.keys() | got.keys() if want.get(key) != got.get(key)}


def test_every_config_is_in_the_table():
    assert METHODS.keys() == PUBLISHED.keys()
    assert all(source for sizes in PUBLISHED.values() for _, source in sizes.values())


@pytest.mark.parametrize("name", METHODS)
def test_a_config_states_the_published_sizes(name):
    assert differences(name, METHODS[name]) == set()


CHANGES = {
    "quest": ("recipe.pattern.dense_layers", "0", "pattern: Quest.dense_layers"),
    "snapkv": ("recipe.segments.0.compress.window", "64", "compress: SnapKV.window"),
    "duo_int4": ("recipe.segments.1.policy.window", "64", "policy of streaming: SinkWindow.window"),
    "minference": ("recipe.pattern.slash", "609", "pattern: MInference.slash"),
    "h2o": ("recipe.segments.0.policy.budget", "102", "policy: H2O.budget"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_size_is_noticed(name):
    path, value, key = CHANGES[name]
    assert differences(name, load_config(FILES[name], {path: value})) == {key}


def test_another_residual_of_kivi_is_noticed():
    changed = differences("kivi2", Experiment(Recipe((chain(2, 32, 32),))))
    assert changed == {
        "policy of tail: Remainder.page",
        "policy of recent: Recent.page",
        "policy of recent: Recent.keep",
    }
