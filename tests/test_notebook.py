"""The notebook in examples/ runs from its first cell to its last."""

import json
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest

NOTEBOOK = Path(__file__).parent.parent / "examples" / "figures.ipynb"


def test_every_cell_runs_and_the_figures_show(inputs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    assert "example-support-dataset.json" in first.source
    first.source = f"inputs = {json.loads(json.dumps(inputs))!r}"  # the same cells on the tiny model
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    shown = [[kind for output in cell.outputs for kind in output.get("data", {})] for cell in code]
    assert "rows it never saw" in code[1].outputs[-1].text
    assert sum("application/vnd.plotly.v1+json" in kinds for kinds in shown) == 3 and "text/html" in shown[4]


def test_the_notebook_is_kept_without_outputs() -> None:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in notebook["cells"])
