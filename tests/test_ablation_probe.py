"""Tests probe.py ablation: each condition changes exactly the attention that it names, and figures equal those of
models that were changed by hand."""

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from nanometa import probe
from nanometa.common.errors import UserError
from nanometa.common.statistics import bits, clustered_ratio, mcnemar, paired_difference
from nanometa.config import TaskConfig
from nanometa.data.layout import IGNORE, Draw
from nanometa.data.loader import Windows
from nanometa.evals.tasks import read as read_tasks
from nanometa.evals.tasks import texts
from nanometa.inference.scoring import score_batch
from nanometa.model import GPT
from nanometa.probes import ablation
from nanometa.probes.ablation import AblationProbe, of_tasks, of_text
from nanometa.probes.interventions import CONDITIONS, changed_attention, record_norms
from nanometa.reports import ablation as section
from nanometa.train import evaluate
from tests.conftest import tree
from tests.runs import run_on, saved, small_run
from tests.test_interventions import muted
from tests.test_model import LAYERED, WITH_MARKERS
from tests.test_perplexity import ALONE
from tests.test_positions import MARKED, PLAIN, kept, lines_of, timeless

# ----------------------------------------------------------------------------- validation windows


def of_condition(lines: list[dict], condition: str) -> dict[str, dict]:
    return {line["tokens"]: line for line in lines if line.get("condition") == condition}


def total(lines: dict[str, dict], name: str = "nats") -> float:
    """Returns the nats per token over both kinds of tokens."""
    return sum(line[name] * line["targets"] for line in lines.values()) / sum(of["targets"] for of in lines.values())


@pytest.mark.parametrize("rule", ["ignore", "skip"])
@pytest.mark.parametrize("second", [name for name in LAYERED if name in WITH_MARKERS])
def test_the_loss_equals_that_of_a_changed_model_in_training(workdir, second, rule):
    """Intact is training's validation. Off is that of a model with zeros, diagonal is that of the arm diagonal."""
    folder = workdir / "data/u"
    run = run_on(folder, second_attention=second, rule=rule)
    data = Windows(folder, "val", run.config.model.block_size, rule)
    lines = of_text(AblationProbe(windows=None), run)()
    others = {"off": muted(run.model)}
    if second == "meta":
        others["diagonal"] = GPT(dataclasses.replace(run.model.cfg, second_attention="diagonal")).eval()
        others["diagonal"].load_state_dict(run.model.state_dict())
    intact = evaluate(copy.deepcopy(run.model), data, run.config, ALONE)["loss"]
    for name, model in others.items():
        of = of_condition(lines, name)
        assert of.keys() == ({"ordinary", "markers"} if rule == "ignore" else {"ordinary"})
        assert total(of, "nats_intact") == pytest.approx(intact, rel=1e-6)
        loss = evaluate(model, data, run.config, ALONE)["loss"]
        assert total(of) == pytest.approx(loss, rel=1e-6) and abs(loss - intact) > 1e-4
        assert total(of, "difference") == pytest.approx(loss - intact, rel=1e-3)
    assert all(line["n"] == data.n_windows for line in lines)


@torch.no_grad()
def test_tokens_are_told_apart_by_the_position_that_predicts(workdir):
    """Counts in single windows which targets are predicted at markers."""
    folder = workdir / "data/u"
    run = run_on(folder, second_attention="meta")
    data = Windows(folder, "val", run.config.model.block_size, "ignore")
    lines = of_text(AblationProbe(windows=5, conditions=("hidden_markers",)), run)()
    sums = {name: ([], [], []) for name in ("ordinary", "markers")}
    for window in data.sample(5):
        batch = data.batch(np.array([window]))
        where = (batch.targets[0] != IGNORE).nonzero().flatten().tolist()
        before = score_batch(run.model, batch).nats[0]
        with changed_attention(run.model, run.tokenizer.meta, "hidden_markers"):
            after = score_batch(run.model, batch).nats[0]
        for name, (first, second, count) in sums.items():
            mine = [i for i, at in enumerate(where)
                    if (batch.tokens[0, at] == run.tokenizer.meta) == (name == "markers")]  # fmt: skip
            first.append(before[mine].double().sum().item())
            second.append(after[mine].double().sum().item())
            count.append(len(mine))
    for name, (first, second, count) in sums.items():
        line = of_condition(lines, "hidden_markers")[name]
        assert line["targets"] == sum(count) > 0 and line["n"] == 5
        assert line["nats_intact"] == pytest.approx(sum(first) / sum(count), rel=1e-6)
        assert line["nats"] == pytest.approx(sum(second) / sum(count), rel=1e-6)
        ends = clustered_ratio(np.subtract(second, first), count)
        assert line["difference_interval"] == pytest.approx(ends, rel=1e-3, abs=1e-6)
        assert ends[0] < line["difference"] < ends[1]


