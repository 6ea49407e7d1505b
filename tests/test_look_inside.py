"""Tests docs/look_inside.ipynb: it runs from beginning to end, and its committed outputs are those of its code."""

import base64
import json
import os

import pytest

from tests.conftest import ROOT, TINY, cli

NOTEBOOK = ROOT / "docs/look_inside.ipynb"
RUN = '"out/quickstart"'  # as the notebook names its run


def cells(kind: str) -> list[dict]:
    return [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == kind]


def test_the_committed_notebook_was_executed_from_beginning_to_end():
    code = cells("code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert all(output["output_type"] in ("stream", "display_data") for output in outputs)
    assert not [output for output in outputs if output.get("name") == "stderr"]
    pictures = [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 3 and all(base64.b64decode(of).startswith(b"\x89PNG") for of in pictures)


def test_the_committed_notebook_names_no_folder_of_a_machine():
    text = NOTEBOOK.read_text()
    assert str(ROOT) not in text and "/home/" not in text and "site-packages" not in text
    assert sum(RUN in "".join(cell["source"]) for cell in cells("code")) == 1


@pytest.mark.slow
def test_the_notebook_runs_on_a_tiny_run(workdir, tmp_path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    pytest.importorskip("nnsight")
    args = (f"--dataset={workdir / 'data/u'}", "--block_size=256", "--run_name=inside", "--max_steps=4")
    assert cli("train.py", *TINY, *args, cwd=workdir).returncode == 0
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        cell.source = cell.source.replace(RUN, repr(str(workdir / "out/inside")))
    env = {"OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path), "HF_MODULES_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    client = nbclient.NotebookClient(notebook, timeout=250, kernel_name="python3")
    client.execute(cwd=str(tmp_path), env={**os.environ, **env})
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    said = "".join(output.text for output in outputs if output.output_type == "stream")
    assert "arm meta, step 4" in said and "hidden_markers" in said and "other text, patched" in said
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
