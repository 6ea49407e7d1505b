"""Tests weights that a run starts from: those of GPT-2, as transformers and the hub have them, and those of a run."""

import dataclasses
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

from nanometa.common.errors import UserError
from nanometa.config import TrainConfig
from nanometa.data.loader import Windows, step_windows
from nanometa.data.tokenizer import Tokenizer
from nanometa.model import GPT
from nanometa.training.pretrained import load_into
from tests.conftest import TWO, losses
from tests.gpt2_folders import CFG, hf_folder, loaded, rewrite, run, set_tensor
from tests.test_model import WITH_MARKERS
from tests.training_runs import equal, final


def theirs(folder) -> transformers.GPT2LMHeadModel:
    return transformers.GPT2LMHeadModel.from_pretrained(folder).eval()


def text(T=32, B=3):
    """Returns random content without markers: tokens, positions and an empty meta_index."""
    tokens = torch.from_numpy(np.random.default_rng(1).integers(0, 300, (B, T)))
    return tokens, torch.arange(T).expand(B, T), torch.empty(B, 0, dtype=torch.long)


@pytest.mark.parametrize("second", WITH_MARKERS)
def test_every_arm_starts_with_the_logits_of_the_loaded_gpt2(hf, dataset_tokenizer, second):
    ours, plain = (loaded(hf, dataset_tokenizer, second_attention=arm) for arm in (second, "none"))
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


def test_the_log_names_the_loaded_and_the_new_weights(hf, dataset_tokenizer):
    said, tokens = load_into(GPT(dataclasses.replace(CFG, second_attention="meta")), str(hf), dataset_tokenizer)
    assert "\n" not in said and re.search(
        r"model.safetensors \(sha256 [0-9a-f]{64}\): loaded .*h\.\*\.mlp\.c_proj", said
    )
    new = said.split("newly initialized: ")[1].split(";")[0].split()
    assert sorted(new) == sorted(f"h.*.{name}" for name in (
        "ln_second.weight", "ln_second.bias", "second_attn.c_attn.weight", "second_attn.c_attn.bias",
        "second_attn.c_proj.weight", "second_attn.c_proj.bias"))  # fmt: skip
    assert "rows 300 .. 319 of wte.weight" in said and "the first 32 of 64 positions" in said
    assert tokens is None  # nothing says how many tokens they were trained on
    assert "newly initialized: none;" in load_into(GPT(CFG), str(hf), dataset_tokenizer)[0]


def test_weights_with_the_hubs_names_and_masks_load(hf, dataset_tokenizer, tmp_path):
    """As in the hub's own gpt2: names without a prefix, causal masks as buffers, and possibly lm_head."""
    folder = shutil.copytree(hf, tmp_path / "hub")

    def change(state):
        state = {name.removeprefix("transformer."): p for name, p in state.items()}
        masks = {f"h.{i}.attn.bias": torch.ones(64, 64).tril()[None, None] for i in range(2)}
        masks["h.0.attn.masked_bias"] = torch.tensor(-1e4)
        return {**state, **masks, "lm_head.weight": state["wte.weight"].clone()}

    rewrite(folder, change)
    assert equal(loaded(folder, dataset_tokenizer).state_dict(), loaded(hf, dataset_tokenizer).state_dict())


