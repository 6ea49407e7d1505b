import contextlib
import dataclasses
import io
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

from nanometa import train
from nanometa.common.errors import UserError
from nanometa.config import GPTConfig, TrainConfig
from nanometa.data.loader import Windows, step_windows
from nanometa.data.tokenizer import Tokenizer
from nanometa.model import GPT
from nanometa.training.pretrained import load_into
from tests.conftest import TINY, cli, losses, override, refusal, tree
from tests.test_model import WITH_MARKERS
from tests.training_runs import TORCHRUN, equal, final

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 64, "vocab_size": 300}
CFG = GPTConfig(
    n_layer=2, n_head=2, n_embd=32, block_size=32, bias=True, vocab_size=320, content_vocab_size=300,
    second_attention="none",
)  # fmt: skip


def hf_folder(folder: Path, **changes) -> Path:
    """Saves a small random GPT-2 as transformers does. Its vocabulary is that of the datasets in workdir."""
    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**SHAPE, **ends, **changes}))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    model.save_pretrained(folder)
    return folder


def rewrite(folder: Path, change) -> None:
    """Replaces the weights of a folder by change(weights)."""
    state = safetensors.torch.load_file(folder / "model.safetensors")
    safetensors.torch.save_file(change(state), folder / "model.safetensors")


