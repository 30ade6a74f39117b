"""The notebook runs from its first cell to its last, offline."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import experiments

NOTEBOOK = Path(experiments.__file__).parent / "easyspec_colab.ipynb"


@pytest.mark.slow
def test_every_cell_runs(monkeypatch, recwarn):
    recwarn.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "committed without outputs"
    NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOK.parent)}}
    ).execute()
    text = "".join(o.get("text", "") for cell in notebook.cells for o in cell.get("outputs", []))
    assert "tokens a round" in text
    assert "Name a directory in PAIR" in text
    pictures = [
        o
        for cell in notebook.cells
        for o in cell.get("outputs", [])
        if "image/png" in o.get("data", {})
    ]
    assert len(pictures) == 1
