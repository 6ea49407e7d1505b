"""Tests that files are treated as data: their contents are never run, and do not lead to other files."""

import ast
import io
import json
import os
import pickle
import re
import shutil
from types import SimpleNamespace

import pytest
import torch

from nanometa.common.errors import UserError
from nanometa.common.terminal import write as write_text
from nanometa.evals.common import Evaluation
from nanometa.training import checkpoint
from nanometa.training.checkpoint import load_run, open_checkpoint
from tests.conftest import ROOT, cli, override, refusal, tree
from tests.fast_cases import diagonal
from tests.test_checkpoint import write
from tests.test_rooms import PRODUCT
from tests.training_runs import BASE, run

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


def test_every_promise_of_the_security_page_names_a_test_that_exists():
    page = (ROOT / "docs/security.md").read_text()
    promises = page.split("## What they cannot do")[1].split("## What they can do")[0].strip()
    for promise in re.split(r"\n- |\n\n", promises):
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", promise)
        assert named, promise
        for file, test in named:
            assert f"\ndef {test}(" in (ROOT / "tests" / file).read_text(), (file, test)


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
    with pytest.raises(UserError, match=r"manifest.json is damaged .*not a plain file name|link is a link out of its"):
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


# ----------------------------------------------------------------------------- a run of a stranger


@pytest.fixture
def strange(workdir, tmp_path, monkeypatch):
    """A copy of a short run in a folder of its own, beside the dataset and a file that is not the run's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(workdir / "data")
    if not (workdir / "out/short").exists():
        run(workdir, "short", "--max_steps=2")
    shutil.copytree(workdir / "out/short", tmp_path / "out/short")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").write_text("mine")
    return tmp_path / "out/short"


RESUME = ("--run_name=short", "--init_from=resume")


def resumed(strange, steps: int = 3):
    return cli("train.py", *override(BASE, *RESUME, f"--max_steps={steps}"), cwd=strange.parent.parent)


@pytest.mark.parametrize(
    ("name", "target"),
    diagonal(["train.log", "metrics.jsonl", ".lock", "wandb", "tensorboard"], ["file", "new", "pipe", "zero"]),
)
def test_a_resume_writes_through_no_link_and_waits_for_no_pipe(strange, name, target):
    """The target may exist or be created by the write."""
    mine, path = strange.parent.parent / "mine", strange / name
    path.unlink(missing_ok=True)
    if target == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero" if target == "zero" else mine / target)
    before = tree(strange.parent)
    if name in ("wandb", "tensorboard") and target == "pipe":
        return  # only the tracker opens this path, and it makes a folder of it
    error = refusal(resumed(strange))
    assert f"{name} is " in error and ("a link out of its folder: delete" in error or "not a regular file" in error)
    after = tree(strange.parent)
    assert {key: of for key, of in after.items() if key != "short/.lock"} == {
        key: of for key, of in before.items() if key != "short/.lock"
    }
    assert [path.name for path in mine.iterdir()] == ["file"] and (mine / "file").read_text() == "mine"


def test_other_links_of_a_run_are_replaced_without_their_targets(strange):
    """Files that are written anew, and temporary names."""
    mine = strange.parent.parent / "mine"
    for name in ("config.json", "latest", ".step_00000003.writing", ".step_00000001.deleting", ".latest.a.1.writing"):
        (strange / name).unlink(missing_ok=True)
        (strange / name).symlink_to(mine if name.startswith(".step") else mine / "file")
    result = resumed(strange)
    assert result.returncode == 0, result.stderr.decode()
    assert (
        load_run(strange / "step_00000003").state["step"] == 3 and (strange / "latest").read_text()[5:13] == "00000003"
    )
    assert [path.name for path in mine.iterdir()] == ["file"] and (mine / "file").read_text() == "mine"


def test_a_run_folder_may_be_a_link_or_lie_below_one_and_may_hold_links_to_its_own_files(strange, tmp_path):
    """As if out/ were on another disk."""
    scratch = tmp_path / "scratch"
    (tmp_path / "out").rename(scratch)
    (tmp_path / "out").symlink_to(scratch)
    (scratch / "logs").mkdir()
    (scratch / "short").rename(scratch / "body")
    (scratch / "short").symlink_to("body")
    (scratch / "body/sub").mkdir()
    for name in ("train.log", "metrics.jsonl"):
        (scratch / "body" / name).rename(scratch / "body/sub" / name)
        (scratch / "body" / name).symlink_to(f"sub/{name}")
    result = resumed(tmp_path / "out/short")
    assert result.returncode == 0, result.stderr.decode()
    assert load_run(tmp_path / "out/short/step_00000003").state["step"] == 3
    assert "done in" in (scratch / "body/sub/train.log").read_text()


def test_a_run_folder_that_is_a_dangling_link_is_refused(tmp_path, workdir):
    (tmp_path / "data").symlink_to(workdir / "data")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/new").symlink_to(tmp_path / "scratch")
    error = refusal(cli("train.py", *BASE, "--run_name=new", "--max_steps=1", cwd=tmp_path))
    assert "out/new is a link to " in error and "which does not exist: create that folder, or remove the link" in error


def test_text_of_a_checkpoint_takes_one_line_of_the_log(strange):
    """The origin comes from state.json. A line of its own in train.log could be a command, if the log were a link."""
    folder = strange / "step_00000002"
    state = json.loads((folder / "state.json").read_text())
    state["origin"] = "scratch\ntouch created\r\x1b[2J\u2028end"
    (folder / "state.json").write_text(json.dumps(state))
    seal(folder)
    lines = len((strange / "train.log").read_text().splitlines())
    result = resumed(strange, steps=2)
    assert result.returncode == 0, result.stderr.decode()
    added = (strange / "train.log").read_text().splitlines()[lines:]
    assert any(line.endswith(r"started from scratch\ntouch created\r\x1b[2J\u2028end") for line in added)
    assert "\x1b" not in result.stdout.decode()


def seal(folder) -> None:
    """Writes the hashes of a checkpoint's files into its manifest."""
    names = json.loads((folder / "manifest.json").read_text())["sha256"]
    (folder / "manifest.json").write_bytes(
        checkpoint._manifest({name: checkpoint.file_sha256(folder / name) for name in names})
    )


