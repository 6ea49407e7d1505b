import dataclasses
import re
import runpy
import typing
from pathlib import Path

import pytest

from nanometa.common.errors import UserError
from nanometa.config import (
    GPTConfig,
    MarkerConfig,
    PrepareConfig,
    SampleConfig,
    TrainConfig,
    WeightConfig,
    train_config_from_dict,
    train_settings,
)
from nanometa.config.arms import SECOND_ATTENTIONS, SecondAttention, arm_label
from nanometa.config.checks import bool_names, field_names, flat, flat_fields, similar_path, to_dict
from nanometa.config.command_line import join_help_lines, load_config, recipes
from nanometa.config.settings import setting
from nanometa.training.dataset import recipe_of
from tests.conftest import ROOT

FILES = recipes(ROOT / "config")
RECIPES = [path for path in FILES if isinstance(runpy.run_path(str(path))["config"], PrepareConfig)]
CONFIGS = [path for path in FILES if path not in RECIPES]


def load(*argv: str, cls=TrainConfig):
    return load_config(cls, list(argv), config_file=cls is not SampleConfig)


@pytest.mark.parametrize("cls", [TrainConfig, PrepareConfig, SampleConfig])
def test_names_of_settings_are_unique_over_all_dataclasses(cls):
    names = field_names(cls)
    assert len(names) == len(set(names)) and "model" not in names


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_file_loads_and_survives_saving(path):
    cfg = load(str(path))
    assert cfg.run_name == path.stem
    assert train_config_from_dict(to_dict(cfg)) == cfg


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_and_can_be_overridden(path):
    recipe = load(str(path), cls=PrepareConfig)
    assert load(str(path), "--injection=none", cls=PrepareConfig) == dataclasses.replace(recipe, injection="none")


def test_every_dataset_of_a_config_has_a_recipe():
    recipes = {path.stem for path in RECIPES}
    assert {"stdlib", "c4"} <= recipes
    for path in CONFIGS:
        assert recipe_of(load(str(path)).dataset).recipe in recipes


def test_a_bool_setting_needs_no_value():
    for argv in (["--dry_run"], ["--dry-run"], ["--dry_run", "True"], ["--dry_run=True"], ["--dry_run", "--n_layer=2"]):
        assert load(*argv).dry_run is True
    cfg = load("--n_layer=2", "--bias", "--compile=False", "--dry_run")
    assert (cfg.model.n_layer, cfg.model.bias, cfg.compile, cfg.dry_run) == (2, True, False, True)
    assert load("--compile", "False").compile is False and load("--dry_run=False").dry_run is False
    assert load("--run_name", "x", "--dry_run").run_name == "x"
    assert bool_names(TrainConfig) == [
        "bias",
        "rope_dynamic",
        "draw_curves",
        "compile",
        "activation_checkpointing",
        "dry_run",
        "allow_changed_data",
        "skip_spikes",
        "semantic_lists",
        "shuffle_answers",
    ]


def test_meta_gpt2_has_the_papers_settings():
    cfg = load(str(ROOT / "config/meta_gpt2.py"))
    m = cfg.model
    assert (m.n_layer, m.n_head, m.n_embd, m.block_size, m.dropout) == (12, 12, 768, 1024, 0.0)
    assert cfg.batch_size * m.block_size == 491_520
    assert (cfg.max_steps, cfg.warmup_steps, cfg.learning_rate, cfg.min_lr) == (200_000, 2000, 6e-4, 6e-5)
    assert (cfg.beta1, cfg.beta2, cfg.weight_decay, cfg.grad_clip) == (0.9, 0.95, 0.1, 1.0)


