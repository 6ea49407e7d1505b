"""Compares LoRA with peft, and loads exported adapters with it."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, inject_adapter_in_model

from nanometa.common.errors import UserError
from nanometa.config import MarkerConfig, TrainConfig
from nanometa.config.command_line import load_config
from nanometa.data.tokenizer import Tokenizer
from nanometa.interop.adapter import TARGETS
from nanometa.interop.export import ExportConfig, export
from nanometa.layers.loss import Objective
from nanometa.model import GPT
from nanometa.training.adapters import attach, merge
from nanometa.training.checkpoint import Run, load_run
from tests.conftest import WORDS
from tests.runs import saved, small_run
from tests.test_adapters import batch, hidden, settings, trained_weights


def wake_factors(model: GPT, seed: int = 0) -> GPT:
    """Draws the factors at random. With B at its initial zeros, no test of them could fail."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith((".A", ".B")):
                p.normal_(0, 0.3, generator=generator)
    return model


@pytest.mark.parametrize("second", ["none", "meta"])
def test_the_same_factors_give_pefts_outputs_and_gradients(second):
    """peft adds a second path beside each frozen layer; here the factors change the weight. Both in float64."""
    cfg = settings("lora", second)
    ours = wake_factors(attach(trained_weights(cfg), cfg, 0)).double()
    targets = TARGETS.removeprefix(r"transformer\.")
    lora = LoraConfig(r=cfg.lora_r, lora_alpha=cfg.lora_alpha, lora_dropout=0.0, target_modules=targets)
    theirs = inject_adapter_in_model(lora, trained_weights(cfg).double())
    modules = dict(theirs.named_modules())
    pairs = []
    for name, p in ours.named_parameters():
        if p.requires_grad:
            layer, letter = name.split(".parametrizations.")[0], name[-1]
            other = getattr(modules[layer], f"lora_{letter}")["default"].weight
            with torch.no_grad():
                other.copy_(p)
            pairs.append((p, other))
    assert len(pairs) == sum(p.requires_grad for p in theirs.parameters()) == (8 if second == "none" else 16)
    nats = [Objective(model)(*batch()) for model in (ours, theirs)]
    torch.testing.assert_close(*nats, rtol=1e-6, atol=1e-6)
    for one in nats:
        one.backward()
    for p, other in pairs:
        assert p.grad.norm() > 0.01
        torch.testing.assert_close(p.grad, other.grad, rtol=1e-6, atol=1e-6)
    found = hidden(ours)
    assert (found - hidden(trained_weights(cfg).double()))[..., :60].abs().max() > 0.1
    torch.testing.assert_close(found, hidden(theirs), rtol=1e-6, atol=1e-6)


# ----------------------------------------------------------------------------- exported adapters


@pytest.fixture(scope="module")
def small_tokenizer() -> Tokenizer:
    return Tokenizer.train([" ".join(WORDS) + "\n"] * 3, 300)


def adapted(tokenizer: Tokenizer, folder: Path, init_from: str = "out/base", **changes) -> tuple[Path, Path]:
    """Saves a run, and one that was trained from it with LoRA. Returns their folders. changes: of the second config,
    or of the shape of both."""
    chunk_markers = changes.pop("chunk_markers", 0)
    more = {name: changes.pop(name) for name in ("train_only", "markers", "target_rule") if name in changes}
    data = {"injection": "none", "chunk_content": 32, "chunk_markers": 0, "dataset": "x"}
    base = small_run(tokenizer, data, **{"second_attention": "none", **changes})
    more = {"train_only": "lora", "lora_r": 4, "init_from": init_from, **more}
    if more["train_only"] != "lora":
        del more["lora_r"]
    cfg = dataclasses.replace(base.config, **more)
    data = {**data, "chunk_markers": chunk_markers, "injection": "uniform" if chunk_markers else "none"}
    base_folder = saved(base, folder / "base")  # before the adapters are attached, which change the model in place
    model = wake_factors(attach(load_run(base_folder).model, cfg, chunk_markers))
    run = Run(model, tokenizer, cfg, {**base.state, "data": data}, folder / "tuned")
    return base_folder, saved(run, folder / "tuned")


def exported(run: Path, *args: str) -> Path:
    name = "adapter" if "--adapter" in args else "hf"
    given = [f"--run={run}", f"--output={run.parent / f'{run.name}_{name}'}", *args]
    return export(load_config(ExportConfig, given))


