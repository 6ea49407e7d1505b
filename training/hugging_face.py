"""Converts GPT-2 weights to and from Hugging Face's format, and reads them from the hub or from a local folder.

It reads only safetensors files, never pickles, and does not need transformers.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from nanometa.common.errors import UserError
from nanometa.common.files import is_count, open_file_sha256, read_json
from nanometa.config import GPTConfig
from nanometa.data.tokenizer import Tokenizer
from nanometa.model import GPT
from nanometa.training.checkpoint import WEIGHTS
from nanometa.training.tensor_files import read_tensors

HUB = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")  # names in the hub's organization openai-community
CONFIG = "config.json"
SIZES = ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")  # fields that config.json must have
# Values of GPT2Config's fields that nanoMeta's GPT supports. If config.json lacks a field, the first value applies.
COMPUTED = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
}
# Heads that transformers and trl add to a GPT-2. Pretraining does not need them, so they are left out.
HEADS = ("score.", "classifier.", "qa_outputs.", "multiple_choice_head.", "v_head.summary.")
MASKS = (".attn.bias", ".attn.masked_bias")  # buffers of older versions of transformers, which hold causal masks
PADDING = 256  # vocabularies are padded to a multiple of at most this, for speed or for a few special tokens

# Hugging Face stores these as Conv1D, of shape (in, out), and nanoMeta as Linear, of shape (out, in).
_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def to_hf(model: GPT) -> dict[str, torch.Tensor]:
    """Returns a state dict for transformers.GPT2LMHeadModel.

    Raises UserError unless the model has second_attention=none, position=learned, meta_position=same and bias=True."""
    cfg = model.cfg
    if (cfg.second_attention, cfg.position, cfg.meta_position, cfg.bias) != ("none", "learned", "same", True):
        raise UserError(
            f"Hugging Face's GPT-2 cannot hold a model with second_attention={cfg.second_attention}, "
            f"position={cfg.position}, meta_position={cfg.meta_position}, bias={cfg.bias}: convert a model with "
            f"second_attention=none, position=learned, meta_position=same, bias=True."
        )
    state = {name: p.T if name.endswith(_TRANSPOSED) else p for name, p in model.state_dict().items()}
    state = {f"transformer.{name}": p.contiguous().clone() for name, p in state.items()}
    return {**state, "lm_head.weight": state["transformer.wte.weight"]}


def from_hf(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns a state dict for GPT from that of a GPT2LMHeadModel: the inverse of to_hf. Other heads are left out.

    The names in the hub's own gpt2 lack the prefix "transformer."."""
    ours = {name: p for name, p in state.items() if name != "lm_head.weight" and not name.startswith(HEADS)}
    ours = {name.removeprefix("transformer."): p for name, p in ours.items()}
    ours = {name: p for name, p in ours.items() if not name.endswith(MASKS)}
    return {name: p.T.contiguous() if name.endswith(_TRANSPOSED) else p.clone() for name, p in ours.items()}


@dataclass
class StartWeights:
    """Weights for step 0: tensors with the names and shapes of GPT's parameters, including the markers' rows."""

    file: Path
    sha256: str
    tensors: dict[str, torch.Tensor]
    cure: str  # what to do if they do not fit the model
    note: str  # appended to the sentence in the log
    content_tokens: int | None = None  # number of content tokens that they were trained on; None = unknown


def check_shape(weights: StartWeights, name: str, wanted: tuple[int, ...]) -> None:
    """Raises UserError if a tensor is missing or does not have the model's shape."""
    if name not in weights.tensors:
        raise UserError(f"{name} {wanted} of this model is missing in {weights.file}: {weights.cure}.")
    found = tuple(weights.tensors[name].shape)
    if found != wanted:
        raise UserError(f"{name} is {found} in {weights.file} but {wanted} in this model: {weights.cure}.")


def with_markers(wte: torch.Tensor, tokenizer: Tokenizer) -> torch.Tensor:
    """Returns wte (n_content or more, C) resized to (n_vocab, C).

    The rows of the markers and of spare ids are the mean of the content rows."""
    content = wte[: tokenizer.n_content].float()
    return torch.cat([content, content.mean(0).expand(tokenizer.n_vocab - tokenizer.n_content, -1)])