@pytest.mark.parametrize("size", ["gpt2", "tiny"])
def test_the_configs_of_arms_differ_only_in_the_arm(size):
    """All arms have the same steps, windows, rates and seeds, and windows with the same content (922 of 1024, 461 of
    512)."""
    file = {"gpt2": "config/{}_gpt2.py", "tiny": "config/tiny_{}.py"}[size].format
    meta = load(str(ROOT / file("meta")))
    bare = {"gpt2": "config/gpt2.py", "tiny": "config/tiny_gpt2.py"}[size]
    with_markers = (meta.dataset, meta.model.block_size)
    without = (load(str(ROOT / bare)).dataset, {"gpt2": 922, "tiny": 461}[size])
    assert without[0].endswith("_none") and with_markers[0].endswith("_uniform")
    for path, data, model in (
        (bare, without, {"second_attention": "none"}),
        (file("causal2"), without, {"second_attention": "causal"}),
        (file("random"), without, {"second_attention": "random"}),
        (file("widemlp"), without, {"second_attention": "none", "n_inner": 6 * meta.model.n_embd}),
        (file("pause"), with_markers, {"second_attention": "none"}),
        (file("diagonal"), with_markers, {"second_attention": "diagonal"}),
        (file("meta_mean"), with_markers, {"second_attention": "meta_mean"}),
        (file("read_meta"), with_markers, {"second_attention": "read_meta"}),
        (file("causal2_markers"), with_markers, {"second_attention": "causal"}),
    ):
        model = dataclasses.replace(meta.model, block_size=data[1], **model)
        arm = dataclasses.replace(meta, dataset=data[0], run_name=Path(path).stem, model=model)
        assert load(str(ROOT / path)) == arm, path


def test_settings_of_every_type_can_be_overridden(tmp_path):
    cfg = load("--n_layer=6", "--learning_rate=1", "--compile=False", "--second_attention=none", "--vocab_size=100",
               "--n-head=3", "--run_name", "x")  # fmt: skip
    assert cfg.model == GPTConfig(n_layer=6, n_head=3, second_attention="none", vocab_size=100)
    assert (
        cfg.learning_rate == 1.0 and type(cfg.learning_rate) is float and cfg.compile is False and cfg.run_name == "x"
    )
    assert load("--vocab_size=None").model.vocab_size is None
    assert load("--files", "a", "b*", "--source=files", cls=PrepareConfig).files == ("a", "b*")


