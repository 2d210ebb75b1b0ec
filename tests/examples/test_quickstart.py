"""The notebook, executed cell by cell by a real kernel, whose event loop runs while the trainer does."""

from __future__ import annotations

import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from benchmarks.lives import lines_of
from tests.conftest import ROOT
from tests.system.background import Background

pytestmark = pytest.mark.system
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


@pytest.mark.timeout(700)
def test_quickstart_notebook_trains_plots_and_answers(background: Background) -> None:
    background.result(__name__)


def story(tmp_path: Path) -> None:
    for name in ("configs", "models"):
        (tmp_path / name).symlink_to(ROOT / name)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "it is committed without outputs"
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()

    steps = lines_of(tmp_path / "runs" / "quickstart" / "metrics.jsonl")
    assert [step["step"] for step in steps] == [0, 1, 2]
    # a term that was defined in the notebook was computed by workers in other processes: a share of 1, never 0 tokens
    assert all(0 <= step["reward/short_reply"] < 1 for step in steps)
    images = [
        output["data"]["image/png"]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert len(images) == 2, "the plot, and the image with the box"
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert " -> " in printed and "box:" in printed, json.dumps(printed[-1000:])