def test_norms_are_averaged_over_the_positions_of_a_kind(workdir):
    folder = workdir / "data/u"
    run = run_on(folder, second_attention="meta")
    data = Windows(folder, "val", run.config.model.block_size, "ignore")
    lines = [line for line in of_text(AblationProbe(windows=4), run)() if line["kind"] == "norm"]
    assert [(line["layer"], line["tokens"]) for line in lines] == [(0, "markers"), (1, "markers")]
    batch = data.batch(data.sample(4))
    with record_norms(run.model) as ratios:
        score_batch(run.model, batch)
    at = batch.tokens == run.tokenizer.meta
    for line, ratio in zip(lines, ratios, strict=True):
        assert line["norm"] == pytest.approx(ratio[at].mean().item(), rel=1e-5) and line["positions"] == at.sum()
        assert line["norm_interval"][0] < line["norm"] < line["norm_interval"][1]


def test_randomly_drawn_positions_are_those_of_validation(workdir):
    folder = workdir / "data/n"
    run = run_on(folder, second_attention="random")
    draw = Draw(run.config.model.random_fraction, run.config.seed, "val")
    data = Windows(folder, "val", run.config.model.block_size, "ignore", draw)
    lines = of_text(AblationProbe(windows=None), run)()
    assert {line.get("condition") for line in lines} == {None, "off"}
    of = of_condition(lines, "off")
    assert total(of, "nats_intact") == pytest.approx(evaluate(run.model, data, run.config, ALONE)["loss"], rel=1e-6)
    assert {line["tokens"] for line in lines} == {"ordinary"}


# ----------------------------------------------------------------------------- task texts


def test_answers_equal_those_of_a_changed_model(tokenizer):
    run = small_run(tokenizer, MARKED, position="rope")
    task = TaskConfig(tasks=("parity",), placements=("target", "none"), level="easy")
    run.config = dataclasses.replace(run.config, task=task)
    cfg = AblationProbe(n=40, lengths=(32,))
    lines, cells = of_tasks(cfg, run)(), cfg.cells(run)
    changed = dataclasses.replace(run, model=muted(run.model))
    for (maker, level, length), placement in zip(cells, ("target", "none"), strict=True):
        mine = [line for line in lines if line["placement"] == placement and line["kind"] == "difference"]
        names = ["off", "diagonal", "hidden_markers"] if placement == "target" else ["off"]
        assert [line["condition"] for line in mine] == names
        examples = texts(maker, level, length, 40)
        before, after = (read_tasks(of, examples, length) for of in (run, changed))
        line = mine[0]
        assert line["outcomes"] == after["outcomes"] and line["exact"] == after["exact"]
        assert line["exact_intact"] == before["exact"] and line["tokens"] == "answers"
        assert (line["nats_intact"], line["nats"]) == pytest.approx((before["nats"], after["nats"]), rel=1e-5)
        sides = bits(before["outcomes"]), bits(after["outcomes"])
        assert (line["lost"], *line["lost_interval"]) == paired_difference(*sides)
        assert line["lost_p"] == mcnemar(*sides)
        if placement == "none":  # nothing to connect
            assert line["difference"] == 0 and line["lost"] == 0
        else:
            assert line["difference_interval"][0] < line["difference"] < line["difference_interval"][1]
    norms = [line for line in lines if line["kind"] == "norm"]
    assert {(line["placement"], line["tokens"]) for line in norms} == {("target", "markers")}


