"""Writes the factors that a run trained with LoRA as an adapter for peft, beside the export of the model it began from.

    python export.py --run=out/base --output=out/hf_base
    python export.py --run=out/tuned --adapter --output=out/adapter
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("out/hf_base"), "out/adapter")

peft is not needed to write an adapter. It cannot express everything that a run can train; other runs are refused.
"""

from pathlib import Path

import safetensors.torch
import torch
from torch.nn.utils import parametrize

from nanometa.common.errors import UserError
from nanometa.data.markers import markers_of
from nanometa.interop.output import begin, finish, write_json
from nanometa.interop.weights import is_plain, refuse
from nanometa.training.checkpoint import Run, open_run
from nanometa.training.hugging_face import HUB
from nanometa.training.run_folders import holds_run

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TARGETS = r"transformer\.h\.\d+\.(attn|second_attn)\.(c_attn|c_proj)"  # a regular expression for names of layers


def open_adapted(path: str) -> Run:
    """Returns a run whose model has its adapters. path: as for open_run.

    Raises UserError if an adapter of peft cannot express what the run trained."""
    saved = open_run(path)
    cfg = saved.config
    if cfg.train_only != "lora":
        raise UserError(
            f"{saved.folder} has no adapter, because it was trained with train_only={cfg.train_only}: export it "
            f"without --adapter."
        )
    if names := markers_of(cfg, saved.state["data"]["chunk_markers"]):
        raise UserError(
            f"an adapter cannot hold {saved.folder}, because it also trained the embedding of {' and '.join(names)}, "
            f"and the model that it began from need not have such a row: export it without --adapter."
        )
    if cfg.extends:
        raise UserError(
            f"an adapter cannot hold {saved.folder}, because the positions of its model were rescaled "
            f"(rope_scaling={cfg.model.rope_scaling}, rope_factor={cfg.model.rope_factor:g}): export it without "
            f"--adapter."
        )
    model = saved.load_into(saved.adapted_model(), "cpu")
    for block in model.h:
        if cfg.model.second.has_layer and not block.second_attn.c_proj.parametrizations.weight.original.any():
            raise UserError(
                f"an adapter cannot hold {saved.folder}, because the model that it began from has no second attention: "
                f"export it without --adapter."
            )
    run = Run(model, saved.tokenizer(), cfg, saved.state, saved.folder)
    refuse(run)
    return run


def adapter_weights(run: Run) -> dict[str, torch.Tensor]:
    """Returns the content of adapter_model.safetensors: A (r, in) and B (out, r) of each layer, under peft's names."""
    weights = {}
    for name, layer in run.model.named_modules():
        if parametrize.is_parametrized(layer, "weight"):
            (factors,) = layer.parametrizations.weight
            for letter in ("A", "B"):
                key = f"base_model.model.transformer.{name}.lora_{letter}.weight"
                weights[key] = getattr(factors, letter).detach().contiguous()
    return weights


def adapter_config(run: Run) -> dict:
    """Returns the content of adapter_config.json."""
    cfg = run.config
    known = None if holds_run(Path(cfg.init_from)) else cfg.init_from
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": f"openai-community/{known}" if known in HUB else known,
        "r": cfg.lora_r,
        "lora_alpha": cfg.lora_alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": TARGETS,
        "fan_in_fan_out": is_plain(run),  # transformers' GPT-2 stores its matrices as (in, out)
        "inference_mode": True,
    }


def write_adapter(run: Run, output: Path) -> list[str]:
    """Writes the adapter as a new folder. Returns what to print about it."""
    partial = begin(output)
    write_json(partial / CONFIG, adapter_config(run))
    weights = adapter_weights(run)
    safetensors.torch.save_file(weights, partial / WEIGHTS, metadata={"format": "pt"})
    finish(partial, output, config=CONFIG, weights=WEIGHTS)
    numbers = sum(tensor.numel() for tensor in weights.values())
    return [
        f"{output}: a LoRA adapter for peft, {numbers:,} numbers, for the model that the run started from",
        f"{run.folder} started from {run.state.get('origin', 'unknown weights')}",
    ]
