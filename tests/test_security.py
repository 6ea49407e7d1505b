"""Tests that files are treated as data: their contents are never run, and do not lead to other files."""

import ast
import json
import pickle

import pytest
import torch

from nanometa.common.errors import UserError
from nanometa.training import checkpoint
from nanometa.training.checkpoint import load_run, open_checkpoint
from tests.conftest import ROOT
from tests.test_checkpoint import write
from tests.test_rooms import PRODUCT

FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml"}
FORBIDDEN_CALLS = {
    "torch.load", "os.system", "os.popen", "eval", "exec", "numpy.load", "np.load", "subprocess.getoutput",
    "subprocess.getstatusoutput", "pandas.read_pickle",
}  # fmt: skip


def offences(text: str) -> list[str]:
    """Returns the imports and calls that could run the contents of a file or a command line."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in FORBIDDEN_MODULES]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module] if (node.module or "").split(".")[0] in FORBIDDEN_MODULES else []
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            found += [name] if name in FORBIDDEN_CALLS else []
            for keyword in node.keywords:
                if keyword.arg in ("shell", "allow_pickle", "trust_remote_code"):
                    value = keyword.value
                    found += [] if isinstance(value, ast.Constant) and value.value is False else [f"{keyword.arg}="]
    return found


def test_no_code_unpickles_evaluates_or_uses_a_shell():
    assert len(PRODUCT) > 30
    for path in PRODUCT:
        assert offences(path.read_text()) == [], path
    bad = "import pickle\nfrom dill import x\ntorch.load(f)\nos.system('x')\nsubprocess.run('x', shell=True)\neval('1')"
    assert len(offences(bad)) == 6  # the check finds all of these


def test_config_files_are_the_only_files_that_are_run():
    """Running a config file is running code, as the README says. No other file is run."""
    assert [path.name for path in PRODUCT if "runpy.run_path(" in path.read_text()] == ["command_line.py"]
    assert "running one is running code" in (ROOT / "README.md").read_text()


def test_a_checkpoint_is_loaded_without_pickle(tmp_path, monkeypatch):
    folder = write(tmp_path, 3)

    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    for owner, name in ((pickle, "loads"), (pickle, "load"), (torch, "load")):
        monkeypatch.setattr(owner, name, refuse)
    assert load_run(tmp_path).state["step"] == 3
    assert open_checkpoint(folder).optimizer()["wte.weight/exp_avg"].tolist() == [3.0] * 3


@pytest.mark.parametrize(
    "name", ["../elsewhere", "/etc/passwd", "..", ".", "", "sub/file", "a\0b", "~/x", "link", "x" * 300, ".hidden"]
)
def test_a_checkpoints_manifest_cannot_lead_out_of_its_folder(tmp_path, name):
    """Neither a name nor a link may lead elsewhere, even if the hash is right."""
    folder = write(tmp_path, 3)
    (tmp_path / "elsewhere").write_text("not yours")
    (folder / "link").symlink_to("../elsewhere")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["sha256"][name] = checkpoint.file_sha256(tmp_path / "elsewhere")
    (folder / "manifest.json").write_bytes(checkpoint._manifest(manifest["sha256"]))
    with pytest.raises(
        UserError, match=r"manifest.json is damaged \(ValueError: .*(not a plain file name|a link out of)"
    ):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "tokenizer.ranks"])
def test_a_link_out_of_a_checkpoint_is_refused(tmp_path, name):
    folder = write(tmp_path, 3)
    (folder / name).rename(tmp_path / "moved")
    (folder / name).symlink_to(tmp_path / "moved")
    with pytest.raises(UserError, match=f"{name} is a link out of its folder"):
        open_checkpoint(folder)
    (folder / name).unlink()
    (tmp_path / "moved").rename(folder / name)
    (tmp_path / "linked").symlink_to(folder)  # a link to the folder itself is allowed
    assert open_checkpoint(tmp_path / "linked").step == 3
