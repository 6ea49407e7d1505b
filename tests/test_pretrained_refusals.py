"""Tests the refusal of weights that a run cannot start from: one sentence each, and nothing changed on disk."""

import contextlib
import io
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nanometa import train
from nanometa.common.errors import UserError
from nanometa.data.tokenizer import Tokenizer
from nanometa.model import GPT
from nanometa.training.pretrained import load_into
from tests.conftest import cli, override, refusal, tree
from tests.gpt2_folders import (
    BASE,
    CFG,
    drop,
    rename_weights,
    repeat_tensor,
    run,
    set_config,
    set_tensor,
)  # fmt: skip
from tests.training_runs import equal


@pytest.fixture(scope="module")
def tuned(workdir, hf) -> Path:
    return run(workdir, "tuned", f"--init_from={hf}", "--max_steps=6")


@pytest.fixture(scope="module")
def meta_run(workdir) -> Path:
    args = ("--dataset=data/u", "--block_size=32", "--second_attention=meta", "--max_steps=2", "--bias=False")
    return run(workdir, "with_meta", *args)


def refused(workdir, monkeypatch, *args) -> str:
    """Starts training, which must be refused with nothing changed on disk, and returns the sentence."""
    monkeypatch.chdir(workdir)
    before = tree(workdir)
    with pytest.raises(UserError) as caught, contextlib.redirect_stdout(io.StringIO()):
        train.main(override((*BASE, "--run_name=new"), *args))
    assert tree(workdir) == before and "\n" not in str(caught.value)
    return str(caught.value)


FIT = "set --n_layer=2 --n_head=2 --n_embd=32 --bias=True --position=learned"


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (("--n_layer=3",), f"n_layer=3, but the weights of .* have 2: {FIT}"),
        (("--n_head=4",), f"n_head=4, but the weights of .* have 2: {FIT}"),
        (("--n_embd=64",), f"n_embd=64, but the weights of .* have 32: {FIT}"),
        (("--n_inner=64",), "n_inner=64, but the weights .* have 128: set .* --n_inner=128 --bias"),
        (("--bias=False",), f"bias=False, but the weights of .* have True: {FIT}"),
        (("--position=rope",), f"position=rope, but the weights of .* have learned: {FIT}"),
        (
            ("--block_size=84",),
            "block_size=84 is too long, because the weights .* have 64 positions: set --block_size to at most 64",
        ),
        (("--run_name=tuned",), "the run folder out/tuned exists"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_the_weights_are_refused(workdir, hf, tuned, monkeypatch, args, sentence):
    found = refused(workdir, monkeypatch, f"--init_from={hf}", *args)
    assert re.search(sentence, found), found


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("gpt2-medum", "did you mean 'gpt2-medium'"),
        ("resum", "did you mean 'resume'"),
        (
            "qqqqqqqq",
            "'qqqqqqqq' is neither one of scratch, resume, .*gpt2-xl nor a folder: name a run that train.py",
        ),
        ("out/quickstart", "nor a folder: name a run that train.py made"),
        ("tuned", "did you mean 'out/tuned'"),
        ("out/tuned/step_00000099", r"the checkpoints of out/tuned are step_0.*; name one of them"),
        ("out/tund", "did you mean 'out/tuned'"),
        ("texts/doc000.txt", "is a file: give the folder"),
        ("texts", "init_from=texts has no config.json"),
    ],
)
def test_an_unknown_init_from_is_refused(workdir, tuned, monkeypatch, name, sentence):
    # the value is checked first, even if the run's folder exists
    for run_name in ("new", "tuned") if name != "texts" else ("new",):
        found = refused(workdir, monkeypatch, f"--init_from={name}", f"--run_name={run_name}")
        assert re.search(sentence, found), found


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (
            set_config(activation_function="relu"),
            "activation_function=relu, but this model computes activation_function=gelu_new",
        ),
        (
            set_config(layer_norm_epsilon=1e-6),
            "layer_norm_epsilon=1e-06, but this model computes layer_norm_epsilon=1e-05",
        ),
        (set_config(model_type="llama"), "model_type=llama"),
        (set_config(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx=True"),
        (set_config(n_head="two"), "config.json is damaged"),
        (set_config(n_layer=2.5), "config.json is damaged .*n_layer is '2.5', not a positive whole number"),
        (set_config(n_layer=True), "config.json is damaged"),
        (set_config(n_inner=[1]), "config.json is damaged"),
        (set_config(vocab_size=299), "predict 299 ids, but the dataset's tokenizer bpe300 has 300: use weights whose"),
        (set_config(vocab_size=513), "predict 513 ids, but the dataset's tokenizer bpe300 has 300: use weights whose"),
        (set_config(vocab_size=310), r"wte.weight is \(300, 32\) in .* but \(310, 32\) .*with their config.json"),
        (set_config(n_positions=40), r"wpe.weight is \(64, 32\) in .* but \(40, 32\) in this model"),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json is damaged"),
        (lambda folder: (folder / "config.json").write_text("{}"), "config.json has no entry 'n_layer'"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 99), "model.safetensors is damaged"),
        (rename_weights("pytorch_model.bin"), "pickle.*save_pretrained"),
        (rename_weights("model.safetensors.index.json"), "several files.*max_shard_size"),
        (set_tensor("lm_head.weight", torch.zeros(300, 32)), "lm_head.weight in .* differs from wte.weight.*tied"),
        (
            set_tensor("transformer.h.1.mlp.c_fc.weight", torch.zeros(32, 96)),
            r"h.1.mlp.c_fc.weight is \(96, 32\) in .* but \(128, 32\) in this model: use the unchanged weights of a",
        ),
        (set_tensor("transformer.ln_f.bias", torch.full((32,), torch.nan)), "ln_f.bias in .* not finite"),
        (set_tensor("v_head.weight", torch.zeros(3)), r"v_head.weight \(3,\) of .* has no place in this model"),
        (drop("transformer.h.0.ln_1.bias"), r"h.0.ln_1.bias \(32,\) of this model is missing in "),
        (drop("transformer.wte.weight"), "wte.weight .* is missing"),
        (set_tensor("wte.weight", torch.zeros(300, 32)), "both wte.weight and transformer.wte.weight, and only one of"),
        (set_tensor("lm_head.bias", torch.zeros(300)), r"lm_head.bias \(300,\) of .* has no place in this model"),
        (
            set_tensor("transformer.h.0.attn.c_attn.weight", torch.zeros(32, 96, dtype=torch.int8)),
            "transformer.h.0.attn.c_attn.weight in .* has the dtype int8: use weights of float32, float16 or bfloat16",
        ),
        (
            set_tensor("transformer.h.0.attn.c_attn.weight", torch.zeros(32, 96).to(torch.float8_e4m3fn)),
            "transformer.h.0.attn.c_attn.weight in .* has the dtype F8_E4M3, which cannot be read: use weights of flo",
        ),
        (set_tensor("transformer.wte.weight", torch.zeros(300)), r"wte.weight is \(300,\) in .* but \(300, 32\)"),
        (repeat_tensor, "model.safetensors is damaged .*its header has an entry twice"),
    ],
)  # fmt: skip
def test_folders_that_do_not_fit_are_refused(workdir, hf, monkeypatch, tmp_path, damage, sentence):
    folder = shutil.copytree(hf, tmp_path / "copy")
    damage(folder)
    found = refused(workdir, monkeypatch, f"--init_from={folder}")
    assert re.search(sentence, found), found


