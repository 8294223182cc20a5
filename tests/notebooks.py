"""Run the notebooks of `docs/notebooks` and keep what their cells show: `make notebooks`."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).parent.parent / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def run(path: Path, folder: Path, *more: str) -> NotebookNode:
    """Return a notebook as a fresh process in `folder` runs its cells, and `more` cells of Python, in order."""
    notebook = nbformat.read(path, as_version=4)
    notebook.cells += map(nbformat.v4.new_code_cell, more)
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": str(FOLDER),
        "PYTHONWARNINGS": "ignore:IProgress",  # a package of bars, which no cell shows
    }
    client = NotebookClient(
        notebook, resources={"metadata": {"path": str(folder)}}, record_timing=False, coalesce_streams=True
    )
    client.execute(env=environment)
    return notebook


def main() -> None:
    for path in NOTEBOOKS:
        with tempfile.TemporaryDirectory() as folder:
            notebook = run(path, Path(folder))
        notebook.metadata.language_info = {"name": "python"}
        path.write_text(nbformat.writes(notebook) + "\n")


if __name__ == "__main__":
    main()