@pytest.fixture(scope="module")
def hf(tmp_path_factory) -> Path:
    return hf_folder(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def tokenizer(workdir) -> Tokenizer:
    tokenizer = Tokenizer.load(workdir / "data/n")
    assert (tokenizer.n_content, tokenizer.n_vocab) == (300, 320)
    return tokenizer


def loaded(folder, tokenizer, **changes) -> GPT:
    model = GPT(dataclasses.replace(CFG, **changes))
    load_into(model, str(folder), tokenizer)
    return model.eval()


def theirs(folder) -> transformers.GPT2LMHeadModel:
    return transformers.GPT2LMHeadModel.from_pretrained(folder).eval()


def text(T=32, B=3):
    """Returns random content without markers: tokens, positions and an empty meta_index."""
    tokens = torch.from_numpy(np.random.default_rng(1).integers(0, 300, (B, T)))
    return tokens, torch.arange(T).expand(B, T), torch.empty(B, 0, dtype=torch.long)


@pytest.mark.parametrize("second", WITH_MARKERS)
def test_every_arm_starts_with_the_logits_of_the_loaded_gpt2(hf, tokenizer, second):
    ours, plain = (loaded(hf, tokenizer, second_attention=arm) for arm in (second, "none"))
    tokens, positions, index = text()
    with torch.no_grad():
        logits = ours.logits(ours(tokens, positions, index))
        torch.testing.assert_close(logits[..., :300], theirs(hf)(tokens).logits, rtol=1e-5, atol=1e-5)
        assert torch.equal(logits, plain.logits(plain(tokens, positions, index)))
    wte = theirs(hf).transformer.wte.weight
    assert torch.equal(ours.wte.weight[:300], wte)
    torch.testing.assert_close(ours.wte.weight[300:], wte.mean(0).expand(20, -1))
    assert torch.equal(ours.wpe.weight, theirs(hf).transformer.wpe.weight[:32])
    fresh = GPT(ours.cfg).state_dict()
    for name, p in ours.named_parameters():
        assert ("second" in name) == torch.equal(p, fresh[name]), name


def test_the_log_names_the_loaded_and_the_new_weights(hf, tokenizer):
    said, tokens = load_into(GPT(dataclasses.replace(CFG, second_attention="meta")), str(hf), tokenizer)
    assert "\n" not in said and re.search(
        r"model.safetensors \(sha256 [0-9a-f]{64}\): loaded .*h\.\*\.mlp\.c_proj", said
    )
    new = said.split("newly initialized: ")[1].split(";")[0].split()
    assert sorted(new) == sorted(f"h.*.{name}" for name in (
        "ln_second.weight", "ln_second.bias", "second_attn.c_attn.weight", "second_attn.c_attn.bias",
        "second_attn.c_proj.weight", "second_attn.c_proj.bias"))  # fmt: skip
    assert "rows 300 .. 319 of wte.weight" in said and "the first 32 of 64 positions" in said
    assert tokens is None  # nothing says how many tokens they were trained on
    assert "newly initialized: none;" in load_into(GPT(CFG), str(hf), tokenizer)[0]


def test_weights_with_the_hubs_names_and_masks_load(hf, tokenizer, tmp_path):
    """As in the hub's own gpt2: names without a prefix, causal masks as buffers, and possibly lm_head."""
    folder = shutil.copytree(hf, tmp_path / "hub")

    def change(state):
        state = {name.removeprefix("transformer."): p for name, p in state.items()}
        masks = {f"h.{i}.attn.bias": torch.ones(64, 64).tril()[None, None] for i in range(2)}
        masks["h.0.attn.masked_bias"] = torch.tensor(-1e4)
        return {**state, **masks, "lm_head.weight": state["wte.weight"].clone()}

    rewrite(folder, change)
    assert equal(loaded(folder, tokenizer).state_dict(), loaded(hf, tokenizer).state_dict())


def test_half_precision_weights_become_float32(hf, tokenizer, tmp_path):
    folder = shutil.copytree(hf, tmp_path / "half")
    rewrite(folder, lambda state: {name: p.half() for name, p in state.items()})
    model, full = loaded(folder, tokenizer), loaded(hf, tokenizer)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    torch.testing.assert_close(model.wpe.weight, full.wpe.weight, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("vocab_size", [301, 304, 320, 384, 512])
def test_padded_rows_of_the_vocabulary_are_dropped_with_a_sentence(tokenizer, tmp_path, vocab_size):
    """Vocabularies are padded for speed (50304 rows for GPT-2), or by an added token (50258)."""
    folder = hf_folder(tmp_path, vocab_size=vocab_size)
    model = GPT(CFG)
    said, _ = load_into(model, str(folder), tokenizer)
    assert f"rows 300 .. {vocab_size - 1} of wte.weight in the file are dropped, because the tokenizer bpe300" in said
    tokens, positions, index = text()
    with torch.no_grad():
        found = model.eval().logits(model(tokens, positions, index))[..., :300]
        torch.testing.assert_close(found, theirs(folder)(tokens).logits[..., :300], rtol=1e-5, atol=1e-5)


def test_padded_weights_of_gpt2_fit_gpt2s_tokenizer(tmp_path):
    gpt2, shape = Tokenizer.gpt2(), {"n_layer": 1, "n_head": 1, "n_embd": 8}
    cfg = dataclasses.replace(CFG, **shape, vocab_size=gpt2.n_vocab, content_vocab_size=gpt2.n_content)
    for vocab_size in (50258, 50304):
        folder = hf_folder(tmp_path / str(vocab_size), **shape, vocab_size=vocab_size)
        model = GPT(cfg)
        load_into(model, str(folder), gpt2)
        assert torch.equal(model.wte.weight[:50257], theirs(folder).transformer.wte.weight[:50257])


def test_other_heads_are_left_out_with_a_sentence(hf, tokenizer, tmp_path):
    """Those of sequence and token classification, question answering, multiple choice, and trl's value head."""
    heads = ("score.weight", "classifier.weight", "classifier.bias", "qa_outputs.weight", "qa_outputs.bias",
             "multiple_choice_head.summary.weight", "v_head.summary.weight")  # fmt: skip
    folder = shutil.copytree(hf, tmp_path / "heads")

    def change(state):
        prefixed = {name: p for name, p in state.items() if name != "lm_head.weight"}
        return {**prefixed, **{name: torch.full((3,), torch.nan) for name in heads}}

    rewrite(folder, change)
    model = GPT(CFG)
    said, _ = load_into(model, str(folder), tokenizer)
    assert f"not loaded, because pretraining has no such head: {' '.join(sorted(heads))}" in said
    assert equal(model.state_dict(), loaded(hf, tokenizer).state_dict())


def test_an_untied_copy_of_the_head_is_compared_by_value(hf, tokenizer, tmp_path):
    """The copy may have another dtype, and other padded rows."""
    folder = hf_folder(tmp_path / "padded", vocab_size=304)

    def change(state):
        state = {name: p.half().float() for name, p in state.items()}
        head = torch.cat([state["transformer.wte.weight"][:300], torch.randn(4, 32)])
        return {**state, "lm_head.weight": head.half()}

    rewrite(folder, change)
    assert loaded(folder, tokenizer).wte.weight[0, 0] != 0
    set_tensor("lm_head.weight", torch.zeros(304, 32))(folder)
    with pytest.raises(UserError, match="lm_head.weight in .* differs from wte.weight"):
        load_into(GPT(CFG), str(folder), tokenizer)


# ----------------------------------------------------------------------------- complete runs

BASE = (*TINY, "--dataset=data/n", "--block_size=28", "--second_attention=none", "--bias=True")


def run(workdir, name, *args, **how) -> Path:
    result = cli("train.py", *override(BASE, f"--run_name={name}", *args), cwd=workdir, **how)
    assert result.returncode == 0, result.stderr.decode()[-3000:] + result.stdout.decode()[-2000:]
    return workdir / "out" / name


@pytest.fixture(scope="module")
def tuned(workdir, hf) -> Path:
    return run(workdir, "tuned", f"--init_from={hf}", "--max_steps=6")


def test_the_first_loss_equals_that_of_transformers(workdir, hf, tuned):
    cfg = TrainConfig(batch_size=8, micro_batch_size=8)
    data = Windows(workdir / "data/n", "train", 28, "ignore")
    batch = data.batch(step_windows(0, cfg, data.n_windows, 0, 1)[0])
    with torch.no_grad():
        logits = theirs(hf)(batch.tokens).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=-100)
    assert losses(tuned)[0] == pytest.approx(expected.item(), rel=1e-5)
    assert "newly initialized: none" in (tuned / "train.log").read_text()


def test_a_resumed_fine_tuning_equals_an_uninterrupted_one_to_the_bit(workdir, hf, tuned):
    run(workdir, "tuned_twice", f"--init_from={hf}", "--max_steps=3", "--lr_decay_steps=6")
    folder = run(workdir, "tuned_twice", "--init_from=resume", "--max_steps=6", "--lr_decay_steps=6")
    assert equal(final(folder), final(tuned)) and losses(folder) == losses(tuned)


def test_a_run_restarted_by_torchrun_resumes(workdir, hf, tuned):
    args = (f"--init_from={hf}", "--lr_decay_steps=6")
    run(workdir, "restarted", *args, "--max_steps=3")
    folder = run(workdir, "restarted", *args, "--max_steps=6", env={"TORCHELASTIC_RESTART_COUNT": "1"})
    assert equal(final(folder), final(tuned))
    newest = folder / (folder / "latest").read_text().strip()
    assert "newly initialized" in json.loads((newest / "state.json").read_text())["origin"]  # also after the resume
    # After a kill before the first checkpoint, the initial weights are read again.
    (workdir / "out/early").mkdir()
    (workdir / "out/early/config.json").write_text("{}")
    early = run(workdir, "early", *args, "--max_steps=1", env={"TORCHELASTIC_RESTART_COUNT": "1"})
    assert losses(early) == losses(tuned)[:1]


def test_two_processes_start_from_the_same_weights(workdir, hf, tuned):
    args = (f"--init_from={hf}", "--max_steps=6", "--micro_batch_size=4")
    assert losses(run(workdir, "tuned_two", *args, launcher=TORCHRUN)) == pytest.approx(losses(tuned), rel=1e-5)


def test_a_run_may_start_from_the_weights_of_another_run(workdir, tokenizer, tuned):
    """Loads a GPT-2 run into a model with meta-attention, from the run's folder (best checkpoint) and from a
    checkpoint."""
    for source in (tuned, tuned / "step_00000006"):
        model = GPT(dataclasses.replace(CFG, block_size=28, second_attention="meta"))
        said, _ = load_into(model, str(source), tokenizer)
        weights = safetensors.torch.load_file(tuned / "step_00000006/model.safetensors")
        for name, p in weights.items():
            if name != "wte.weight":
                assert torch.equal(model.state_dict()[name], p), name
        wte = weights["wte.weight"][:300]  # this run had no markers
        assert torch.equal(model.wte.weight[:300], wte)
        torch.testing.assert_close(model.wte.weight[300:], wte.mean(0).expand(20, -1))
        assert "are the mean of the others" in said and "h.*.second_attn.c_attn.weight" in said


@pytest.fixture(scope="module")
def meta_run(workdir) -> Path:
    args = ("--dataset=data/u", "--block_size=32", "--second_attention=meta", "--max_steps=2", "--bias=False")
    return run(workdir, "with_meta", *args)


def test_all_weights_of_a_run_with_markers_are_loaded(workdir, tokenizer, meta_run):
    model = GPT(dataclasses.replace(CFG, second_attention="meta", bias=False))
    said, tokens = load_into(model, str(meta_run / "step_00000002"), tokenizer)
    assert equal(model.state_dict(), safetensors.torch.load_file(meta_run / "step_00000002/model.safetensors"))
    assert "newly initialized: none; rows 300 .. 319 of wte.weight, the markers, are as trained" in said
    assert tokens == 2 * 8 * 28  # steps x windows x content tokens


# ----------------------------------------------------------------------------- refusals


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


def set_config(**values):
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **values}))

    return damage


