"""Converts GPT-2 weights to and from Hugging Face's format, and reads them from the hub or from a local folder.

It reads only safetensors files, never pickles, and does not need transformers.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from nanometa.common.errors import UserError
from nanometa.common.files import read_json
from nanometa.config import GPTConfig
from nanometa.data.tokenizer import Tokenizer
from nanometa.model import GPT
from nanometa.training.checkpoint import WEIGHTS, read_tensors

HUB = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")  # names in the hub's organization openai-community
CONFIG = "config.json"
# Values of GPT2Config's fields that nanoMeta's GPT supports. If config.json lacks a field, the first value applies.
COMPUTED = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
}


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
    """Returns a state dict for GPT from that of a GPT2LMHeadModel: the inverse of to_hf.

    The names in the hub's own gpt2 lack the prefix "transformer."."""
    ours = {name.removeprefix("transformer."): p for name, p in state.items() if name != "lm_head.weight"}
    ours = {name: p for name, p in ours.items() if not name.endswith((".attn.bias", ".attn.masked_bias"))}  # masks
    return {name: p.T.contiguous() if name.endswith(_TRANSPOSED) else p.clone() for name, p in ours.items()}


@dataclass
class StartWeights:
    """Weights for step 0: tensors with the names and shapes of GPT's parameters, including the markers' rows."""

    file: Path
    tensors: dict[str, torch.Tensor]
    fit: str  # the settings of a model that they fit, as command-line arguments
    note: str  # appended to the sentence in the log
    content_tokens: int | None = None  # number of content tokens that they were trained on; None = unknown
    sha256: str = ""  # hash of the file, if it was computed before


def check_shape(weights: StartWeights, name: str, wanted: tuple[int, ...]) -> None:
    """Raises UserError if a tensor is missing or does not have the model's shape."""
    if name not in weights.tensors:
        raise UserError(f"{name} {wanted} of this model is missing in {weights.file}: set {weights.fit}.")
    found = tuple(weights.tensors[name].shape)
    if found != wanted:
        raise UserError(f"{name} is {found} in {weights.file} but {wanted} in this model: set {weights.fit}.")


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
    try:
        theirs = read_json(config)
        n_layer, n_head, n_embd, n_positions, vocab_size = (
            int(theirs[key]) for key in ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")
        )
        n_inner = int(theirs.get("n_inner") or 4 * n_embd)
    except KeyError as error:
        raise UserError(f"{config} has no entry {error}: give the folder of a Hugging Face GPT-2.") from None
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"{config} is damaged ({type(error).__name__}: {error}): download it again.") from None
    for key, values in COMPUTED.items():
        if theirs.get(key, values[0]) not in values:
            raise UserError(
                f"{config} has {key}={theirs[key]}, but this model computes {key}={values[0]}: use the weights of a "
                f"GPT-2 that was trained with {key}={values[0]}."
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
            raise UserError(f"{name}={ours}, but the weights of init_from={init_from} have {found}: set {fit}.")
    if cfg.block_size > n_positions:
        raise UserError(
            f"block_size={cfg.block_size} is too long, because the weights of init_from={init_from} have {n_positions} "
            f"positions: set --block_size to at most {n_positions}."
        )
    if vocab_size != tokenizer.n_content or (vocab_size == 50257 and tokenizer.name != "gpt2"):
        cure = "--tokenizer=gpt2" if vocab_size == 50257 else "the tokenizer that these weights were trained with"
        raise UserError(
            f"the weights of init_from={init_from} predict {vocab_size} ids, but the dataset's tokenizer "
            f"{tokenizer.name} has {tokenizer.n_content}: prepare the dataset with {cure}."
        )

    state = read_tensors(file)
    weights = StartWeights(file, from_hf(state), fit, f"{marker_rows(tokenizer)} are the mean of the others")
    # config.json and the tensors must agree before rows are cut off and appended
    check_shape(weights, "wte.weight", (vocab_size, n_embd))
    check_shape(weights, "wpe.weight", (n_positions, n_embd))
    wte, wpe = weights.tensors["wte.weight"], weights.tensors["wpe.weight"]
    if "lm_head.weight" in state and not torch.equal(state["lm_head.weight"], wte):
        raise UserError(
            f"lm_head.weight in {file} differs from wte.weight, but this model's head is tied to wte.weight: use "
            f"weights with a tied head."
        )
    weights.tensors["wte.weight"] = with_markers(wte, tokenizer)
    weights.tensors["wpe.weight"] = wpe[: cfg.block_size]
    if cfg.block_size < n_positions:
        weights.note += f"; wpe.weight has the first {cfg.block_size} of {n_positions} positions"
    return weights