def test_padding_is_not_among_the_positions(tokenizer):
    run = small_run(tokenizer, PLAIN, second_attention="causal")
    run.config = dataclasses.replace(run.config, task=TaskConfig(tasks=("copying",), placements=("none",)))
    cfg = AblationProbe(n=6, lengths=(48,))
    ((maker, level, length),) = cfg.cells(run)
    examples = texts(maker, level, length, 6)
    assert len({len(example.ids) for example in examples}) > 1
    norms = [line for line in of_tasks(cfg, run)() if line["kind"] == "norm"]
    assert [line["positions"] for line in norms] == [sum(len(example.ids) for example in examples)] * 2


# ----------------------------------------------------------------------------- the command


@pytest.fixture
def two_steps(workdir, tmp_path, monkeypatch):
    """A run on text with two checkpoints, of steps 3 and 9."""
    run = run_on(workdir / "data/u", second_attention="meta")
    folder = saved(run, tmp_path / "out/small")
    later = dataclasses.replace(run, state={**run.state, "step": 9}, model=muted(run.model))
    other = saved(later, tmp_path / "other")
    (other / "step_00000009").rename(folder / "step_00000009")
    monkeypatch.chdir(tmp_path)
    return folder


def test_every_step_measures_all_checkpoints_and_draws_curves(two_steps, capsys):
    probe.main(["ablation", f"--run={two_steps}", "--every_step", "--windows=4"])
    lines, said = lines_of(two_steps / "ablation.jsonl"), capsys.readouterr().out
    differences = [(line["step"], line["condition"], line["tokens"]) for line in lines if line["kind"] == "difference"]
    assert differences == [(s, c, t) for s in (3, 9) for c in CONDITIONS for t in ("ordinary", "markers")]
    assert len({line["weights_sha256"] for line in lines}) == 2 and all(line["run"] == "small" for line in lines)
    for line in lines:
        if line["step"] == 9 and line["kind"] == "difference" and line["condition"] != "hidden_markers":
            assert line["difference"] == 0  # its second attention adds nothing
    assert not [line for line in lines if line["step"] == 9 and line["kind"] == "norm"]
    assert (two_steps / "ablation.png").read_bytes().startswith(b"\x89PNG") and "hidden markers" in said
    shown = [of for of in section.panels_of(lines) if of[0]["kind"] == "difference"]
    section.draw(figure := Figure(layout="constrained"), shown[0])
    drawn = [
        (list(one.get_xdata()), list(one.get_ydata())) for one in figure.axes[0].lines if one.get_marker() in "osD"
    ]
    assert drawn == [([3, 9], [of_condition([one for one in lines if one["step"] == s], c)["ordinary"]["difference"]
                               for s in (3, 9)]) for c in CONDITIONS]  # fmt: skip


def test_lines_are_repeatable_and_one_checkpoint_can_be_named(two_steps):
    for _ in range(2):
        probe.main(["ablation", f"--run={two_steps}/step_00000003", "--windows=3", "--conditions", "off"])
    lines = timeless(lines_of(two_steps / "ablation.jsonl"))
    half = len(lines) // 2
    assert lines[:half] == lines[half:] and {line["step"] for line in lines} == {3}
    assert {line.get("condition") for line in lines} == {None, "off"}


def test_a_run_on_tasks_reads_its_tasks_or_text(tokenizer, workdir, tmp_path):
    run = run_on(workdir / "data/u", second_attention="meta")
    folder = kept(run, tmp_path / "out/small", tasks=("parity",), placements=("target",))
    output = tmp_path / "text.jsonl"
    probe.main(["ablation", f"--run={folder}", "--on=text", "--windows=3", f"--output={output}"])
    assert {line["text"] for line in lines_of(output)} == {"validation"}