def test_gpt2_weights_need_gpt2s_tokenizer(dataset_tokenizer, hf, tmp_path):
    folder = shutil.copytree(hf, tmp_path / "copy")
    set_config(vocab_size=50257)(folder)
    for other in (dataset_tokenizer, SimpleNamespace(name="bpe50257", n_content=50257)):
        with pytest.raises(UserError, match=f"{other.name} has {other.n_content}: .* with --tokenizer=gpt2"):
            load_into(GPT(CFG), str(folder), other)


def test_a_refused_load_leaves_the_model_unchanged(dataset_tokenizer, hf, tmp_path):
    folder = shutil.copytree(hf, tmp_path / "copy")
    set_tensor("transformer.ln_f.bias", torch.zeros(31))(folder)
    model = GPT(CFG)
    with pytest.raises(UserError, match="ln_f.bias"):
        load_into(model, str(folder), dataset_tokenizer)
    assert equal(model.state_dict(), GPT(CFG).state_dict())


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (("--second_attention=none",), r"h.0.\S*second\S* \(.* has no place in this .*--second_attention=meta"),
        (("--second_attention=causal",), "second_attention=causal, but .* was trained with meta: set --second_att"),
        (("--n_head=4",), "n_head=4, but out/with_meta/.* was trained with 2: set --n_head=2"),
        (("--n_layer=3",), r"h.2.ln_1.weight \(32,\) of this model is missing in .*: set --n_layer=2 "),
        (("--n_layer=1",), r"h.1.\S+ \(.*\) of .* has no place in this model: set --n_layer=2 "),
        (("--n_embd=64",), r"wte.weight is \(320, 32\) in .* but \(320, 64\) in this model: set .*--n_embd=32 "),
        (("--block_size=64",), r"wpe.weight is \(32, 32\) in .* but \(64, 32\) in this .* --block_size=32 "),
        (("--position=rope",), "wpe.weight .* has no place in this model: set .* --position=learned"),
        (("--bias=True",), "bias .* of this model is missing in .* --bias=False"),
        (("--init_from=out/nothing",), "init_from='out/nothing' is neither one of scratch"),
    ],
)
def test_runs_that_do_not_fit_are_refused(workdir, meta_run, monkeypatch, args, sentence):
    same = ("--init_from=out/with_meta", "--dataset=data/u", "--block_size=32", "--second_attention=meta")
    found = refused(workdir, monkeypatch, *override((*same, "--bias=False"), *args))
    assert re.search(sentence, found), found


def test_a_run_with_another_tokenizer_is_refused(meta_run, dataset_tokenizer):
    other = Tokenizer.train(["some other text " * 30], 300)
    with pytest.raises(UserError, match="another tokenizer .* prepare the dataset with --tokenizer=.*with_meta/"):
        load_into(GPT(CFG), str(meta_run), other)


def test_damaged_initial_weights_are_refused(workdir, meta_run, monkeypatch, tmp_path):
    folder = shutil.copytree(meta_run / "step_00000002", tmp_path / "copy")
    (folder / "model.safetensors").write_bytes(b"")
    assert "model.safetensors is damaged: its sha256" in refused(workdir, monkeypatch, f"--init_from={folder}")


@pytest.mark.parametrize("name", ["gpt2", "gpt2-xl"])
def test_without_a_network_the_refusal_is_one_sentence(workdir, tmp_path, name):
    before = tree(workdir)
    env = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    error = refusal(cli("train.py", *BASE, "--run_name=new", f"--init_from={name}", cwd=workdir, env=env))
    assert f"config.json and model.safetensors of openai-community/{name} could not be downloaded" in error
    assert "--init_from=FOLDER" in error and tree(workdir) == before and not (tmp_path / "cache").exists()
