"""The notebook runs from its first cell to its last."""

from pathlib import Path

import pytest

from tests.tiny_checkpoint import save_tiny_model

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "diffusion_llm.ipynb"


@pytest.mark.slow
def test_every_cell_of_the_notebook_runs(tmp_path, monkeypatch):
    """Proves that a real kernel executes the notebook, on a tiny model, and that its plots are drawn."""
    nbformat = pytest.importorskip("nbformat", reason="notebooks need nbformat: pip install -e '.[notebook]'")
    nbclient = pytest.importorskip("nbclient", reason="notebooks need nbclient: pip install -e '.[notebook]'")
    pytest.importorskip("ipykernel", reason="notebooks need ipykernel: pip install -e '.[notebook]'")
    monkeypatch.setenv("DIFFLM_MODEL", str(save_tiny_model(tmp_path / "model")))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    assert any("mask token '<|mask|>'" in output.get("text", "") for output in outputs)