def test_half_precision_weights_become_float32(hf, dataset_tokenizer, tmp_path):
    folder = shutil.copytree(hf, tmp_path / "half")
    rewrite(folder, lambda state: {name: p.half() for name, p in state.items()})
    model, full = loaded(folder, dataset_tokenizer), loaded(hf, dataset_tokenizer)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    torch.testing.assert_close(model.wpe.weight, full.wpe.weight, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("vocab_size", [301, 304, 320, 384, 512])
def test_padded_rows_of_the_vocabulary_are_dropped_with_a_sentence(dataset_tokenizer, tmp_path, vocab_size):
    """Vocabularies are padded for speed (50304 rows for GPT-2), or by an added token (50258)."""
    folder = hf_folder(tmp_path, vocab_size=vocab_size)
    model = GPT(CFG)
    said, _ = load_into(model, str(folder), dataset_tokenizer)
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


def test_other_heads_are_left_out_with_a_sentence(hf, dataset_tokenizer, tmp_path):
    """Those of sequence and token classification, question answering, multiple choice, and trl's value head."""
    heads = ("score.weight", "classifier.weight", "classifier.bias", "qa_outputs.weight", "qa_outputs.bias",
             "multiple_choice_head.summary.weight", "v_head.summary.weight")  # fmt: skip
    folder = shutil.copytree(hf, tmp_path / "heads")

    def change(state):
        prefixed = {name: p for name, p in state.items() if name != "lm_head.weight"}
        return {**prefixed, **{name: torch.full((3,), torch.nan) for name in heads}}

    rewrite(folder, change)
    model = GPT(CFG)
    said, _ = load_into(model, str(folder), dataset_tokenizer)
    assert f"not loaded, because pretraining has no such head: {' '.join(sorted(heads))}" in said
    assert equal(model.state_dict(), loaded(hf, dataset_tokenizer).state_dict())


def test_an_untied_copy_of_the_head_is_compared_by_value(hf, dataset_tokenizer, tmp_path):
    """The copy may have another dtype, and other padded rows."""
    folder = hf_folder(tmp_path / "padded", vocab_size=304)

    def change(state):
        state = {name: p.half().float() for name, p in state.items()}
        head = torch.cat([state["transformer.wte.weight"][:300], torch.randn(4, 32)])
        return {**state, "lm_head.weight": head.half()}

    rewrite(folder, change)
    assert loaded(folder, dataset_tokenizer).wte.weight[0, 0] != 0
    set_tensor("lm_head.weight", torch.zeros(304, 32))(folder)
    with pytest.raises(UserError, match="lm_head.weight in .* differs from wte.weight"):
        load_into(GPT(CFG), str(folder), dataset_tokenizer)


def test_weights_of_the_hub_are_read_from_the_cache(hf, dataset_tokenizer, monkeypatch):
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
        load_into(model, "gpt2", dataset_tokenizer)
        assert equal(model.state_dict(), loaded(hf, dataset_tokenizer).state_dict())
        assert bool(asked) == (cached is None)
    repo = "openai-community/gpt2"
    assert asked[1:] == [(repo, "config.json"), (repo, "model.safetensors")]


# ----------------------------------------------------------------------------- complete runs


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
    assert losses(run(workdir, "tuned_two", *args, launcher=TWO)) == pytest.approx(losses(tuned), rel=1e-5)


def test_a_run_may_start_from_the_weights_of_another_run(workdir, dataset_tokenizer, tuned):
    """Loads a GPT-2 run into a model with meta-attention, from the run's folder (best checkpoint) and from a
    checkpoint."""
    for source in (tuned, tuned / "step_00000006"):
        model = GPT(dataclasses.replace(CFG, block_size=28, second_attention="meta"))
        said, _ = load_into(model, str(source), dataset_tokenizer)
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


def test_all_weights_of_a_run_with_markers_are_loaded(workdir, dataset_tokenizer, meta_run):
    model = GPT(dataclasses.replace(CFG, second_attention="meta", bias=False))
    said, tokens = load_into(model, str(meta_run / "step_00000002"), dataset_tokenizer)
    assert equal(model.state_dict(), safetensors.torch.load_file(meta_run / "step_00000002/model.safetensors"))
    assert "newly initialized: none; rows 300 .. 319 of wte.weight, the markers, are as trained" in said
    assert tokens == 2 * 8 * 28  # steps x windows x content tokens


def test_transformers_is_not_needed(workdir, hf):
    """Importing transformers fails here, because a module of that name comes first on the path."""
    block = workdir / "block"
    block.mkdir()
    (block / "transformers.py").write_text("raise AssertionError('imported')")
    run(workdir, "without", f"--init_from={hf}", "--max_steps=1", env={"PYTHONPATH": str(block)})