def test_command_line_beats_file_beats_default():
    path = str(ROOT / "config/tiny_meta.py")
    assert load(path).model.n_layer == 4 != GPTConfig().n_layer
    assert load(path, "--n_layer=2").model.n_layer == 2
    assert load(path, "--n_layer=2").model.n_embd == load(path).model.n_embd


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--n_leyer=4"], "unknown setting --n_leyer: did you mean 'n_layer'?"),
        (["--learning_rte=1"], "did you mean 'learning_rate'?"),
        (["--lr=3"], "unknown setting --lr: did you mean 'learning_rate'?"),
        (["--bs=3"], "did you mean 'batch_size'?"),
        (["--wd=3"], "did you mean 'weight_decay'?"),
        (["--epochs=3"], "did you mean 'max_steps'?"),
        (["--max-iters=3"], "did you mean 'max_steps'?"),
        (["--seq_len=3"], "did you mean 'block_size'?"),
        (["--optimizer=moun"], r"it must be one of adamw, muon \(did you mean 'muon'\?\); --help"),
        (["--optimizer=AdamW"], r"it must be one of adamw, muon \(did you mean 'adamw'\?\); --help"),
        (["--dtype", "bf16"], r"float32 \(did you mean 'bfloat16'\?\)"),
        (["--tasks", "parity", "copyng"], r"parity, copying \(did you mean 'copying'\?\)"),
        (["--optimizer=sgd"], "it must be one of adamw, muon; --help"),
        (["--n_layer=six"], "^--n_layer=six is invalid: it must be a whole number; --help lists all settings"),
        (["--n-layer", "six"], "^--n_layer=six is invalid: it must be a whole number"),
        (["--learning_rate=fast"], "^--learning_rate=fast is invalid: it must be a number;"),
        (["--n_inner=x"], "^--n_inner=x is invalid: it must be a whole number or None;"),
        (["--tasks", "copying", "x"], "^--tasks=copying x is invalid: it must be a list, each item of .*copying"),
        (["--compile=maybe"], "^--compile=maybe is invalid: it must be True or False"),
        (["--second_attention=metta"], "^--second_attention=metta is invalid: it must be one of meta.*causal.*none"),
        (["--n_layer"], "^--n_layer has no value: it must be a whole number"),
        (["--dry_run", "perhaps"], "^--dry_run=perhaps is invalid: it must be True or False"),
        (["--dry_run", "--dry_run=True"], "--dry_run is given 2 times"),
        (["--n_layer=4", "--n_layer=5"], "--n_layer is given 2 times: give it once"),
        (["--n_layer=4", "--n-layer=5"], "--n_layer is given 2 times"),
        (["--n_layer=4", "oops"], "unexpected argument 'oops'"),
        (["--n_layer=0"], "n_layer=0 is out of range: it must lie in 1"),
        (["--max_steps=0"], "max_steps=0 is out of range: it must be at least 1"),
        (["--batch_size=1000000000000"], "batch_size=1000000000000 is out of range"),
        (["--weight_decay=inf"], "weight_decay=inf is out of range: it must be finite"),
        (["--dropout=1"], r"dropout=1.0 is out of range: it must lie in \[0, 1\)"),
        (["--learning_rate=nan"], "learning_rate=nan is out of range"),
        (["--learning_rate=1e-5"], "min_lr=6e-05 is out of range: it must be at most learning_rate=1e-05"),
        (["--n_embd=100"], r"n_embd=100 cannot be split into n_head=12 heads: use n_embd=96 or 108"),
        (["--n_embd=36", "--position=rope"], "even head size, but n_embd/n_head = 3: use n_embd=24 or 48"),
        (["config/tiny_meta.py", "--n_head=5"], "use n_embd=190 or 200 or another n_head"),
        (["--config=config/tiny_meta.py"], "unknown setting --config: give the config file as the first argument"),
        (["config/tiny_meta.py", "config/tiny_gpt2.py"], "config/tiny_gpt2.py': give only one config file"),
        (["--n_layer=2", "config/tiny_meta.py"], "config/tiny_meta.py': the config file must be the first argument"),
        (["--keep=1"], "keep=1 is out of range.*damaged"),
        (["--run_name=../x"], "run_name='../x' is out of range.*folder name"),
        (["config/tiny_mata.py"], "no config file 'config/tiny_mata.py': did you mean 'config/tiny_meta.py'"),
    ],
)  # fmt: skip
def test_bad_command_lines_get_one_sentence(argv, sentence, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=sentence) as caught:
        load(*argv)
    assert "\n" not in str(caught.value) and "│" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "config = TrainConfig(learing_rate=1e-4)",
            "TrainConfig has no setting 'learing_rate': did you mean 'learning_rate'",
        ),
        (
            "config = TrainConfig(n_layer=4)",
            r"TrainConfig has no setting 'n_layer', because it belongs to GPTConfig: write model=GPTConfig\(n_layer",
        ),
        (
            "config = TrainConfig(model=GPTConfig(n_layer='6'))",
            "n_layer='6' has the wrong type: it must be a whole number",
        ),
        ("config = TrainConfig(model=GPTConfig(bias=1))", "bias=1 has the wrong type: it must be True or False"),
        (
            "config = TrainConfig(dtype='float16')",
            "dtype='float16' has the wrong type: it must be one of auto, bfloat16, float32 .did you mean 'bfloat16'",
        ),
        ("config = TrainConfig(max_steps=True)", "max_steps=True has the wrong type"),
        (
            "config = TrainConfig(eval_windows=2.5)",
            "eval_windows=2.5 has the wrong type: it must be a whole number or None",
        ),
        ("config = {}", "must define `config = TrainConfig"),
        ("confg = TrainConfig()", r"must define `config = TrainConfig\(...\)`, but it defines no config"),
        ("config = TrainConfig(", "SyntaxError"),
        ("config = 1/0", "ZeroDivisionError"),
        ("import sys; sys.exit(0)", "SystemExit"),
    ],
)
def test_bad_config_files_get_one_sentence(tmp_path, text, sentence):
    path = tmp_path / "c.py"
    path.write_text("from config import GPTConfig, TrainConfig\n" + text)
    with pytest.raises(UserError, match=sentence) as caught:
        load(str(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_config_file_that_is_missing_in_a_folder_without_any_is_looked_for_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="'config/tiny_meta.py': run this in the folder of the repository.* full path"):
        load("config/tiny_meta.py")


@pytest.mark.parametrize(
    ("name", "known", "similar"),
    [
        ("data/mine_unifrom", ["data/mine_none", "data/mine_uniform"], "data/mine_uniform"),
        ("mine_uniform", ["data/mine_uniform"], "data/mine_uniform"),
        ("data/mine_none", ["data/mine_uniform"], None),
        ("out/quickstart", ["out/my_meta", "out/stand_in"], None),
        ("x", [], None),
    ],
)
def test_a_suggested_path_is_similar_in_its_last_part(name, known, similar):
    assert similar_path(name, known) == similar


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--source=files"], "needs files: give, for example, --source=files --files"),
        (["--files", "a.txt"], "only used with --source=files"),
        (["--chunk_markers=0"], "chunk_markers=0 places no markers: use --injection=none"),
        (["--val_fraction=0"], "strictly between"),
        (["--name=a/b"], "folder name"),
        (["--bpe_vocab_size=200"], "257"),
        (["--min_document_tokens=-1"], "min_document_tokens=-1 is out of range: it must lie in 0"),
    ],
)
def test_bad_settings_of_prepare_are_refused(argv, sentence):
    with pytest.raises(UserError, match=sentence):
        load(*argv, cls=PrepareConfig)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [(["--temperature=-1"], "temperature"), (["--temperature=1e-40"], "temperature"), (["--top_p=0"], "top_p"),
     (["--top_k=0"], "top_k"), (["--count=0"], "count"), (["some.py"], "unexpected argument"),
     (["--prompt=a", "--prompt_file=b"], "both given")],
)  # fmt: skip
def test_bad_settings_of_sample_are_refused(argv, sentence):
    with pytest.raises(UserError, match=sentence):
        load(*argv, cls=SampleConfig)


