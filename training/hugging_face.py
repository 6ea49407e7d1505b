"""Converts GPT-2 weights to and from Hugging Face's format, and reads them from the hub or from a local folder.

Only safetensors is read, nothing pickled, and transformers is not needed.
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


# Theirs are Conv1D, (in, out), where ours are Linear, (out, in).
_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def to_hf(model: GPT) -> dict[str, torch.Tensor]:
    """State dict for transformers.GPT2LMHeadModel. UserError but for second_attention none, position learned,
    meta_position same, bias."""
    cfg = model.cfg
    if (cfg.second_attention, cfg.position, cfg.meta_position, cfg.bias) != ("none", "learned", "same", True):
        raise UserError(
            f"Hugging Face's GPT-2 has no second_attention={cfg.second_attention}, position={cfg.position}, "
            f"meta_position={cfg.meta_position}, bias={cfg.bias}: only none, learned, same, True can be converted."
        )
    state = {name: p.T if name.endswith(_TRANSPOSED) else p for name, p in model.state_dict().items()}
    state = {f"transformer.{name}": p.contiguous().clone() for name, p in state.items()}
    return {**state, "lm_head.weight": state["transformer.wte.weight"]}


def from_hf(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """State dict for GPT from that of a GPT2LMHeadModel: the inverse of to_hf. The hub's own gpt2 has no prefix."""
    ours = {name.removeprefix("transformer."): p for name, p in state.items() if name != "lm_head.weight"}
    ours = {name: p for name, p in ours.items() if not name.endswith((".attn.bias", ".attn.masked_bias"))}  # masks
    return {name: p.T.contiguous() if name.endswith(_TRANSPOSED) else p.clone() for name, p in ours.items()}


@dataclass
class StartWeights:
    """Tensors with the names and shapes of GPT's parameters, markers' rows included."""

    file: Path
    tensors: dict[str, torch.Tensor]
    fit: str  # the settings that they fit
    note: str  # for the log
    content_tokens: int | None = None  # of text, that they were trained on; None = nobody says
    sha256: str = ""  # of the file, if it is known already


def check_shape(weights: StartWeights, name: str, wanted: tuple[int, ...]) -> None:
    if name not in weights.tensors:
        raise UserError(f"{name} {wanted} of this model is missing in {weights.file}: take {weights.fit}.")
    found = tuple(weights.tensors[name].shape)
    if found != wanted:
        raise UserError(f"{name} is {found} in {weights.file} and {wanted} in this model: take {weights.fit}.")


def with_markers(wte: torch.Tensor, tokenizer: Tokenizer) -> torch.Tensor:
    """wte (n_content or more, C) -> (n_vocab, C): the rows of markers and spare ids are the mean of the content's."""
    content = wte[: tokenizer.n_content].float()
    return torch.cat([content, content.mean(0).expand(tokenizer.n_vocab - tokenizer.n_content, -1)])


def marker_rows(tokenizer: Tokenizer) -> str:
    return f"rows {tokenizer.n_content} .. {tokenizer.n_vocab - 1} of wte.weight, the markers,"


def download(repo: str) -> tuple[Path, Path]:
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


def files_of(folder: Path) -> tuple[Path, Path]:
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


def read_hugging_face(init_from: str, config: Path, file: Path, cfg: GPTConfig, tokenizer: Tokenizer) -> StartWeights:
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

    state = read_tensors(file)
    weights = StartWeights(file, from_hf(state), fit, f"{marker_rows(tokenizer)} are the mean of the others")
    # config.json and the tensors must agree, before rows are cut off and put on
    check_shape(weights, "wte.weight", (vocab_size, n_embd))
    check_shape(weights, "wpe.weight", (n_positions, n_embd))
    wte, wpe = weights.tensors["wte.weight"], weights.tensors["wpe.weight"]
    if "lm_head.weight" in state and not torch.equal(state["lm_head.weight"], wte):
        raise UserError(
            f"lm_head.weight in {file} is not wte.weight, and this model's head is tied: take tied weights."
        )
    weights.tensors["wte.weight"] = with_markers(wte, tokenizer)
    weights.tensors["wpe.weight"] = wpe[: cfg.block_size]
    if cfg.block_size < n_positions:
        weights.note += f"; wpe.weight has the first {cfg.block_size} of {n_positions} positions"
    return weights
