"""Provides the learning-rate schedules, AdamW and Muon as one optimizer, and the norms that the log records."""

import math

import torch
from torch.nn.utils import get_total_norm

from nanometa.config import TrainConfig
from nanometa.model import ADAPTED, GPT
from nanometa.training.distributed import pick_dtype


def decay_of(cfg: TrainConfig) -> tuple[int, int]:
    """Returns the first update of the decay of cosine and wsd, and the first one after it, which has min_lr."""
    end = cfg.lr_decay_steps or cfg.max_steps
    stable = end - round(cfg.decay_fraction * end) if cfg.schedule == "wsd" else 0
    return max(cfg.warmup_steps, stable), end


def learning_rate(step: int, cfg: TrainConfig, early: tuple[int, int] | None = None) -> float:
    """Returns the learning rate of update number `step`, counted from 0.

    After a linear warm-up there are three schedules:
    - cosine: half a cosine down to min_lr (GPT-3, nanoGPT).
    - wsd: constant, then down to min_lr as 1 - sqrt over the last decay_fraction of the steps. The rate before the
      decay does not depend on the number of steps (Hu et al., arXiv 2404.06395; the form of the decay is from Hägele
      et al., arXiv 2405.18392).
    - constant: no decay.
    early: what decay_of returns, for a decay that begins before that of the schedule (--stop_at). It starts from the
    rate that update would have had."""
    early = early if early and step >= early[0] else None
    if step < cfg.warmup_steps and not early:
        return cfg.learning_rate * (step + 1) / (cfg.warmup_steps + 1)
    if cfg.schedule == "constant":
        return cfg.learning_rate
    start, end = early or decay_of(cfg)
    peak = cfg.learning_rate
    if start < cfg.warmup_steps:  # only an early decay can start within the warm-up
        peak = learning_rate(start, cfg)
    done = min(1.0, max(0, step - start) / max(1, end - start))
    left = 0.5 * (1 + math.cos(math.pi * done)) if cfg.schedule == "cosine" else 1 - math.sqrt(done)
    return cfg.min_lr + left * (peak - cfg.min_lr)


MUON_BATCH = 2**21  # numbers in the matrices that Muon computes at once, which limits its temporary memory


