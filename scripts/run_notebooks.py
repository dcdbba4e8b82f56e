"""Run the notebooks and store their outputs in them: `.venv/bin/python scripts/run_notebooks.py` (lcx[notebooks])."""

from pathlib import Path

import nbclient
import nbformat

ROOT = Path(__file__).parent.parent


def main() -> None:
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        nbclient.NotebookClient(notebook, timeout=1_800, resources={"metadata": {"path": str(ROOT)}}).execute()
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)
        # the version of the interpreter that ran it is not part of a notebook
        notebook.metadata["language_info"] = {"name": "python"}
        nbformat.write(notebook, path)
        print(path.name, flush=True)


if __name__ == "__main__":
    main()
