"""Defines TrainConfig, the settings of a training run, and reads the settings of saved runs."""

from dataclasses import dataclass, field
from typing import Literal

from tyro.conf import Suppress

from nanometa.common.errors import UserError
from nanometa.config.checks import FOLDER_NAME, check, check_types, is_folder_name
from nanometa.config.marker_settings import MarkerConfig
from nanometa.config.model_settings import GPTConfig
from nanometa.config.settings import EMPTY, SET, Settings, setting
from nanometa.config.task_settings import TaskConfig
from nanometa.config.weight_settings import BRANCH, COMPARING, WeightConfig


@dataclass(frozen=True)
class TrainConfig(Settings):
    """Trains a model. The defaults are the recipe of the paper (arXiv 2509.16278, appendix B)."""

    model: GPTConfig = field(default_factory=GPTConfig)

    # what to train on, where the run is saved, and how it starts
    run_name: str = setting("", on_resume="ignored")
    """folder of the run inside out_dir; by default the name of the config file"""
    dataset: str = setting("data/stdlib_uniform", on_resume="ignored")
    """folder of the dataset that prepare.py wrote"""
    init_from: str = setting("scratch", on_resume="ignored")
    """how the run starts. scratch: a new run, and the run folder must not exist, except for what a start leaves that
    was killed before its first step; resume: from the newest checkpoint of this run; auto: resume if there is a
    checkpoint, else scratch; gpt2, gpt2-medium, gpt2-large, gpt2-xl, a local Hugging Face GPT-2 folder or the folder of
    another run: a new run from those weights. Weights that they lack (those of the second attention) are initialized as
    for scratch, marker embeddings with the mean embedding"""
    max_steps: int = setting(200_000, on_resume="may change")
    """number of optimizer steps of the run"""
    batch_size: int = 480
    """windows per optimizer step, summed over all processes and micro-batches (480 x 1024 = 491,520 positions)"""
    micro_batch_size: int = setting(12, on_resume="may change")
    """windows per forward pass of one process; the number of gradient accumulation steps follows from it"""
    seed: int = 1337
    """seed of the initial weights, the order of the windows, and dropout"""
    out_dir: str = setting("out", on_resume="ignored")
    """folder that contains all runs"""

    # optimizer: nanoGPT's GPT-2 settings, which the paper uses
    learning_rate: float = setting(6e-4, on_resume="may change")
    """peak learning rate"""
    min_lr: float = setting(6e-5, only_with={"schedule": ("cosine", "wsd")}, on_resume="may change")
    """learning rate at the end of the cosine and wsd schedules"""
    warmup_steps: int = setting(2000, on_resume="may change")
    """steps in which the learning rate rises linearly to its peak"""
    schedule: Literal["cosine", "wsd", "constant"] = setting("cosine", on_resume="may change")
    """learning rate after the warm-up. cosine: half a cosine down to min_lr; wsd: stable, then a decay to min_lr;
    constant: stays at learning_rate"""
    lr_decay_steps: int | None = setting(None, only_with={"schedule": ("cosine", "wsd")}, on_resume="may change")
    """step at which the schedule reaches min_lr; None = max_steps"""
    decay_fraction: float = setting(0.2, only_with={"schedule": ("wsd",)}, on_resume="may change")
    """the wsd schedule decays during this last share of lr_decay_steps"""
    stop_at: float | None = setting(None, only_with={"tasks": SET}, on_resume="may change")
    """end the run once every validated cell (task and placement) has this share of exact answers, but not before the
    curriculum has ended. With schedule=wsd the decay begins at that evaluation, unless it has begun, and the run lasts
    as long as the decay; with the other schedules it ends at once. max_steps remains the cap; None = only the cap"""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for the weight matrices of the blocks and AdamW for all other parameters; Muon's updates are scaled to
    the size of AdamW's, so learning_rate has the same meaning"""
    weight_decay: float = setting(0.1, on_resume="may change")
    """weight decay of matrices and embeddings; other parameters have none"""
    beta1: float = setting(0.9, on_resume="may change")
    """AdamW's decay rate of the mean of gradients"""
    beta2: float = setting(0.95, on_resume="may change")
    """AdamW's decay rate of the mean of squared gradients"""
    grad_clip: float = setting(1.0, on_resume="may change")
    """maximum norm of the gradient of all parameters; 0 = no clipping"""

    # training a small part of given weights (docs/adapters.md)
    train_only: Literal["all", "markers", "lora"] = "all"
    """what is trained. all: everything; markers: the embeddings of the run's markers; lora: these, and low-rank factors
    of the attentions' matrices. All but `all` start from the weights of init_from, train with AdamW whatever the
    optimizer, and without weight decay"""
    lora_r: int = setting(16, only_with={"train_only": ("lora",)})
    """rank of the factors that LoRA trains"""
    lora_alpha: float = setting(32.0, only_with={"train_only": ("lora",)})
    """LoRA adds lora_alpha / lora_r times the product of the factors to a matrix"""

    # evaluations, checkpoints and the log
    eval_interval: int = setting(1000, on_resume="may change")
    """steps between evaluations on the validation split"""
    eval_windows: int | None = None
    """validation windows per evaluation, spread evenly over the split; None = all; the final evaluation uses all"""
    save_interval: int = setting(1000, on_resume="may change")
    """steps between checkpoints"""
    keep: int = setting(2, on_resume="may change")
    """number of recent checkpoints to keep, in addition to the best one"""
    log_interval: int = setting(10, on_resume="may change")
    """steps between log lines"""
    tracker: Literal["wandb", "tensorboard", "none"] | None = setting(None, on_resume="may change")
    """where the figures go in addition to metrics.jsonl; None = wandb, or none with wandb=disabled. tensorboard: into
    the run folder, for `tensorboard --logdir`; it needs the package tensorboard"""
    wandb: Literal["offline", "online", "disabled"] = setting("offline", on_resume="may change")
    """Weights & Biases logging. offline: into the run folder, for `wandb sync` to upload later; disabled: none"""
    draw_curves: bool = setting(True, on_resume="may change")
    """draw the curves into loss.png in the run folder, at checkpoints and at the end"""
    sample_interval: int | None = setting(None, on_resume="may change")
    """steps between sample texts, which the run generates from sample_prompt, prints and logs; None = no samples"""
    sample_prompt: str = setting("", only_with={"sample_interval": SET}, on_resume="may change")
    """text that every sample continues, which may contain markers; by default the start of a document"""

    # hardware
    device: Literal["auto", "cuda", "mps", "cpu"] = setting("auto", on_resume="may change")
    """device to train on; auto = cuda, else mps, else cpu"""
    dtype: Literal["auto", "bfloat16", "float32"] = setting("auto", on_resume="may change")
    """precision of the forward pass; auto = bfloat16 autocast where the hardware supports it, else float32"""
    compile: bool = setting(True, on_resume="may change")
    """use torch.compile; if the compiler is missing or broken, the run goes on without it and says so, unless
    compile=True was given explicitly"""
    activation_checkpointing: bool = setting(False, on_resume="may change")
    """keep only the inputs of each block and recompute the rest in the backward pass: less memory, a third more
    computation"""

    # instead of training
    dry_run: bool = setting(False, on_resume="ignored")
    """print parameters, tokens, FLOPs, memory, hours and cost instead of training; needs neither data nor a GPU"""
    accelerator: str = setting("H100", only_with={"dry_run": (True,)}, on_resume="ignored")
    """for dry_run: GPU model, such as A100 or H100; the error message for an unknown model lists the known ones"""
    n_accelerators: int = setting(8, only_with={"dry_run": (True,)}, on_resume="ignored")
    """for dry_run: number of GPUs"""
    mfu: float = setting(0.4, only_with={"dry_run": (True,)}, on_resume="ignored")
    """for dry_run: share of the peak FLOPs that training reaches (model FLOPs utilization)"""
    price: float = setting(3.0, only_with={"dry_run": (True,)}, on_resume="ignored")
    """for dry_run: price of one GPU in US dollars per hour"""
    show_batch: int | None = setting(None, on_resume="ignored")
    """print the exact input of this step, with visible markers, instead of training"""

    # rarely needed
    scorer: str = setting("self", only_with={"weighting": COMPARING}, on_resume=BRANCH)
    """model whose short contexts the weights of the loss depend on (docs/weighting.md). self: the model that is
    trained; the folder of a run without markers; or a folder that `python eval.py nats` wrote"""
    target_rule: Literal["ignore", "skip"] = "ignore"
    """ignore: every position predicts the next one, except where the next one is a marker; skip: a content token
    predicts the next content token, past any markers, and markers predict nothing"""
    branch_from: str = setting("", on_resume="ignored")
    """checkpoint of another run (out/trunk/step_00001000) that this new run continues, including its optimizer state
    and its place in the data: for example, to branch one constant or wsd run into several budgets"""
    verify: Literal["full", "header"] = setting("full", only_with={"tasks": EMPTY}, on_resume="may change")
    """full: check the SHA-256 and all token ids of every shard at the start, except of files that are unchanged since
    an earlier check (.verified.json in the dataset folder); header: check only headers and sizes"""
    allow_changed_data: bool = setting(
        False, only_with={"init_from": ("resume", "auto"), "branch_from": SET}, on_resume="ignored"
    )
    """continue from a checkpoint with other shards than it was trained on; the tokenizer must be the same"""
    max_skipped: int = setting(10, on_resume="may change")
    """end the run after this many skipped steps in a row; a step with a non-finite loss or gradient is skipped"""
    spike_deviations: float = setting(6.0, on_resume="may change")
    """log a spike if the gradient norm is this many standard deviations above the mean of the last 128 steps"""
    skip_spikes: bool = setting(False, on_resume="may change")
    """also skip the update of a step with a spike"""

    task: TaskConfig = field(default_factory=TaskConfig)
    markers: MarkerConfig = field(default_factory=MarkerConfig)
    weights: WeightConfig = field(default_factory=WeightConfig)

    typed: Suppress[tuple[str, ...]] = field(default=(), compare=False, repr=False, metadata={"hidden": True})
    """names of the settings that the command line or the config file set, even to their defaults; never saved"""

    def __post_init__(self):
        check_types(self)
        for name in ("batch_size", "micro_batch_size"):
            check(self, name, 1 <= getattr(self, name) <= 10**6, "lie in 1 .. 1000000")
        for name in ("max_steps", "log_interval", "eval_interval", "save_interval", "max_skipped", "lora_r"):
            check(self, name, getattr(self, name) >= 1, "be at least 1")
        for name in ("min_lr", "warmup_steps", "weight_decay", "grad_clip", "seed"):
            check(self, name, getattr(self, name) >= 0, "be at least 0")
        for name in ("learning_rate", "spike_deviations", "lora_alpha"):
            check(self, name, getattr(self, name) > 0, "be above 0")
        if self.schedule != "constant":
            check(self, "min_lr", self.min_lr <= self.learning_rate, f"be at most learning_rate={self.learning_rate}")
        check(self, "lr_decay_steps", self.lr_decay_steps is None or self.lr_decay_steps >= 1, "be at least 1")
        check(self, "decay_fraction", 0 < self.decay_fraction <= 1, "lie in (0, 1]")
        at_least = self.sample_interval is None or self.sample_interval >= 1
        check(self, "sample_interval", at_least, "be at least 1, or None")
        check(self, "stop_at", self.stop_at is None or 0 < self.stop_at <= 1, "lie in (0, 1], or be None")
        check(self, "mfu", 0 < self.mfu <= 1, "lie in (0, 1]")
        check(self, "n_accelerators", 1 <= self.n_accelerators <= 10**6, "lie in 1 .. 1000000")
        check(self, "price", self.price >= 0, "be at least 0")
        check(self, "show_batch", self.show_batch is None or self.show_batch >= 0, "be at least 0, or None")
        check(self, "init_from", self.init_from != "", "be scratch, resume, auto, gpt2 or a folder")
        if self.dry_run and self.show_batch is not None:
            raise UserError(f"dry_run and show_batch={self.show_batch} are both given: give only one of them.")
        if self.branch_from and self.init_from not in ("scratch", "auto"):
            raise UserError(
                f"init_from={self.init_from} and branch_from={self.branch_from} are both given: give only one of them."
            )
        check(self, "eval_windows", self.eval_windows is None or self.eval_windows >= 1, "be at least 1")
        check(self, "scorer", self.scorer != "", "be self or a folder")
        self._check_tracker()
        self._check_markers()
        for name in ("beta1", "beta2"):
            check(self, name, 0 <= getattr(self, name) < 1, "lie in [0, 1)")
        check(self, "keep", self.keep >= 2, "be at least 2, because the newest checkpoint may be damaged")
        check(self, "run_name", is_folder_name(self.run_name) or not self.run_name, FOLDER_NAME)

    def _check_tracker(self) -> None:
        """Raises UserError if tracker and wandb are both given and contradict each other."""
        given = self.wandb != "offline" or "wandb" in self.typed
        if given and self.tracker and (self.tracker == "wandb") != (self.wandb != "disabled"):
            raise UserError(
                f"tracker={self.tracker} and wandb={self.wandb} contradict each other: give only one of them."
            )

    @property
    def tracked_by(self) -> str:
        """The tracker of the run: wandb, tensorboard or none."""
        return self.tracker or ("none" if self.wandb == "disabled" else "wandb")

    def _check_markers(self) -> None:
        """Raises UserError if what markers hide cannot be combined with the other settings."""
        markers, model, task = self.markers, self.model, self.task
        pair = markers.places_markers and markers.marks == "clcr"
        if pair and model.meta_position not in ("same", "previous"):
            raise UserError(
                f"meta_position={model.meta_position} is not implemented for marks=clcr, which has two markers: use "
                f"--meta_position=previous or same."
            )
        if model.summary == "mean" and not (pair and markers.hides.before and markers.evict == "segment"):
            raise UserError(
                "summary=mean stands for spans that are forgotten: add --marks=clcr, --closing_reads=segment and "
                "--evict=segment."
            )
        given = f"the settings of markers ({markers.label})"
        if task.tasks and markers.places_markers:
            raise UserError(
                f"marker_place={markers.marker_place} cannot be combined with tasks, whose texts have their own "
                f"meta-tokens: use marker_place=stored."
            )
        if task.visible == "marked" and markers.restricts:
            raise UserError(f"visible=marked cannot be combined with {given}: leave one of them out.")
        if not markers.restricts:
            return
        if markers.closes and self.target_rule == "ignore" and (markers.places_markers or not markers.hides.after):
            raise UserError(
                f"target_rule=ignore lets markers predict the next token, and {given} hide from them what they would "
                f"need for that: set --target_rule=skip."
            )
        if model.rope_dynamic:
            raise UserError(f"rope_dynamic is not implemented for {given}: use a fixed --rope_scaling.")
        second = model.second
        if second.connects == "random" or second.others != "nothing":
            raise UserError(
                f"second_attention={second.name} is not implemented for {given}: use none, meta, diagonal or causal."
            )
        if second.connects == "markers" and markers.evict not in ("nothing", "segment"):
            raise UserError(
                f"second_attention={second.name} reads all markers, but evict={markers.evict} forgets some: use "
                f"evict=segment, or --second_attention=none."
            )

    def has_markers(self, chunk_markers: int) -> bool:
        """Returns whether the run's texts have markers. chunk_markers: those in a chunk of its dataset."""
        return self.markers.marks != "none" if self.markers.places_markers else chunk_markers > 0

    def arm_name(self, chunk_markers: int) -> str:
        """Returns the short name of the run's arm, with what is special about its markers.

        chunk_markers: number of markers in a chunk of its dataset."""
        name, label = self.model.arm_name(self.has_markers(chunk_markers)), self.markers.label
        label += ", mean" * (self.model.summary == "mean")
        alone = label and self.markers.places_markers and not self.model.second.has_layer
        part = {"all": "", "markers": "markers trained", "lora": "LoRA"}[self.train_only]
        return ", ".join(filter(None, ("" if alone else name, label, part, self.weights.label)))

    @property
    def extends(self) -> bool:
        """Whether the run uses a longer context window than the one that its positions were trained in."""
        return self.model.rope_scaling != "none" or self.model.rope_factor != 1

    @property
    def takes_over(self) -> bool:
        """Whether the run takes its model settings from the run that init_from names, if it names one."""
        return bool(self.task.tasks or self.extends) and self.init_from != "scratch"


# renamed settings of saved runs: {old name: new name, or None if the setting no longer exists}
ALIASES: dict[str, str | None] = {}


def train_config_from_dict(values: dict) -> TrainConfig:
    """Returns the settings of a saved run from the dictionary that to_dict made, possibly in an older version.

    A missing setting has its default, and ALIASES translates old names. Raises UserError for an unknown setting and for
    an invalid value."""
    nested = {"model": GPTConfig, "task": TaskConfig, "markers": MarkerConfig, "weights": WeightConfig}
    try:
        parts = {"model": values["model"]} | {name: values.get(name, {}) for name in nested if name != "model"}
        for name, part in parts.items():  # JSON has lists in place of tuples
            part = {key: tuple(value) if isinstance(value, list) else value for key, value in _renamed(part).items()}
            parts[name] = nested[name](**part)
        return TrainConfig(**{**_renamed(values), **parts})
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"the saved config does not fit this version of the code ({error}): use the version that wrote it."
        ) from error


def _renamed(values: dict) -> dict:
    """Returns the settings under their present names, without those that no longer exist."""
    names = {name: ALIASES.get(name, name) for name in values}
    return {names[name]: value for name, value in values.items() if names[name] is not None}
