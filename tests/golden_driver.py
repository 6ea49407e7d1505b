"""Runs a fixed list of small commands with the code of one checkout and writes their results as lines `name value`.

    python tests/golden_driver.py ROOT OUTPUT

ROOT is the checkout, OUTPUT the file to write. Datasets and runs go to the current folder, which should be empty.
tests/compare_commits.py starts this file twice, once for each commit, so that both commits run the same commands even
if one of them has no copy of this file. The commands run in one process, through main(argv) of the checkout's
programs, because importing torch takes longer than most of them. The driver uses command lines and file formats only.
The one exception is the dictionary ROOMS.
"""

import contextlib
import gc
import hashlib
import importlib
import io
import itertools
import json
import sys
import traceback
from pathlib import Path

import numpy as np

# name -> modules that may define it, the newest layout first; the first one that the checkout has is used
ROOMS = {
    "open_windows": ("nanometa.training.dataset", "training.dataset", "startup"),
    "load_config": ("nanometa.config.command_line", "config.command_line", "cli"),
    "TrainConfig": ("nanometa.config", "config"),
}

WORDS = tuple("the cat sat on a mat and saw that one dog had run over two hills to eat some red apples".split())
# Fields of JSON lines that differ between two runs of the same code, or between two commits by their nature.
UNEQUAL = ("seconds", "command", "commit", "machine", "mfu")
BATCH_FIELDS = ("tokens", "targets", "positions", "meta_index", "scored_index")

TEXTS = ("--source=files", "--files", "texts/*.txt")
BPE = ("--bpe_vocab_size=300", "--val_fraction=0.1", "--workers=1")
CHUNKS = ("--chunk_content=28",)
MARKERS = ("--chunk_markers=4",)

SIZE = {"n_layer": 2, "n_head": 2, "n_embd": 32}
STEPS = {
    "dtype": "float32", "compile": False, "wandb": "disabled", "device": "cpu", "batch_size": 4, "micro_batch_size": 2,
    "max_steps": 6, "learning_rate": 1e-2, "min_lr": 1e-3, "warmup_steps": 2, "log_interval": 1, "eval_interval": 3,
    "save_interval": 3, "eval_windows": 5,
}  # fmt: skip
MARKED = {"dataset": "data/u", "block_size": 96}
PLAIN = {"dataset": "data/n", "block_size": 84}
ARMS = {
    "meta": {**MARKED, "second_attention": "meta"},
    "causal2": {**PLAIN, "second_attention": "causal"},
    "random": {**PLAIN, "second_attention": "random"},
    "widemlp": {**PLAIN, "second_attention": "none", "n_inner": 6 * SIZE["n_embd"]},
    "pause": {**MARKED, "second_attention": "none"},
    "gpt2": {**PLAIN, "second_attention": "none"},
}
ROPE = {**ARMS["meta"], "position": "rope"}
# eval_windows: all validation texts, because versions before 0.2.0 chose a part of them in another way
TASKS = {"train_length": 96, "level": "easy", "batch_size": 8, "micro_batch_size": 4, "eval_windows": None}
ALL_TASKS = ("--tasks", "list_recall", "segment_counting", "parity", "copying")
ALL_PLACEMENTS = ("--placements", "target", "every", "none", "background")
# Runs beside those of every arm: name -> settings that differ from ROPE and STEPS.
VARIANTS = {
    "periodic": {"dataset": "data/p"},
    "min_document_tokens": {"dataset": "data/long"},
    "meta_position-none": {"meta_position": "none"},
    "meta_position-none_first": {"meta_position": "none_first"},
    "meta_position-none_second": {"meta_position": "none_second"},
    "bfloat16": {"dtype": "bfloat16"},
    "dropout": {"dropout": 0.1},
    "bias": {"bias": True},
    "muon-wsd": {"optimizer": "muon", "schedule": "wsd", "decay_fraction": 0.5},
    "activation_checkpointing": {"activation_checkpointing": True},
    "no_clipping": {"grad_clip": 0, "seed": 7},
}


