"""Measures training steps of nanoMeta's arms, of nanoGPT and of Hugging Face's GPT-2.

It also builds meta-attention under a dense mask, which other sections compare with."""

import dataclasses
import functools
import importlib.util
import itertools
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

from nanometa.benches.timing import DTYPES, Contestant, contest, quartiles, say
from nanometa.config import GPTConfig, TrainConfig, WeightConfig
from nanometa.data.layout import IGNORE, places_of
from nanometa.layers.loss import Objective
from nanometa.layers.weighting import ShortLengths, WeightedObjective
from nanometa.meta_attention import MetaAttention
from nanometa.model import GPT
from nanometa.training.distributed import autocast, pick_device
from nanometa.training.estimate import flops_per_window
from nanometa.training.optimizer import Optimizer

VOCABULARY, CONTENT = 50304, 50257
# layers, heads, width, positions per window, windows per step
SHAPES = {"gpt2": (12, 12, 768, 1024, 4), "small": (6, 6, 384, 256, 8), "tiny": (4, 3, 192, 512, 8)}
KEPT = "nanogpt, memory kept"
MARKERS = 0.1  # share of the positions, in the arm with meta-tokens


@dataclasses.dataclass(frozen=True)
class Step:
    """Settings that determine what a training step computes.

    arm: none, meta, dense (meta-attention under the paper's masks over all rows), nanogpt or hf. markers: meta-tokens
    per window. nanogpt: the folder of a checkout, which is imported and not changed."""

    arm: str
    dtype: str  # fp32 | bf16
    compiled: bool
    shape: tuple[int, int, int, int, int]
    markers: int = 0
    vocabulary: tuple[int, int] = (VOCABULARY, CONTENT)
    nanogpt: str = ""
    device: str = "auto"
    recompute: bool = False
    micro_batches: int = 1  # each has the windows of `shape`; the update follows the last one
    scorer: str = ""  # of a weighted loss: self or stored; "": the usual loss

    @property
    def positions(self) -> int:
        return self.shape[3] * self.shape[4] * self.micro_batches

    @property
    def content(self) -> int:
        return (self.shape[3] - self.markers) * self.shape[4] * self.micro_batches

    def scored_by(self, scorer: str) -> "Step":
        """Returns the step with another scorer."""
        return dataclasses.replace(self, scorer=scorer)

    def config(self) -> GPTConfig:
        n_layer, n_head, n_embd, T, _ = self.shape
        second = "meta" if self.arm in ("meta", "dense") else "none"
        return GPTConfig(
            n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=T, second_attention=second,
            vocab_size=self.vocabulary[0], content_vocab_size=self.vocabulary[1],
        )  # fmt: skip


def training_step(step: Step) -> Callable[[], torch.Tensor]:
    """Returns a function that makes one update (forward, backward, clipping, AdamW) and returns the loss before it.

    The function always trains on the same windows."""
    torch.manual_seed(0)
    device = pick_device(step.device)
    nats, parameters, update = (_ours if step.arm in ("none", "meta", "dense") else _peer)(step, device)

    def one():
        for _ in range(step.micro_batches):
            with autocast(device, DTYPES[step.dtype]):
                loss = nats()
            (loss / step.micro_batches).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        update()
        return loss.detach()

    return one


def windows(step: Step) -> tuple[torch.Tensor, ...]:
    """Returns random windows as in a Batch: tokens, targets, positions (B, T), meta_index (B, M), scored (B, S)."""
    T, B, meta = step.shape[3], step.shape[4], step.vocabulary[1]
    tokens = torch.randint(0, meta, (B, T))
    index = torch.stack([torch.randperm(T)[: step.markers].sort().values for _ in range(B)])
    tokens.scatter_(1, index, meta)
    following = torch.cat((tokens[:, 1:], torch.randint(0, meta, (B, 1))), 1)
    targets = torch.where(following == meta, IGNORE, following)
    scored = torch.from_numpy(places_of((targets != IGNORE).numpy(), min(T, T - step.markers + 1)))
    return tokens, targets, torch.arange(T).repeat(B, 1), index, scored


