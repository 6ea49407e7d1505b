"""Settings of a training run."""

from dataclasses import dataclass, field
from typing import Literal

from tyro.conf import Suppress

from nanometa.common.errors import UserError
from nanometa.config.checks import FOLDER_NAME, check, check_types, is_folder_name
from nanometa.config.model_settings import GPTConfig
from nanometa.config.settings import EMPTY, SET, Settings, setting
from nanometa.config.task_settings import TaskConfig


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
