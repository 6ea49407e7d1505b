"""The settings: frozen dataclasses and their checks. command_line.py fills them from files and command lines."""

import os
import re
from dataclasses import dataclass, field
from typing import Literal

from tyro.conf import Suppress

from nanometa.common.errors import UserError
from nanometa.config.arms import SECOND_ATTENTIONS, SecondAttention, SecondAttentionName
from nanometa.config.checks import FOLDER_NAME, check, check_types, is_folder_name, nearest_multiples
from nanometa.config.settings import EMPTY, SET, Settings, setting
from nanometa.config.tasks import PLACEMENTS, Level, Placement, Question, Task

RANDOM_ATTENTIONS = tuple(name for name, second in SECOND_ATTENTIONS.items() if second.connects == "random")
SCATTERED_PLACEMENTS = tuple(name for name, placement in PLACEMENTS.items() if placement.scattered)


@dataclass(frozen=True)
class GPTConfig(Settings):
    """The shape of the model. The defaults are GPT-2 124M with meta-attention (151.9M parameters)."""

    n_layer: int = 12
    """blocks"""
    n_head: int = 12
    """heads of every attention, the second one included"""
    n_embd: int = 768
    """width"""
    n_inner: int | None = None
    """width of the MLP; None = 4 n_embd, as GPT-2; 6 n_embd has the parameters of a second attention"""
    block_size: int = 1024
    """positions in a window, markers included; a whole number of the dataset's chunks"""
    vocab_size: int | None = None
    """rows of the embedding; None = the dataset's tokenizer decides"""
    content_vocab_size: int | None = None
    """ids below this can be predicted, the rest are markers and spare rows; None = the tokenizer decides"""
    second_attention: SecondAttentionName = "meta"
    """after causal attention in every block: attention among the meta-tokens; controls of equal size: a second
    causal attention, or attention among randomly drawn positions (sparsity without tokens); or nothing (GPT-2)"""
    random_fraction: float = setting(0.1, only_with={"second_attention": RANDOM_ATTENTIONS})
    """share of a window's positions that second_attention=random connects, drawn for each window; needs no markers"""
    position: Literal["learned", "rope"] = "learned"
    """a learned table, as GPT-2, or rotary q and k in every attention"""
    meta_position: Literal["same", "none", "none_first", "none_second"] = "same"
    """meta-tokens have the position of their place in the window, as all tokens, or none; with rope also none in the
    first, causal attention alone, or in the second"""
    rope_theta: float = setting(10000.0, only_with={"position": ("rope",)})
    """base of the rotary wavelengths"""
    rope_scaling: Literal["none", "pi", "ntk", "yarn"] = "none"
    """how rotary positions reach beyond the window of training: position interpolation (also of a learned table),
    NTK-aware, or YaRN"""
    rope_factor: float = 1.0
    """block_size over the window of training; with init_from=RUN the model is that run's, and its window grows by so
    much, with rope_scaling=none too"""
    rope_dynamic: bool = False
    """for evaluation: the factor is no more than a text's length asks for, and grows with it"""
    yarn_beta_fast: float = setting(32.0, only_with={"rope_scaling": ("yarn",)})
    """YaRN leaves what turns more often than this in the window of training"""
    yarn_beta_slow: float = setting(1.0, only_with={"rope_scaling": ("yarn",)})
    """YaRN interpolates what turns less often than this"""
    yarn_ramp: Literal["code", "paper"] = setting("code", only_with={"rope_scaling": ("yarn",)})
    """between the two: linear in the number of the pair of dimensions, as YaRN's code, or in its turns, as its paper"""
    yarn_attention_factor: float | None = setting(None, only_with={"rope_scaling": ("yarn",)})
    """what q and k are multiplied by; None = YaRN's 0.1 ln(factor) + 1, and 1.0 = no temperature"""
    dropout: float = 0.0
    """0 for pretraining, as in the paper; above 0 the masks depend on the number of processes and on micro_batch_size,
    so a run repeats exactly only with the same of both"""
    bias: bool = False
    """biases in linear layers and LayerNorms; True is needed for GPT-2's own weights"""

    def __post_init__(self):
        check_types(self)
        for name, most in (("n_layer", 10**4), ("n_head", 10**4), ("n_embd", 2**16), ("block_size", 2**24)):
            check(self, name, 1 <= getattr(self, name) <= most, f"lie in 1 .. {most}")
        check(self, "dropout", 0 <= self.dropout < 1, "lie in [0, 1)")
        check(self, "n_inner", self.n_inner is None or 1 <= self.n_inner <= 2**18, "lie in 1 .. 262144, or be None")
        check(self, "random_fraction", 0 < self.random_fraction <= 1, "lie in (0, 1]")
        if self.second.markers == "refused" and self.meta_position != "same":
            raise UserError(
                f"meta_position={self.meta_position} needs meta-tokens, and second_attention={self.second_attention} "
                f"runs without: leave one out."
            )
        check(self, "rope_theta", self.rope_theta > 1, "be above 1")
        check(self, "rope_factor", 1 <= self.rope_factor <= 2**16, "lie in 1 .. 65536")
        check(self, "yarn_beta_slow", 0 < self.yarn_beta_slow < self.yarn_beta_fast, "lie between 0 and yarn_beta_fast")
        factor = self.yarn_attention_factor
        check(self, "yarn_attention_factor", factor is None or factor > 0, "be above 0, or None")
        if self.rope_scaling == "none" and self.rope_dynamic:
            raise UserError(
                "rope_dynamic does nothing with rope_scaling=none: add --rope_scaling=yarn, or leave it out."
            )
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
        if self.rope_scaling == "ntk" and self.n_embd // self.n_head == 2:
            raise UserError(
                "rope_scaling=ntk needs heads of more than one pair of dimensions: take rope_scaling=pi, or another "
                "n_head."
            )

    @property
    def second(self) -> SecondAttention:
        """The registry's entry of second_attention."""
        return SECOND_ATTENTIONS[self.second_attention]

    @property
    def original_block_size(self) -> int:
        """The window that the positions were trained in, before it was extended."""
        return round(self.block_size / self.rope_factor)

    def check_position(self) -> None:
        """Raises UserError for a factor that leaves a part of a position, and for settings that a learned table has no
        use for. Not checked at once: a factor may be given alone,
        and the window and the kind of positions come from the run that is extended."""
        allowed = ("pi",) if self.rope_factor != 1 else ("none", "pi")
        if self.position == "learned" and (self.rope_scaling not in allowed or self.rope_dynamic):
            raise UserError(
                f"rope_scaling={self.rope_scaling}{', rope_dynamic' * self.rope_dynamic} by {self.rope_factor:g} needs "
                f"position=rope: a table of learned positions can be interpolated once, with --rope_scaling=pi."
            )
        if self.position == "learned" and self.meta_position not in ("same", "none"):
            raise UserError(
                f"meta_position={self.meta_position} needs position=rope: learned positions are added before any "
                f"attention."
            )
        window = self.block_size / self.rope_factor
        if abs(window - round(window)) > 1e-6 * window:
            raise UserError(
                f"rope_factor={self.rope_factor} does not divide block_size={self.block_size} into a whole window: "
                f"take a factor that does."
            )


