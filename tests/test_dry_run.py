"""Tests --dry_run: what it prints, from where it knows sizes and peaks, and what it refuses."""

import json
import re

import pytest
import torch

from nanometa import train
from nanometa.common.errors import UserError
from nanometa.config import GPTConfig, TrainConfig
from nanometa.config.command_line import load_config
from nanometa.data.tokenizer import Tokenizer
from nanometa.model import GPT
from nanometa.training import estimate
from nanometa.training.checkpoint import load_run
from nanometa.training.distributed import Dist
from tests.conftest import ROOT, cli, override, tree
from tests.conftest import TINY as SMALL
from tests.test_config import CONFIGS

CPU = torch.device("cpu")
GPT2 = GPTConfig(vocab_size=50304, content_vocab_size=50257)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A100-PCIE-40GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("A100-SXM4-40GB", 312e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA RTX A6000", 154.8e12),
        ("NVIDIA L4", 121e12),
        ("h100", 989e12),
        # devices that the table does not list
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA H20", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA L40", None),
        ("Tesla V100-SXM2-16GB", None),
        ("cpu", None),
        ("", None),
    ],
)
def test_a_devices_name_gives_its_peak_flops(name, peak):
    assert estimate.peak_flops(name) == peak


def test_parameters_by_part_add_up_to_the_model():
    counts = estimate.parameters(estimate.skeleton(GPT2))
    assert sum(counts.values()) == GPT(GPT2).num_params()
    assert counts == {
        "embeddings": 50304 * 768,
        "position table": 1024 * 768,
        "norms": 37 * 768,
        "attention": 12 * 4 * 768**2,
        "second attention": 12 * 4 * 768**2,
        "MLP": 12 * 8 * 768**2,
    }


def test_a_recipe_gives_the_sizes_of_its_dataset():
    tokenizer = Tokenizer.gpt2()
    assert estimate.data_of("data/c4_periodic")[:4] == (922, 102, tokenizer.n_vocab, tokenizer.n_content)
    assert estimate.data_of("data/c4_none")[:4] == (922, 0, 50304, 50257)
    assert estimate.data_of("elsewhere/stdlib_uniform")[:4] == (461, 51, 4160, 4096)
    long = estimate.data_of("data/stdlib_none_2048plus")
    assert (
        long[:4] == (461, 0, 4160, 4096) and "config/stdlib.py, since data/stdlib_none_2048plus is not" in long.origin
    )
    for name in (
        "c4",
        "c4_random",
        "nothing_uniform",
        "_uniform",
        "a_b_c",
        "c4_none_0plus",
        "c4_none_plus",
        "c4_8plus",
    ):
        assert estimate.recipe_of(f"data/{name}") is None


def test_a_prepared_dataset_gives_its_own_sizes(workdir):
    found = estimate.data_of(str(workdir / "data/u"))
    assert found[:4] == (28, 4, 320, 300) and "as prepared" in found.origin
    assert estimate.data_of(str(workdir / "data/n")).chunk_markers == 0


def test_dry_run_needs_no_data_and_writes_nothing(tmp_path):
    result = cli(
        "train.py", str(ROOT / "config/meta_gpt2.py"), "--dry_run", "--n_accelerators=4", "--mfu=0.5", cwd=tmp_path
    )
    out = result.stdout.decode()
    assert result.returncode == 0 and not result.stderr, result.stderr.decode()
    for line in (
        "dataset, according to config/c4.py, since data/c4_uniform is not prepared yet",
        "480 windows = 4 processes x 10 micro-batches x 12 windows",
        "a step                          442,560 content tokens in 491,520 positions",
    ):
        assert line in out, out
    hours = 96_000_000 * estimate.flops_per_window(GPT2, 102) / (4 * 989e12 * 0.5) / 3600
    assert out.splitlines()[-1] == f"hours and cost: {hours:,.2f} hours on 4 x H100, {hours * 4 * 3:,.2f} USD"
    assert not tree(tmp_path)


