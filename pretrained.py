"""Weights for step 0: OpenAI's GPT-2 from the Hugging Face hub or from a local folder, or those of another run of ours.

    python train.py config/meta_gpt2.py --init_from=gpt2 --bias=True --run_name=from_gpt2
    python train.py config/meta_gpt2.py --init_from=out/gpt2_1024 --run_name=from_ours

Only safetensors is read, nothing pickled, and transformers is not needed. What the weights lack, a second attention,
stays as GPT draws it, with an output projection of zero: at step 0 text without markers has the logits of the weights.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoint import WEIGHTS, content_tokens, holds_run, open_run, read_tensors
from config import GPTConfig, UserError, nearest_name
from data.files import read_json
from data.shards import file_sha256
from data.tokenizer import Tokenizer
from extend import interpolated
from model import GPT, from_hf

KEYWORDS = ("scratch", "resume", "auto")  # of init_from; all else is weights
HUB = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")  # of openai-community
CONFIG = "config.json"
# What GPT computes, by the names of Hugging Face's GPT2Config; a config.json without the name means the first
COMPUTED = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
}


@dataclass
class Weights:
    """Tensors with the names and shapes of GPT's parameters, markers' rows included."""

    file: Path
    tensors: dict[str, torch.Tensor]
    fit: str  # the settings that they fit
    note: str  # for the log
    content_tokens: int | None = None  # of text, that they were trained on; None = nobody says


def check_name(init_from: str) -> None:
    """Raises UserError unless init_from is a keyword, a name on the hub, or else a folder."""
    if init_from in KEYWORDS or init_from in HUB or Path(init_from).is_dir():
        return
    if Path(init_from).is_file():
        raise UserError(f"init_from={init_from} is a file: give the folder that it is in.")
    beside = sorted(map(str, Path(init_from).parent.glob("*/"))) if "/" in init_from else []
    known = [*KEYWORDS, *HUB]
    raise UserError(
        f"init_from={init_from!r} is none of {', '.join(known)} and no folder: "
        f"{nearest_name(init_from, beside or known)}"
    )


def load_into(model: GPT, init_from: str, tokenizer: Tokenizer) -> tuple[str, int | None]:
    """Overwrites the parameters of a fresh model -> a sentence for the log: what was loaded, and what is new; and how
    many content tokens of text the weights were trained on, None if nobody says.

    tokenizer: that of the dataset. Raises UserError if anything does not fit; the model is then as it was."""
    check_name(init_from)
    if init_from in HUB:
        weights = _hugging_face(init_from, *_download(f"openai-community/{init_from}"), model.cfg, tokenizer)
    elif holds_run(Path(init_from)):
        weights = _run_of_ours(init_from, model.cfg, tokenizer)
    else:
        weights = _hugging_face(init_from, *_files_of(Path(init_from)), model.cfg, tokenizer)

    params = dict(model.named_parameters())
    new = [
        name for name in params if name not in weights.tensors and (".second_attn." in name or ".ln_second." in name)
    ]
    for name in [name for name in params if name not in new]:
        _check_shape(weights, name, tuple(params[name].shape))
        if not torch.isfinite(weights.tensors[name]).all():
            raise UserError(f"{name} in {weights.file} has values that are not finite: take other weights.")
    for name, tensor in weights.tensors.items():
        if name not in params:
            raise UserError(
                f"{name} {tuple(tensor.shape)} of {weights.file} has no place in this model: take {weights.fit}."
            )
    with torch.no_grad():
        for name, tensor in weights.tensors.items():
            params[name].copy_(tensor)
    return (
        f"weights of {weights.file} (sha256 {file_sha256(weights.file)}): loaded {_brief(weights.tensors)}; "
        f"new, as from scratch: {_brief(new) or 'none'}; {weights.note}"
    ), weights.content_tokens


def _brief(names) -> str:
    """h.0.ln_1.weight, h.1.ln_1.weight -> h.*.ln_1.weight"""
    return " ".join(dict.fromkeys(re.sub(r"^h\.\d+\.", "h.*.", name) for name in names))


def _check_shape(weights: Weights, name: str, wanted: tuple[int, ...]) -> None:
    if name not in weights.tensors:
        raise UserError(f"{name} {wanted} of this model is missing in {weights.file}: take {weights.fit}.")
    found = tuple(weights.tensors[name].shape)
    if found != wanted:
        raise UserError(f"{name} is {found} in {weights.file} and {wanted} in this model: take {weights.fit}.")


def _read(file: Path) -> dict[str, torch.Tensor]:
    return read_tensors(file)


def _with_markers(wte: torch.Tensor, tokenizer: Tokenizer) -> torch.Tensor:
    """wte (n_content or more, C) -> (n_vocab, C): the rows of markers and spare ids are the mean of the content's."""
    content = wte[: tokenizer.n_content].float()
    return torch.cat([content, content.mean(0).expand(tokenizer.n_vocab - tokenizer.n_content, -1)])


