"""A method whose source changed is another point: what counts as its source, and what a folder with rows of the old one does."""

import json
import sys

import pytest
from test_sweep_points import fill, resolved

from lcx.config_files import load_config
from lcx.errors import UserError
from lcx.sweep import sources
from lcx.sweep.rows import read_rows
from lcx.sweep.runner import open_sweep

METHOD = '''"""A method of a user's."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from own_ranking import rank

from lcx.experiment import Experiment
from lcx.policies.base import Evict
from lcx.recipe import Recipe, Segment


@dataclass(frozen=True)
class Mine(Evict):
    budget: int = 16

    def score(self, ctx, held, new):
        return rank(held.pos), rank(new.pos)


def get_config():
    return Experiment(Recipe((Segment(policy=Mine()),)))
'''


@pytest.fixture
def mine(tmp_path, monkeypatch):
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "mine.py").write_text(METHOD)
    (folder / "own_ranking.py").write_text("def rank(pos):\n    return pos\n")
    (folder / "unrelated.py").write_text("X = 1\n")
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    sys.modules.pop("own_ranking", None)


def digest(folder):
    return sources.digest(load_config(folder / "mine.py").recipe)


def test_the_source_is_the_file_of_the_class_and_what_it_imports(mine):
    names = {path.name for path in sources.source_files(load_config(mine / "mine.py").recipe)}
    # of lcx the files of its base classes, and nothing of numpy or of jax
    assert {"mine.py", "own_ranking.py", "base.py", "axes.py"} <= names
    assert not names & {"unrelated.py", "numpy.py", "dataclasses.py", "__init__.py"}


@pytest.mark.parametrize(("file", "counts"), [("mine.py", True), ("own_ranking.py", True), ("unrelated.py", False)])
def test_a_change_of_any_of_them_changes_the_key(mine, file, counts):
    before = digest(mine)
    assert digest(mine) == before
    (mine / file).write_text((mine / file).read_text() + "# changed\n")
    assert (digest(mine) != before) == counts


def test_another_version_of_lcx_is_another_key(mine, monkeypatch):
    before = digest(mine)
    monkeypatch.setattr("lcx.__version__", "0.0.0")
    assert digest(mine) != before


def test_a_folder_runs_a_changed_method_anew_and_says_which_file(mine, tmp_path):
    configs = ("configs/dense.py", str(mine / "mine.py"))
    jobs = lambda: resolved(configs, keep_ratios=(0.3, 0.6))[1]
    notes = []
    store = open_sweep(tmp_path / "run", jobs(), note=notes.append)
    fill(store)
    assert open_sweep(tmp_path / "run", jobs(), note=notes.append).unfinished() == 0 and not notes
    kept = {job.key for job in jobs() if job.reference is None}
    (mine / "own_ranking.py").write_text("def rank(pos):\n    return -pos\n")
    again = open_sweep(tmp_path / "run", jobs(), note=notes.append)
    assert notes == ["2 points run anew, as the source of their method changed: own_ranking.py"]
    assert [(r["method"], r["status"]) for r in read_rows(again)] == [
        ("dense", "ok"),
        ("mine", "todo"),
        ("mine", "todo"),
    ]
    assert kept == set(again.rows())
    old = [json.loads(line) for line in (tmp_path / "run" / "replaced.jsonl").read_text().splitlines()]
    assert len(old) == 2 and all(entry["row"]["nll"] == 2.0 for entry in old)
    # a budget besides is another sweep, whatever changed with it
    (mine / "own_ranking.py").write_text("def rank(pos):\n    return pos\n")
    with pytest.raises(UserError, match="holds another sweep"):
        open_sweep(tmp_path / "run", resolved(configs, keep_ratios=(0.2, 0.6))[1])


def test_several_budgets_are_points_of_the_methods_that_have_one(mine):
    points, _ = resolved(("configs/dense.py", "configs/int8.py", str(mine / "mine.py")), keep_ratios=(0.25, 0.5))
    assert [(p.method, p.kept, p.columns["keep_ratio"]) for p in points] == [
        ("dense", None, None),
        ("int8", None, None),
        ("mine", 48, 0.25),
        ("mine", 96, 0.5),
    ]
    assert len({p.key for p in points}) == 4
