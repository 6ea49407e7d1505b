"""Tests the plans of studies, and the command line of study.py."""

import types
from pathlib import Path

import pytest

from nanometa.common.errors import UserError
from nanometa.config import MarkerConfig, PrepareConfig, TrainConfig
from nanometa.config.arms import SECOND_ATTENTIONS
from nanometa.config.command_line import load_config
from nanometa.config.weight_settings import COMPARING
from nanometa.evals.compression import CompressionEval, ratios_of
from nanometa.probes import masks
from nanometa.studies.analysis import WAITING, analyse, table
from nanometa.studies.cell import arguments_of, placed, runs_of, words
from nanometa.studies.plan import Cell, joined, read_plan
from tests.conftest import ROOT, cli
from tests.study_plans import PLAN, write_plan

META = ROOT / "studies/meta_tokens.toml"


@pytest.fixture
def plan_file(tmp_path) -> Path:
    return write_plan(tmp_path)


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
        ('of = "pretrain"\nfigure', 'of = "text"\nfigure', r"names a figure of 'text' in \[analysis.figures\]"),
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
    for cell in {cell.arm.name: cell for cell in plan.cells()}.values():
        path, *rest = words(arguments_of(plan, cell)["pretrain"])
        cfg = load_config(TrainConfig, [str(ROOT / path), *rest], config_file=True)
        assert cfg.dataset.removeprefix("data/") in plan.prepare and cfg.model.n_embd == 96
        arms[Path(path).stem] = cfg
    assert set(masks.configs()) < set(arms) and "tiny_gpt2" in arms
    assert len(read_plan(str(ROOT / "studies/sentinels.toml"), "minutes").cells()) == len(plan.arms)


def test_the_plan_of_the_adapters_is_valid():
    """Every arm starts from the one plain model of its seed, and all arms that are compared have the same steps."""
    plan = read_plan(str(ROOT / "studies/adapters.toml"))
    assert all(runs_of(plan, cell)["pretrain"] == f"pretrain_all_{cell.seed}" for cell in plan.cells())
    trained, steps = set(), set()
    for cell in {cell.arm.name: cell for cell in plan.cells()}.values():
        path, *rest = words(arguments_of(plan, cell)["finetune"])
        cfg = load_config(TrainConfig, [str(ROOT / path), *rest, "--init_from=out/base"], config_file=True)
        assert cfg.dataset == "data/stdlib_none" and cfg.model.n_embd == 96
        trained.add((Path(path).stem, cfg.train_only))
        steps.add((cfg.max_steps, cfg.learning_rate))
    assert {("tiny_sr", "lora"), ("tiny_clcr", "lora"), ("tiny_gpt2", "lora")} < trained
    assert len(trained) == len(plan.arms) and len(steps) == 1
    assert len(read_plan(str(ROOT / "studies/adapters.toml"), "minutes").cells()) == len(plan.arms)


def test_the_plan_of_the_weighted_losses_is_valid():
    """Its branches can be given as they are, and every weighting that compares losses is an arm."""
    plan, rules = read_plan(str(ROOT / "studies/weighting.toml")), set()
    for cell in {cell.arm.name: cell for cell in plan.cells()}.values():
        for kind in ("pretrain", "finetune"):
            path, *rest = words(arguments_of(plan, cell)[kind])
            start = ["--branch_from=out/x/step_00000700"] if kind == "finetune" else []
            cfg = load_config(TrainConfig, [str(ROOT / path), *rest, *start], config_file=True)
            assert cfg.dataset.removeprefix("data/") in plan.prepare and cfg.model.n_embd == 96
        rules.add(cfg.weights.weighting)
    assert rules == {"uniform", "permuted", *COMPARING}
    assert len(read_plan(str(ROOT / "studies/weighting.toml"), "minutes").cells()) == len(plan.arms)


@pytest.mark.parametrize("name", ["sentinels_text", "sentinels_more"])
def test_the_further_plans_of_the_sentinels_are_valid(name):
    """Every command of every cell is accepted, in the study and in its small size."""
    for size in ("", "minutes"):
        plan = read_plan(str(ROOT / f"studies/{name}.toml"), size)
        assert len(plan.cells()) == len(plan.arms) * (1 if size or name == "sentinels_more" else 3)
        for cell in {cell.arm.name: cell for cell in plan.cells()}.values():
            arguments = arguments_of(plan, cell)
            path, *rest = words(arguments["pretrain"])
            cfg = load_config(TrainConfig, [str(ROOT / path), *rest], config_file=True)
            assert cfg.dataset.removeprefix("data/") in plan.prepare and cfg.model.n_embd == 96
            for measure in arguments.keys() - {"pretrain"}:
                load_config(CompressionEval, [*words(arguments[measure]), "--run=out/x"])
    for dataset, commands in plan.prepare.items():
        assert load_config(PrepareConfig, commands[-1].split()[2:]).name in (dataset, "")


@pytest.mark.parametrize("name", ["sentinels", "sentinels_more", "adapters"])
def test_every_arm_can_be_read_by_the_methods_of_its_measures(name):
    plan, read = read_plan(str(ROOT / f"studies/{name}.toml")), 0
    for cell in {cell.arm.name: cell for cell in plan.cells()}.values():
        arguments = arguments_of(plan, cell)
        for measure in arguments.keys() - {"pretrain", "finetune"}:
            path, *rest = words(arguments[plan.measures[measure].of])
            start = ["--init_from=out/x"] if plan.measures[measure].of == "finetune" else []
            trained = load_config(TrainConfig, [str(ROOT / path), *rest, *start], config_file=True)
            stored = 0 if trained.dataset.endswith("none") else 51
            run = types.SimpleNamespace(config=trained, state={"data": {"chunk_markers": stored}}, folder="out/x")
            cfg = load_config(CompressionEval, [*words(arguments[measure]), "--run=out/x"])
            for method in cfg.methods:
                read += len(ratios_of(cfg, run, method))  # raises UserError if it cannot be read so
    assert read > 10


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
                 "f1_full": 0.7, "loss_text": 2.5},
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
