"""Tests that need a GPU: pytest -m cuda runs them where there is one; they are skipped elsewhere."""

import dataclasses
import os
import sys
import warnings

import pytest
import torch

from nanometa.config import GPTConfig, TrainConfig
from nanometa.config.command_line import load_config
from nanometa.data.layout import places_of
from nanometa.inference.generation import generate
from nanometa.layers.loss import Objective
from nanometa.layers.visibility import DenseAttention, limited_attention, visible
from nanometa.model import GPT
from nanometa.train import Trainer
from nanometa.training.distributed import autocast, pick_dtype, processes, why_not_compile
from tests.conftest import TINY, cli, losses, override
from tests.test_generate_cache import PLANS, laid_out, random_run
from tests.test_model import LAYERED
from tests.test_visibility import closing_rows, evicting

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU here"),
]
SHAPE = GPTConfig(n_layer=2, n_head=2, n_embd=64, block_size=128, vocab_size=320, content_vocab_size=300)
DEVICE = "cuda"
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")
GPU = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0,1")}


def batch(device: str) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 300, (3, 128), generator=generator)
    index = torch.stack([torch.randperm(128, generator=generator)[:13].sort().values for _ in range(3)])
    index[2, 9:] = 128  # padding
    tokens.scatter_(1, index.clamp(max=127), 301)
    targets = torch.where(tokens.roll(-1, 1) >= 300, -100, tokens.roll(-1, 1))
    positions = torch.arange(128).expand(3, 128)
    scored = torch.from_numpy(places_of((targets >= 0).numpy(), 120))
    return tuple(tensor.to(device) for tensor in (tokens, targets, positions, index, scored))


def loss_and_gradients(device: str, dtype: torch.dtype, compiled: bool = False, recompute: bool = False, **changes):
    torch.manual_seed(0)
    model = GPT(dataclasses.replace(SHAPE, **changes))
    model.recompute = recompute
    for block in model.h:
        torch.nn.init.normal_(block.second_attn.c_proj.weight, std=0.1)
    model.to(device)
    objective = torch.compile(Objective(model), dynamic=False) if compiled else Objective(model)
    with autocast(torch.device(device), dtype):
        nats = objective(*batch(device))
    nats.backward()
    return nats.item(), {name: p.grad.float().cpu() for name, p in model.named_parameters()}


@pytest.mark.parametrize("columns", [(True, True), (True, False), (False, True)])
def test_attention_within_limits_on_the_gpu_equals_a_dense_mask_on_the_cpu(columns):
    limits = [column if given else None for column, given in zip((closing_rows(), evicting()), columns, strict=True)]
    T = limits[0 if columns[0] else 1].size(1)
    generator, results = torch.Generator().manual_seed(1), []
    given = [torch.randn(2, 3, T, 16, generator=generator) for _ in range(4)]
    for device in ("cpu", DEVICE):
        q, k, v = (x.to(device).requires_grad_() for x in given[:3])
        here = [None if column is None else column.to(device) for column in limits]
        attention = limited_attention(*here, T, 0.0) if device == DEVICE else DenseAttention(visible(*limits, T), 0.0)
        y = attention(q, k, v)
        results.append([x.cpu() for x in (y, *torch.autograd.grad(y, (q, k, v), given[3].to(device)))])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("position", ["learned", "rope"])
@pytest.mark.parametrize("second", LAYERED)
def test_the_gpu_gives_the_loss_and_gradients_of_the_cpu(second, position):
    changes = {"second_attention": second, "position": position}
    nats, grads = loss_and_gradients("cpu", torch.float32, **changes)
    gpu_nats, gpu_grads = loss_and_gradients(DEVICE, torch.float32, **changes)
    assert gpu_nats == pytest.approx(nats, rel=1e-4)
    for name, grad in grads.items():
        assert (gpu_grads[name] - grad).norm() <= 1e-3 * grad.norm() + 1e-6, name
    half_nats, half_grads = loss_and_gradients(DEVICE, torch.bfloat16, **changes)
    assert half_nats == pytest.approx(nats, rel=1e-2)
    for name, grad in grads.items():
        assert (half_grads[name] - grad).norm() <= 0.1 * grad.norm() + 1e-3, name


@pytest.mark.skipif(why_not_compile(torch.device(DEVICE)) is not None, reason="triton is missing")
def test_the_compiled_model_gives_the_loss_and_gradients_of_the_eager_one():
    nats, grads = loss_and_gradients(DEVICE, torch.float32)
    compiled_nats, compiled_grads = loss_and_gradients(DEVICE, torch.float32, compiled=True)
    assert compiled_nats == pytest.approx(nats, rel=1e-4)
    for name, grad in grads.items():
        assert (compiled_grads[name] - grad).norm() <= 1e-3 * grad.norm() + 1e-6, name


def test_activation_checkpointing_gives_the_same_gradients():
    nats, grads = loss_and_gradients(DEVICE, torch.float32, dropout=0.2)
    again_nats, again = loss_and_gradients(DEVICE, torch.float32, recompute=True, dropout=0.2)
    assert again_nats == nats and all((again[name] - grad).norm() <= 1e-5 * grad.norm() for name, grad in grads.items())