def test_a_run_without_its_option_is_offered_with_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out/my_meta").mkdir(parents=True)
    with pytest.raises(UserError, match=r"unexpected argument 'out/my_meta': did you mean --run=out/my_meta\?"):
        load("out/my_meta", cls=SampleConfig)


def test_every_setting_has_a_help_text():
    """Every setting has a docstring, which --help shows without the line breaks of the source."""
    for cls in (TrainConfig, PrepareConfig, SampleConfig):
        join_help_lines(cls)
        for name, field in flat_fields(cls).items():
            assert len(field.metadata["help"]) > 10 and "\n" not in field.metadata["help"], name


def test_what_other_positions_get_needs_all_markers_as_the_connected_positions():
    for changes in ({"connects": "random", "others": "mean"}, {"connects": "markers", "others": "read", "window": 2}):
        with pytest.raises(ValueError, match="is implemented for all markers only"):
            SecondAttention("x", "x", markers="needed", **changes)


def test_every_arm_has_its_own_label():
    allowed = {"needed": (True,), "refused": (False,), "allowed": (False, True)}
    cases = [(second, wide, marked) for second in SECOND_ATTENTIONS.values() for wide in (False, True)
             for marked in allowed[second.markers]]  # fmt: skip
    names = [arm_label(*case) for case in cases]
    assert len(set(names)) == len(names)
    assert {"diagonal", "meta+mean", "read meta"} < {*names}
    assert {"meta", "causal2", "random", "widemlp", "pause", "gpt2", "causal2 with markers", "pause, wide mlp"} <= {
        *names
    }


# ----------------------------------------------------------------------------- settings that were typed


def test_typed_and_named_settings_are_known_even_at_their_default(tmp_path):
    """A value counts even if the command line writes it in another way, or if a call in a config file names it."""
    assert load().typed == ()
    cfg = load("--n-layer=12", "--position", "learned", "--bias=False", "--tasks", "parity", "copying")
    assert cfg.typed == ("bias", "n_layer", "position", "tasks") and cfg.model == GPTConfig()
    path = tmp_path / "c.py"
    path.write_text(
        "from config import GPTConfig, TrainConfig\n"
        "config = TrainConfig(GPTConfig(position='learned', n_embd=96), target_rule='ignore')"
    )
    assert load(str(path), "--seed=1337").typed == ("n_embd", "position", "seed", "target_rule")
    # a recipe that is made from another one by `replace` names the settings that differ from the defaults
    path.write_text(
        "from dataclasses import replace\nfrom config.tiny_meta import config as meta\n"
        "config = replace(meta, model=replace(meta.model, bias=True))"
    )
    for _ in range(2):  # once when the other recipe is read for the first time, and once when it is cached
        assert {"bias", "n_layer", "position"} <= {*load(str(path)).typed}
        assert not {"second_attention", "rope_theta", "target_rule", "seed"} & {*load(str(path)).typed}
    assert {"second_attention", "n_layer"} <= {*load(str(ROOT / "config/tiny_meta.py")).typed}


