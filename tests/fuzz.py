"""Gives thousands of damaged inputs to the commands' functions, in one process: each must be refused or usable.

    python -m tests.fuzz                          # 3,000 inputs, some minutes
    python -m tests.fuzz --count=500 --seed=7 --only=checkpoint

Each input is one of the KINDS below with one to three kinds of damage: bytes are flipped, cut or inserted, lines are
doubled, values in JSON become other types, huge, negative or non-finite numbers, or deep nesting, keys are lost or
added, and text gets odd Unicode, paths that lead elsewhere, or symbolic links. A hash that is checked before the file
is parsed is computed anew ("sealed"), so that the damage reaches the parser.

An input passes if it is refused by a UserError of one line, or accepted and usable. Any other exception, SECONDS
without an answer, and a file that changed on disk are failures, which are printed with the arguments that repeat them.
"""

import argparse
import contextlib
import faulthandler
import gzip
import hashlib
import io
import itertools
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
import unittest.mock
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from nanometa import prepare
from nanometa.common.errors import UserError
from nanometa.config import GPTConfig, PrepareConfig, SampleConfig, TrainConfig
from nanometa.config import train_config_from_dict as from_dict
from nanometa.config.checks import bool_names, field_names, to_dict
from nanometa.config.command_line import load_config, recipes
from nanometa.data.loader import Windows
from nanometa.data.shards import read_manifest
from nanometa.data.sources import Piece, Skipped, open_source
from nanometa.data.tokenizer import RANKS_FILE, SPEC_FILE
from nanometa.data.verify import CACHE, verify
from nanometa.inference.generation import MarkerPlan
from nanometa.inference.scoring import score
from nanometa.model import GPT
from nanometa.sample import read_prompt, show_sample, start_samples
from nanometa.training import checkpoint, pretrained
from nanometa.training.dataset import data_facts, with_vocabulary
from nanometa.training.distributed import accumulation
from nanometa.training.launch import ranks
from nanometa.training.optimizer import Optimizer, learning_rate
from nanometa.training.resume import check_resumable, find_checkpoint
from tests.conftest import ROOT
from tests.damage import (
    CHUNK,
    PATHS,
    QUIET,
    TEXTS,
    VALUES,
    C,
    M,
    World,
    damage,
    damage_bytes,
    seal_checkpoint,
    seal_dataset,
    seal_tokenizer,
)  # fmt: skip

SECONDS = 5
# ----------------------------------------------------------------------------- kinds of input


def value_text(rng: random.Random) -> str:
    value = rng.choice((*VALUES, "scratch", "cosine", "1e-3", "0x10", "1_000", "½", "٣", "-0", "+1", "1e999", "''"))
    return str(value) if not isinstance(value, int) or abs(value) < 10**4000 else "9" * 4000


def command_line(world: World, rng: random.Random) -> Callable:
    cls = rng.choice((TrainConfig, PrepareConfig, SampleConfig))
    names, argv = field_names(cls), []
    for _ in range(rng.choice((1, 1, 2, 3, 5))):
        name = rng.choice(names)
        if rng.random() < 0.1:
            name = damage_bytes(name.encode(), rng).decode("utf-8", "replace")
        shape = rng.choice(("--{}={}", "--{}={}", "--{}={}", "--{}", "-{}={}", "{}", "--{}=", "--{}={}={}"))
        argv.append(shape.format(name, value_text(rng), rng.random()))
        if name in bool_names(cls) and rng.random() < 0.5:
            argv[-1] = f"--{name}={rng.choice(('True', 'False', 'true', '0', 'yes'))}"
    if rng.random() < 0.1:
        argv.insert(0, rng.choice((*PATHS, "damaged.py", "texts", "elsewhere", "rows.parquet")))
    return lambda: use_config(load_config(cls, argv, config_file=cls is not SampleConfig))


