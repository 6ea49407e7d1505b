"""Tests that current code reads a dataset and a run of an earlier version, and computes what that version computed.

tests/old_run/README.md says how the files were made.
"""

import json
import shlex
import shutil

import pytest

from tests.conftest import ROOT, cli, losses

OLD_RUN = ROOT / "tests/old_run"
EXPECTED = json.loads((OLD_RUN / "expected.json").read_text())


@pytest.fixture
def folder(tmp_path):
    """A copy of the old dataset and the old run, which commands may change."""
    return shutil.copytree(OLD_RUN, tmp_path / "old")


def repeat(what: str, folder) -> str:
    """Runs the recorded command of a result and returns what it printed."""
    _, *args = shlex.split(EXPECTED[what]["command"])
    result = cli(*args, cwd=folder)
    assert result.returncode == 0, result.stderr.decode()
    return result.stdout.decode()


def test_the_greedy_text_is_the_recorded_one(folder):
    assert repeat("sample", folder) == EXPECTED["sample"]["text"]


def test_the_evaluated_losses_are_the_recorded_ones(folder):
    repeat("evaluate", folder)
    found = [json.loads(line) for line in (folder / "out/old/perplexity.jsonl").read_text().splitlines()]
    expected = EXPECTED["evaluate"]["losses"]
    names = ("markers", "draw", "tokens")
    assert [[line[name] for name in names] for line in found] == [[line[name] for name in names] for line in expected]
    for name in ("loss", "bits_per_byte"):
        assert [line[name] for line in found] == pytest.approx([line[name] for line in expected], rel=1e-4)


def test_the_resumed_run_has_the_recorded_losses(folder):
    """The losses are equal to 1e-4, because later versions round differently in the loss."""
    run, expected = folder / "out/old", EXPECTED["resume"]
    before = (run / "metrics.jsonl").read_text().splitlines()
    repeat("resume", folder)
    after = (run / "metrics.jsonl").read_text().splitlines()
    kept = [line for line in before if json.loads(line)["kind"] != "final"]
    assert after[: len(kept)] == kept
    found, final = losses(run)[-len(expected["losses"]) :], losses(run, "final")
    assert (run / "latest").read_text().strip() == "step_00000204"
    assert found == pytest.approx(expected["losses"], rel=1e-4)
    assert final == pytest.approx([expected["final_validation_loss"]], rel=1e-4)
