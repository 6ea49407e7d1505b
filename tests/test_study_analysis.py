"""Tests the verdicts of a study on invented lines."""

import json
from pathlib import Path

import numpy as np
import pytest

from nanometa.common.errors import UserError
from nanometa.studies.analysis import INSENSITIVE, WAITING, analyse, picture, picture_of_curves, table
from nanometa.studies.cell import fingerprint
from nanometa.studies.plan import Plan, read_plan
from tests.conftest import cli
from tests.study_plans import PLAN, write_plan


@pytest.fixture
def plan_file(tmp_path) -> Path:
    return write_plan(tmp_path)


# ----------------------------------------------------------------------------- the analysis


def invented(plan: Plan, effect: dict[str, float], noise: float = 0.005, seeds=range(1, 4)) -> list[dict]:
    """Returns lines of the deciding stage in which each arm's share of exact answers is 0.5 + effect + noise."""
    rng, lines = np.random.default_rng(0), []
    for cell in plan.cells():
        if cell.stage.name != "deciding" or cell.seed not in seeds:
            continue
        read_as = dict.fromkeys(cell.arm.placements.get(name, name) for name in ("target", "background"))
        tasks = [
            {"task": "copying", "placement": placement, "length": length,
             "exact": 0.5 + effect.get(cell.arm.name, 0) + noise * rng.standard_normal()}
            for placement in read_as for length in (128, 256, 512)
        ]  # fmt: skip
        lines.append({
            "study": plan.name, "plan": fingerprint(plan, cell), "cell": cell.key, "stage": "deciding",
            "arm": cell.arm.name, "seed": cell.seed, "variant": "", "uncommitted_changes": False,
            "commit": "c", "processor": "p", "threads": 1, "torch": "2", "data": {},
            "pretrain": {"bits_per_byte": 1.2 + 1e-4 * rng.standard_normal()}, "finetune": {"reached_at": 9},
            "measures": {
                "tasks": tasks, "text_ablation": [{"placement": "text", "exact": 1e-4 * rng.standard_normal()}],
            },
        })  # fmt: skip
    return lines


def verdicts(plan: Plan, lines: list[dict]) -> dict[str, str]:
    results = analyse(plan, lines)
    return {row.name: row.verdict for row in [results.gate, *results.comparisons]}


@pytest.fixture
def plan(plan_file) -> Plan:
    plan_file.write_text(PLAN.replace("[1, 2, 3]", "[1, 2, 3, 4, 5, 6, 7, 8]").replace("fewer = { O = 2 }", ""))
    return read_plan(str(plan_file))


def test_the_verdicts_are_those_of_the_invented_effects(plan):
    lines = invented(plan, {"O": 0.3, "M": 0.10, "P": 0.0, "G": 0.001}, seeds=range(1, 9))
    assert verdicts(plan, lines) == {
        "gate": "holds", "H3": "holds", "H4": "does not hold", "H5": "does not hold", "H2": "does not hold",
    }  # fmt: skip
    results = analyse(plan, lines)
    row = next(row for row in results.comparisons if row.name == "H3")
    assert row.mean == pytest.approx(0.10, abs=0.01) and row.low < 0.10 < row.high and len(row.seeds) == 8
    text = table(plan, results)
    assert "32 of 32 planned runs" in text and "| H3 | M - P | +1" in text
    assert picture(plan, results).startswith(b"\x89PNG")


def test_a_closed_gate_withholds_every_verdict_on_accuracy(plan):
    found = verdicts(plan, invented(plan, {"O": 0.05, "M": 0.2}, seeds=range(1, 9)))
    assert found["gate"] != "holds" and found["H3"] == found["H4"] == INSENSITIVE and found["H5"] == "does not hold"


def test_there_is_no_verdict_before_all_runs_are_in(plan):
    lines = invented(plan, {"O": 0.3, "M": 0.2}, seeds=range(1, 9))[:-1]
    assert set(verdicts(plan, lines).values()) == {WAITING}


def test_stages_before_the_deciding_one_show_validation_at_the_trained_length(plan):
    lines = invented(plan, {}, seeds=range(1, 9))
    assert analyse(plan, lines).earlier == []
    for variant, reached in (("low", 100), ("high", None)):
        tuned = {"step": 300, "reached_at": reached, "exact_copying_target": 0.9, "exact_copying_background": 0.8}
        lines.append({**lines[0], "stage": "tuning", "variant": variant, "finetune": tuned, "seed": 7})
    rows = analyse(plan, lines).earlier
    assert rows == [("tuning", "M", "low", 1, 100.0, 0.8), ("tuning", "M", "high", 1, 300.0, 0.8)]
    assert "| tuning | M | high | 1 | 300 | 80.0 % |" in table(plan, analyse(plan, lines))


def test_too_much_noise_is_undecided(plan):
    assert verdicts(plan, invented(plan, {"O": 0.4}, noise=0.2, seeds=range(1, 9)))["H3"] == "undecided"


def test_two_arms_may_be_compared_under_different_conditions(plan_file):
    """A figure of the first arm at one line of a measure, and of the second arm at another."""
    tasks = [{"method": name, "bits": value} for name, value in (("own", 1.5), ("full", 1.0))]
    plan_file.write_text(
        PLAN
        + """[[analysis.figures]]
name = "C"
claim = "own - full"
of = "tasks"
where = { method = "own" }
where_second = { method = "full" }
figure = "bits"
unit = "bits"
first = "M"
second = "P"
margin = 0.1
"""
    )
    plan = read_plan(str(plan_file))
    lines = invented(plan, {})
    for line in lines:
        line["measures"]["tasks"] += [{**one, "task": "", "placement": "", "length": 0} for one in tasks]
    results = analyse(plan, lines)
    row = next(row for row in results.comparisons if row.name == "C")
    assert row.differences == (0.5,) * 3
    assert [level.name for level in results.levels][-1] == "bits of tasks (method=full)"


