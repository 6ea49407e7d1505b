"""Loads the weights that training starts from: a GPT-2 from the Hugging Face hub or a folder, or another run.

    python train.py config/meta_gpt2.py --init_from=gpt2 --bias=True --run_name=from_gpt2
    python train.py config/meta_gpt2.py --init_from=out/gpt2_1024 --run_name=from_ours

If the weights lack the second attention, it keeps its random initial weights with an output projection of zero. At
step 0 the model therefore computes the logits of the loaded weights for text without markers.
"""

import re
from pathlib import Path

import torch

from nanometa.common.errors import UserError
from nanometa.config import GPTConfig
from nanometa.data.tokenizer import Tokenizer
from nanometa.model import GPT
from nanometa.training.checkpoint import WEIGHTS, Checkpoint, content_tokens, open_run
from nanometa.training.context_extension import interpolated
from nanometa.training.hugging_face import (
    HUB,
    StartWeights,
    check_shape,
    download,
    files_of,
    marker_rows,
    read_hugging_face,
    with_markers,
)
from nanometa.training.run_folders import holds_run, suggestion

KEYWORDS = ("scratch", "resume", "auto")  # values of init_from that name no weights


def check_name(init_from: str) -> None:
    """Raises UserError unless init_from is a keyword, a name on the hub, or an existing folder."""
    if init_from in KEYWORDS or init_from in HUB or Path(init_from).is_dir():
        return
    if Path(init_from).is_file():
        raise UserError(f"init_from={init_from} is a file: give the folder that contains it.")
    names = [*KEYWORDS, *HUB]
    known = map(str, Path(init_from).parent.glob("*/")) if "/" in init_from else names
    raise UserError(
        f"init_from={init_from!r} is neither one of {', '.join(names)} nor a folder: "
        f"{suggestion(Path(init_from), known)}"
    )


def load_into(model: GPT, init_from: str, tokenizer: Tokenizer) -> tuple[str, int | None]:
    """Overwrites the parameters of a new model with the weights that init_from names.

    tokenizer: the dataset's. Returns a sentence for the log that says what was loaded and what is new, and the number
    of content tokens that the weights were trained on (None if unknown). Raises UserError if anything does not fit; the
    model is then unchanged."""
    check_name(init_from)
    if init_from in HUB:
        weights = read_hugging_face(init_from, *download(f"openai-community/{init_from}"), model.cfg, tokenizer)
    elif holds_run(Path(init_from)):
        weights = _run_of_ours(open_run(init_from), init_from, model.cfg, tokenizer)
    else:
        weights = read_hugging_face(init_from, *files_of(Path(init_from)), model.cfg, tokenizer)

    params = dict(model.named_parameters())
    new = [
        name for name in params if name not in weights.tensors and (".second_attn." in name or ".ln_second." in name)
    ]
    for name in [name for name in params if name not in new]:
        check_shape(weights, name, tuple(params[name].shape))
        if not torch.isfinite(weights.tensors[name]).all():
            raise UserError(f"{name} in {weights.file} has values that are not finite: use other weights.")
    for name, tensor in weights.tensors.items():
        if name not in params:
            raise UserError(
                f"{name} {tuple(tensor.shape)} of {weights.file} has no place in this model: {weights.cure}."
            )
    with torch.no_grad():
        for name, tensor in weights.tensors.items():
            params[name].copy_(tensor)
    return (
        f"weights of {weights.file} (sha256 {weights.sha256}): loaded {_brief(weights.tensors)}; "
        f"newly initialized: {_brief(new) or 'none'}; {weights.note}"
    ), weights.content_tokens


def _brief(names) -> str:
    """Joins parameter names, with one name for all blocks: h.0.ln_1.weight and h.1.ln_1.weight give h.*.ln_1.weight."""
    return " ".join(dict.fromkeys(re.sub(r"^h\.\d+\.", "h.*.", name) for name in names))


def _run_of_ours(saved: Checkpoint, init_from: str, cfg: GPTConfig, tokenizer: Tokenizer) -> StartWeights:
    """Returns the weights of a checkpoint that train.py wrote. init_from: its run or its folder, for messages.

    Raises UserError if the tokenizers differ, or settings that the weights depend on although no shape shows them."""
    theirs, data = saved.config.model, saved.state["data"]
    if data["tokenizer"] != tokenizer.fingerprint:
        raise UserError(
            f"init_from={init_from} was trained with another tokenizer (fingerprint {data['tokenizer'][:12]}..) than "
            f"the dataset's ({tokenizer.fingerprint[:12]}..): prepare the dataset with --tokenizer={saved.folder}."
        )
    shared = ["n_head"]
    if cfg.position == theirs.position == "rope":
        shared.append("rope_theta")
        if cfg.rope_scaling == "none":  # otherwise with_base has extended the base run's window
            shared.append("rope_scaling")
    if cfg.second.has_layer and theirs.second.has_layer:
        shared.append("second_attention")
    for name in shared:
        ours, found = getattr(cfg, name), getattr(theirs, name)
        if ours != found:
            raise UserError(f"{name}={ours}, but {saved.folder} was trained with {found}: set --{name}={found}.")

    names = ["n_layer", "n_head", "n_embd", "block_size", "bias", "position"]
    names += ["n_inner"] if theirs.n_inner != cfg.n_inner else []
    names += ["second_attention"] if theirs.second.has_layer else []
    cure = "set " + " ".join(f"--{name}={getattr(theirs, name)}" for name in names)
    weights = StartWeights(
        saved.folder / WEIGHTS,
        saved.sha256[WEIGHTS],
        saved.weights(saved.empty_model()),
        cure,
        f"{marker_rows(tokenizer)} are as trained",
        content_tokens(saved.state, saved.config),
    )
    table = weights.tensors.get("wpe.weight")
    if table is not None and cfg.position == "learned" and cfg.rope_factor != theirs.rope_factor:
        weights.tensors["wpe.weight"] = interpolated(table, cfg.rope_factor, cfg.block_size)
        weights.note += f"; wpe.weight is interpolated from {len(table)} to {cfg.block_size} positions"
    if not data["chunk_markers"] and not saved.config.task.tasks:
        # The run never saw a marker, so the rows of its markers are still random.
        weights.tensors["wte.weight"] = with_markers(weights.tensors["wte.weight"], tokenizer)
        weights.note = f"{marker_rows(tokenizer)} are the mean of the others"
    return weights