def use_config(cfg) -> None:
    again = json.loads(json.dumps(to_dict(cfg)))
    if isinstance(cfg, SampleConfig):
        read_prompt(cfg if cfg.prompt_file not in ("-", "/dev/zero") else SampleConfig())
        checkpoint.open_run(cfg.run)
    if isinstance(cfg, PrepareConfig) and cfg.source == "files":
        open_source(cfg)
    if isinstance(cfg, PrepareConfig) and cfg.inspect:
        prepare.inspect(Path(cfg.inspect), QUIET)
    if isinstance(cfg, PrepareConfig) and cfg.merge:
        prepare.merge_config([f"--merge={cfg.merge[0]}"])
    if isinstance(cfg, TrainConfig):
        assert from_dict(again) == cfg
        assert all(np.isfinite(learning_rate(step, cfg)) for step in (0, 1, cfg.max_steps))
        for world in (1, 8):
            with contextlib.suppress(UserError):
                assert accumulation(cfg, world) * world * cfg.micro_batch_size == cfg.batch_size
        find_checkpoint(cfg, Path(cfg.out_dir) / cfg.run_name, check_sentence)
        Windows(cfg.dataset, "train", cfg.model.block_size, cfg.target_rule)


def config_file(world: World, rng: random.Random) -> Callable:
    source = rng.choice(recipes(ROOT / "config"))
    cls = PrepareConfig if "PrepareConfig" in source.read_text() else TrainConfig
    world.write(Path("damaged.py"), damage(source.read_bytes(), rng, False))
    return lambda: use_config(load_config(cls, ["damaged.py"], config_file=True))


def dataset(world: World, rng: random.Random) -> Callable:
    folder = Path("data/d")
    files = [folder / name for name in ("manifest.json",) * 4 + (SPEC_FILE, RANKS_FILE)] + [*folder.glob("*.bin")]
    damaged = world.damage(files, rng)
    if rng.random() < 0.6:
        seal_tokenizer(folder)
        seal_dataset(folder) if damaged.name != "manifest.json" or rng.random() < 0.3 else None
    return lambda: use_dataset(world)


def use_dataset(world: World) -> None:
    prepare.print_summary(Path("data/d"), read_manifest(Path("data/d")), QUIET)
    for split in ("train", "val"):
        for rule in ("ignore", "skip"):
            data = Windows("data/d", split, CHUNK, rule)
            verify(Path("data/d"), data.manifest, data.tokenizer.meta + 1)
            batch = data.batch(np.array([0, data.n_windows - 1]))
            data.tokenizer.decode(batch.tokens[0].tolist())
            data.tokenizer.encode("any text at all: é\0\U0001f600")
            cfg = with_vocabulary(TrainConfig(dataset="data/d"), data.tokenizer.n_vocab, data.tokenizer.n_content)
            json.dumps(data_facts(data, cfg))
            assert batch.tokens.max() < data.tokenizer.n_vocab and batch.targets.max() < data.tokenizer.n_content


def checkpoint_folder(world: World, rng: random.Random) -> Callable:
    folder = world.step
    names = ("state.json",) * 5 + ("manifest.json", SPEC_FILE, RANKS_FILE, checkpoint.WEIGHTS, checkpoint.OPTIMIZER)
    world.damage([folder / name for name in names], rng)
    if rng.random() < 0.8:
        if rng.random() < 0.7:
            seal_tokenizer(folder)
        seal_checkpoint(folder)
    return lambda: use_checkpoint(world)


def use_checkpoint(world: World) -> None:
    run = checkpoint.load_run(world.step)
    continue_text(run, SampleConfig(prompt="the cat", max_new_tokens=2))
    saved = checkpoint.newest(world.step.parent, lambda sentence: check_sentence(sentence))
    check_resumable(saved, world.cfg, data_facts(world.data, world.cfg))
    model = GPT(world.cfg.model)
    saved.load_into(model)
    optimizer = Optimizer(model, world.cfg)
    saved.restore(optimizer)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step(1e-3)
    assert saved.state["best"] is None or saved.state["best"]["loss"] > 0
    json.dumps(saved.state.get("origin"))


def continue_text(run, cfg: SampleConfig) -> None:
    [(prompt, ids)] = start_samples(run, cfg, read_prompt(cfg), [0])
    with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), "utf-8")):
        show_sample(run, True, prompt, ids)


def prompt(world: World, rng: random.Random) -> Callable:
    pieces = (
        *TEXTS,
        "the cat",
        "<|meta|>",
        "<|meta|>",
        "<|endoftext|>",
        " sat",
        "\n",
        "a" * 2000,
        "\0",
        "<|meta",
        "﷽",
        "  ",
    )
    text = "".join(rng.choices(pieces, k=rng.choice((0, 1, 2, 5, 9, 30))))
    raw = damage_bytes(text.encode("utf-8", "surrogatepass"), rng)
    world.write(Path("prompt.txt"), raw)
    as_file = rng.random() < 0.4
    source = {"prompt_file": "prompt.txt"} if as_file else {"prompt": text}

    def use():
        cfg = SampleConfig(max_new_tokens=2, meta=rng.choice(("trained", "none", "periodic")), **source)
        if rng.random() < 0.3:  # as in a notebook
            plan = MarkerPlan.of_run(world.run)
            tokens, nats = score(world.run, text, plan)
            assert len(tokens) == len(nats) and np.isfinite(nats).all()
        continue_text(world.run, cfg)

    return use


