"""The notebook runs from top to bottom, and finds what its text says."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "docs" / "tutorials" / "first_run.ipynb"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the packages of Jupyter
def test_it_trains_and_retrieves(
    require_backend: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_backend("notebook")
    import nbclient
    import nbformat

    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    printed = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    same_class = re.search(r"same class for (\d+)%", printed)
    right = re.search(r"(\d+)% of the other 300", printed)
    assert same_class, printed
    assert right, printed
    assert int(same_class[1]) > 40, "four times chance"
    assert int(right[1]) > 50, "five times chance"


def test_it_is_stored_without_outputs() -> None:
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert '"outputs": []' in text
    assert '"output_type"' not in text
    assert '"image/png"' not in text