@pytest.mark.parametrize(("shift", "verdict"), [(-0.1, "holds"), (0.1, "the reverse holds"), (0.0, "does not hold")])
def test_a_claim_that_the_first_is_lower_holds_if_it_is_lower(plan_file, shift, verdict):
    plan_file.write_text(PLAN.replace('claim = "bits"\n', 'claim = "bits"\nlower = true\n'))
    plan = read_plan(str(plan_file))
    lines = invented(plan, {"O": 0.3})
    for line in lines:
        line["pretrain"]["bits_per_byte"] += shift * (line["arm"] == "M")
    row = next(row for row in analyse(plan, lines).comparisons if row.name == "H5")
    assert row.mean == pytest.approx(shift, abs=1e-3) and row.verdict == verdict
    assert "| below 0 | 3 | ±0.0100 | " in table(plan, analyse(plan, lines))


def curve_plan(plan_file, where: str) -> Plan:
    """Returns the plan with curves of the share of exact answers by length. where: other entries of the curves."""
    entry = '[[analysis.curves]]\nof = "tasks"\nx = "length"\nfigure = "exact"\nunit = "share"\n'
    plan_file.write_text(PLAN + entry + where)
    return read_plan(str(plan_file))


def test_curves_are_the_means_of_the_runs_by_the_field_that_the_plan_names(plan_file):
    plan = curve_plan(plan_file, 'where = { placement = "target" }\n')
    lines = invented(plan, {"M": 0.25}, noise=1e-6)
    for line in lines:
        for cell in line["measures"]["tasks"]:
            cell["exact"] += cell["length"] / 1024 + line["seed"] / 1000
    (curves,) = analyse(plan, lines).described
    assert (curves.name, curves.x) == ("exact of tasks by length (placement=target)", "length")
    assert list(curves.values) == ["M", "P", "O"]  # the fourth arm reads no placement "target"
    assert curves.values["P"][256] == {seed: pytest.approx(0.75 + seed / 1000, abs=1e-5) for seed in (1, 2, 3)}
    assert "| meta (M) | 3 | 0.8770 | 1.0020 | 1.2520 |" in table(plan, analyse(plan, lines))
    assert picture_of_curves(plan, analyse(plan, lines)).startswith(b"\x89PNG")
    assert picture_of_curves(plan, analyse(plan, lines[:0])) is None


@pytest.mark.parametrize(("old", "new"), [('x = "length"', 'x = "lenght"'), ('figure = "exact"', 'figure = "exat"')])
def test_curves_of_a_field_that_no_line_has_are_refused(plan_file, old, new):
    curve_plan(plan_file, "mean = true\n")
    head, entry = plan_file.read_text().split("[[analysis.curves]]")
    plan_file.write_text(f"{head}[[analysis.curves]]{entry.replace(old, new)}")
    plan = read_plan(str(plan_file))
    with pytest.raises(UserError, match="but no line of tasks has the field"):
        analyse(plan, invented(plan, {}))


def test_a_comparison_of_a_field_that_no_line_has_is_refused(plan_file):
    """It would otherwise be "undecided", like one with too much noise."""
    plan_file.write_text(PLAN.replace('figure = "bits_per_byte"', 'figure = "bits_per_bite"'))
    plan = read_plan(str(plan_file))
    with pytest.raises(UserError, match="no line of pretrain has the field 'bits_per_bite'"):
        analyse(plan, invented(plan, {}))


def test_several_lines_of_one_figure_are_refused_or_averaged_as_the_plan_says(plan_file):
    plan = curve_plan(plan_file, "")
    lines = invented(plan, {})
    with pytest.raises(UserError, match="has 2 lines of that kind: name more fields in `where`, or give mean = true"):
        analyse(plan, lines)
    plan = curve_plan(plan_file, "mean = true\n")
    (curves,) = analyse(plan, lines).described
    cells = [cell["exact"] for cell in lines[0]["measures"]["tasks"] if cell["length"] == 512]
    assert len(cells) == 2 and curves.values["M"][512][1] == pytest.approx(np.mean(cells))


def test_lines_of_different_commits_are_named(plan):
    lines = invented(plan, {}, seeds=range(1, 9))
    lines[0]["commit"] = "d"
    assert analyse(plan, lines).warnings == ["The lines have 2 different values of commit."]


def test_pairs_that_did_not_both_reach_the_accuracy_are_left_out_of_matched_only(plan):
    lines = invented(plan, {"O": 0.4, "M": 0.1}, seeds=range(1, 9))
    for line in lines:
        if line["seed"] <= 3:
            line["finetune"]["reached_at"] = None
    row = next(row for row in analyse(plan, lines).comparisons if row.name == "H3")
    assert len(row.seeds) == 8 and row.matched[3] == 5


def test_the_report_writes_a_table_and_a_picture(plan, plan_file, tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in invented(plan, {"O": 0.3}, seeds=range(1, 9))))
    result = cli("study.py", "report", str(plan_file), f"--output={path}", cwd=tmp_path)
    assert result.returncode == 0, result.stderr.decode()
    assert (tmp_path / "fake.md").read_text() in result.stdout.decode()
    assert (tmp_path / "fake.png").read_bytes().startswith(b"\x89PNG")
