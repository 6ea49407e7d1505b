"""Makes small folders with GPT-2 weights as transformers writes them, and runs that start from them."""

import dataclasses
import json
from pathlib import Path

import safetensors.torch
import torch
import transformers

from nanometa.config import GPTConfig
from nanometa.model import GPT
from nanometa.training.pretrained import load_into
from tests.conftest import TINY, cli, override

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 64, "vocab_size": 300}
CFG = GPTConfig(
    n_layer=2, n_head=2, n_embd=32, block_size=32, bias=True, vocab_size=320, content_vocab_size=300,
    second_attention="none",
)  # fmt: skip
BASE = (*TINY, "--dataset=data/n", "--block_size=28", "--second_attention=none", "--bias=True")


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


def set_config(**values):
    """Returns a function that changes a folder, here values of its config.json."""

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


def loaded(folder, tokenizer, **changes) -> GPT:
    model = GPT(dataclasses.replace(CFG, **changes))
    load_into(model, str(folder), tokenizer)
    return model.eval()


def run(workdir, name, *args, **how) -> Path:
    result = cli("train.py", *override(BASE, f"--run_name={name}", *args), cwd=workdir, **how)
    assert result.returncode == 0, result.stderr.decode()[-3000:] + result.stdout.decode()[-2000:]
    return workdir / "out" / name