class Results:
    """Lines `name value`. A name occurs once, and a value has no line break."""

    def __init__(self, output: Path, root: Path):
        self.output, self.root = output, root
        self.lines: dict[str, str] = {}
        self.failed: list[str] = []

    def add(self, name: str, value: str) -> None:
        """Records a result. Raises ValueError if the name has a result already, or if the value has a line break."""
        if name in self.lines or " " in name or "\n" in value:
            raise ValueError(f"{name!r} is no new name, or its value has a line break")
        self.lines[name] = value

    def text(self, name: str, text: str) -> None:
        """Records every line of a text."""
        for number, line in enumerate(text.splitlines(), start=1):
            self.add(f"{name}/line-{number:03}", json.dumps(line))

    def file(self, name: str, path: Path) -> None:
        """Records the sha256 of a file. In the JSON of a part, the random name of the plan and times are left out."""
        raw = path.read_bytes()
        if path.name.endswith(".json") and path.name.startswith(("plan", "unit_")):
            values = json.loads(raw)
            raw = json.dumps({key: values[key] for key in values if key not in ("id", "plan", "stamps")}).encode()
        self.add(name, hashlib.sha256(raw).hexdigest())

    def json_lines(self, name: str, path: Path) -> None:
        """Records every line of a file of JSON lines, whatever the order of its fields, without those that cannot be
        equal."""
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            values = json.loads(line)
            kept = {key: value for key, value in values.items() if key not in UNEQUAL and not key.endswith("_s")}
            self.add(f"{name}/line-{number:03}", json.dumps(kept, sort_keys=True))

    @contextlib.contextmanager
    def case(self, name: str):
        """Goes on after an exception in one case: its lines are missing, and the driver ends with status 1."""
        try:
            yield
        except (Exception, SystemExit):
            self.failed.append(name)
            print(f"{name} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)

    def write(self) -> None:
        self.output.write_text("".join(f"{name} {value}\n" for name, value in self.lines.items()))


def program(name: str, *argv: str) -> str:
    """Calls main(argv) of a program of the checkout and returns what it wrote to standard output.

    Garbage collection then closes the lock file of a finished trainer, so that its run can be resumed.
    """
    module = importlib.import_module(name)
    written, said = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(written), contextlib.redirect_stderr(said):
            module.main(list(argv))
    except BaseException:
        print(written.getvalue()[-1000:], said.getvalue()[-3000:], file=sys.stderr)
        raise
    finally:
        gc.collect()
    return written.getvalue()


def room(name: str, root: Path):
    """Returns the function or class `name` of ROOMS from the checkout. Raises LookupError if no module is there."""
    for module in ROOMS[name]:
        path = root / module.replace(".", "/")
        if path.is_dir() or path.with_suffix(".py").is_file():
            return getattr(importlib.import_module(module), name)
    raise LookupError(f"{root} has none of the modules {', '.join(ROOMS[name])}: add the one that has {name} to ROOMS")


def flags(settings: dict) -> list[str]:
    """Returns settings as a command line, without those that a program would refuse for having no effect."""
    idle = {"min_lr"} if settings.get("schedule") == "constant" else set()
    return [f"--{name}={value}" for name, value in settings.items() if name not in idle]


def write_texts(folder: Path, documents: int = 60, words: int = 300) -> None:
    """Writes small documents of repeatable nonsense. Every fourth document is three times as long as the others."""
    state = 1
    folder.mkdir(parents=True)
    for number in range(documents):
        out = []
        for i in range(words if number % 4 else 3 * words):
            state = (state * 1103515245 + 12345) % 2**31
            out.append(WORDS[(state >> 16) % len(WORDS)] + ("\n" if i % 11 == 10 else " "))
        (folder / f"doc{number:03}.txt").write_text("".join(out))


def prepare(results: Results) -> None:
    """Prepares all datasets and records the sha256 of each of their files."""
    write_texts(Path("texts"))
    parts = [f"--part={number}/2" for number in (1, 2)]
    commands = {
        "u": ["--injection=uniform", *MARKERS],
        "p": ["--injection=periodic", *MARKERS],
        "n": ["--injection=none"],
        "long": ["--injection=uniform", *MARKERS, "--min_document_tokens=900"],
        "shards": ["--injection=uniform", *MARKERS, "--shard_tokens=5000", "--seed=7"],
    }
    for name, settings in commands.items():
        with results.case(f"prepare/{name}"):
            program("prepare", *TEXTS, *BPE, *CHUNKS, f"--name={name}", *settings)
    with results.case("prepare/merged"):
        for part in parts:
            program("prepare", *TEXTS, *BPE, *CHUNKS, *MARKERS, "--name=merged", part)
        folders = sorted(map(str, Path("data").glob("merged.part*")))
        program("prepare", "--merge", *folders)
        program("prepare", "--merge", *folders, "--name=merged_none", "--injection=none")
    for path in sorted(Path("data").rglob("*")):
        if path.is_file() and not path.name.startswith("."):
            results.file(f"prepare/{path.relative_to('data')}", path)


def batches(results: Results, name: str, argv: list[str]) -> None:
    """Records the sha256 of the first batch of both splits."""
    cfg = room("load_config", results.root)(room("TrainConfig", results.root), argv)
    for split in ("train", "val"):
        batch = room("open_windows", results.root)(cfg, split).batch(np.arange(4))
        for field in BATCH_FIELDS:
            tensor = getattr(batch, field).contiguous().numpy()
            digest = hashlib.sha256(f"{tensor.dtype} {tensor.shape}".encode() + tensor.tobytes()).hexdigest()
            results.add(f"batch/{name}/{split}/{field}", digest)


def train(results: Results, name: str, settings: dict, *more: str, data: bool = False) -> str:
    """Trains a run of that name, records its metrics, settings and newest checkpoint, and returns its folder."""
    folder = f"out/{name}"
    argv = [*flags({**STEPS, **settings}), f"--run_name={name}", *more]
    if data:
        with results.case(f"batch/{name}"):
            batches(results, name, argv)
    with results.case(f"train/{name}"):
        program("train", *argv)
        record_run(results, name)
    return folder


def record_run(results: Results, name: str) -> None:
    folder = Path("out", name)
    results.json_lines(f"train/{name}/metrics", folder / "metrics.jsonl")
    written = json.loads((folder / "config.json").read_text())
    for part in ("config", "data"):
        results.add(f"train/{name}/config.json/{part}", json.dumps(written[part], sort_keys=True))
    newest = max(folder.glob("step_*"))
    for file in sorted(newest.glob("*.safetensors")):
        results.file(f"train/{name}/{newest.name}/{file.name}", file)


def sample(results: Results, name: str, run: str, *settings: str) -> None:
    with results.case(f"sample/{name}"):
        written = program("sample", f"--run={run}", "--show_markers=yes", *settings)
        results.add(f"sample/{name}", json.dumps(written))


def samples(results: Results, name: str, run: str, rope: bool) -> None:
    """Records greedy and drawn text of a run, and text beyond its window if its positions are rotary."""
    sample(results, f"{name}/greedy", run, "--temperature=0", "--prompt=the cat", "--max_new_tokens=40")
    # more tokens than the window has positions, so that it slides
    sample(results, f"{name}/drawn", run, "--count=2", "--temperature=0.8", "--max_new_tokens=110")
    if rope:
        yarn = ("--rope_scaling=yarn", "--rope_factor=2", "--max_new_tokens=120")
        sample(results, f"{name}/yarn", run, "--temperature=0.8", *yarn)


def evaluate(results: Results, name: str, run: str, what: str, *settings: str, command: str = "eval") -> None:
    output = Path(f"lines/{name.replace('/', '-')}.jsonl")
    with results.case(f"{command}/{name}"):
        program(command, what, f"--run={run}", f"--output={output}", *settings)
        results.json_lines(f"{command}/{name}", output)


def evaluations(results: Results, name: str, run: str, rope: bool) -> None:
    few = ("--n=20", "--lengths", "96", "160")
    evaluate(results, f"{name}/tasks", run, "tasks", *few, "--level=easy", *ALL_TASKS, *ALL_PLACEMENTS)
    evaluate(results, f"{name}/passkey", run, "passkey", "--n=4", "--lengths", "384", "--depths", "0.5")
    if rope:
        more = ("--lengths", "192", "--rope_scaling=ntk", "--rope_factor=2")
        evaluate(results, f"{name}/perplexity_ntk", run, "perplexity", "--max_tokens=600", *more)
        more = ("--lengths", "192", "--rope_scaling=yarn", "--rope_dynamic=True")
        evaluate(results, f"{name}/perplexity_dynamic", run, "perplexity", "--max_tokens=300", *more)
        more = ("--documents=True", "--lengths", "96", "192")
        evaluate(results, f"{name}/perplexity_documents", run, "perplexity", *more)


def all_arms(results: Results) -> None:
    """Trains every arm with both kinds of positions and both target rules, and samples from and evaluates each run."""
    for (arm, settings), position, rule in itertools.product(ARMS.items(), ("learned", "rope"), ("ignore", "skip")):
        name = f"{arm}-{position}-{rule}"
        given = {**SIZE, **settings, "position": position}
        if settings["dataset"] == MARKED["dataset"]:  # elsewhere both rules give the same targets, and skip is refused
            given["target_rule"] = rule
        run = train(results, name, given, data=True)
        samples(results, name, run, position == "rope")
        evaluate(results, f"{name}/perplexity", run, "perplexity", "--max_tokens=600")
        if arm in ("meta", "random") and (position, rule) in (("rope", "ignore"), ("learned", "skip")):
            evaluations(results, name, run, position == "rope")


def variants(results: Results) -> None:
    """Trains the runs of VARIANTS and those that start from the weights of another run."""
    for name, settings in VARIANTS.items():
        run = train(results, name, {**SIZE, **ROPE, **settings}, data="dataset" in settings)
        sample(results, f"{name}/drawn", run, "--temperature=0.8", "--max_new_tokens=40")
    for position in ("learned", "rope"):  # trained long enough to write more than one repeated word
        longer = {**STEPS, **SIZE, **ROPE, "position": position, "max_steps": 60, "eval_interval": 60}
        name = f"longer-{position}"
        samples(results, name, train(results, name, longer), position == "rope")
        evaluate(results, f"{name}/perplexity", f"out/{name}", "perplexity", "--max_tokens=600")
    for meta in ("none", "periodic", "uniform"):
        more = ("--temperature=0.8", "--top_k=20", "--top_p=0.9", f"--meta={meta}", "--max_new_tokens=40")
        sample(results, f"markers-{meta}", "out/meta-rope-ignore", *more)
    train(results, "from_run", {**SIZE, **ROPE, "init_from": "out/meta-rope-ignore", "seed": 8})
    train(results, "from_plain_run", {**SIZE, **ROPE, "init_from": "out/gpt2-rope-skip"})
    yarn = {"dataset": "data/u", "rope_scaling": "yarn", "rope_factor": 2}
    extended = train(results, "extended", {**yarn, "init_from": "out/meta-rope-skip"})
    samples(results, "extended", extended, rope=False)
    pi = {"dataset": "data/u", "rope_scaling": "pi", "rope_factor": 2}
    train(results, "extended_learned", {**pi, "init_from": "out/meta-learned-ignore"})


def tasks(results: Results) -> None:
    """Trains on the synthetic tasks, and evaluates and probes the trained runs."""
    settings = {**TASKS, "dataset": "data/u"}
    with results.case("batch/tasks"):
        scratch = flags({**STEPS, **SIZE, **settings, "block_size": 96, "position": "rope"})
        batches(results, "tasks", [*scratch, "--run_name=tasks", *ALL_TASKS, *ALL_PLACEMENTS])
    given = {**settings, "init_from": "out/meta-rope-ignore"}
    run = train(results, "tasks", given, *ALL_TASKS, *ALL_PLACEMENTS)
    growing = {**given, "curriculum_steps": 5, "train_length": 192, "level": "medium", "loss_on": "all"}
    train(results, "tasks_curriculum", growing, "--tasks", "parity", "copying", *ALL_PLACEMENTS)
    train(results, "tasks_questions", {**given, "train_length": 192, "questions": 3}, "--tasks", "list_recall")
    train(results, "tasks_random", {**settings, "dataset": "data/n", "init_from": "out/random-rope-skip"}, *ALL_TASKS)
    few = ("--n=20", "--lengths", "96", "160")
    evaluate(results, "tasks", run, "tasks", *few)
    evaluate(results, "tasks_random", "out/tasks_random", "tasks", *few)
    few = ("--n=20", "--lengths", "160", "--placements", "every")
    evaluate(results, "positions", run, "positions", *few, command="probe")


def resumed(results: Results) -> None:
    """Stops a run after three steps, resumes it and branches from it, and compares it with an uninterrupted run."""
    settings = {**SIZE, **ROPE, "schedule": "constant", "eval_interval": 6}
    with results.case("train/resumed"):
        argv = [*flags({**STEPS, **settings, "max_steps": 3}), "--run_name=resumed"]
        program("train", *argv)
        program("train", *flags({**STEPS, **settings}), "--run_name=resumed", "--init_from=resume")
        record_run(results, "resumed")
    train(results, "straight", settings)
    train(results, "branch", {**settings, "branch_from": "out/resumed/step_00000003", "max_steps": 5})
    with results.case("train/resumed_equals_straight"):
        weights = [
            Path("out", name, "step_00000006/model.safetensors").read_bytes() for name in ("resumed", "straight")
        ]
        results.add("train/resumed_equals_straight", str(weights[0] == weights[1]))


def without_training(results: Results) -> None:
    """Records what --show_batch and --dry_run print."""
    for arm, settings in ARMS.items():
        with results.case(f"show_batch/{arm}"):
            argv = flags({**STEPS, **SIZE, **settings, "show_batch": 2})
            results.text(f"show_batch/{arm}", program("train", *argv))
        with results.case(f"dry_run/{arm}"):
            argv = flags({**STEPS, **SIZE, **settings, "dry_run": True, "n_accelerators": 2})
            results.text(f"dry_run/{arm}", program("train", *argv))
    with results.case("show_batch/tasks"):
        argv = [*flags({**STEPS, **TASKS, "init_from": "out/meta-rope-ignore", "show_batch": 2}), *ALL_TASKS]
        results.text("show_batch/tasks", program("train", *argv, *ALL_PLACEMENTS))
    for name in ("meta_gpt2", "tiny_meta", "tiny_causal2", "tiny_random", "tiny_widemlp", "tiny_pause", "tiny_gpt2"):
        with results.case(f"dry_run/{name}"):
            recipe = str(results.root / "config" / f"{name}.py")
            results.text(f"dry_run/{name}", program("train", recipe, "--dry_run=True"))


def main(root: Path, output: Path) -> int:
    sys.path[0] = str(root)  # in place of the folder of this file
    results = Results(output, root)
    for name in ("prepare", "train", "sample", "eval"):
        found = Path(importlib.import_module(name).__file__)
        if found.parent != root:
            raise ImportError(f"{name} was imported from {found}, and must come from {root}")
    for group in (prepare, all_arms, variants, tasks, resumed, without_training):
        group(results)
        print(f"{group.__name__}: {len(results.lines)} results so far", file=sys.stderr, flush=True)
    results.write()
    return 1 if results.failed else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()))