def marker_rows(tokenizer: Tokenizer) -> str:
    """Names the markers' rows, as the subject of a sentence."""
    return f"rows {tokenizer.n_content} .. {tokenizer.n_vocab - 1} of wte.weight, the markers,"


def download(repo: str) -> tuple[Path, Path]:
    """Returns the paths of config.json and model.safetensors in the hub's cache, downloading them if necessary.

    Raises UserError if they cannot be downloaded."""
    import huggingface_hub as hub

    paths = [hub.try_to_load_from_cache(repo, name) for name in (CONFIG, WEIGHTS)]
    if not all(isinstance(path, str) for path in paths):
        try:
            # Without a network, hf_hub_download would retry for 23 s, so the network is tried once before.
            hub.get_session().head(hub.hf_hub_url(repo, CONFIG), timeout=10)
            paths = [hub.hf_hub_download(repo, name) for name in (CONFIG, WEIGHTS)]
        except Exception as error:  # its class depends on the HTTP library that this version of huggingface_hub uses
            reason = " ".join(str(error).split()).rstrip(".")
            raise UserError(
                f"{CONFIG} and {WEIGHTS} of {repo} could not be downloaded from the Hugging Face hub "
                f"({type(error).__name__}: {reason}): check the network, or download the two files elsewhere and name "
                f"their folder with --init_from=FOLDER."
            ) from error
    return Path(paths[0]), Path(paths[1])


def files_of(folder: Path) -> tuple[Path, Path]:
    """Returns the paths of config.json and model.safetensors in a local folder. Raises UserError if one is missing."""
    for name in (CONFIG, WEIGHTS):
        if (folder / name).is_file():
            continue
        how = f"with transformers, GPT2LMHeadModel.from_pretrained({str(folder)!r}).save_pretrained(FOLDER"
        if name == WEIGHTS and (folder / "pytorch_model.bin").exists():
            raise UserError(
                f"{folder} has its weights in pytorch_model.bin, a pickle that could run code when it is read: convert "
                f"them once, {how}), and give that FOLDER."
            )
        if name == WEIGHTS and (folder / f"{WEIGHTS}.index.json").exists():
            raise UserError(
                f"{folder} has its weights in several files, but only a single file can be read: join them once, "
                f"{how}, max_shard_size='100GB'), and give that FOLDER."
            )
        raise UserError(
            f"init_from={folder} has no {name}: give a folder with {CONFIG} and {WEIGHTS} of a Hugging Face GPT-2, or "
            f"a run of train.py that has saved a checkpoint."
        )
    return folder / CONFIG, folder / WEIGHTS


