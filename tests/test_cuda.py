"""Tests that need a GPU: pytest -m cuda runs them where there is one; they are skipped elsewhere."""

import dataclasses
import os

import pytest
import torch

from nanometa.config import GPTConfig
from nanometa.data.layout import places_of
from nanometa.inference.generation import generate
from nanometa.layers.loss import Objective
from nanometa.model import GPT
from nanometa.training.distributed import autocast, pick_dtype, why_not_compile
from tests.conftest import TINY, cli, losses, override
from tests.test_generate_cache import PLANS, laid_out, random_run
from tests.test_model import LAYERED

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU here"),
]
SHAPE = GPTConfig(n_layer=2, n_head=2, n_embd=64, block_size=128, vocab_size=320, content_vocab_size=300)
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


@pytest.mark.parametrize("position", ["learned", "rope"])
@pytest.mark.parametrize("second", LAYERED)
def test_the_gpu_gives_the_loss_and_gradients_of_the_cpu(second, position):
    changes = {"second_attention": second, "position": position}
    nats, grads = loss_and_gradients("cpu", torch.float32, **changes)
    gpu_nats, gpu_grads = loss_and_gradients("cuda", torch.float32, **changes)
    assert gpu_nats == pytest.approx(nats, rel=1e-4)
    for name, grad in grads.items():
        assert (gpu_grads[name] - grad).norm() <= 1e-3 * grad.norm() + 1e-6, name
    half_nats, half_grads = loss_and_gradients("cuda", torch.bfloat16, **changes)
    assert half_nats == pytest.approx(nats, rel=1e-2)
    for name, grad in grads.items():
        assert (half_grads[name] - grad).norm() <= 0.1 * grad.norm() + 1e-3, name


@pytest.mark.skipif(why_not_compile(torch.device("cuda")) is not None, reason="triton is missing")
def test_the_compiled_model_gives_the_loss_and_gradients_of_the_eager_one():
    nats, grads = loss_and_gradients("cuda", torch.float32)
    compiled_nats, compiled_grads = loss_and_gradients("cuda", torch.float32, compiled=True)
    assert compiled_nats == pytest.approx(nats, rel=1e-4)
    for name, grad in grads.items():
        assert (compiled_grads[name] - grad).norm() <= 1e-3 * grad.norm() + 1e-6, name


def test_activation_checkpointing_gives_the_same_gradients():
    nats, grads = loss_and_gradients("cuda", torch.float32, dropout=0.2)
    again_nats, again = loss_and_gradients("cuda", torch.float32, recompute=True, dropout=0.2)
    assert again_nats == nats and all((again[name] - grad).norm() <= 1e-5 * grad.norm() for name, grad in grads.items())


@pytest.mark.parametrize("second", LAYERED)
def test_greedy_decoding_on_the_gpu_gives_the_ids_of_the_cpu(second):
    run, plan = random_run(second_attention=second, position="rope"), PLANS["uniform"]
    prompt = laid_out(5, plan)
    expected = list(generate(run, prompt, plan, 60, temperature=0))
    run.model.to("cuda")
    assert list(generate(run, prompt, plan, 60, temperature=0)) == expected


def train(workdir, name, *args, launcher=None):
    base = (*TINY, "--dataset=data/u", "--block_size=32", f"--run_name={name}", "--max_steps=20")
    launched = {"launcher": launcher} if launcher else {}
    result = cli("train.py", *override(base, "--device=cuda", *args), cwd=workdir, env=GPU, **launched)
    assert result.returncode == 0, result.stderr.decode()[-3000:]
    return workdir / "out" / name


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_in_bf16_with_compile_has_the_losses_of_an_uninterrupted_one(workdir, optimizer):
    assert pick_dtype("auto", torch.device("cuda"))[0] in (torch.bfloat16, torch.float32)
    args = ("--dtype=auto", "--compile=True", f"--optimizer={optimizer}", "--lr_decay_steps=20")
    straight = train(workdir, f"gpu_{optimizer}", *args)
    train(workdir, f"gpu2_{optimizer}", *args, "--max_steps=9")
    resumed = train(workdir, f"gpu2_{optimizer}", *args, "--init_from=resume")
    assert losses(straight)[-1] < losses(straight)[0]
    assert losses(resumed) == pytest.approx(losses(straight), rel=2e-2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU alone")
def test_two_gpus_give_the_losses_of_one(workdir):
    launcher = ("torchrun", "--standalone", "--nproc_per_node=2")
    one = train(workdir, "gpu_one", "--micro_batch_size=4")
    two = train(workdir, "gpu_two", "--micro_batch_size=4", launcher=launcher)
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
