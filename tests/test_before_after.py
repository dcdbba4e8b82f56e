"""scripts/before_after.py: how it shrinks a config and what it counts as a difference.  Nothing is compiled."""

import json
from pathlib import Path

import numpy as np
import pytest

from lcx.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import before_after
    import before_after_runs

    return before_after, before_after_runs


def test_every_config_has_small_sizes_that_are_not_its_own(scripts):
    _, runs = scripts
    for name in runs.method_names():
        same = runs.small_experiment(name) == runs.config_of(name)
        assert same == (name in ("dense", "int8", "int4")), name


def test_fields_are_set_wherever_their_class_is_nested(scripts):
    _, runs = scripts
    small, met = runs.with_fields(
        runs.config_of("duo_int4"), {"SinkWindow": {"sink": 1, "window": 5}, "Int": {"bits": 8}}
    )
    assert met == {"SinkWindow", "Int"}
    retrieval, streaming = small.recipe.segments
    assert (streaming.policy.sink, streaming.policy.window) == (1, 5)
    assert retrieval.codec.bits == streaming.codec.bits == 8


def test_a_class_that_is_gone_is_named(scripts, monkeypatch):
    _, runs = scripts
    monkeypatch.setitem(runs.SETTINGS, "dense", runs.Small(fields={"NoSuch": {"x": 1}}))
    with pytest.raises(UserError, match="NoSuch.*is not part of the config"):
        runs.small_experiment("dense")


def test_figures_differ_when_they_change_come_or_go(scripts):
    script, _ = scripts
    rows = script.differences({"a": {"x": 1, "y": 2, "z": False}}, {"a": {"x": 1, "y": 3, "w": 4}})
    assert rows == [("a", "y", 2, 3), ("a", "z", False, None), ("a", "w", None, 4)]


@pytest.mark.parametrize("change,count", [(0.0, 0), (9e-6, 0), (2e-5, 1), (np.nan, 1)])
def test_logits_differ_beyond_the_tolerance(scripts, change, count):
    script, _ = scripts
    before = {"a, one shot": np.zeros((2, 3), np.float32)}
    after = {"a, one shot": before["a, one shot"] + np.float32(change) * np.eye(2, 3, dtype=np.float32)}
    assert len(list(script.logit_differences(before, after))) == count
    assert len(list(script.logit_differences(before, {}))) == 1


def test_only_listed_differences_are_allowed(scripts, tmp_path, capsys):
    script, _ = scripts
    path = tmp_path / "allowed.json"
    path.write_text(json.dumps([{"config": "a", "quantity": "one shot, *", "reason": "meant"}]))
    rows = [("a", "one shot, logits", 0.0, 2e-5), ("b", "one shot, logits", 0.0, 2e-5), ("a", "temp", 1, 2)]
    assert script.show(rows, script.read_allowed(path)) == 2
    assert capsys.readouterr().out.count("NOT ALLOWED") == 2
    path.write_text(json.dumps([{"config": "a", "quantity": "*", "reason": ""}]))
    with pytest.raises(UserError, match="reason"):
        script.read_allowed(path)


def test_the_record_holds_every_config(scripts):
    """Those that were there before the core changed; later ones are not compared."""
    _, runs = scripts
    held = json.loads((ROOT / "docs/measured/before.json").read_text())["tiny"]["configs"]
    assert len(held) == 16 and set(held) <= set(runs.SETTINGS)
    with np.load(ROOT / "tests/data/before_logits.npz") as logits:
        modes = {
            f"{n}, {q.removesuffix(', refused')}"
            for n, c in held.items()
            for q, v in c.items()
            if "refused" in q and not v
        }
        assert set(logits.files) == modes
        assert all(np.isfinite(logits[key]).all() for key in logits.files)