def read_hugging_face(init_from: str, config: Path, file: Path, cfg: GPTConfig, tokenizer: Tokenizer) -> StartWeights:
    """Reads the weights of a Hugging Face GPT-2.

    config, file: the paths of its config.json and model.safetensors. Raises UserError if its settings, vocabulary or
    positions do not fit the model cfg and the tokenizer, or if a file is damaged."""
    theirs = _read_config(config)
    n_layer, n_head, n_embd, n_positions, vocab_size = (theirs[key] for key in SIZES)
    n_inner = theirs.get("n_inner") or 4 * n_embd
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
            raise UserError(f"{name}={ours}, but the weights of init_from={init_from} have {found}: set {fit}.")
    if cfg.block_size > n_positions:
        raise UserError(
            f"block_size={cfg.block_size} is too long, because the weights of init_from={init_from} have {n_positions} "
            f"positions: set --block_size to at most {n_positions}."
        )
    _check_vocabulary(init_from, vocab_size, tokenizer)

    with open(file, "rb") as opened:
        state, sha256 = read_tensors(opened), open_file_sha256(opened)
    _check_tensors(state, file)
    cure = "use the unchanged weights of a GPT2LMHeadModel, with their config.json"
    weights = StartWeights(file, sha256, from_hf(state), cure, f"{marker_rows(tokenizer)} are the mean of the others")
    # config.json and the tensors must agree before rows are cut off and appended
    check_shape(weights, "wte.weight", (vocab_size, n_embd))
    check_shape(weights, "wpe.weight", (n_positions, n_embd))
    wte, wpe, n_content = weights.tensors["wte.weight"], weights.tensors["wpe.weight"], tokenizer.n_content
    if "lm_head.weight" in state and not torch.equal(state["lm_head.weight"][:n_content].to(wte), wte[:n_content]):
        raise UserError(
            f"lm_head.weight in {file} differs from wte.weight, but this model's head is tied to wte.weight: use "
            f"weights with a tied head."
        )
    weights.tensors["wte.weight"] = with_markers(wte, tokenizer)
    weights.tensors["wpe.weight"] = wpe[: cfg.block_size]
    if vocab_size > n_content:
        weights.note += (
            f"; rows {n_content} .. {vocab_size - 1} of wte.weight in the file are dropped, because the tokenizer "
            f"{tokenizer.name} has no such ids"
        )
    if cfg.block_size < n_positions:
        weights.note += f"; wpe.weight has the first {cfg.block_size} of {n_positions} positions"
    if heads := sorted(name for name in state if name.startswith(HEADS)):
        weights.note += f"; not loaded, because pretraining has no such head: {' '.join(heads)}"
    return weights


def _read_config(path: Path) -> dict:
    """Returns the content of config.json. Raises UserError if it is not that of a GPT-2 which this model computes."""
    try:
        theirs = read_json(path)
        for key in SIZES:
            if not (is_count(theirs[key]) and theirs[key]):
                raise ValueError(f"{key} is {str(theirs[key])[:40]!r}, not a positive whole number")
        if theirs.get("n_inner") is not None and not is_count(theirs["n_inner"]):
            raise ValueError(f"n_inner is {str(theirs['n_inner'])[:40]!r}, not a whole number")
    except KeyError as error:
        raise UserError(f"{path} has no entry {error}: give the folder of a Hugging Face GPT-2.") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}): download it again.") from None
    for key, values in COMPUTED.items():
        if theirs.get(key, values[0]) not in values:
            raise UserError(
                f"{path} has {key}={str(theirs[key])[:40]}, but this model computes {key}={values[0]}: use the weights "
                f"of a GPT-2 that was trained with {key}={values[0]}."
            )
    return theirs


def _check_vocabulary(init_from: str, vocab_size: int, tokenizer: Tokenizer) -> None:
    """Raises UserError unless the weights predict the ids of the tokenizer, or these and a few more that are padding.

    The ids of weights say nothing about their tokenizer, except that GPT-2's has 50257."""
    padded = -(-tokenizer.n_content // PADDING) * PADDING
    of_gpt2 = 50257 <= vocab_size <= -(-50257 // PADDING) * PADDING
    if tokenizer.n_content <= vocab_size <= padded and (not of_gpt2 or tokenizer.name == "gpt2"):
        return
    cure = (
        "prepare the dataset with --tokenizer=gpt2"
        if of_gpt2
        else f"use weights whose tokenizer is {tokenizer.name}, or a dataset with the tokenizer of these weights"
    )
    raise UserError(
        f"the weights of init_from={init_from} predict {vocab_size} ids, but the dataset's tokenizer {tokenizer.name} "
        f"has {tokenizer.n_content}: {cure}."
    )


def _check_tensors(state: dict[str, torch.Tensor], file: Path) -> None:
    """Raises UserError if a name stands for two tensors, or a tensor is not one of floats."""
    for name, tensor in state.items():
        if f"transformer.{name}" in state:
            raise UserError(
                f"{file} has both {name} and transformer.{name}, and only one of them can be loaded: save the weights "
                f"again with only one."
            )
        if not tensor.is_floating_point() and not name.endswith(MASKS):
            raise UserError(
                f"{name} in {file} has the dtype {str(tensor.dtype).removeprefix('torch.')}: use weights of float32, "
                f"float16 or bfloat16, which are not quantized."
            )