@pytest.mark.parametrize("shape", [{}, {"bias": True}, {"position": "rope", "second_attention": "causal"}])
def test_peft_loads_an_exported_adapter_over_the_exported_base(small_tokenizer, tmp_path, shape, capsys):
    """It computes what the merged run computes, and so does the export of the merged run."""
    base, tuned = adapted(small_tokenizer, tmp_path, **shape)
    folders = [exported(run, "--eval_texts=0") for run in (base, tuned)]
    load = transformers.AutoModelForCausalLM.from_pretrained
    theirs, whole = (load(folder, trust_remote_code=True).double().eval() for folder in folders)
    tokens = torch.randint(0, small_tokenizer.n_content, (2, 20), generator=torch.Generator().manual_seed(0))
    run = load_run(tuned)
    model, n = run.model.double(), run.tokenizer.n_content
    with torch.no_grad():
        ours = (model(tokens, torch.arange(20).expand(2, -1), None) @ model.wte.weight.T)[..., :n]
        before = theirs(tokens).logits[..., :n]
        theirs = PeftModel.from_pretrained(theirs, exported(tuned, "--adapter")).double().eval()
        found, merged = (model(tokens).logits[..., :n].double() for model in (theirs, whole))
    torch.testing.assert_close(found, merged, rtol=1e-4, atol=1e-4)  # merged weights are rounded to fp32
    torch.testing.assert_close(found, ours, rtol=1e-3, atol=1e-3)  # and so are rotary tables
    assert (before - ours).abs().max() > 0.1
    factors = 4 * (16 + 48 + 16 + 16) * 2 * (2 if "second_attention" in shape else 1)
    assert f"a LoRA adapter for peft, {factors:,} numbers" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("init_from", "named"), [("gpt2", "openai-community/gpt2"), ("weights/gpt2", "weights/gpt2"), ("BASE", None)]
)
def test_an_adapter_names_the_model_that_transformers_can_load(small_tokenizer, tmp_path, init_from, named):
    init_from = str(tmp_path / "base") if init_from == "BASE" else init_from
    _, tuned = adapted(small_tokenizer, tmp_path, init_from)
    folder = exported(tuned, "--adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == named and (config["r"], config["lora_alpha"]) == (4, 32.0)
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"train_only": "all"}, "has no adapter, because it was trained with train_only=all: export it without"),
        ({"chunk_markers": 4}, r"because it also trained the embedding of <\|meta\|>"),
        (
            {"target_rule": "skip", "markers": MarkerConfig(marker_place="sentence"), "meta_position": "previous"},
            r"because it also trained the embedding of <\|sr\|>",
        ),
        ({"position": "rope", "rope_scaling": "yarn", "rope_factor": 2.0}, "positions of its model were rescaled"),
        ({"markers": MarkerConfig(evict="local")}, "cannot be exported, because the exported code"),
    ],
)
def test_what_an_adapter_cannot_hold_is_refused(small_tokenizer, tmp_path, changes, sentence):
    _, tuned = adapted(small_tokenizer, tmp_path, **changes)
    with pytest.raises(UserError, match=sentence) as refused:
        exported(tuned, "--adapter")
    assert "\n" not in str(refused.value) and not (tmp_path / "tuned_adapter").exists()


def test_an_adapter_cannot_bring_a_second_attention(small_tokenizer, tmp_path):
    base, tuned = adapted(small_tokenizer, tmp_path, second_attention="causal")
    run = load_run(base)
    for block in run.model.h:
        torch.nn.init.zeros_(block.second_attn.c_proj.weight)
    cfg = load_run(tuned).config
    state = {**run.state, "best": None}
    shutil.rmtree(tuned)
    saved(Run(attach(run.model, cfg, 0), run.tokenizer, cfg, state, tuned), tuned)
    with pytest.raises(UserError, match="the model that it began from has no second attention"):
        exported(tuned, "--adapter")


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--markers=none"], "--markers has no effect: it is only used with --adapter=False, but adapter=True"),
        (["--eval_texts=3"], "--eval_texts has no effect"),
        (["--dataset=x"], "--dataset has no effect"),
        (["--push_to_hub=a/b"], "--push_to_hub has no effect"),
        (["--rope_scaling=yarn", "--rope_factor=2"], "rope_scaling=yarn changes the model, which an adapter does not"),
    ],
)
def test_settings_of_a_whole_model_are_refused_for_an_adapter(args, sentence):
    with pytest.raises(UserError, match=sentence):
        load_config(ExportConfig, ["--adapter", *args])


def test_merging_and_peft_agree_on_the_factor(small_tokenizer):
    """A check of alpha / r against a merge by hand, apart from peft."""
    cfg = settings("lora")
    model = wake_factors(attach(trained_weights(cfg), cfg, 0))
    (factors,) = model.h[0].attn.c_proj.parametrizations.weight
    expected = trained_weights(cfg).h[0].attn.c_proj.weight + 4 * factors.B @ factors.A
    torch.testing.assert_close(merge(model).h[0].attn.c_proj.weight, expected)
    assert isinstance(cfg, TrainConfig)