def test_the_list_of_typed_settings_is_not_a_setting(capsys):
    cfg = load("--n_layer=3")
    assert dataclasses.replace(cfg, seed=1).typed == ("n_layer",)
    assert cfg == dataclasses.replace(cfg, typed=()) and "typed" not in {**to_dict(cfg), **flat(cfg)}
    with pytest.raises(UserError, match="unknown setting --typed"):
        load("--typed", "x")
    with pytest.raises(SystemExit):
        load("--help")
    assert "typed" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ("--random_fraction=0.1", "only used with --second_attention=random, but second_attention=meta; leave"),
        ("--second_attention=none --random-fraction 0.2", "only used with --second_attention=random"),
        ("--rope_theta=5", "only used with --position=rope, but position=learned"),
        ("--decay_fraction=0.2", "only used with --schedule=wsd, but schedule=cosine"),
        ("--schedule=constant --min_lr=0", "only used with --schedule=cosine|wsd, but schedule=constant"),
        ("--schedule=constant --lr_decay_steps=9", "only used with --schedule=cosine|wsd"),
        ("--price=2", "only used with --dry_run=True, but dry_run=False"),
        ("--dry_run=False --mfu=0.4", "only used with --dry_run=True"),
        ("--allow_changed_data", "only used with --init_from=resume|auto or with --branch_from, but init_from=scratch"),
        ("--level=hard", "only used with --tasks, but tasks=()"),
        ("--verify=header --tasks parity", "only used without --tasks, but tasks=parity"),
        ("--question=index --tasks parity", "only used with --tasks=list_recall, but tasks=parity"),
        ("--meta_share=0.2 --tasks parity", "only used with --placements=background, but placements=target"),
        ("--meta_share=0.2 --placements background", "only used with --tasks"),
    ],
)  # fmt: skip
def test_a_typed_setting_without_an_effect_is_refused(argv, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)) as refused:
        load(*argv.split())
    assert str(refused.value).startswith("--") and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "argv",
    [
        "--position=rope --rope_scaling=pi --yarn_ramp=paper --init_from=out/a",
        "--schedule=wsd --decay_fraction=0.2 --dry_run --mfu=0.4",
        "--init_from=resume --allow_changed_data",
        "--branch_from=out/a/step_00000001 --allow_changed_data",
        "--tasks list_recall --question=after --placements every background --meta_share=0.2",
        "--tasks parity --init_from=out/a --rope_theta=5",
        "--schedule=constant --learning_rate=1e-6",
    ],
)
def test_a_typed_setting_with_an_effect_is_accepted(argv):
    """A setting of the model also counts as having an effect if the run that is taken over may use it."""
    assert load(*argv.split())