def set_tensor(name: str, tensor):
    return lambda folder: rewrite(folder, lambda state: {**state, name: tensor})


def rename_weights(name: str):
    return lambda folder: (folder / "model.safetensors").rename(folder / name)


def drop(name: str):
    return lambda folder: rewrite(folder, lambda state: {k: p for k, p in state.items() if k != name})


def repeat_tensor(folder: Path) -> None:
    """Adds the name of the first tensor to the header once more."""
    raw = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + length].rstrip()
    name, entry = next((name, entry) for name, entry in json.loads(header).items() if name != "__metadata__")
    header = header[:-1] + f', "{name}": {json.dumps(entry)}}}'.encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])


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


def test_gpt2_weights_need_gpt2s_tokenizer(tokenizer, hf, tmp_path):
    folder = shutil.copytree(hf, tmp_path / "copy")
    set_config(vocab_size=50257)(folder)
    for other in (tokenizer, SimpleNamespace(name="bpe50257", n_content=50257)):
        with pytest.raises(UserError, match=f"{other.name} has {other.n_content}: .* with --tokenizer=gpt2"):
            load_into(GPT(CFG), str(folder), other)


def test_a_refused_load_leaves_the_model_unchanged(tokenizer, hf, tmp_path):
    folder = shutil.copytree(hf, tmp_path / "copy")
    set_tensor("transformer.ln_f.bias", torch.zeros(31))(folder)
    model = GPT(CFG)
    with pytest.raises(UserError, match="ln_f.bias"):
        load_into(model, str(folder), tokenizer)
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