def muon_batches(matrices: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Returns the matrices in lists of one shape, each with at most MUON_BATCH numbers or a single matrix."""
    by_shape: dict[torch.Size, list[torch.Tensor]] = {}
    for matrix in matrices:
        by_shape.setdefault(matrix.shape, []).append(matrix)
    batches = []
    for same in by_shape.values():
        n = max(1, MUON_BATCH // same[0].numel())
        batches += [same[start : start + n] for start in range(0, len(same), n)]
    return batches


def muon_transient(matrices: list[torch.Tensor], dtype: torch.dtype) -> int:
    """Returns the largest number of bytes that an update of Muon holds at once beside its state.

    dtype: that of the Newton-Schulz steps."""
    size, most = dtype.itemsize, 0
    for batch in muon_batches(matrices):
        n, gram = len(batch) * batch[0].numel(), len(batch) * min(batch[0].shape) ** 2
        # the directions with their stacked copy, in fp32; then the largest of two moments of a Newton-Schulz step
        most = max(most, 2 * 4 * n, size * (2 * n + gram), size * (n + 2 * gram))
    return most


def muon_matrices(model: GPT) -> list[torch.Tensor]:
    """Returns the parameters that Muon updates: the trained matrices of the blocks, but not the factors of LoRA."""
    return [
        p for name, p in model.named_parameters()
        if name.startswith("h.") and p.dim() == 2 and p.requires_grad and ADAPTED not in name
    ]  # fmt: skip


def muon_dtype(device: torch.device) -> torch.dtype:
    """Returns the dtype of the Newton-Schulz steps: bfloat16, or fp32 on a processor or GPU that would emulate it."""
    return pick_dtype("auto", device)[0]


class Muon(torch.optim.Muon):
    """torch.optim.Muon that computes the Newton-Schulz steps of several matrices of one shape in batched products.

    torch.optim.Muon always takes these steps in bfloat16. Here they are in fp32 on a processor without bfloat16, where
    emulating it would take seconds for each update."""

    @torch.no_grad()
    def step(self) -> None:
        """Makes one update, as torch.optim.Muon does with adjust_lr_fn="match_rms_adamw"."""
        for group in self.param_groups:
            for params in muon_batches(group["params"]):
                self._update(params, group)

    def _update(self, params: list[torch.Tensor], group: dict) -> None:
        grads, momentum = [p.grad for p in params], group["momentum"]
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        directions = list(torch._foreach_lerp(grads, buffers, momentum))  # Nesterov
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        # 0.2 sqrt(larger side) gives updates the root mean square of AdamW's (arXiv 2502.16982, section 2.2)
        scale = group["lr"] * 0.2 * math.sqrt(max(params[0].shape))
        for p, update in zip(params, orthogonalized(directions, group), strict=True):
            p.add_(update, alpha=-scale)


def orthogonalized(matrices: list[torch.Tensor], group: dict) -> torch.Tensor:
    """Returns matrices of one shape, stacked (N, rows, columns), with their singular values brought near 1. Empties the
    list, to free its memory.

    group: a parameter group of Muon, with the coefficients and number of Newton-Schulz steps, and eps."""
    a, b, c = group["ns_coefficients"]
    x = torch.stack(matrices)
    matrices.clear()
    x = x.to(muon_dtype(x.device))
    tall = x.size(1) > x.size(2)
    x.div_(x.norm(dim=(1, 2), keepdim=True).clamp(min=group["eps"]))  # now no singular value is above 1
    x = x.mT if tall else x  # the product of the shorter sides is smaller
    for _ in range(group["ns_steps"]):
        gram = x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, gram, x, beta=a)
    return x.mT if tall else x


# The state that each optimizer keeps per parameter: "step" is a number, the other tensors have the parameter's shape.
STATE = {torch.optim.AdamW: ("step", "exp_avg", "exp_avg_sq"), Muon: ("momentum_buffer",)}


class Optimizer:
    """AdamW for all parameters, or Muon for the matrices inside the blocks and AdamW for the rest. Frozen parameters
    have no state.

    Muon (Jordan et al., 2024) orthogonalizes the momentum by Newton-Schulz steps. Its updates are scaled here to the
    root mean square of AdamW's updates (Liu et al., arXiv 2502.16982), so both share one learning rate and weight
    decay."""

    def __init__(self, model: GPT, cfg: TrainConfig):
        self.model = model
        self.parts: list[torch.optim.Optimizer] = []
        groups = model.param_groups(cfg.weight_decay)
        if cfg.optimizer == "muon" and (matrices := muon_matrices(model)):
            ids = {id(p) for p in matrices}
            groups = [{**group, "params": [p for p in group["params"] if id(p) not in ids]} for group in groups]
            self.parts.append(Muon(matrices, weight_decay=cfg.weight_decay))
        self.parts.append(torch.optim.AdamW(groups, betas=(cfg.beta1, cfg.beta2), fused=True))
        mine = [p for part in self.parts for group in part.param_groups for p in group["params"]]
        trained = [p for p in model.parameters() if p.requires_grad]
        assert len(mine) == len({id(p) for p in mine}) == len(trained), "a parameter is missing"

    def step(self, rate: float) -> None:
        """Makes one update at this learning rate, and deletes the gradients."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = rate
            part.step()
        self.forget_gradients()

    def forget_gradients(self) -> None:
        """Deletes the gradients without an update."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Returns the state by parameter name, with keys such as "h.0.attn.c_attn.weight/exp_avg"."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        states = ((p, state) for part in self.parts for p, state in part.state.items())
        return {f"{names[id(p)]}/{key}": tensor for p, state in states for key, tensor in state.items()}

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Takes over a state that `tensors` returned.

        Raises ValueError, before anything has changed, if it is not the state of these parameters."""
        params = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        owner = {id(p): part for part in self.parts for group in part.param_groups for p in group["params"]}
        for name, p in params.items():
            here = {
                key.rpartition("/")[2]: tensor.shape for key, tensor in tensors.items() if key.startswith(f"{name}/")
            }
            keys = STATE[type(owner[id(p)])]
            wanted = {key: torch.Size() if key == "step" else p.shape for key in keys}
            if here != wanted:
                raise ValueError(
                    f"{name} has the state {sorted(here) or 'nothing'}, but needs {', '.join(keys)} with the shape of "
                    f"the parameter"
                )
        for name in tensors:
            if name.rpartition("/")[0] not in params:
                raise ValueError(f"{name} belongs to no parameter that is trained")
        for name, tensor in tensors.items():
            param, key = name.rsplit("/", 1)
            owner[id(params[param])].state[params[param]][key] = tensor.to(params[param].device)


def part_of(name: str) -> str:
    """Returns the part of the model that a parameter belongs to: embeddings, attn, second_attn, mlp or norms."""
    if name.startswith("h.") and ".ln_" not in name:
        return name.split(".")[2]
    return "embeddings" if name.startswith(("wte", "wpe")) else "norms"


@torch.no_grad()
def norms(model: GPT) -> dict[str, torch.Tensor]:
    """Returns the L2 norms of the trained parameters and of their gradients by name.

    The names are weight_norm for the whole model, and weight_norm_PART and grad_norm_PART for each part that is
    trained."""
    parts: dict[str, list[torch.Tensor]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            parts.setdefault(part_of(name), []).append(p)
    out = {"weight_norm": get_total_norm([p for p in model.parameters() if p.requires_grad])}
    for part, params in parts.items():
        out[f"weight_norm_{part}"] = get_total_norm(params)
        out[f"grad_norm_{part}"] = get_total_norm([p.grad for p in params])
    return out
