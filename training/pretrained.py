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
from nanometa.common.keyed_random import stable_key
from nanometa.config import GPTConfig
from nanometa.data.markers import markers_of
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


def load_into(
    model: GPT,
    init_from: str,
    tokenizer: Tokenizer,
    markers: tuple[str, ...] = (),
    positions: int | None = None,
    seed: int = 0,
) -> tuple[str, int | None]:
    """Overwrites the parameters of a new model with the weights that init_from names.

    tokenizer: the dataset's. markers: names of the markers that the run's texts have; the rows of those that the
    weights have never seen become the mean of the content rows, and get noise drawn by `seed` if there are several.
    positions: number of positions that the run's texts use; None = all of the model.
    Returns a sentence for the log that says what was loaded and what is new, and the number of content tokens that the
    weights were trained on (None if unknown). Raises UserError if anything does not fit; the model is then
    unchanged."""
    check_name(init_from)
    if init_from in HUB:
        weights = read_hugging_face(init_from, *download(f"openai-community/{init_from}"), model.cfg, tokenizer)
    elif holds_run(Path(init_from)):
        weights = _run_of_ours(open_run(init_from), init_from, model.cfg, tokenizer, markers)
    else:
        weights = read_hugging_face(init_from, *files_of(Path(init_from)), model.cfg, tokenizer)

    params = dict(model.named_parameters())
    _fill_positions(weights, params.get("wpe.weight"), positions)
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
    _tell_apart(weights, tokenizer, markers, seed)
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


def _fill_positions(weights: StartWeights, table: torch.Tensor | None, positions: int | None) -> None:
    """Gives the table of learned positions the length of the model's `table`, if the run's texts do not use the rest.

    A marker that shares a position makes a window longer, but not the text in it."""
    found = weights.tensors.get("wpe.weight")
    if found is None or positions is None or table is None or not positions <= len(found) < len(table):
        return
    weights.tensors["wpe.weight"] = torch.cat([found, table[len(found) :].detach().to(found)])
    weights.note += f"; rows {len(found)} .. {len(table) - 1} of wpe.weight are new, and no text of the run uses them"


def _tell_apart(weights: StartWeights, tokenizer: Tokenizer, markers: tuple[str, ...], seed: int) -> None:
    """Adds noise from N(0, 0.02) to the rows of several markers if two of them are equal.

    Equal rows would get equal updates, except for what the mask makes different."""
    wte, ids = weights.tensors["wte.weight"], [tokenizer.markers[name] for name in markers]
    if len(ids) < 2 or len(torch.unique(wte[ids], dim=0)) == len(ids):
        return
    for name, row in zip(markers, ids, strict=True):
        generator = torch.Generator().manual_seed(stable_key(seed, "noise", name) >> 1)
        wte[row] += torch.empty(wte.size(1)).normal_(0, 0.02, generator=generator)
    weights.note += f"; noise from N(0, 0.02) was added to the rows of {' and '.join(markers)}, which were equal"


def _run_of_ours(
    saved: Checkpoint, init_from: str, cfg: GPTConfig, tokenizer: Tokenizer, markers: tuple[str, ...]
) -> StartWeights:
    """Returns the weights of a checkpoint that train.py wrote. init_from: its run or its folder, for messages.
    markers: as for load_into.

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
    if saved.config.task.tasks:
        return weights
    wte, seen = weights.tensors["wte.weight"], markers_of(saved.config, data["chunk_markers"])
    # The rows of markers that the run never saw are still random.
    if not seen:
        weights.tensors["wte.weight"] = with_markers(wte, tokenizer)
        weights.note = f"{marker_rows(tokenizer)} are the mean of the others"
    elif unseen := [name for name in markers if name not in seen and tokenizer.markers[name] < len(wte)]:
        wte[[tokenizer.markers[name] for name in unseen]] = wte[: tokenizer.n_content].mean(0)
        weights.note += f", except those of {' and '.join(unseen)}, which are the mean of the content rows"
    return weights
