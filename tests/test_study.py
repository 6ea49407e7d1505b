"""Tests studies: the plan, the queue under kills, the analysis on invented lines, and the command line."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from nanometa.common.errors import UserError
from nanometa.common.statistics import holm
from nanometa.config import MarkerConfig, PrepareConfig, TrainConfig
from nanometa.config.arms import SECOND_ATTENTIONS
from nanometa.config.command_line import load_config
from nanometa.evals.compression import CompressionEval
from nanometa.probes import masks
from nanometa.studies import queue
from nanometa.studies.analysis import INSENSITIVE, WAITING, analyse, picture, table
from nanometa.studies.cell import arguments_of, fingerprint, placed, words
from nanometa.studies.plan import Cell, Plan, joined, read_plan
from tests.conftest import ROOT, cli

META = ROOT / "studies/meta_tokens.toml"
PLAN = """
[study]
name = "fake"
question = "Does it work?"
lines = "lines.jsonl"
[prepare]
[settings]
pretrain = ["--steps=5"]
finetune = ["--placements target background"]
[measures.text_ablation]
command = "probe.py ablation"
of = "pretrain"
arguments = ["--lengths 1", "--placements text"]
arms = ["M"]
[measures.tasks]
command = "eval.py tasks"
of = "finetune"
arguments = ["--lengths 128 256 512", "--placements target background"]
[arms.M]
label = "meta"
[arms.P]
label = "pause"
pretrain = ["--second_attention=none"]
[arms.O]
label = "oracle"
weights_of = "M"
finetune = ["--visible=marked"]
[arms.G]
label = "gpt2"
placements = { target = "none", background = "none" }
[stages.tuning]
arms = ["M"]
seeds = [7]
variants = { low = ["--learning_rate=1"], high = ["--learning_rate=2"] }
[stages.deciding]
arms = ["M", "P", "O", "G"]
seeds = [1, 2, 3]
fewer = { O = 2 }
[sizes.small]
stages = ["deciding"]
seeds = 1
pretrain = ["--steps=1"]
measures = { tasks = ["--lengths 128"] }
[analysis]
stage = "deciding"
tasks = ["copying"]
placements = ["target", "background"]
lengths = [128, 256, 512]
length = 256
margin = 0.05
gate = { name = "gate", claim = "O - P", first = "O", second = "P", length = 512, above = 0.1 }
contrasts = [
  { name = "H3", claim = "M - P", first = "M", second = "P" },
  { name = "H4", claim = "P - G", first = "P", second = "G" },
]
[[analysis.figures]]
name = "H5"
claim = "bits"
of = "pretrain"
figure = "bits_per_byte"
unit = "bits per byte"
first = "M"
second = "P"
margin = 0.01
[[analysis.figures]]
name = "H2"
claim = "diagonal"
of = "text_ablation"
where = { placement = "text" }
figure = "exact"
unit = "nats"
first = "M"
margin = 0.005
"""


@pytest.fixture
def plan_file(tmp_path) -> Path:
    path = tmp_path / "plan.toml"
    path.write_text(PLAN)
    return path


# ----------------------------------------------------------------------------- the plan


def test_a_plan_lists_its_cells_stage_by_stage_and_seed_by_seed(plan_file):
    cells = [cell.key for cell in read_plan(str(plan_file)).cells()]
    assert cells[:2] == ["tuning/M/7/low", "tuning/M/7/high"]
    assert cells[2:6] == ["deciding/M/1", "deciding/P/1", "deciding/O/1", "deciding/G/1"]
    assert "deciding/O/2" in cells and "deciding/O/3" not in cells and len(cells) == len(set(cells)) == 13


def test_a_size_shrinks_the_study_under_another_name(plan_file):
    whole, small = read_plan(str(plan_file)), read_plan(str(plan_file), "small")
    assert [cell.key for cell in small.cells()] == [f"deciding/{arm}/1" for arm in "MPOG"]
    assert small.settings == {"pretrain": ("--steps=1",), "finetune": whole.settings["finetune"]}
    assert small.measures["tasks"].arguments == ("--placements target background", "--lengths 128")
    assert small.measures["text_ablation"] == whole.measures["text_ablation"]
    assert (small.name, small.lines) == ("fake_small", Path("out/fake_small/lines.jsonl"))


def test_of_a_setting_given_twice_the_later_one_counts():
    assert joined(["a.py", "--x=1", "--l 1 2"], ["--l 3", "--y=2"]) == ("a.py", "--x=1", "--l 3", "--y=2")
    assert joined(["a.py", "--x=1"], ["--y=2", "b.py"]) == ("b.py", "--x=1", "--y=2")


def test_an_arm_without_markers_reads_each_placement_once(plan_file):
    plan = read_plan(str(plan_file))
    cell = Cell(plan.stages["deciding"], plan.arms["G"], 1, "")
    assert placed(cell, ["--placements target background", "--n=1"]) == ["--placements none", "--n=1"]


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ('arms = ["M"]', 'arms = ["X"]', "names the arm 'X'"),
        ("[settings]", "[setings]", "unknown entry 'setings'"),
        ("finetune = [", "finetun = [", "unknown entry 'finetun'"),
        ('of = "finetune"', 'of = "finetuning"', "measures tasks of 'finetuning'"),
        ('"eval.py tasks"', '"train.py"', "measures tasks with 'train.py'"),
        ("[measures.tasks]", "[measures.other]", r"without \[measures.tasks\]"),
        ('of = "pretrain"\nfigure', 'of = "text"\nfigure', r"compares a figure of 'text' in \[analysis.figures\]"),
        ("seeds = [1, 2, 3]", "seeds = [1, 1]", "names a seed of stage deciding twice"),
        ('label = "meta"\n', "", "has no entry 'label'"),
        ('name = "fake"', "name = ", "cannot be read"),
        ("seeds = [7]", 'seeds = "7"', "has seeds='7' in stage tuning"),
        ('first = "M"', 'first = "Q"', r"names the arm 'Q' in \[analysis.contrasts\]"),
        ('claim = "M - P", ', "", r"lacks claim in \[analysis.contrasts\]"),
        ("\nmargin = 0.05", "\nmargn = 0.05", "unknown entry 'margn'"),
        ("\nmargin = 0.05", '\nmargin = "5"', "has margin='5'"),
        ("lengths = [128, 256, 512]", "lengths = [128, 512]", "length=256"),
        ('tasks = ["copying"]', 'tasks = ["copy"]', "names 'copy' in tasks"),
        ('stage = "deciding"', 'stage = "decide"', "analyses stage 'decide'"),
        ('stage = "deciding"', 'stage = "tuning"', "analyses stage 'tuning', which has 2 variants"),
        (
            'arms = ["M", "P", "O", "G"]',
            'arms = ["M", "P", "O"]',
            r"the arm 'G' in \[analysis.contrasts\] of stage deciding",
        ),
        ('stages = ["deciding"]', 'stages = ["tuning"]', "analyses stage 'deciding'"),
    ],
)
def test_a_faulty_plan_is_refused_in_one_sentence(plan_file, old, new, sentence):
    plan_file.write_text(PLAN.replace(old, new, 1))
    with pytest.raises(UserError, match=sentence):
        read_plan(str(plan_file))
        read_plan(str(plan_file), "small")


def test_the_study_of_meta_tokens_is_a_valid_plan():
    """Its arms are real, every stage before the deciding one has other seeds, and its commands know their settings."""
    plan, small = read_plan(str(META)), read_plan(str(META), "minutes")
    used = {value.partition("=")[2] for arm in plan.arms.values() for value in arm.pretrain
            if value.startswith("--second_attention")}  # fmt: skip
    assert used <= set(SECOND_ATTENTIONS)
    seeds = [set(stage.seeds) for stage in plan.stages.values()]
    assert len(set.union(*seeds)) == sum(map(len, seeds))
    for name in ("M", "C", "S", "P"):
        assert plan.stages["deciding"].fewer.get(name) is None and len(plan.stages["deciding"].seeds) >= 16
    assert len(small.stages["deciding"].seeds) == 2
    for cell in {cell.arm.name: cell for cell in plan.cells()}.values():
        cfg = load(cell, "pretrain", cell.arm.pretrain)
        assert cfg.dataset.removeprefix("data/") in plan.prepare
        tuned = load(cell, "finetune", cell.stage.variants[cell.variant])
        assert set(tuned.task.tasks) == set(plan.analysis["tasks"]) and tuned.stop_at == 0.95
    for name, commands in plan.prepare.items():
        assert commands[-1].startswith("python prepare.py ")
        assert load_config(PrepareConfig, commands[-1].split()[2:]).name == name


def test_the_plan_of_the_quick_start_has_every_arm():
    """Every tiny config that pretrains is an arm of it, and its datasets are those that the configs name."""
    plan = read_plan(str(ROOT / "studies/quick_start.toml"))
    given = {arm.pretrain for arm in plan.arms.values()}
    other = {"tiny_tasks.py", "tiny_extend_4x.py", "tiny_extend_8x.py"}
    paths = [path for path in sorted((ROOT / "config").glob("tiny_*.py")) if path.name not in other]
    found = {path.name: load_config(TrainConfig, [str(path)], config_file=True) for path in paths}
    assert given == {(f"config/{name}",) for name, cfg in found.items() if cfg.markers == MarkerConfig()}
    assert plan.stages["seeds"].arms == tuple(plan.arms)
    for (path,) in given:
        cfg = load_config(TrainConfig, [str(ROOT / path)], config_file=True)
        assert cfg.dataset.removeprefix("data/") in plan.prepare
    for name, commands in plan.prepare.items():
        assert load_config(PrepareConfig, commands[-1].split()[2:]).name in (name, "")


def test_the_plan_of_the_sentinels_is_valid():
    """Its configs exist, its datasets are those of its configs, and every config of a sentinel is an arm."""
    plan = read_plan(str(ROOT / "studies/sentinels.toml"))
    arms = {}
    for cell in plan.cells():
        path, *rest = words(arguments_of(plan, cell)["pretrain"])
        cfg = load_config(TrainConfig, [str(ROOT / path), *rest], config_file=True)
        assert cfg.dataset.removeprefix("data/") in plan.prepare and cfg.model.n_embd == 96
        arms[Path(path).stem] = cfg
    assert set(masks.configs()) < set(arms) and "tiny_gpt2" in arms
    assert len(read_plan(str(ROOT / "studies/sentinels.toml"), "minutes").cells()) == len(plan.arms)


@pytest.mark.parametrize("name", ["sentinels_text", "sentinels_more"])
def test_the_further_plans_of_the_sentinels_are_valid(name):
    """Every command of every cell is accepted, in the study and in its small size."""
    for size in ("", "minutes"):
        plan = read_plan(str(ROOT / f"studies/{name}.toml"), size)
        assert len(plan.cells()) == len(plan.arms) * (1 if size or name == "sentinels_more" else 3)
        for cell in plan.cells():
            arguments = arguments_of(plan, cell)
            path, *rest = words(arguments["pretrain"])
            cfg = load_config(TrainConfig, [str(ROOT / path), *rest], config_file=True)
            assert cfg.dataset.removeprefix("data/") in plan.prepare and cfg.model.n_embd == 96
            for measure in arguments.keys() - {"pretrain"}:
                load_config(CompressionEval, [*words(arguments[measure]), "--run=out/x"])
    for dataset, commands in plan.prepare.items():
        assert load_config(PrepareConfig, commands[-1].split()[2:]).name in (dataset, "")


def test_the_matrix_of_ratios_and_the_lengths_of_recall_are_in_the_table():
    """With one seed the verdicts are undecided, but the tables show each arm at each ratio and length."""
    plan = read_plan(str(ROOT / "studies/sentinels_more.toml"))
    lines = []
    for number, cell in enumerate(plan.cells()):
        measures = {}
        if cell.arm.name in plan.measures["ratios"].arms:
            measures["ratios"] = [{"method": "trained", "ratio": ratio, "bits_per_byte": number + ratio}
                                  for ratio in (0.125, 0.25, 0.375, 0.5)]  # fmt: skip
        if cell.arm.name in plan.measures["forgotten"].arms:
            measures["forgotten"] = [
                *({"measure": "recall", "method": method, "ratio": None, "size": size, "exact": size / 100}
                  for method in ("trained", "full") for size in (2, 4, 8, 16, 24)),
                {"measure": "continuation", "method": "trained", "ratio": 0.5, "agreement": 0.5, "rouge_full": 0.6,
                 "f1_full": 0.7},
            ]  # fmt: skip
        lines.append({
            "study": plan.name, "cell": cell.key, "stage": "single", "arm": cell.arm.name, "seed": 1, "variant": "",
            "pretrain": {"bits_per_byte": float(number)}, "measures": measures, "commit": "c", "processor": "p",
            "threads": 1, "torch": "t", "data": {}, "uncommitted_changes": False,
        })  # fmt: skip
    results = analyse(plan, lines)
    assert {row.verdict for row in results.comparisons} == {"undecided"}
    values = {level.name: level.values for level in results.levels}
    for ratio in (0.125, 0.25, 0.375, 0.5):
        assert len(values[f"bits_per_byte of ratios (method=trained, ratio={ratio})"]) == 5
    assert values["exact of forgotten (measure=recall, method=full, size=24)"]["drop"] == {1: 0.24}
    assert "| cl/cr, ratio 0.25 (clcr_0250) | 1 | 6.5000 |" in table(plan, results)
    assert {row.verdict for row in analyse(plan, lines[1:]).comparisons} == {WAITING}


def load(cell: Cell, settings: str, more: tuple[str, ...]):
    """Returns the settings of a training command of a cell."""
    plan = read_plan(str(META))
    arguments = joined(joined(plan.settings[settings], getattr(cell.arm, settings)), more)
    path, *rest = words(placed(cell, list(arguments)))
    base = ["--init_from=out/x"] if settings == "finetune" else []
    return load_config(TrainConfig, [str(ROOT / path), *rest, *base], config_file=True)


# ----------------------------------------------------------------------------- the queue


@pytest.fixture
def commands(tmp_path, monkeypatch) -> Path:
    """Replaces the repository by stand-ins for its commands."""
    folder = tmp_path / "commands"
    folder.mkdir()
    for name in ("train", "eval", "probe"):
        shutil.copy(ROOT / "tests/study_commands.py", folder / f"{name}.py")
    monkeypatch.setattr(queue, "ROOT", folder)
    monkeypatch.setattr(queue, "POLL_S", 0.02)
    return folder


def run_queue(
    plan: Plan, tmp_path: Path, name: str = "out", workers: int = 2, limit: float | None = None
) -> list[dict]:
    lines = tmp_path / name / "lines.jsonl"
    queue.Queue(plan, lines, tmp_path / name, workers, 1, limit).run()
    return queue.read_lines(lines, plan)


def comparable(lines: list[dict]) -> list[dict]:
    """Returns lines without timings, in the order of their cells."""
    return sorted(({**line, "cpu_s": None} for line in lines), key=lambda line: line["cell"])


def test_the_queue_writes_a_line_for_every_cell(plan_file, commands, tmp_path):
    plan = read_plan(str(plan_file))
    lines = run_queue(plan, tmp_path)
    assert {line["cell"] for line in lines} == {cell.key for cell in plan.cells()} and len(lines) == 13
    line = next(line for line in lines if line["cell"] == "deciding/M/1")
    tasks = line["measures"]["tasks"]
    assert [(cell["length"], cell["placement"]) for cell in tasks][:2] == [(128, "target"), (128, "background")]
    assert line["finetune"]["reached_at"] == 4 and line["commit"] == "c" and line["measures"]["text_ablation"]
    assert "outcomes" not in tasks[0] and "arm" not in tasks[0] and all(line["cpu_s"].values())
    assert list(line["cpu_s"]) == [
        "pretrain_M_1",
        "pretrain_M_1_text_ablation",
        "finetune_deciding_M_1",
        "finetune_deciding_M_1_tasks",
    ]
    oracle, plain = (next(of for of in lines if of["cell"] == f"deciding/{arm}/1") for arm in "OM")
    assert oracle["cpu_s"]["pretrain_M_1"] == plain["cpu_s"]["pretrain_M_1"]
    assert oracle["pretrain"] == plain["pretrain"] and oracle["measures"].keys() == {"tasks"}
    assert oracle["measures"]["tasks"] != plain["measures"]["tasks"]
    assert run_queue(plan, tmp_path) == lines  # a second call finds nothing to do
    assert not list((tmp_path / "out/fake").glob("finetune_*/step_*"))


def test_the_cells_of_a_study_without_fine_tuning_train_once(plan_file, commands, tmp_path):
    """Their measures belong to the pretraining, variants change it, and the analysis compares figures alone."""
    start, _, end = PLAN.partition("[sizes.small]")
    end = end.partition("[[analysis.figures]]")[2]
    start = start.replace('finetune = ["--placements target background"]\n', "")
    start = start.replace('of = "finetune"', 'of = "pretrain"')
    plan_file.write_text(f'{start}[analysis]\nstage = "deciding"\n[[analysis.figures]]{end}')
    with pytest.raises(UserError, match=r"has finetune in \[arms.O\], but no finetune in \[settings\]"):
        read_plan(str(plan_file))
    oracle = 'weights_of = "M"\nfinetune = ["--visible=marked"]\n'
    plan_file.write_text(plan_file.read_text().replace(oracle, ""))
    plan = read_plan(str(plan_file))
    lines = run_queue(plan, tmp_path)
    by_cell = {line["cell"]: line for line in lines}
    assert len(lines) == 13 and "finetune" not in lines[0] and by_cell["deciding/G/1"]["measures"]["tasks"]
    assert by_cell["tuning/M/7/low"]["pretrain"] != by_cell["tuning/M/7/high"]["pretrain"]
    results = analyse(plan, lines)
    assert [row.name for row in results.comparisons] == ["H5", "H2"] and not any(map(len, results.curves.values()))
    assert results.levels[0].values["P"].keys() == {1, 2, 3} and results.levels[1].values.keys() == {"M"}
    first, second = (row.p for row in results.comparisons)
    assert {row.holm for row in results.comparisons} == set(holm([first, second]))
    text = table(plan, results)
    assert "bits_per_byte of pretrain, bits per byte:" in text and "exact of text_ablation (placement=text)" in text
    assert picture(plan, results).startswith(b"\x89PNG")


def test_a_queue_that_is_killed_at_ten_moments_writes_the_lines_of_an_uninterrupted_one(plan_file, commands, tmp_path):
    plan = read_plan(str(plan_file))
    expected = comparable(run_queue(plan, tmp_path, "whole"))
    program = (
        f"import sys; from pathlib import Path; from nanometa.studies import queue\n"
        f"from nanometa.studies.plan import read_plan\n"
        f"queue.ROOT = Path({str(commands)!r}); out = Path({str(tmp_path / 'killed')!r})\n"
        f"queue.Queue(read_plan({str(plan_file)!r}), out / 'lines.jsonl', out, 2, 1, None).run()\n"
    )
    draws, kills = random.Random(5), 0
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    while True:
        process = subprocess.Popen([sys.executable, "-c", program], env=environment, start_new_session=True)
        time.sleep(draws.uniform(1.0, 2.0)) if kills < 10 else process.wait()
        if process.poll() is not None:
            break
        kind = draws.choice((signal.SIGTERM, signal.SIGKILL))
        # only the queue, so that its commands are left behind; or all of them, as when a machine goes down
        if draws.random() < 0.5:
            process.send_signal(kind)
        else:
            os.killpg(process.pid, kind)
        process.wait()
        kills += 1
    assert process.returncode == 0
    lines = queue.read_lines(tmp_path / "killed/lines.jsonl", plan)
    assert comparable(lines) == expected
    assert all(len(line["cpu_s"]) == (4 if line["arm"] == "M" else 3) for line in lines)  # also of earlier calls


def test_a_line_that_a_kill_cut_short_is_written_again(plan_file, commands, tmp_path):
    plan = read_plan(str(plan_file))
    run_queue(plan, tmp_path)
    path = tmp_path / "out/lines.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    assert len({line["cell"] for line in run_queue(plan, tmp_path)}) == 13


def test_a_cell_whose_folders_were_deleted_starts_again(plan_file, commands, tmp_path):
    plan = read_plan(str(plan_file))
    expected = run_queue(plan, tmp_path)
    for path in (tmp_path / "out/fake").glob("*_M_*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    kept = [line for line in expected if not (line["arm"] == "M" and line["seed"] == 1)]
    (tmp_path / "out/lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    assert comparable(run_queue(plan, tmp_path)) == comparable(expected)


def test_runs_that_differ_are_named_with_the_difference(plan_file, commands, tmp_path):
    plan = read_plan(str(plan_file))
    script = (commands / "train.py").read_text()
    (commands / "train.py").write_text(script.replace('"torch": "2"', '"torch": str(time.time())'))
    with pytest.raises(UserError, match="13 cells failed: .* differ in torch"):
        run_queue(plan, tmp_path)


def test_a_cell_that_was_trained_at_two_commits_names_both(plan_file, commands, tmp_path):
    plan = read_plan(str(plan_file))
    script = (commands / "train.py").read_text()
    changing = '"commit": "first" if "run_name=pretrain" in str(sys.argv) else "second"'
    (commands / "train.py").write_text(script.replace('"commit": "c"', changing))
    lines = run_queue(plan, tmp_path)
    assert {line["commit"] for line in lines} == {"second and first"}


def test_weights_that_a_kill_left_behind_are_removed(plan_file, commands, tmp_path):
    plan = read_plan(str(plan_file))
    run_queue(plan, tmp_path)
    left = tmp_path / "out/fake/finetune_deciding_P_1/step_5"
    left.mkdir()
    run_queue(plan, tmp_path)
    assert not left.exists() and list((tmp_path / "out/fake/pretrain_P_1").glob("step_*"))


def test_a_line_of_other_settings_is_refused_but_another_arm_may_change(plan_file, commands, tmp_path):
    plan = read_plan(str(plan_file))
    lines = run_queue(plan, tmp_path)
    # the tuning stage overrides the learning rate, so choosing one for the arm changes only the deciding stage
    plan_file.write_text(PLAN.replace('label = "meta"\n', 'label = "meta"\nfinetune = ["--learning_rate=2"]\n'))
    changed = read_plan(str(plan_file))
    path = tmp_path / "out/lines.jsonl"
    with pytest.raises(UserError, match="a line of deciding/M/1 that was measured with other settings"):
        queue.read_lines(path, changed)
    kept = [line for line in lines if not line["cell"].startswith("deciding/M")]
    path.write_text("".join(json.dumps(line) + "\n" for line in kept))
    assert queue.read_lines(path, changed) == kept


def test_a_failed_command_is_named_and_the_other_cells_are_finished(plan_file, commands, tmp_path):
    plan_file.write_text(PLAN.replace('"--visible=marked"', '"--fail"'))
    plan = read_plan(str(plan_file))
    with pytest.raises(
        UserError, match=r"2 cells failed: deciding/O/1 \(train.py .* ended with status 1 \(this command fails\)"
    ):
        run_queue(plan, tmp_path)
    assert len(queue.read_lines(tmp_path / "out/lines.jsonl", plan)) == 11


def test_a_worker_that_fails_unexpectedly_ends_the_queue(plan_file, commands, tmp_path, monkeypatch):
    """A full disk, for example, must not end one of the threads without a word."""
    plan, written = read_plan(str(plan_file)), []

    def full(path: Path, lines: list[dict]) -> None:
        written.append(lines)
        raise OSError("No space left on device")

    monkeypatch.setattr(queue, "write_lines", full)
    with pytest.raises(OSError, match="No space left"):
        run_queue(plan, tmp_path)
    assert len(written) <= 2  # one for each worker


def test_the_queue_stops_at_its_limit_and_goes_on_later(plan_file, commands, tmp_path):
    plan = read_plan(str(plan_file))
    assert len(run_queue(plan, tmp_path, limit=0.5)) < 13
    assert len(run_queue(plan, tmp_path)) == 13


def test_two_queues_cannot_work_in_one_folder(plan_file, commands, tmp_path):
    plan = read_plan(str(plan_file))
    first = queue.Queue(plan, tmp_path / "a.jsonl", tmp_path / "out", 1, 1, None)
    with pytest.raises(UserError, match="another process works on"):
        queue.Queue(plan, tmp_path / "a.jsonl", tmp_path / "out", 1, 1, None)
    first.lock.release()


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


# ----------------------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run"], "plan is empty"),
        (["run", "nothing.toml"], "the plan nothing.toml cannot be read"),
        (["run", str(META), "--size=hours"], "has no size 'hours'"),
        (["run", str(META), "--workers=0"], "workers=0"),
        (["report", str(META), "--output=missing.jsonl"], "missing.jsonl has no lines yet"),
    ],
)
def test_a_wrong_command_line_gets_one_sentence(tmp_path, arguments, sentence):
    result = cli("study.py", *arguments, cwd=tmp_path)
    assert result.returncode == 2 and sentence in result.stderr.decode() and not list(tmp_path.iterdir())


def test_the_report_writes_a_table_and_a_picture(plan, plan_file, tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in invented(plan, {"O": 0.3}, seeds=range(1, 9))))
    result = cli("study.py", "report", str(plan_file), f"--output={path}", cwd=tmp_path)
    assert result.returncode == 0, result.stderr.decode()
    assert (tmp_path / "fake.md").read_text() in result.stdout.decode()
    assert (tmp_path / "fake.png").read_bytes().startswith(b"\x89PNG")