def _marker_rows(tokenizer: Tokenizer) -> str:
    return f"rows {tokenizer.n_content} .. {tokenizer.n_vocab - 1} of wte.weight, the markers,"


# ----------------------------------------------------------------------------- Hugging Face


def _download(repo: str) -> tuple[Path, Path]:
    """The paths of config.json and model.safetensors in the hub's cache, downloaded unless they are there."""
    import huggingface_hub as hub

    paths = [hub.try_to_load_from_cache(repo, name) for name in (CONFIG, WEIGHTS)]
    if not all(isinstance(path, str) for path in paths):
        try:
            # hf_hub_download tries again for 23 s where there is no network: ask once before
            hub.get_session().head(hub.hf_hub_url(repo, CONFIG), timeout=10)
            paths = [hub.hf_hub_download(repo, name) for name in (CONFIG, WEIGHTS)]
        except Exception as error:  # of whichever HTTP library this version of huggingface_hub uses
            reason = " ".join(str(error).split()).rstrip(".")
            raise UserError(
                f"{CONFIG} and {WEIGHTS} of {repo} could not be downloaded from the Hugging Face hub "
                f"({type(error).__name__}: {reason}): check the network, or fetch the two files elsewhere and give "
                f"their folder, --init_from=FOLDER."
            ) from error
    return Path(paths[0]), Path(paths[1])


def _files_of(folder: Path) -> tuple[Path, Path]:
    """The paths of config.json and model.safetensors in a local folder."""
    for name in (CONFIG, WEIGHTS):
        if (folder / name).is_file():
            continue
        how = f"with transformers, GPT2LMHeadModel.from_pretrained({str(folder)!r}).save_pretrained(FOLDER"
        if name == WEIGHTS and (folder / "pytorch_model.bin").exists():
            raise UserError(
                f"{folder} has its weights pickled, in pytorch_model.bin, and reading that could run code: convert "
                f"them once, {how}), and give that FOLDER."
            )
        if name == WEIGHTS and (folder / f"{WEIGHTS}.index.json").exists():
            raise UserError(
                f"{folder} has its weights in several files, and one is read: join them once, {how}, "
                f"max_shard_size='100GB'), and give that FOLDER."
            )
        raise UserError(
            f"init_from={folder} has no {name}: give a folder with {CONFIG} and {WEIGHTS} of a Hugging Face GPT-2, or "
            f"a run of ours that has saved a checkpoint."
        )
    return folder / CONFIG, folder / WEIGHTS