def test_dry_run_reads_a_prepared_dataset_and_names_unknown_peaks(workdir):
    args = ("--dataset=data/n", "--block_size=56", "--second_attention=none", "--n_accelerators=1", "--dry_run")
    before = tree(workdir)
    out = cli(
        "train.py", "--batch_size=8", "--micro_batch_size=8", "--device=cpu", "--dtype=float32", *args, cwd=workdir
    )
    text = out.stdout.decode()
    assert "as prepared in data/n" in text and "float32" in text, text + out.stderr.decode()
    assert "markers  " not in text and "second attention" not in text and "casts" not in text
    assert text.splitlines()[-1].startswith(
        "hours and cost: not estimated, because peak FLOP/s are known only for GPUs in bfloat16, not for float32 on cpu"
    )
    assert tree(workdir) == before


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (("--accelerator=V100",), "the peak FLOP/s of accelerator='V100' are not known: give one of A100, .*RTX 4090"),
        (
            ("--dataset=data/books",),
            "neither a dataset in data/books nor a recipe .*: prepare it first, or name a dataset",
        ),
        (("--block_size=1000",), "block_size=1000 is not a multiple of 512, .*--block_size=512 or 1024"),
        (
            ("--dataset=data/stdlib_none", "--block_size=461"),
            "second_attention=meta has nothing to connect, because data/stdlib_none has no markers",
        ),
        (
            ("--vocab_size=99",),
            "vocab_size=99 does not match the tokenizer of data/stdlib_uniform, which has 4160: leave",
        ),
        (("--n_accelerators=3",), "cannot be split over 3 processes"),
        (
            ("--dataset=data/tiny_meta_uniform",),
            # the default dataset of config/tiny_meta.py would be stdlib_uniform
            "neither a dataset in data/tiny_meta_uniform nor a recipe for it",
        ),
        (("--accelerator=H10",), "'H10' are not known: give one of .* \\(did you mean 'H100'\\?\\)"),
        (("--init_from=out/nothing",), "init_from='out/nothing' is neither one of scratch, .* nor a folder"),
        (
            ("--target_rule=skip", "--second_attention=none", "--dataset=data/stdlib_none", "--block_size=461"),
            "no effect",
        ),
    ],
)
def test_bad_settings_are_refused(args, sentence, tmp_path, capsys):
    with pytest.raises(UserError, match=sentence) as caught:
        train.main([str(ROOT / "config/tiny_meta.py"), *args, "--dry_run"])
    assert "\n" not in str(caught.value) and not capsys.readouterr().out


def test_dry_run_estimates_runs_on_tasks(workdir, monkeypatch, capsys):
    """Texts count with their padded widths under the curriculum, and the model is that of init_from."""
    monkeypatch.chdir(workdir)
    shape = ("--dataset=data/u", "--block_size=32", "--position=rope")
    train.main(override(SMALL, "--run_name=base", "--max_steps=1", *shape))
    capsys.readouterr()
    tasks = ("--tasks=parity", "--train_length=64", "--init_from=out/base", "--max_steps=100", "--dry_run=True")
    shape = ("--n_layer", "--n_head", "--n_embd")
    args = [arg for arg in override(SMALL, *tasks, "--n_accelerators=1") if not arg.startswith((*shape, "--device"))]
    before = tree(workdir)
    train.main(args)
    out = capsys.readouterr().out
    assert "tasks parity\n  model: out/base/" in out and "an embedding of 320 rows" in out
    assert "100 steps                       800 texts in 5.120e+04 positions, padding included" in out
    assert re.search(f"\n  total +{load_run('out/base').model.num_params() / 1e6:.3f} M\n", out)
    assert tree(workdir) == before
    # the curriculum's texts have 49, 75, 114, 170 and 256 positions, padded to multiples of 32
    train.main([str(ROOT / "config/finetune_tasks.py"), "--dry_run", "--max_steps=2800"])
    positions = 64 * 560 * (64 + 96 + 128 + 192 + 256)
    assert f"179,200 texts in {positions:.3e} positions" in capsys.readouterr().out
    with pytest.raises(UserError, match="train_length=2048 is too long"):
        train.main([str(ROOT / "config/finetune_tasks.py"), "--dry_run", "--train_length=2048"])


def test_mfu_is_recorded_if_the_peak_is_known(workdir, monkeypatch):
    """MFU is the model's FLOPs over the peak of all processes. It is not recorded for CPUs and fp32, which have no
    known peak."""
    monkeypatch.chdir(workdir)
    monkeypatch.setattr(train, "peak_flops", lambda name: 1e12)
    for dtype in ("bfloat16", "float32"):
        args = [f"--run_name=mfu_{dtype}", "--dataset=data/u", "--block_size=64", f"--dtype={dtype}"]
        cfg = load_config(TrainConfig, override(SMALL, *args))
        trainer = train.Trainer(cfg, Dist(0, 0, 1, CPU))
        clock = train.Clock()
        trainer.train_step(False)
        trainer._log_step(1.0, 1.0, 1e-3, 0.5, clock)
        trainer.log.close()
        line = json.loads((workdir / f"out/{cfg.run_name}/metrics.jsonl").read_text())
        if dtype == "bfloat16":
            assert line["mfu"] == estimate.flops_per_window(trainer.cfg.model, 8) * 8 / 0.5 / 1e12
        else:
            assert "mfu" not in line


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_has_a_dry_run_without_data(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train.main([str(path), "--dry_run"])
    out = capsys.readouterr().out
    assert "is not prepared yet" in out and "hours and cost: " in out and out.endswith(" USD\n")
    assert not list(tmp_path.iterdir())