def unfinished(world: World, rng: random.Random) -> Callable:
    """Damages one part of a preparation, which `--merge` reads and a repeated preparation continues."""
    folder = Path("data/q.part1of1")
    files = [folder / "plan.json"] * 3 + [folder / SPEC_FILE, folder / RANKS_FILE] + 3 * [*folder.glob("unit_*.json")]
    world.damage(files + [*folder.glob("unit_*.train")], rng)
    if rng.random() < 0.6:
        seal_tokenizer(folder)

    def use():
        argv = [f"--merge={folder}", "--name=merged"]
        try:
            prepare.merge(prepare.merge_config(["--merge", str(folder), "--name=merged"]), " ".join(argv), QUIET)
            data = Windows("data/merged", "val", CHUNK, "ignore")
            verify(Path("data/merged"), data.manifest, data.tokenizer.meta + 1)
        finally:
            for path in Path("data").glob("merged*"):
                for file in path.iterdir():
                    file.unlink()
                path.rmdir()

    return use


def source(world: World, rng: random.Random) -> Callable:
    """Damages a file of texts or rows, or gives it another suffix, encoding or compression."""
    path = Path(rng.choice(("rows.jsonl", "rows.jsonl.gz", "rows.parquet", "texts/doc000.txt")))
    if path.suffix == ".gz" and rng.random() < 0.5:  # damaged lines in an intact archive
        world.write(path, gzip.compress(damage(gzip.decompress(path.read_bytes()), rng, False)))
    elif path.suffix == ".jsonl" and rng.random() < 0.5:
        lines = path.read_bytes().splitlines()
        lines[2] = damage(lines[2], rng, True)
        world.write(path, b"\n".join(lines))
    elif rng.random() < 0.5:
        raw = path.read_bytes()
        path = Path("other" + rng.choice(SUFFIXES))
        for change in rng.choices(CHANGES, k=rng.choice((0, 0, 1, 2))):
            raw = change(raw)
        world.write(path, raw)
    else:
        world.damage([path], rng)

    def use():
        given = {"separator": rng.choice(("<|endoftext|>", "\n", "e"))} if rng.random() < 0.2 else {}
        given |= {"text_column": rng.choice(("n", "x", "text.text", ".", "x.0"))} if rng.random() < 0.2 else {}
        cfg = PrepareConfig(
            source="files", files=(str(path),), val_fraction=0.3, chunk_content=C, chunk_markers=M, **given
        )
        opened = open_source(cfg)
        for item in itertools.chain.from_iterable(map(opened.read, range(opened.n_units))):
            if isinstance(item, Skipped):
                check_sentence(item.reason)
            assert isinstance(item, Skipped) or (isinstance(item, Piece) and item.text.encode())

    return use


SUFFIXES = (
    "", ".txt", ".TXT", ".md", ".jsonl", ".NDJSON", ".json", ".csv", ".parquet", ".zip", ".txt.gz", ".jsonl.gz",
    ".json.GZ", ".parquet.gz", ".zst", "\x1b[31m.txt",
)  # fmt: skip
CHANGES = (
    gzip.compress, lambda raw: b"\xef\xbb\xbf" + raw, lambda raw: raw.decode("latin-1").encode("utf-16"),
    lambda raw: raw + bytes(5000), lambda raw: b"[" + raw.replace(b"\n", b",") + b"]", lambda raw: raw[: len(raw) // 2],
)  # fmt: skip


def launch(world: World, rng: random.Random) -> Callable:
    """Sets the variables of torchrun to values that need not make sense."""
    values = ("", "0", "1", "2", "-1", "1.0", " 1", "x", "10" * 20, "١", "127.0.0.1", "65536", "\udcff")
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT",
             "TORCHELASTIC_RUN_ID")  # fmt: skip
    given = {name: rng.choice(values) for name in names if rng.random() < 0.6}

    def use():
        with unittest.mock.patch.dict(os.environ, given):
            rank, local_rank, world_size = ranks()
        assert 0 <= rank < world_size and 0 <= local_rank < world_size

    return use