def _ours(step: Step, device: torch.device) -> tuple[Callable, list, Callable]:
    """Returns the loss, the parameters and the update of a nanoMeta model, for training_step."""
    batch = [tensor.to(device) for tensor in windows(step)]
    model = GPT(step.config())
    model.recompute = step.recompute
    if step.arm == "dense":
        for block in model.h:
            block.second_attn.__class__ = DenseMeta
    model.to(device)
    objective, beside = _weighted(step, model, device) if step.scorer else (Objective(model), {})
    optimizer = Optimizer(model, TrainConfig(model=step.config()))
    if step.compiled:
        objective = torch.compile(objective, dynamic=False)

    def nats() -> torch.Tensor:
        found = objective(*batch, **beside)
        return found[0] if step.scorer else found

    return (
        lambda: nats() / (step.content // step.micro_batches),
        list(model.parameters()),
        lambda: optimizer.step(1e-4),
    )


def _weighted(step: Step, model: GPT, device: torch.device) -> tuple[WeightedObjective, dict]:
    """Returns the weighted objective of a model, and what it needs besides a batch. Short contexts are a quarter of a
    window."""
    _, _, _, T, B = step.shape
    content = T - step.markers
    length = content // 4
    lengths = ShortLengths(length, round((1 - length / content) * length), content, T)
    beside = {"ties": torch.randint(0, 2**62, (B, T)).to(device), "column": None}
    if step.scorer == "stored":
        beside["column"] = (8 * torch.rand(B, content)).to(device)
    return WeightedObjective(model, WeightConfig(weighting="dense"), lengths), beside


class DenseMeta(MetaAttention):
    """MetaAttention as the paper writes it: attention over all rows, with both masks as tensors."""

    def forward(self, x, meta_index, norm, rotate=None, attend=None, packed=False):
        assert rotate is None and attend is None, "DenseMeta has neither rotary positions nor cached decoding"
        B, T, _ = x.shape
        is_meta = torch.zeros(B, T, dtype=torch.bool, device=x.device).scatter_(1, meta_index, True)
        pairs = is_meta[:, :, None] & is_meta[:, None, :] & torch.ones(T, T, dtype=torch.bool, device=x.device).tril()
        # Rows of content see nothing, which softmax cannot compute. They see themselves and are dropped afterwards.
        mask = (pairs | torch.eye(T, dtype=torch.bool, device=x.device))[:, None]
        q, k, v = rearrange(self.c_attn(norm(x)), "b t (three h d) -> three b h t d", three=3, h=self.n_head)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return x + torch.where(is_meta[..., None], self.c_proj(rearrange(y, "b h t d -> b t (h d)")), 0)


def _peer(step: Step, device: torch.device) -> tuple[Callable, list, Callable]:
    """Returns the loss, the parameters and the update of nanoGPT or Hugging Face's GPT-2, for training_step."""
    tokens, targets, *_ = (tensor.to(device) for tensor in windows(step))
    model = (nanogpt_model(step) if step.arm == "nanogpt" else hf_model(step)).to(device)
    parameters = list(model.parameters())
    if step.arm == "nanogpt":  # as in nanoGPT's train.py
        optimizer = model.configure_optimizers(0.1, 1e-4, (0.9, 0.95), device.type)
    else:
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)
    run = torch.compile(model) if step.compiled else model

    def update():
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    if step.arm == "nanogpt":
        return lambda: run(tokens, targets)[1], parameters, update
    return lambda: run(tokens, labels=tokens).loss, parameters, update


def bench(args, peaks: dict[str, float]) -> list[dict]:
    """Returns one row per shape, dtype, mode and implementation, each of which runs in a process of its own.

    nanoGPT takes part twice: as its users run it, and as "nanogpt, memory kept", with the setting of the memory
    allocator that nanoMeta's commands make."""
    rows = []
    for name in args.shapes:
        shape = SHAPES[name]
        vocabulary = (4160, 4096) if name == "tiny" else (VOCABULARY, CONTENT)
        arms = {"none": 0, "meta": round(MARKERS * shape[3])}
        arms |= ({"nanogpt": 0, KEPT: 0} if args.nanogpt else {}) | ({"hf": 0} if args.hf else {})
        arms = {who: markers for who, markers in arms.items() if who not in args.without}
        for dtype, mode in itertools.product(args.dtypes, args.modes):
            steps = {
                who: Step(who.split(",")[0], dtype, mode == "compiled", shape, markers, vocabulary, str(args.nanogpt))
                for who, markers in arms.items()
            }
            contestants = {
                who: Contestant(training_step, step, keep_freed=who in ("none", "meta", KEPT))
                for who, step in steps.items()
            }
            times, peak = contest(contestants, args.repeats)
            for who, step in steps.items():
                low, middle, high = (step.positions / seconds for seconds in quartiles(times[who])[::-1])
                row = {"shape": name, "dtype": dtype, "mode": mode, "who": who, "positions/s": middle}
                row |= {"quartiles": f"{low:,.0f} .. {high:,.0f}", "content/s": middle * step.content / step.positions}
                if who in ("none", "meta"):
                    flops = flops_per_window(step.config(), step.markers) / shape[3]
                    row["share of the matmul peak"] = middle * flops / peaks[dtype]
                row["peak GB"] = peak[who] / 1e9
                rows.append(row)
                say(row)
    return rows


def ratios(rows: list[dict]) -> list[str]:
    """Returns sentences that compare the speeds and the memory within each shape, dtype and mode."""
    groups = {}
    for row in rows:
        groups.setdefault((row["shape"], row["dtype"], row["mode"]), {})[row["who"]] = row
    out = []
    for key, group in groups.items():
        plain, parts = group["none"], []
        if "meta" in group:
            positions, content = (group["meta"][unit] / plain[unit] for unit in ("positions/s", "content/s"))
            parts.append(f"meta / none {positions:.3f} in positions/s, {content:.3f} in content tokens/s")
        for peer in ("nanogpt", KEPT, "hf"):
            if peer in group:
                speed, memory = (plain[unit] / group[peer][unit] for unit in ("positions/s", "peak GB"))
                parts.append(f"none / {peer} {speed:.3f}, memory {memory:.2f}")
        if parts:
            out.append(f"{' '.join(key)}: {'; '.join(parts)}")
    return out


@functools.cache
def nanogpt_module(folder: str):
    """Imports model.py of a nanoGPT checkout under a name that does not collide with nanoMeta's own model.py."""
    path = Path(folder) / "model.py"
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def nanogpt_model(step: Step) -> nn.Module:
    """Returns nanoGPT's model of the step's shape."""
    n_layer, n_head, n_embd, T, _ = step.shape
    module = nanogpt_module(step.nanogpt)
    cfg = module.GPTConfig(T, step.vocabulary[0], n_layer, n_head, n_embd, dropout=0.0, bias=False)
    return module.GPT(cfg)


def hf_model(step: Step) -> nn.Module:
    """Returns Hugging Face's GPT-2 of the step's shape, without dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    n_layer, n_head, n_embd, T, _ = step.shape
    return GPT2LMHeadModel(
        GPT2Config(
            n_layer=n_layer, n_head=n_head, n_embd=n_embd, n_positions=T, vocab_size=step.vocabulary[0],
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )
    )  # fmt: skip
