"""The settings: frozen dataclasses, their checks, and how a config file and the command line fill them.

    python train.py config/tiny_meta.py --n_layer=6 --learning_rate=3e-4 --compile=False

A config file is Python that defines `config = TrainConfig(...)`: running a config is running code.
Overrides are flat: a field's name is unique over the nested dataclasses (tests/test_config.py).
"""

import contextlib
import dataclasses
import difflib
import io
import math
import os
import re
import runpy
import sys
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro


class UserError(Exception):
    """Bad input. The message is one sentence that names the value, the cause and the cure."""


def run_cli(main) -> None:
    """Calls main(argv) of a command-line program and ends the process; a UserError: its sentence and status 2."""
    status = 0
    try:
        main(sys.argv[1:])
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # one voice a machine
            print(f"error: {error}", file=sys.stderr)
        status = 2
    except (OSError, MemoryError) as error:
        if isinstance(error, BrokenPipeError):  # the reader of our output (head, say) has gone
            os._exit(1)
        reason = str(error) or "there is not enough memory"
        print(f"error: {reason}: check the path, its permissions and the space that is left.", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # DDP keeps gloo's threads alive beyond destroy_process_group, and one that frees a tensor while the interpreter
        # shuts down aborts the process (seen in 4 of 99 runs of two processes): leave without that shutdown.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


@dataclass(frozen=True)
class GPTConfig:
    """The shape of the model. The defaults are GPT-2 124M with meta-attention (151.9M parameters)."""

    n_layer: int = 12
    """blocks"""
    n_head: int = 12
    """heads of every attention, the second one included"""
    n_embd: int = 768
    """width"""
    block_size: int = 1024
    """positions in a window, markers included; a whole number of the dataset's chunks"""
    vocab_size: int | None = None
    """rows of the embedding; None = the dataset's tokenizer decides"""
    content_vocab_size: int | None = None
    """ids below this can be predicted, the rest are markers and spare rows; None = the tokenizer decides"""
    second_attention: Literal["meta", "causal", "none"] = "meta"
    """after causal attention in every block: attention among the meta-tokens, a second causal attention of
    equal size (the control with equal parameters), or nothing (GPT-2)"""
    position: Literal["learned", "rope"] = "learned"
    """a learned table, as GPT-2, or rotary q and k in every attention"""
    rope_theta: float = 10000.0
    """base of the rotary wavelengths"""
    dropout: float = 0.0
    """0 for pretraining, as in the paper"""
    bias: bool = False
    """biases in linear layers and LayerNorms; True is needed for GPT-2's own weights"""

    def __post_init__(self):
        check_types(self)
        for name, most in (("n_layer", 10**4), ("n_head", 10**4), ("n_embd", 2**16), ("block_size", 2**24)):
            check(self, name, 1 <= getattr(self, name) <= most, f"lie in 1 .. {most}")
        check(self, "dropout", 0 <= self.dropout < 1, "lie in [0, 1)")
        check(self, "rope_theta", self.rope_theta > 1, "be above 1")
        if self.n_embd % self.n_head:
            raise UserError(
                f"n_embd={self.n_embd} cannot be split into n_head={self.n_head} heads: take "
                f"n_embd={nearest_multiples(self.n_embd, self.n_head)} or another n_head."
            )
        if self.position == "rope" and (self.n_embd // self.n_head) % 2:
            raise UserError(
                f"position=rope needs an even head size, and n_embd/n_head = {self.n_embd // self.n_head}: "
                f"choose n_embd and n_head so that their ratio is even."
            )


@dataclass(frozen=True)
class TrainConfig:
    """A training run. The defaults are the paper's recipe (arXiv 2509.16278, appendix B)."""

    model: GPTConfig = field(default_factory=GPTConfig)

    # where
    run_name: str = ""
    """the run's folder inside out_dir; by default the name of the config file"""
    out_dir: str = "out"
    """folder of all runs"""
    init_from: Literal["scratch", "resume", "auto"] = "scratch"
    """scratch refuses an existing run folder; resume needs one; auto resumes if there is a checkpoint"""
    dataset: str = "data/stdlib_uniform"
    """folder that prepare.py made"""
    verify: Literal["full", "header"] = "full"
    """check the sha256 of every shard at the start, or only headers and sizes"""
    target_rule: Literal["ignore", "skip"] = "ignore"
    """ignore: a position whose next token is a marker is not scored, a marker predicts its successor;
    skip: a content token predicts the next content token past any markers, markers are not scored"""
    seed: int = 1337
    """keys the initial weights, the order of the windows, and dropout"""

    # how much
    batch_size: int = 480
    """windows a step, over all processes and micro-batches (480 x 1024 = 491,520 positions)"""
    micro_batch_size: int = 12
    """windows in one forward of one process; gradient accumulation follows from it"""
    max_steps: int = 200_000
    """steps of the run"""

    # optimizer: nanoGPT's GPT-2 settings, which are the paper's
    learning_rate: float = 6e-4
    """peak of the schedule"""
    min_lr: float = 6e-5
    """end of the cosine"""
    warmup_steps: int = 2000
    """linear warm-up"""
    lr_decay_steps: int | None = None
    """step at which the cosine reaches min_lr; None = max_steps"""
    weight_decay: float = 0.1
    """on matrices and embeddings only"""
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0
    """largest norm of the whole gradient; 0 = no clipping"""

    # watching and saving
    log_interval: int = 10
    """steps between lines of the log"""
    eval_interval: int = 1000
    """steps between evaluations on the validation split"""
    eval_windows: int | None = None
    """evaluate on so many validation windows, evenly spread over the split; None = all; the end takes all"""
    save_interval: int = 1000
    """steps between checkpoints"""
    keep: int = 2
    """checkpoints kept, besides the best"""
    wandb: Literal["offline", "online", "disabled"] = "offline"
    """offline logs go to the run's folder; `wandb sync` sends them later"""

    # machine
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """auto = bfloat16 autocast where the hardware computes it, else float32"""
    compile: bool = True
    """torch.compile; off, with the reason, where no C++ compiler is found"""

    def __post_init__(self):
        check_types(self)
        for name in ("batch_size", "micro_batch_size"):
            check(self, name, 1 <= getattr(self, name) <= 10**6, "lie in 1 .. 1000000")
        for name in ("max_steps", "log_interval", "eval_interval", "save_interval"):
            check(self, name, getattr(self, name) >= 1, "be at least 1")
        for name in ("min_lr", "warmup_steps", "weight_decay", "grad_clip", "seed"):
            check(self, name, getattr(self, name) >= 0, "be at least 0")
        check(self, "learning_rate", self.learning_rate > 0, "be above 0")
        check(self, "min_lr", self.min_lr <= self.learning_rate, f"be at most learning_rate={self.learning_rate}")
        check(self, "lr_decay_steps", self.lr_decay_steps is None or self.lr_decay_steps >= 1, "be at least 1")
        check(self, "eval_windows", self.eval_windows is None or self.eval_windows >= 1, "be at least 1")
        for name in ("beta1", "beta2"):
            check(self, name, 0 <= getattr(self, name) < 1, "lie in [0, 1)")
        check(self, "keep", self.keep >= 2, "be at least 2, since the newest checkpoint may be damaged")
        check(self, "run_name", is_folder_name(self.run_name) or not self.run_name, FOLDER_NAME)


@dataclass(frozen=True)
class PrepareConfig:
    """How text becomes token shards with meta-tokens. The defaults make the embedded dataset."""

    name: str = ""
    """the dataset's folder inside data/; by default <source>_<injection>"""
    source: Literal["stdlib", "files"] = "stdlib"
    """stdlib: source and documentation of the running Python's standard library; files: your text files"""
    files: tuple[str, ...] = ()
    """glob patterns of UTF-8 text files for --source=files; ** crosses folders; a file is a document"""
    tokenizer: str = "bpe"
    """bpe: a byte-level BPE trained on this train split; gpt2; or the folder of a prepared dataset or run
    whose tokenizer is taken over"""
    bpe_vocab_size: int = 4096
    """tokens of the trained BPE, <|endoftext|> included"""
    injection: Literal["uniform", "periodic", "none"] = "uniform"
    """places of the markers in a chunk: drawn without replacement, evenly spaced, or no markers"""
    chunk_content: int = 461
    """content tokens in a chunk (922 for the paper's window of 1024)"""
    chunk_markers: int = 51
    """markers in a chunk (102 for the paper's window: k = 0.1); ignored with injection=none"""
    val_fraction: float = 0.05
    """share of the text that goes to validation, by a hash of the text itself"""
    seed: int = 1337
    """keys the places of the markers and the split"""
    workers: int = os.cpu_count() or 1
    """processes that tokenize; the result does not depend on their number"""
    shard_tokens: int = 100_000_000
    """positions in a shard file"""
    inspect: str = ""
    """print this prepared dataset, with windows decoded, and prepare nothing"""

    def __post_init__(self):
        check_types(self)
        check(self, "chunk_content", 1 <= self.chunk_content <= 2**20, "lie in 1 .. 1048576")
        check(self, "chunk_markers", 0 <= self.chunk_markers <= 2**20, "lie in 0 .. 1048576")
        check(self, "workers", 1 <= self.workers <= 1024, "lie in 1 .. 1024")
        check(self, "shard_tokens", self.shard_tokens >= 1, "be at least 1")
        check(self, "seed", self.seed >= 0, "be at least 0")
        check(self, "val_fraction", 0 < self.val_fraction < 1, "lie strictly between 0 and 1")
        check(self, "bpe_vocab_size", 257 <= self.bpe_vocab_size <= 1_000_000, "lie in 257 .. 1000000")
        check(self, "name", is_folder_name(self.name) or not self.name, FOLDER_NAME)
        if self.injection != "none" and self.chunk_markers == 0:
            raise UserError(f"injection={self.injection} with chunk_markers=0 places nothing: take --injection=none.")
        if self.source == "files" and not self.files:
            raise UserError("source=files needs patterns: for example --source=files --files 'texts/**/*.txt'.")
        if self.source != "files" and self.files:
            raise UserError(f"files is only read with --source=files, and source={self.source}: add --source=files.")


@dataclass(frozen=True)
class SampleConfig:
    """What to write with a trained model."""

    run: str = ""
    """a run's folder (out/NAME) or one of its checkpoints; by default the newest run in out/"""
    prompt: str | None = None
    """text to continue; may contain <|meta|>; by default the start of a document"""
    prompt_file: str = ""
    """read the prompt from this UTF-8 file; - is standard input"""
    max_new_tokens: int = 300
    """content tokens to write; markers come on top"""
    count: int = 1
    """samples"""
    temperature: float = 0.8
    """0 = always the most likely token"""
    top_k: int | None = 200
    """draw from the k most likely tokens; None = from all"""
    top_p: float = 1.0
    """draw from the smallest set of tokens with this much probability"""
    seed: int = 1337
    """keys the draws and the places of the markers"""
    meta: Literal["trained", "none", "periodic", "uniform"] = "trained"
    """where markers are inserted: as the run's data had them, nowhere, or by another rule"""
    stop_at_endoftext: bool = False
    """end a sample at <|endoftext|>"""
    show_markers: Literal["auto", "yes", "no"] = "auto"
    """print the markers, dim; auto = only on a terminal"""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    dtype: Literal["auto", "bfloat16", "float32"] = "float32"

    def __post_init__(self):
        check_types(self)
        for name in ("max_new_tokens", "count"):
            check(self, name, getattr(self, name) >= 1, "be at least 1")
        check(self, "temperature", self.temperature == 0 or self.temperature >= 1e-3, "be 0, or at least 0.001")
        check(self, "top_k", self.top_k is None or self.top_k >= 1, "be at least 1, or None")
        check(self, "top_p", 0 < self.top_p <= 1, "lie in (0, 1]")
        check(self, "seed", self.seed >= 0, "be at least 0")
        if self.prompt is not None and self.prompt_file:
            raise UserError("prompt and prompt_file are both given: leave one out.")


# ----------------------------------------------------------------------------- checks

FOLDER_NAME = "be a folder name of at most 100 letters, digits, '.', '_' and '-', not starting with a dot"


def is_folder_name(name: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}", name) is not None


def check(config, name: str, holds: bool, must: str) -> None:
    if not holds:
        raise UserError(f"{name}={getattr(config, name)!r} is out of range: it must {must}.")


def check_types(config) -> None:
    """Every field holds a value of its annotated type (an int is taken for a float).

    Dataclasses do not look at types, and a config file could say n_layer="6"."""
    hints = typing.get_type_hints(type(config))
    for name, hint in hints.items():
        value = getattr(config, name)
        options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        if float in options and type(value) is int:
            object.__setattr__(config, name, float(value))
        elif type(value) is float and not math.isfinite(value):
            raise UserError(f"{name}={value} is out of range: it must be finite.")
        elif not any(_is_a(value, option) for option in options):
            wanted = " or ".join(_type_name(option) for option in options)
            raise UserError(f"{name}={value!r} has the wrong type: it must be {wanted}.")


def _is_a(value, hint) -> bool:
    if typing.get_origin(hint) is Literal:
        return any(value == choice and type(value) is type(choice) for choice in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_is_a(item, typing.get_args(hint)[0]) for item in value)
    return type(value) is hint  # not isinstance: True is no int here


def _type_name(hint) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    return "None" if hint is types.NoneType else str(getattr(hint, "__name__", hint))


def nearest_multiples(value: int, step: int) -> str:
    below = value // step * step
    return f"{below} or {below + step}" if below else f"{step}"


def nearest_name(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(sorted(known))}."


# ----------------------------------------------------------------------------- filling


def field_names(cls) -> list[str]:
    """All flat names of a config class, nested dataclasses included."""
    names = []
    for name, hint in typing.get_type_hints(cls).items():
        names += field_names(hint) if dataclasses.is_dataclass(hint) else [name]
    return names


def load_config(cls, argv: list[str], config_file: bool = False):
    """argv = --name=value ..., after a FILE.py if config_file -> an instance of cls. Raises UserError."""
    default = None
    if config_file and argv and not argv[0].startswith("-"):
        default, argv = _read_config_file(cls, argv[0]), argv[1:]
    known = field_names(cls)
    given = [arg[2:].split("=")[0].replace("-", "_") for arg in argv if arg.startswith("--")]
    for name in given:
        if name not in known + ["help"]:
            raise UserError(f"unknown setting --{name}: {nearest_name(name, known)}")
        if given.count(name) > 1:
            raise UserError(f"--{name} is given {given.count(name)} times: leave one.")
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            config, unknown = tyro.cli(
                cls,
                default=default,
                args=argv,
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff),
                use_underscores=True,
                return_unknown_args=True,
            )
    except SystemExit as end:
        if not end.code:  # --help
            raise
        # tyro draws a box; its first paragraph is the reason
        lines = [line.strip("│╭╮╰╯ ") for line in complaint.getvalue().splitlines()[1:]]
        rules = [i for i, line in enumerate(lines) if line.startswith("──")]
        sentence = " ".join(lines[: rules[0]] if rules else lines).strip().rstrip(" .")
        raise UserError(f"{sentence}; --help lists all settings.") from None
    if unknown:
        raise UserError(f"unexpected argument {unknown[0]!r}: settings are given as --name=value.")
    return config


def _read_config_file(cls, path: str):
    if not Path(path).is_file():
        here = sorted(str(p) for p in Path("config").glob("*.py") if p.name != "__init__.py")
        raise UserError(f"there is no config file {path!r}: {nearest_name(path, here)}")
    try:
        config = runpy.run_path(path).get("config")
    except TypeError as error:  # TrainConfig(learing_rate=...)
        found = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
        if not found:
            raise UserError(f"{path} fails: {error}.") from error
        owner, name = found.groups()
        owner_class = {c.__name__: c for c in (GPTConfig, TrainConfig, PrepareConfig, SampleConfig)}.get(owner)
        known = [f.name for f in dataclasses.fields(owner_class)] if owner_class else []
        raise UserError(f"{path}: {owner} has no setting {name!r}: {nearest_name(name, known)}") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (Exception, SystemExit) as error:
        raise UserError(f"{path} fails with {type(error).__name__}: {error}; correct the file.") from error
    if not isinstance(config, cls):
        raise UserError(f"{path} must define `config = {cls.__name__}(...)`, and defines {type(config).__name__}.")
    if isinstance(config, TrainConfig) and not config.run_name:
        config = dataclasses.replace(config, run_name=Path(path).stem)
    return config


def to_dict(config) -> dict:
    return dataclasses.asdict(config)


def train_config_from_dict(values: dict) -> TrainConfig:
    """The inverse of to_dict. Raises UserError on keys of another version."""
    try:
        return TrainConfig(**{**values, "model": GPTConfig(**values["model"])})
    except (TypeError, KeyError) as error:
        raise UserError(f"the saved config does not fit this version of the code ({error}).") from error