def test_the_command_on_tasks_judges_lost_answers(tokenizer, tmp_path, capsys):
    run = small_run(tokenizer, MARKED, position="rope")
    folder = kept(run, tmp_path / "out/small", tasks=("parity",), placements=("target",))
    probe.main(["ablation", f"--run={folder}", "--n=12", "--lengths=32"])
    lines, said = lines_of(folder / "ablation.jsonl"), capsys.readouterr().out
    judged = [line for line in lines if line["kind"] == "difference"]
    assert all(line["comparisons"] == 3 and line["lost_verdict"].startswith("undecided: n = 12") for line in judged)
    assert "There is no verdict for n = 12" in said and (folder / "ablation.png").exists()


REFUSED = {
    "no layer": ("n", "none", ("--conditions", "off"), "has no second attention"),
    "nothing to change": ("n", "none", (), "has no second attention: use a run with markers or with a second"),
    "no markers": ("n", "causal", ("--conditions", "diagonal"), "reads texts without markers: use --conditions off."),
    "already": ("u", "diagonal", ("--conditions", "diagonal"), "already attends only to itself"),
    "none": ("u", "none", ("--conditions", "hidden_markers", "off"), "condition off changes nothing in"),
    "twice": ("u", "meta", ("--conditions", "off", "off"), "name each once"),
    "few windows": ("u", "meta", ("--windows=1",), "windows=1 is out of range"),
    "tasks": ("u", "meta", ("--n=100",), "--n has no effect on"),
    "dataset": ("u", "meta", ("--on=tasks", "--windows=5"), "--windows has no effect on"),
    "no folder": ("u", "meta", ("--run=out/small/step_00000003", "--every_step"), "does not name the folder of a run"),
    "no run": ("u", "meta", ("--run=", "--every_step"), "does not name the folder of a run"),
    "no steps": ("u", "meta", ("--run=out", "--every_step"), "there is no step_ checkpoint in 'out'"),
    "markers": ("n", "none", ("--dataset=data/u",), "was trained without markers, and data/u has them"),
    "unknown": ("n", "causal", ("--on=tasks", "--placements=target", "--lengths=20"), "trained without meta-tokens"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_before_anything_is_written(workdir, tmp_path, monkeypatch, case):
    data, second, args, sentence = REFUSED[case]
    saved(run_on(workdir / f"data/{data}", second_attention=second), tmp_path / "out/small")
    (tmp_path / "data").symlink_to(workdir / "data")
    before = tree(tmp_path)
    monkeypatch.chdir(tmp_path)
    run = () if any(arg.startswith("--run") for arg in args) else ("--run=out/small",)
    with pytest.raises(UserError) as refused:
        probe.main(["ablation", *run, *args])
    assert sentence in str(refused.value) and str(refused.value).endswith(".")
    assert tree(tmp_path) == before


def test_conditions_that_change_nothing_are_left_out_and_named(workdir, tmp_path, capsys):
    folder = saved(run_on(workdir / "data/u", second_attention="none"), tmp_path / "out/pause")
    probe.main(["ablation", f"--run={folder}", "--windows=3"])
    said = capsys.readouterr().out
    assert said.count("left out: ") == 2 and "left out: off, because" in said
    lines = lines_of(folder / "ablation.jsonl")
    assert {line["condition"] for line in lines} == {"hidden_markers"}


def test_a_loss_that_is_not_finite_is_refused(workdir, tmp_path):
    run = run_on(workdir / "data/u", second_attention="meta")
    run.model.ln_f.weight.data[0] = float("nan")
    folder = saved(run, tmp_path / "out/small")
    with pytest.raises(UserError, match="is not finite"):
        probe.main(["ablation", f"--run={folder}", "--windows=3"])
    assert not (folder / "ablation.jsonl").exists()


def test_lines_are_valid_json_for_the_report(two_steps):
    probe.main(["ablation", f"--run={two_steps}", "--windows=2"])
    for row in (two_steps / "ablation.jsonl").read_text().splitlines():
        section.check(json.loads(row))
    assert ablation.KINDS == ("ordinary", "markers")