def test_a_run_with_another_tokenizer_is_refused(meta_run, tokenizer):
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


def test_weights_of_the_hub_are_read_from_the_cache(hf, tokenizer, monkeypatch):
    """If both files are in the cache, nothing is requested. Otherwise they are downloaded."""
    import huggingface_hub

    asked = []
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: SimpleNamespace(head=lambda *a, **k: asked.append(a)))
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda repo, name: asked.append((repo, name)) or str(hf / name)
    )
    for cached in (str(hf), None):
        found = lambda repo, name, cached=cached: cached and f"{cached}/{name}"  # noqa: E731
        monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", found)
        model = GPT(CFG)
        load_into(model, "gpt2", tokenizer)
        assert equal(model.state_dict(), loaded(hf, tokenizer).state_dict())
        assert bool(asked) == (cached is None)
    repo = "openai-community/gpt2"
    assert asked[1:] == [(repo, "config.json"), (repo, "model.safetensors")]


def test_transformers_is_not_needed(workdir, hf):
    """Importing transformers fails here, because a module of that name comes first on the path."""
    block = workdir / "block"
    block.mkdir()
    (block / "transformers.py").write_text("raise AssertionError('imported')")
    run(workdir, "without", f"--init_from={hf}", "--max_steps=1", env={"PYTHONPATH": str(block)})