def test_a_checkpoint_of_another_step_than_its_name_says_is_not_resumed(strange):
    """A resume from it would treat the checkpoints after that step as damaged."""
    shutil.copytree(strange / "step_00000002", strange / "step_00000007")
    said = []
    assert checkpoint.newest(strange, said.append).folder.name == "step_00000002"
    assert len(said) == 1 and "step_00000007/state.json is of step 2: rename or remove the folder" in said[0]
    assert load_run(strange / "step_00000007").state["step"] == 2


def test_an_evaluation_appends_through_no_link_and_names_a_cure_for_a_read_only_folder(tmp_path, monkeypatch):
    model = SimpleNamespace(folder=tmp_path / "run/step_00000001")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/tasks.jsonl").symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match="tasks.jsonl is a link out of its folder"):
        Evaluation().lines(model, "tasks")
    assert Evaluation().lines(model, "passkey") == tmp_path / "run/passkey.jsonl"
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path / "run")
    with pytest.raises(UserError, match=r"passkey.jsonl cannot be written: name another file with --output=FILE.jsonl"):
        Evaluation().lines(model, "passkey")
    assert Evaluation(output=str(tmp_path / "a/b.jsonl")).lines(model, "passkey") == tmp_path / "a/b.jsonl"


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.json", "tasks.jsonl"])
def test_a_report_reads_through_no_link_and_waits_for_no_pipe(strange, name):
    path = strange / name
    for make in (lambda: path.symlink_to("/dev/zero"), lambda: os.mkfifo(path)):
        path.unlink(missing_ok=True)
        make()
        error = refusal(cli("report.py", "out/short", cwd=strange.parent.parent, timeout=100))
        assert f"{name} is a link out of its folder" in error or f"{name} is not a regular file" in error


@pytest.mark.parametrize("shown", [True, False])
def test_text_of_a_model_cannot_steer_a_terminal(monkeypatch, shown):
    """It goes into files and pipes unchanged."""
    out = io.StringIO()
    monkeypatch.setattr(out, "isatty", lambda: shown, raising=False)
    monkeypatch.setattr("sys.stdout", out)
    raw = "a\tb\n\x1b]0;title\x07\x9b2J\rc é\u202e"
    write_text(raw)
    assert out.getvalue() == (raw.replace("\x1b", r"\x1b").replace("\x07", r"\x07").replace("\x9b", r"\x9b")
                              .replace("\r", r"\r") if shown else raw)  # fmt: skip
