"""Translates a run's settings and weights into those of an exported model."""

import dataclasses
from pathlib import Path

import torch
import torch.nn.functional as F

from nanometa.common.errors import UserError
from nanometa.data.layout import random_positions
from nanometa.inference.generation import MarkerPlan, knows_meta
from nanometa.model import GPT
from nanometa.training.checkpoint import Run
from nanometa.training.hugging_face import to_hf

CODE = Path(__file__).parent / "hugging_face"  # the Python files of an export, copied as they are
# SecondAttention.connects and .others that NanoMetaModel.second in CODE computes, with any window
COMPUTED = {
    ("markers", "nothing"), ("markers", "mean"), ("markers", "read"), ("random", "nothing"), ("all", "nothing"),
    ("nothing", "nothing"),
}  # fmt: skip


def is_plain(run: Run) -> bool:
    """Returns whether transformers' own GPT-2 computes what the run's model computes."""
    m = run.config.model
    return (m.second_attention, m.position) == ("none", "learned") and not knows_meta(run)


def refuse(run: Run) -> None:
    """Raises UserError if the exported code cannot compute what the run's model computes."""
    second = run.config.model.second
    if (second.connects, second.others) not in COMPUTED:
        raise UserError(
            f"second_attention={second.name} cannot be exported, because interop/hugging_face/modeling_nanometa.py "
            f"does not compute it: add it there."
        )
    if run.config.model.rope_dynamic:
        raise UserError(
            "rope_dynamic=True cannot be exported, because the scale of every query rotates all cached keys anew: "
            "leave it out, or export with a fixed --rope_factor."
        )
    markers = run.config.markers
    if markers.places_markers or markers.restricts or run.config.model.meta_position == "previous":
        what = markers.label or "meta_position=previous"
        raise UserError(
            f"{run.folder} cannot be exported, because the exported code does not place sentinels, and hides nothing "
            f"from a position ({what}): export another run."
        )
    if run.config.task.visible == "marked":
        raise UserError(
            f"{run.folder} cannot be exported, because it was trained with visible=marked, which skips positions that "
            f"its tasks name: export a run that reads whole texts."
        )


def placement_of(run: Run, markers: str) -> str:
    """Returns marker_placement of the exported config. markers: the setting of ExportConfig.

    Raises UserError if the run cannot have it."""
    has_rule = bool(run.state["data"]["chunk_markers"])
    if markers == "auto":
        return "implicit" if has_rule else "none"
    if markers != "none" and not has_rule:
        raise UserError(
            f"markers={markers} needs a run that was trained on text with markers, and {run.folder} was not: leave "
            f"--markers out."
        )
    return markers


def pad_id(run: Run) -> int:
    """Returns the id of <|pad|>: the first that is neither text nor a marker the run knows; <|endoftext|> in a GPT-2.

    An id of its own keeps pads apart from the ends of documents, which must neither be masked nor lose their loss."""
    return run.tokenizer.eot if is_plain(run) else run.tokenizer.n_content + knows_meta(run)


def token_ids(run: Run) -> dict:
    """Returns the ids of special tokens, for config.json and generation_config.json."""
    eot = run.tokenizer.eot
    return {"bos_token_id": eot, "eos_token_id": eot, "pad_token_id": pad_id(run)}


def config_of(run: Run, placement: str, seed: int) -> dict:
    """Returns the content of config.json. seed: that of the places of random markers."""
    return _gpt2_config(run) if is_plain(run) else _nanometa_config(run, placement, seed)


def _shape(run: Run) -> dict:
    m = run.config.model
    shape = {"n_layer": m.n_layer, "n_head": m.n_head, "n_embd": m.n_embd, "n_inner": m.n_inner or 4 * m.n_embd}
    return {**shape, **token_ids(run), "dtype": "float32", "tie_word_embeddings": True, "use_cache": True}


def _gpt2_config(run: Run) -> dict:
    dropout = run.config.model.dropout
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **_shape(run),
        "n_positions": run.config.model.block_size,
        "vocab_size": run.tokenizer.n_content,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "attn_pdrop": dropout,
        "embd_pdrop": dropout,
        "resid_pdrop": dropout,
    }


def _nanometa_config(run: Run, placement: str, seed: int) -> dict:
    m, tokenizer = run.config.model, run.tokenizer
    plan, drawn = MarkerPlan.of_run(run, seed=seed), None
    if m.second.connects == "random":  # those of generated text
        draw = (m.random_fraction, run.config.seed, "generated")
        drawn = random_positions(torch.zeros(1, dtype=torch.long).numpy(), m.block_size, *draw)[0].tolist()
    text_positions = sum(position not in plan for position in range(m.block_size))
    return {
        "architectures": ["NanoMetaForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_nanometa.NanoMetaConfig",
            "AutoModelForCausalLM": "modeling_nanometa.NanoMetaForCausalLM",
        },
        "model_type": "nanometa",
        **_shape(run),
        "vocab_size": max(tokenizer.n_vocab, pad_id(run) + 1),
        "content_vocab_size": tokenizer.n_content,
        "marker_id": tokenizer.meta if knows_meta(run) else None,
        "n_positions": text_positions if placement == "implicit" else m.block_size,
        "window": m.block_size,
        "bias": m.bias,
        "dropout": m.dropout,
        "position": m.position,
        "meta_position": m.meta_position,
        "second_connects": m.second.connects,
        "second_window": m.second.window,
        "second_others": m.second.others,
        "random_positions": drawn,
        "rotary_base": m.rope_theta,
        "rotary_scaling": m.rope_scaling,
        "rotary_factor": m.rope_factor,
        "rotary_original_window": m.original_block_size,
        "yarn_beta_fast": m.yarn_beta_fast,
        "yarn_beta_slow": m.yarn_beta_slow,
        "yarn_ramp": m.yarn_ramp,
        "yarn_attention_factor": m.yarn_attention_factor,
        "target_rule": run.config.target_rule,
        "marker_placement": placement,
        "marker_injection": plan.injection,
        "marker_content": plan.C,
        "marker_count": plan.M,
        "marker_key": plan.key,
    }


def weights_of(run: Run) -> dict[str, torch.Tensor]:
    """Returns the content of model.safetensors, in fp32. The tied head is left out; transformers takes wte for it."""
    if is_plain(run):
        weights = to_hf(_with_biases(run.model))
        del weights["lm_head.weight"]
        # rows of markers and unused ids would take part in the softmax, where this model masks them
        weights["transformer.wte.weight"] = weights["transformer.wte.weight"][: run.tokenizer.n_content].clone()
        return weights
    state = {f"transformer.{name}": p.detach().cpu().contiguous() for name, p in run.model.state_dict().items()}
    wte = state["transformer.wte.weight"]
    rows = max(run.tokenizer.n_vocab, pad_id(run) + 1)
    state["transformer.wte.weight"] = F.pad(wte, (0, 0, 0, rows - len(wte)))  # a row for <|pad|>, if there was no spare
    return state


def _with_biases(model: GPT) -> GPT:
    """Returns a model that computes the same with biases of 0, which transformers' GPT-2 must have."""
    twin = GPT(dataclasses.replace(model.cfg, bias=True, meta_position="same"))  # GPT's own biases start at 0
    twin.load_state_dict(model.state_dict(), strict=False)
    return twin
