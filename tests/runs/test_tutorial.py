"""The tutorial runs as Jupyter runs it."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.conftest import ROOT

TUTORIAL = ROOT / "examples" / "tutorial.ipynb"


def test_the_tutorial_is_committed_without_outputs():
    notebook = nbformat.read(TUTORIAL, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells)


def test_links_of_the_tutorial_lead_somewhere():
    notebook = nbformat.read(TUTORIAL, as_version=4)
    links = [link for cell in notebook.cells for link in re.findall(r"\]\(([^)]+)\)", cell.source)]
    assert links
    assert all((TUTORIAL.parent / link).exists() for link in links)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # Jupyter keeps files in the home directory, where tests leave no trace.
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook = nbformat.read(TUTORIAL, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [
        output for cell in notebook.cells for output in cell.get("outputs", []) if "data" in output
    ]
    assert sum("image/png" in output["data"] for output in outputs) == 3, "three plots"
    text = "".join(
        output["text"]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.output_type == "stream"
    )
    assert "north epsilon 2.0 at delta 1e-05" in text
    # A chain, heads and costs for each of the two ledgers.
    assert text.count(": ok: ") == 6