@dataclass(frozen=True)
class TaskConfig(Settings):
    """Synthetic tasks to train on, in place of a dataset's text."""

    tasks: tuple[Task, ...] = ()
    """list_recall, segment_counting, parity, copying: texts are made of these in turn; the model and its tokenizer are
    those of the run that init_from names, or from scratch with the tokenizer of the dataset; none = train on text"""
    train_length: int = setting(256, only_with={"tasks": SET})
    """positions of the longest texts, markers, question and answer included; the shortest have 32"""
    level: Level = setting("hard", only_with={"tasks": SET})  # noqa: RUF009
    """difficulty (the size of lists, segments, spans); training also draws the levels below"""
    placements: tuple[Placement, ...] = setting(("target",), only_with={"tasks": SET})
    """where meta-tokens go, texts taking these in turn: target, where the task points (the paper's); every, after
    every list or span; none, an ordinary word pointing instead; background, that word pointing, and meta-tokens at
    random"""
    meta_share: float = setting(0.1, only_with={"placements": SCATTERED_PLACEMENTS})
    """share of a text's positions that background gives to meta-tokens"""
    question: Question = setting("index", only_with={"tasks": ("list_recall",)})  # noqa: RUF009
    """what list recall asks for: item j of a list (the paper's); the item that follows another one in it (after); or
    item j under the name of another list than the one that is pointed at (misnamed, a control)"""
    questions: int = setting(1, only_with={"tasks": ("list_recall",)})
    """in a training text of list recall; the other tasks have one, and so has every text that is evaluated"""
    loss_on: Literal["answer", "all"] = setting("answer", only_with={"tasks": SET})
    """train on the answers alone, or on all content"""
    curriculum_steps: int = setting(0, only_with={"tasks": SET})
    """in so many first steps longest length and level grow, in five phases, from 32 positions and easy"""
    shuffle_answers: bool = setting(False, only_with={"tasks": SET})
    """give every training text the answer of another one: a control that must stay at chance"""

    def __post_init__(self):
        check_types(self)
        for name in ("tasks", "placements"):
            check(self, name, len(set(getattr(self, name))) == len(getattr(self, name)), "name each once")
        check(self, "placements", self.placements, "name one at least")
        check(self, "train_length", 32 <= self.train_length <= 2**20, "lie in 32 .. 1048576")
        check(self, "meta_share", 0 < self.meta_share < 0.9, "lie strictly between 0 and 0.9")
        check(self, "questions", 1 <= self.questions <= 16, "lie in 1 .. 16")
        check(self, "curriculum_steps", self.curriculum_steps >= 0, "be at least 0")