@pytest.mark.parametrize("second", LAYERED)
def test_greedy_decoding_on_the_gpu_gives_the_ids_of_the_cpu(second):
    run, plan = random_run(second_attention=second, position="rope"), PLANS["uniform"]
    prompt = laid_out(5, plan)
    expected = list(generate(run, prompt, plan, 60, temperature=0))
    run.model.to(DEVICE)
    assert list(generate(run, prompt, plan, 60, temperature=0)) == expected


def run(workdir, *command, launcher=None, **env) -> str:
    """Runs a program of the repository on the GPU, and returns what it prints."""
    launched = {"launcher": launcher} if launcher else {}
    result = cli(*command, f"--device={DEVICE}", cwd=workdir, env=GPU | env, **launched)
    assert result.returncode == 0, result.stderr.decode()[-3000:]
    return result.stdout.decode() + result.stderr.decode()


def train(workdir, name, *args, **how):
    base = (*TINY, "--dataset=data/u", "--block_size=32", f"--run_name={name}", "--max_steps=20")
    run(workdir, "train.py", *(arg for arg in override(base, *args) if not arg.startswith("--device")), **how)
    return workdir / "out" / name


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_in_bf16_with_compile_has_the_losses_of_an_uninterrupted_one(workdir, optimizer):
    assert pick_dtype("auto", torch.device(DEVICE))[0] in (torch.bfloat16, torch.float32)
    args = ("--dtype=auto", "--compile=True", f"--optimizer={optimizer}", "--lr_decay_steps=20")
    straight = train(workdir, f"gpu_{optimizer}", *args)
    train(workdir, f"gpu2_{optimizer}", *args, "--max_steps=9")
    resumed = train(workdir, f"gpu2_{optimizer}", *args, "--init_from=resume")
    assert losses(straight)[-1] < losses(straight)[0]
    assert losses(resumed) == pytest.approx(losses(straight), rel=2e-2)


def test_training_and_evaluation_are_compiled_once(workdir):
    # 5 validation windows do not fill the last micro-batch of 4
    args = ("--compile=True", "--micro_batch_size=4", "--eval_interval=5")
    printed = run(
        workdir, "train.py", *override(without_device(*TINY), "--dataset=data/u", "--block_size=32", *args),
        "--run_name=gpu_once", "--max_steps=12", TORCH_LOGS="recompiles",
    )  # fmt: skip
    assert "torch.compile on" in printed and "Recompiling" not in printed


def without_device(*args: str) -> list[str]:
    return [arg for arg in args if not arg.startswith("--device")]


def test_a_step_waits_for_the_gpu_once(workdir, monkeypatch):
    monkeypatch.chdir(workdir)
    settings = ("--dataset=data/u", "--block_size=32", "--run_name=gpu_wait", "--micro_batch_size=4")
    cfg = load_config(TrainConfig, override(without_device(*TINY), *settings, "--log_interval=50", "--max_steps=50"))
    with processes() as dist:
        trainer = Trainer(cfg, dist.on(DEVICE))
        for _ in range(3):
            trainer.train_step(False)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                trainer.train_step(False)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [f"{w.filename}:{w.lineno}" for w in caught if "synchronizing" in str(w.message)]
    assert len(waits) == 1, waits


@pytest.mark.parametrize("second", LAYERED)
def test_every_arm_trains_under_torchrun_and_writes_text(workdir, second):
    arm = (f"--second_attention={second}", "--position=rope")
    straight = train(workdir, f"gpu_{second}", *arm)
    # one process under torchrun joins a group, over NCCL, and wraps the model in DDP
    grouped = train(workdir, f"gpu_group_{second}", *arm, launcher=(*TORCHRUN, "--nproc_per_node=1"))
    assert losses(grouped) == pytest.approx(losses(straight), rel=1e-4)
    text = run(workdir, "sample.py", f"--run=out/gpu_{second}", "--prompt=the cat", "--max_new_tokens=40")
    assert text.startswith("the cat")


def test_a_longer_window_a_task_evaluations_and_a_probe_run_on_the_gpu(workdir):
    base = train(workdir, "gpu_base", "--position=rope", "--block_size=96")
    longer = train(
        workdir, "gpu_longer", f"--init_from={base}", "--rope_scaling=yarn", "--rope_factor=4", "--block_size=384",
        "--position=rope",
    )  # fmt: skip
    assert losses(longer)[-1] < losses(longer)[0]
    shape = ("--n_", "--block_size", "--dataset", "--position")
    settings = [arg for arg in without_device(*TINY) if not arg.startswith(shape)]
    run(
        workdir, "train.py", *settings, f"--init_from={base}", "--run_name=gpu_tasks", "--max_steps=10",
        "--train_length=96", "--level=easy", "--tasks", "parity",
    )  # fmt: skip
    cell = ("--run=out/gpu_tasks", "--n=8", "--lengths", "96")
    run(workdir, "eval.py", "tasks", *cell)
    run(workdir, "eval.py", "perplexity", "--run=out/gpu_longer", "--max_tokens=2000")
    run(workdir, "probe.py", "attention", *cell)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU alone")
def test_two_gpus_give_the_losses_of_one(workdir):
    launcher = (*TORCHRUN, "--nproc_per_node=2")
    one = train(workdir, "gpu_one", "--micro_batch_size=4")
    two = train(workdir, "gpu_two", "--micro_batch_size=4", launcher=launcher)
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