@pytest.mark.parametrize(
    ("cls", "argv", "sentence"),
    [
        (PrepareConfig, "--hf_config=en", "only used with --source=hf, but source=stdlib"),
        (PrepareConfig, "--text_column=text", "only used with --source=files|hf or with --extra_files"),
        (PrepareConfig, "--packages numpy", "only used with --source=packages"),
        (PrepareConfig, "--tokenizer=gpt2 --bpe_vocab_size=4096", "only used with --tokenizer=bpe"),
        (PrepareConfig, "--injection=none --chunk_markers=51", "only used with --injection=uniform|periodic"),
        (PrepareConfig, "--merge a b --workers=2", "only used without --merge"),
        (PrepareConfig, "--inspect=data/x --seed=1", "--seed has no effect with --inspect"),
        (SampleConfig, "--temperature=0 --top_k=5", "only used with --temperature above 0, but temperature=0"),
        (SampleConfig, "--temperature=0 --top_p=1", "only used with --temperature"),
    ],
)
def test_prepare_and_sample_refuse_typed_settings_without_an_effect(cls, argv, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        load(*argv.split(), cls=cls)


def test_a_recipe_may_name_a_setting_that_the_command_line_makes_unused():
    """config/tiny_meta.py sets min_lr, which a constant schedule does not use."""
    assert load(str(ROOT / "config/tiny_meta.py"), "--schedule=constant").min_lr == 1e-4
    assert load(str(ROOT / "config/c4.py"), "--injection=none", cls=PrepareConfig).chunk_markers == 102


def test_only_with_names_existing_settings_and_values():
    for cls in (TrainConfig, PrepareConfig, SampleConfig):
        declared = flat_fields(cls)
        for name, field in declared.items():
            for other, accepted in field.metadata.get("only_with", {}).items():
                hint = schema_hints(cls)[other]
                choices = typing.get_args(hint)
                if typing.get_origin(hint) is typing.Literal:
                    assert set(accepted) <= set(choices), (name, other)
                assert other in declared and other != name


def schema_hints(cls) -> dict:
    hints = {}
    for name, hint in typing.get_type_hints(cls).items():
        hints |= schema_hints(hint) if dataclasses.is_dataclass(hint) else {name: hint}
    return hints


@pytest.mark.parametrize(
    ("argv", "injection", "idle"),
    [
        ("--top_k=1 --temperature=0.5", "uniform", "temperature"), ("--top_p=0.5 --top_k=1", "uniform", "top_p"),
        ("--top_k=1 --seed=3", "periodic", "seed"), ("--temperature=0 --seed=3", "none", "seed"),
        ("--temperature=0 --seed=3", "uniform", ""), ("--top_k=1 --seed=3", "uniform", ""), ("--seed=3", "none", ""),
        ("--top_k=1", "none", ""), ("--temperature=0", "none", ""),
    ],
)  # fmt: skip
def test_settings_of_sampling_that_a_run_cannot_use_are_refused(argv, injection, idle):
    """Whether the seed has an effect depends on the run, which may place markers at random."""
    cfg = load(*argv.split(), cls=SampleConfig)
    if not idle:
        return cfg.refuse_unused(injection, MarkerConfig())
    with pytest.raises(UserError, match=f"^--{idle} has no effect.* leave"):
        cfg.refuse_unused(injection, MarkerConfig())


def test_the_seed_of_greedy_samples_places_random_segments():
    cfg = load("--temperature=0", "--seed=3", cls=SampleConfig)
    for given in ({"marker_place": "random"}, {"marker_place": "span"}, {"evict": "scattered"}):
        cfg.refuse_unused("none", MarkerConfig(**given))
    with pytest.raises(UserError, match="^--seed has no effect"):
        cfg.refuse_unused("none", MarkerConfig(marker_place="sentence"))


def test_a_seed_without_anything_random_is_refused():
    for meta in ("none", "periodic"):
        with pytest.raises(UserError, match="--seed has no effect: it is only used with --temperature above 0 or with"):
            load("--temperature=0", f"--meta={meta}", "--seed=1", cls=SampleConfig)


# ----------------------------------------------------------------------------- what a resumed run may change


def test_the_settings_that_a_resumed_run_may_change():
    """A setting may not change on resume unless its declaration allows it."""
    rules = {
        name: field.metadata.get("on_resume", "may not change") for name, field in flat_fields(TrainConfig).items()
    }
    free = {name for name, rule in rules.items() if rule == "may change"}
    assert free == {
        "verify", "micro_batch_size", "max_steps", "schedule", "learning_rate", "min_lr", "warmup_steps",
        "lr_decay_steps", "decay_fraction", "weight_decay", "beta1", "beta2", "grad_clip", "max_skipped",
        "spike_deviations", "skip_spikes", "log_interval", "eval_interval", "save_interval", "keep", "wandb", "device",
        "dtype", "compile", "activation_checkpointing", "stop_at", "tracker", "draw_curves", "sample_interval",
        "sample_prompt",
    }  # fmt: skip
    assert {name for name, rule in rules.items() if rule == "ignored"} == {
        "run_name", "out_dir", "init_from", "branch_from", "dataset", "allow_changed_data", "dry_run", "accelerator",
        "n_accelerators", "mfu", "price", "show_batch",
    }  # fmt: skip
    assert {name for name, rule in rules.items() if rule == "a branch may change"} == {
        "scorer", *field_names(WeightConfig)
    }  # fmt: skip
    assert set(rules.values()) == {"may change", "may not change", "ignored", "a branch may change"}
    assert setting(1).metadata["on_resume"] == "may not change"


def test_settings_saved_by_other_versions_load_or_are_refused(monkeypatch):
    """A missing setting gets its default, an unknown one is refused, and ALIASES translates old names."""
    saved = to_dict(dataclasses.replace(TrainConfig(), seed=5))
    del saved["grad_clip"], saved["model"]["bias"], saved["task"]
    assert train_config_from_dict(saved) == dataclasses.replace(TrainConfig(), seed=5)
    for part in (saved, saved["model"]):
        part["gone"] = 3
        with pytest.raises(UserError, match="does not fit this version of the code .*'gone'"):
            train_config_from_dict(saved)
        monkeypatch.setitem(train_settings.ALIASES, "gone", None)
        assert train_config_from_dict(saved).seed == 5
        monkeypatch.delitem(train_settings.ALIASES, "gone")
        del part["gone"]
    saved["grad_norm"] = 2.0
    monkeypatch.setitem(train_settings.ALIASES, "grad_norm", "grad_clip")
    assert train_config_from_dict(saved).grad_clip == 2.0