@dataclass(frozen=True)
class TrainConfig(Settings):
    """A training run. The defaults are the paper's recipe (arXiv 2509.16278, appendix B)."""

    model: GPTConfig = field(default_factory=GPTConfig)
    task: TaskConfig = field(default_factory=TaskConfig)

    # where
    run_name: str = setting("", on_resume="ignored")
    """the run's folder inside out_dir; by default the name of the config file"""
    out_dir: str = setting("out", on_resume="ignored")
    """folder of all runs"""
    init_from: str = setting("scratch", on_resume="ignored")
    """scratch refuses an existing run folder; resume needs one; auto resumes if there is a checkpoint. Or weights for
    step 0: gpt2, gpt2-medium, gpt2-large, gpt2-xl, a local Hugging Face GPT-2 folder, or a run of ours; what they
    lack (a second attention) starts as from scratch, markers at the mean embedding"""
    branch_from: str = setting("", on_resume="ignored")
    """a checkpoint of another run (out/trunk/step_00001000) that this new run goes on from, optimizer and place in the
    data included: one constant or wsd run branches into several budgets"""
    dataset: str = setting("data/stdlib_uniform", on_resume="ignored")
    """folder that prepare.py made"""
    verify: Literal["full", "header"] = setting("full", only_with={"tasks": EMPTY}, on_resume="may change")
    """check the sha256 and all ids of every shard at the start, unless that was done and the file has not changed since
    (.verified.json in the dataset's folder); or only headers and sizes"""
    allow_changed_data: bool = setting(
        False, only_with={"init_from": ("resume", "auto"), "branch_from": SET}, on_resume="ignored"
    )
    """go on from a checkpoint with other shards than it was trained on, of the same tokenizer"""
    target_rule: Literal["ignore", "skip"] = "ignore"
    """ignore: a position whose next token is a marker is not scored, a marker predicts its successor;
    skip: a content token predicts the next content token past any markers, markers are not scored"""
    seed: int = 1337
    """keys the initial weights, the order of the windows, and dropout"""

    # how much
    batch_size: int = 480
    """windows a step, over all processes and micro-batches (480 x 1024 = 491,520 positions)"""
    micro_batch_size: int = setting(12, on_resume="may change")
    """windows in one forward of one process; gradient accumulation follows from it"""
    max_steps: int = setting(200_000, on_resume="may change")
    """steps of the run"""

    # optimizer: nanoGPT's GPT-2 settings, which are the paper's
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: for the matrices inside the blocks, with updates scaled to the size of AdamW's, so that learning_rate means
    the same; AdamW has the rest"""
    schedule: Literal["cosine", "wsd", "constant"] = setting("cosine", on_resume="may change")
    """after a linear warm-up: half a cosine down to min_lr; warm-up, stable, decay; or constant"""
    learning_rate: float = setting(6e-4, on_resume="may change")
    """peak of the schedule"""
    min_lr: float = setting(6e-5, only_with={"schedule": ("cosine", "wsd")}, on_resume="may change")
    """end of the schedule, if it decays"""
    warmup_steps: int = setting(2000, on_resume="may change")
    """linear warm-up"""
    lr_decay_steps: int | None = setting(None, only_with={"schedule": ("cosine", "wsd")}, on_resume="may change")
    """step at which the schedule reaches min_lr; None = max_steps"""
    decay_fraction: float = setting(0.2, only_with={"schedule": ("wsd",)}, on_resume="may change")
    """share of lr_decay_steps in which wsd decays, at its end"""
    weight_decay: float = setting(0.1, on_resume="may change")
    """on matrices and embeddings only"""
    beta1: float = setting(0.9, on_resume="may change")
    beta2: float = setting(0.95, on_resume="may change")
    grad_clip: float = setting(1.0, on_resume="may change")
    """largest norm of the whole gradient; 0 = no clipping"""

    # bad steps
    max_skipped: int = setting(10, on_resume="may change")
    """steps with a non-finite loss or gradient are skipped; so many in a row end the run"""
    spike_deviations: float = setting(6.0, on_resume="may change")
    """a gradient norm so many standard deviations above the mean of the last 128 is logged as a spike"""
    skip_spikes: bool = setting(False, on_resume="may change")
    """skip the update of a spike, too"""

    # watching and saving
    log_interval: int = setting(10, on_resume="may change")
    """steps between lines of the log"""
    eval_interval: int = setting(1000, on_resume="may change")
    """steps between evaluations on the validation split"""
    eval_windows: int | None = None
    """evaluate on so many validation windows, evenly spread over the split; None = all; the end takes all"""
    save_interval: int = setting(1000, on_resume="may change")
    """steps between checkpoints"""
    keep: int = setting(2, on_resume="may change")
    """checkpoints kept, besides the best"""
    wandb: Literal["offline", "online", "disabled"] = setting("offline", on_resume="may change")
    """offline logs go to the run's folder; `wandb sync` sends them later"""

    # machine
    device: Literal["auto", "cuda", "mps", "cpu"] = setting("auto", on_resume="may change")
    dtype: Literal["auto", "bfloat16", "float32"] = setting("auto", on_resume="may change")
    """auto = bfloat16 autocast where the hardware computes it, else float32"""
    compile: bool = setting(True, on_resume="may change")
    """torch.compile; off, with the reason, where no C++ compiler is found"""
    activation_checkpointing: bool = setting(False, on_resume="may change")
    """keep only what goes into a block and make the rest again in the backward: less memory, a third more work"""

    # instead of training
    dry_run: bool = setting(False, on_resume="ignored")
    """print parameters, tokens, FLOPs, memory, hours and cost; needs neither data nor GPU"""
    accelerator: str = setting("H100", only_with={"dry_run": (True,)}, on_resume="ignored")
    """for dry_run: A100, H100, ..., an unknown name lists those whose peak is known"""
    n_accelerators: int = setting(8, only_with={"dry_run": (True,)}, on_resume="ignored")
    """for dry_run: how many"""
    mfu: float = setting(0.4, only_with={"dry_run": (True,)}, on_resume="ignored")
    """for dry_run: the share of the peak that training reaches"""
    price: float = setting(3.0, only_with={"dry_run": (True,)}, on_resume="ignored")
    """for dry_run: US dollars for an hour of one accelerator"""
    show_batch: int | None = setting(None, on_resume="ignored")
    """print exactly what this step sees, markers made visible"""

    typed: Suppress[tuple[str, ...]] = field(default=(), compare=False, repr=False, metadata={"hidden": True})
    """names of the settings that the command line or the config file gave, equal to the defaults or not; never saved"""

    def __post_init__(self):
        check_types(self)
        for name in ("batch_size", "micro_batch_size"):
            check(self, name, 1 <= getattr(self, name) <= 10**6, "lie in 1 .. 1000000")
        for name in ("max_steps", "log_interval", "eval_interval", "save_interval", "max_skipped"):
            check(self, name, getattr(self, name) >= 1, "be at least 1")
        for name in ("min_lr", "warmup_steps", "weight_decay", "grad_clip", "seed"):
            check(self, name, getattr(self, name) >= 0, "be at least 0")
        for name in ("learning_rate", "spike_deviations"):
            check(self, name, getattr(self, name) > 0, "be above 0")
        if self.schedule != "constant":
            check(self, "min_lr", self.min_lr <= self.learning_rate, f"be at most learning_rate={self.learning_rate}")
        check(self, "lr_decay_steps", self.lr_decay_steps is None or self.lr_decay_steps >= 1, "be at least 1")
        check(self, "decay_fraction", 0 < self.decay_fraction <= 1, "lie in (0, 1]")
        check(self, "mfu", 0 < self.mfu <= 1, "lie in (0, 1]")
        check(self, "n_accelerators", 1 <= self.n_accelerators <= 10**6, "lie in 1 .. 1000000")
        check(self, "price", self.price >= 0, "be at least 0")
        check(self, "show_batch", self.show_batch is None or self.show_batch >= 0, "be at least 0, or None")
        check(self, "init_from", self.init_from != "", "be scratch, resume, auto, gpt2 or a folder")
        if self.branch_from and self.init_from not in ("scratch", "auto"):
            raise UserError(f"init_from={self.init_from} and branch_from={self.branch_from} are both given: leave one.")
        check(self, "eval_windows", self.eval_windows is None or self.eval_windows >= 1, "be at least 1")
        for name in ("beta1", "beta2"):
            check(self, name, 0 <= getattr(self, name) < 1, "lie in [0, 1)")
        check(self, "keep", self.keep >= 2, "be at least 2, since the newest checkpoint may be damaged")
        check(self, "run_name", is_folder_name(self.run_name) or not self.run_name, FOLDER_NAME)

    @property
    def extends(self) -> bool:
        """Does this run ask for a longer window than its positions were trained in?"""
        return self.model.rope_scaling != "none" or self.model.rope_factor != 1

    @property
    def takes_over(self) -> bool:
        """Does this run take over the model of the run that init_from names, if it names one?"""
        return bool(self.task.tasks or self.extends) and self.init_from != "scratch"