def _hugging_face(init_from: str, config: Path, file: Path, cfg: GPTConfig, tokenizer: Tokenizer) -> Weights:
    """Raises UserError unless settings, vocabulary and positions are those of the model."""
    try:
        theirs = read_json(config)
        n_layer, n_head, n_embd, n_positions, vocab_size = (
            int(theirs[key]) for key in ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")
        )
        n_inner = int(theirs.get("n_inner") or 4 * n_embd)
    except KeyError as error:
        raise UserError(f"{config} does not say {error}: give a folder of a Hugging Face GPT-2.") from None
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"{config} is damaged ({type(error).__name__}: {error}): fetch it again.") from None
    for key, values in COMPUTED.items():
        if theirs.get(key, values[0]) not in values:
            raise UserError(
                f"{config} says {key}={theirs[key]}, and this model computes {values[0]}: take weights of a GPT-2 that "
                f"was trained so."
            )

    inner = f" --n_inner={n_inner}" if (n_inner, cfg.n_inner) != (4 * n_embd, None) else ""
    fit = f"--n_layer={n_layer} --n_head={n_head} --n_embd={n_embd}{inner} --bias=True --position=learned"
    for name, ours, found in (
        ("n_layer", cfg.n_layer, n_layer),
        ("n_head", cfg.n_head, n_head),
        ("n_embd", cfg.n_embd, n_embd),
        ("n_inner", cfg.n_inner or 4 * cfg.n_embd, n_inner),
        ("bias", cfg.bias, True),
        ("position", cfg.position, "learned"),
    ):
        if ours != found:
            raise UserError(f"{name}={ours}, and the weights of init_from={init_from} have {found}: take {fit}.")
    if cfg.block_size > n_positions:
        raise UserError(
            f"block_size={cfg.block_size}, and the weights of init_from={init_from} know {n_positions} positions: take "
            f"a --block_size of at most that."
        )
    if vocab_size != tokenizer.n_content or (vocab_size == 50257 and tokenizer.name != "gpt2"):
        cure = "--tokenizer=gpt2" if vocab_size == 50257 else "the tokenizer that these weights were trained with"
        raise UserError(
            f"the weights of init_from={init_from} predict {vocab_size} ids, and the dataset's tokenizer "
            f"{tokenizer.name} has {tokenizer.n_content}: prepare the dataset with {cure}."
        )

    state = _read(file)
    weights = Weights(file, from_hf(state), fit, f"{_marker_rows(tokenizer)} are the mean of the others")
    # config.json and the tensors must agree, before rows are cut off and put on
    _check_shape(weights, "wte.weight", (vocab_size, n_embd))
    _check_shape(weights, "wpe.weight", (n_positions, n_embd))
    wte, wpe = weights.tensors["wte.weight"], weights.tensors["wpe.weight"]
    if "lm_head.weight" in state and not torch.equal(state["lm_head.weight"], wte):
        raise UserError(
            f"lm_head.weight in {file} is not wte.weight, and this model's head is tied: take tied weights."
        )
    weights.tensors["wte.weight"] = _with_markers(wte, tokenizer)
    weights.tensors["wpe.weight"] = wpe[: cfg.block_size]
    if cfg.block_size < n_positions:
        weights.note += f"; wpe.weight has the first {cfg.block_size} of {n_positions} positions"
    return weights


# ----------------------------------------------------------------------------- a run of ours


def _run_of_ours(init_from: str, cfg: GPTConfig, tokenizer: Tokenizer) -> Weights:
    """The best checkpoint of a run, else its newest, or the checkpoint that is given.

    Raises UserError for another tokenizer, and for settings that no shape shows but that the weights depend on."""
    saved = open_run(init_from)
    theirs, data = saved.config.model, saved.state["data"]
    if data["tokenizer"] != tokenizer.fingerprint:
        raise UserError(
            f"init_from={init_from} was trained with another tokenizer (fingerprint {data['tokenizer'][:12]}..) than "
            f"the dataset's ({tokenizer.fingerprint[:12]}..): prepare the dataset with --tokenizer={saved.folder}."
        )
    shared = ["n_head"]
    if cfg.position == theirs.position == "rope":
        shared.append("rope_theta")
        if cfg.rope_scaling == "none":  # else startup has stretched what they have
            shared.append("rope_scaling")
    if "none" not in (cfg.second_attention, theirs.second_attention):
        shared.append("second_attention")
    for name in shared:
        ours, found = getattr(cfg, name), getattr(theirs, name)
        if ours != found:
            raise UserError(f"{name}={ours}, and {saved.folder} was trained with {found}: take --{name}={found}.")

    names = ["n_layer", "n_head", "n_embd", "block_size", "bias", "position"]
    names += ["n_inner"] if theirs.n_inner != cfg.n_inner else []
    names += ["second_attention"] if theirs.second_attention != "none" else []
    fit = " ".join(f"--{name}={getattr(theirs, name)}" for name in names)
    file = saved.folder / WEIGHTS
    before = content_tokens(saved.state, saved.config)
    weights = Weights(file, _read(file), fit, f"{_marker_rows(tokenizer)} are as trained", before)
    table = weights.tensors.get("wpe.weight")
    if table is not None and cfg.position == "learned" and cfg.rope_factor != theirs.rope_factor:
        weights.tensors["wpe.weight"] = interpolated(table, cfg.rope_factor, cfg.block_size)
        weights.note += f"; wpe.weight is interpolated from {len(table)} to {cfg.block_size} positions"
    if not data["chunk_markers"] and not saved.config.task.tasks:  # it never saw a marker: their rows are noise
        weights.tensors["wte.weight"] = _with_markers(weights.tensors["wte.weight"], tokenizer)
        weights.note = f"{_marker_rows(tokenizer)} are the mean of the others"
    return weights