def weights(world: World, rng: random.Random) -> Callable:
    """Damages a Hugging Face GPT-2 that training starts from."""
    world.damage([Path("hf/config.json"), Path("hf/model.safetensors")], rng)
    n_vocab = world.data.tokenizer.n_vocab
    cfg = GPTConfig(**{**to_dict(world.hf_config), "vocab_size": n_vocab})
    return lambda: pretrained.load_into(GPT(cfg), "hf", world.data.tokenizer)


KINDS = {
    "command line": (command_line, 4), "config file": (config_file, 2), "dataset": (dataset, 5),
    "checkpoint": (checkpoint_folder, 6), "prompt": (prompt, 3), "unfinished": (unfinished, 3), "source": (source, 3),
    "weights": (weights, 2), "launch": (launch, 1),
}  # fmt: skip


# ----------------------------------------------------------------------------- verdicts


class Hang(BaseException):
    """Raised if there is no answer within SECONDS."""


def check_sentence(sentence: str) -> None:
    assert sentence.isprintable() and 0 < len(sentence) < 20_000, f"not one printable sentence: {sentence[:300]!r}"


def on_disk() -> dict:
    """Returns the state of everything below the current folder: targets of links; time and hash of files."""
    found = {}
    for path in Path().rglob("*"):
        if path.is_symlink():
            found[path] = os.readlink(path)
        elif path.is_file() and path.name != CACHE:
            found[path] = (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).digest())
    return found


def verdict(use: Callable) -> str:
    """Calls use() and returns "refused", "accepted", or "failed: " with the reason."""

    def ring(number, frame):
        raise Hang

    before = on_disk()
    signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    # for a hang outside Python code, which the alarm cannot interrupt
    faulthandler.dump_traceback_later(20 * SECONDS, exit=True)
    out, outcome = io.StringIO(), "accepted"
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            use()
    except UserError as error:
        try:
            check_sentence(str(error))
            outcome = "refused"
        except AssertionError as wrong:
            outcome = f"failed: {wrong}"
    except SystemExit as end:
        outcome = "accepted" if not end.code else f"failed: exit status {end.code}"  # --help ends with status 0
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)
        ours = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in where if str(ROOT) in frame.filename][-3:]
        reason = str(error)[:200] if not isinstance(error, RecursionError) else ""
        outcome = f"failed: {type(error).__name__}: {reason!r} at {' < '.join(ours[::-1])}"
    finally:
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()
    if outcome in ("refused", "accepted") and on_disk() != before:
        changed = sorted(str(path) for path, _ in before.items() ^ on_disk().items())
        outcome = f"failed: {outcome}, and changed on disk: {', '.join(changed[:3])}"
    return outcome


def fuzz(count: int, seed: int, only: str = "", out=sys.stdout) -> int:
    """Runs `count` inputs, shared out by the weights of KINDS, prints a table and returns the number of failures."""
    kinds = {name: kind for name, kind in KINDS.items() if only in name}
    total = sum(weight for _, weight in kinds.values())
    counts: Counter = Counter()
    started, here = time.perf_counter(), Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder))
        try:
            for name, (make, weight) in kinds.items():
                for number in range(-(-count * weight // total)):
                    use = make(world, random.Random(f"{seed} {name} {number}"))
                    outcome = verdict(use)
                    world.restore()
                    counts[name, outcome.split(":")[0]] += 1
                    if outcome.startswith("failed"):
                        print(f"--seed={seed}, {name} number {number}: {outcome}", file=out, flush=True)
        finally:
            os.chdir(here)
    print(f"\n| {'kind':12} | inputs | refused | accepted | failed |\n|---|---|---|---|---|", file=out)
    for name in [*kinds, "all"]:
        row = [sum(n for (k, o), n in counts.items() if name in (k, "all") and o == outcome)
               for outcome in ("refused", "accepted", "failed")]  # fmt: skip
        print(f"| {name:12} | {sum(row):6} | {row[0]:7} | {row[1]:8} | {row[2]:6} |", file=out)
    print(f"seed {seed}, {time.perf_counter() - started:.0f} s", file=out)
    return sum(n for (_, outcome), n in counts.items() if outcome == "failed")


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=3000, help="inputs, over all kinds")
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--only", default="", choices=["", *KINDS], help="one kind")
    args = parser.parse_args()
    sys.exit(fuzz(args.count, args.seed, args.only) > 0)


if __name__ == "__main__":
    main()