@dataclass(frozen=True)
class PrepareConfig(Settings):
    """How text becomes token shards with meta-tokens. The defaults make the embedded dataset."""

    name: str = ""
    """the dataset's folder inside data/; by default <recipe>_<injection>, and _<N>plus with min_document_tokens=N"""
    recipe: str = ""
    """by default the name of the config file, or the source"""
    source: Literal["stdlib", "files", "packages", "hf"] = "stdlib"
    """stdlib: source and documentation of the running Python's standard library; files: your files; packages: the
    Python source of installed packages; hf: a Hugging Face dataset"""
    files: tuple[str, ...] = setting((), only_with={"source": ("files",)})
    """glob patterns for --source=files, ** crosses folders: UTF-8 text (a file is a document), .jsonl, .jsonl.gz or
    .parquet (a row is a document)"""
    text_column: str = setting("text", only_with={"source": ("files", "hf")})
    """field or column that holds the text, for .jsonl, .parquet and --source=hf"""
    packages: tuple[str, ...] = setting((), only_with={"source": ("packages",)})
    """packages for --source=packages, each NAME or NAME==VERSION"""
    hf_dataset: str = setting("", only_with={"source": ("hf",)})
    """name on the hub (allenai/c4) or local folder for --source=hf"""
    hf_config: str = setting("", only_with={"source": ("hf",)})
    """its configuration (en), if it has several"""
    hf_split: str = setting("train", only_with={"source": ("hf",)})
    """its split; validation is cut from it by val_fraction"""
    hf_revision: str = setting("", only_with={"source": ("hf",)})
    """commit or tag of the dataset; by default the newest"""
    streaming: bool = setting(True, only_with={"source": ("hf",)})
    """read a Hugging Face dataset while it downloads, or download all of it first"""
    tokenizer: str = "bpe"
    """bpe: a byte-level BPE trained on this train split; gpt2; or the folder of a prepared dataset or run
    whose tokenizer is taken over"""
    bpe_vocab_size: int = setting(4096, only_with={"tokenizer": ("bpe",)})
    """tokens of the trained BPE, <|endoftext|> included"""
    injection: Literal["uniform", "periodic", "none"] = "uniform"
    """places of the markers in a chunk: drawn without replacement, evenly spaced, or no markers"""
    chunk_content: int = 461
    """content tokens in a chunk (922 for the paper's window of 1024)"""
    chunk_markers: int = setting(51, only_with={"injection": ("uniform", "periodic")})
    """markers in a chunk (102 for the paper's window: k = 0.1)"""
    min_document_tokens: int = 0
    """leave documents of fewer content tokens out of both splits, for long windows. The <|endoftext|> that ends a
    document counts; one that is cut between the splits is as long as each stretch. The tokenizer stays that of all"""
    val_fraction: float = 0.05
    """share of the text that goes to validation, by a hash of the text itself"""
    seed: int = 1337
    """keys the places of the markers and the split"""
    workers: int = setting(os.cpu_count() or 1, only_with={"merge": EMPTY})
    """processes that tokenize; the result does not depend on their number"""
    shard_tokens: int = 100_000_000
    """positions in a shard file"""
    part: str = ""
    """2/3 = prepare the second of three parts, on a machine of its own, into data/NAME.part2of3"""
    merge: tuple[str, ...] = ()
    """folders of all parts (data/NAME.part*of3): check them and write one dataset"""
    inspect: str = setting("", alone=True)
    """print this prepared dataset, with windows decoded, and prepare nothing"""

    def __post_init__(self):
        check_types(self)
        check(self, "chunk_content", 1 <= self.chunk_content <= 2**20, "lie in 1 .. 1048576")
        check(self, "chunk_markers", 0 <= self.chunk_markers <= 2**20, "lie in 0 .. 1048576")
        # so many tokens are held in memory until their document is known to stay
        check(self, "min_document_tokens", 0 <= self.min_document_tokens <= 2**24, "lie in 0 .. 16777216")
        check(self, "workers", 1 <= self.workers <= 1024, "lie in 1 .. 1024")
        check(self, "shard_tokens", self.shard_tokens >= 1, "be at least 1")
        check(self, "seed", self.seed >= 0, "be at least 0")
        check(self, "val_fraction", 0 < self.val_fraction < 1, "lie strictly between 0 and 1")
        check(self, "bpe_vocab_size", 257 <= self.bpe_vocab_size <= 1_000_000, "lie in 257 .. 1000000")
        for name in ("name", "recipe"):
            check(self, name, is_folder_name(getattr(self, name)) or not getattr(self, name), FOLDER_NAME)
        if self.injection != "none" and self.chunk_markers == 0:
            raise UserError(f"injection={self.injection} with chunk_markers=0 places nothing: take --injection=none.")
        for source, name, example in (
            ("files", "files", "--files 'texts/**/*.txt'"),
            ("packages", "packages", "--packages numpy==2.4.6"),
            ("hf", "hf_dataset", "--hf_dataset=allenai/c4 --hf_config=en"),
        ):
            if self.source == source and not getattr(self, name):
                raise UserError(f"source={source} needs {name}: for example --source={source} {example}.")
        if self.part:
            found = re.fullmatch(r"(\d{1,4})/(\d{1,4})", self.part)
            check(self, "part", found is not None and 1 <= int(found[1]) <= int(found[2]), "be i/n with 1 <= i <= n")
            if self.merge:
                raise UserError("part and merge are both given: prepare the parts first, then merge them.")


@dataclass(frozen=True)
class Rescale(Settings):
    """How a run's positions are read; by default as it was trained."""

    rope_scaling: Literal["none", "pi", "ntk", "yarn"] | None = None
    """stretch the run's window without training: pi (also of a learned table), ntk, yarn; none = read on plainly;
    None = as trained"""
    rope_factor: float = 1.0
    """by so much, from the window before any extension"""
    rope_dynamic: bool = False
    """by no more than a text's length asks for, and the more the longer it gets; exact for every token, and so many
    times as slow"""

    def __post_init__(self):
        check_types(self)
        if self.rope_scaling is None and (self.rope_factor != 1 or self.rope_dynamic):
            given = "rope_dynamic" if self.rope_dynamic else f"rope_factor={self.rope_factor:g}"
            raise UserError(f"{given} needs --rope_scaling: add --rope_scaling=yarn (or pi, ntk, none).")
        if self.rope_scaling not in (None, "none") and self.rope_factor == 1 and not self.rope_dynamic:
            raise UserError(
                f"rope_scaling={self.rope_scaling} by a factor of 1 changes nothing: add --rope_factor=4, or "
                f"--rope_dynamic."
            )


@dataclass(frozen=True)
class SampleConfig(Settings):
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
    top_k: int | None = setting(200, only_with={"temperature": SET})
    """draw from the k most likely tokens; None = from all"""
    top_p: float = setting(1.0, only_with={"temperature": SET})
    """draw from the smallest set of tokens with this much probability"""
    seed: int = 1337
    """keys the draws and the places of the markers"""
    meta: Literal["trained", "none", "periodic", "uniform"] = "trained"
    """where markers are inserted: as the run's data had them, nowhere, or by another rule"""
    stop_at_endoftext: bool = False
    """end a sample at <|endoftext|>"""
    show_markers: Literal["auto", "yes", "no"] = "auto"
    """print the markers, dim; auto = only on a terminal"""
    rescale: Rescale = field(default_factory=Rescale)
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


# settings of saved runs that have another name now: {old name: new name, or None if it no longer means anything}
ALIASES: dict[str, str | None] = {}


def train_config_from_dict(values: dict) -> TrainConfig:
    """Returns the settings that to_dict made a dictionary of, maybe in an earlier version of this code.

    A setting that did not exist then has its default, and ALIASES translates names. Raises UserError for a setting that
    is unknown, and for a value that is none."""
    try:
        values = {name: _renamed(part) if name in ("model", "task") else part for name, part in values.items()}
        task = {name: tuple(v) if isinstance(v, list) else v for name, v in values.get("task", {}).items()}  # JSON
        parts = {"model": GPTConfig(**values["model"]), "task": TaskConfig(**task)}
        return TrainConfig(**{**_renamed(values), **parts})
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"the saved config does not fit this version of the code ({error}): take the version that wrote it."
        ) from error


def _renamed(values: dict) -> dict:
    names = {name: ALIASES.get(name, name) for name in values}
    return {names[name]: value for name, value in values.items() if names[name] is not None}
