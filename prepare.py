"""Turns text into token shards, with meta-tokens injected.

    python prepare.py                                    # a small dataset: Python's standard library
    python prepare.py --injection=none                   # the same content without markers
    python prepare.py --min_document_tokens=2048         # only its long documents, with the same tokenizer
    python prepare.py --source=files --files 'texts/**/*.txt' --name=mine \\
        --tokenizer=gpt2 --chunk_content=922 --chunk_markers=102      # the paper's window
    python prepare.py --inspect data/stdlib_uniform      # shows a prepared dataset
"""

import contextlib
import dataclasses
import functools
import itertools
import os
import shlex
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from nanometa.common.errors import UserError
from nanometa.common.interrupts import raise_interrupts
from nanometa.common.terminal import shortened
from nanometa.config import PrepareConfig
from nanometa.config.checks import to_dict
from nanometa.config.command_line import load_config, run_cli
from nanometa.config.settings import why_idle
from nanometa.data.assemble import assemble
from nanometa.data.encoders import Encoders, Item, WorkerDied, split_of
from nanometa.data.shards import token_dtype
from nanometa.data.sources import Piece, Skipped, Source, open_source
from nanometa.data.staging import (  # fmt: skip
    FREE,
    PLAN,
    SEGMENT_TOKENS,
    SPLITS,
    Segment,
    SegmentWriter,
    discard,
    finish_deletion,
    finished_segments,
    lock,
    make_plan,
    plan_config,
    plan_conflict,
    read_plan,
    remove_leftovers,
    units_of,
    write_plan,
)
from nanometa.data.summary import inspect, print_summary, say
from nanometa.data.tokenizer import ENDOFTEXT, Tokenizer, open_tokenizer

TOKENIZER_BYTES = 64 * 2**20  # maximum text that a BPE is trained on, counted in characters
HEARTBEAT_SECONDS = 10
# settings that act when the shards are written, so that a merge may change them
SHARD_SETTINGS = ("injection", "chunk_content", "chunk_markers", "min_document_tokens", "shard_tokens")


def make_tokenizer(cfg: PrepareConfig, source: Source, console: Console) -> Tokenizer:
    """Returns the tokenizer that cfg names: GPT-2's, that of a dataset or a run, or a BPE that is trained here."""
    if cfg.tokenizer != "bpe":
        return open_tokenizer(cfg.tokenizer, "bpe, gpt2")

    def train_texts() -> Iterator[str]:
        remaining = TOKENIZER_BYTES
        for item in itertools.chain.from_iterable(map(source.read, range(source.n_units))):
            if isinstance(item, Piece) and split_of(item, cfg) == "train":
                yield item.text
                remaining -= len(item.text)
                if remaining <= 0:
                    return

    with heartbeat(console, f"training a BPE tokenizer of {cfg.bpe_vocab_size:,} tokens"):
        tokenizer = Tokenizer.train(train_texts(), cfg.bpe_vocab_size)
    if tokenizer.n_content < cfg.bpe_vocab_size:
        say(
            console,
            f"warning: the tokenizer has {tokenizer.n_content:,} tokens, not bpe_vocab_size={cfg.bpe_vocab_size:,}, "
            f"because the training text has no more pairs to merge; give more text or a smaller --bpe_vocab_size",
            style="yellow",
        )
    return tokenizer


@contextlib.contextmanager
def heartbeat(console: Console, activity: str) -> Iterator[None]:
    """Shows that a with block is still running: a spinner on a terminal, otherwise a line every HEARTBEAT_SECONDS."""
    if console.is_terminal:
        with Progress(SpinnerColumn(), TextColumn(activity), TimeElapsedColumn(), console=console) as progress:
            progress.add_task("", total=None)
            yield
        return
    started, ended = time.monotonic(), threading.Event()

    def report() -> None:
        while not ended.wait(HEARTBEAT_SECONDS):
            console.print(f"{activity}: {time.monotonic() - started:.0f} s so far")

    reporter = threading.Thread(target=report, daemon=True)
    reporter.start()
    try:
        yield
    finally:
        ended.set()
        reporter.join()


def new_items(
    source: Source, work: Path, units: list[int], token_bytes: int, digests: dict[int, str]
) -> Iterator[Item]:
    """Yields the items that no finished segment contains, as (unit, number in the unit, piece or None at its end).

    digests: receives the hash of a unit's files before the first item of the unit is read."""
    for unit in units:
        digests[unit] = source.digest(unit)
        done = finished_segments(work, unit, token_bytes)
        start = done[-1].items if done else 0
        number = start
        for number, item in enumerate(itertools.islice(source.read(unit), start, None), start + 1):
            yield unit, number, item
        yield unit, number, None


def tokenize(source: Source, work: Path, cfg: PrepareConfig, tokenizer: Tokenizer, console: Console) -> None:
    """Writes the missing segments of this part into the folder `work`.

    Raises UserError if the files of a unit were replaced or changed since some of it was tokenized."""
    units = units_of(cfg.part, source.n_units)
    token_bytes = token_dtype(tokenizer.n_vocab).itemsize
    finished = [segment for unit in units for segment in finished_segments(work, unit, token_bytes)]
    done = {segment.unit for segment in finished if segment.ends_unit}
    if finished:
        say(console, f"continuing the preparation in {work}: {len(done)} of {len(units)} units are already tokenized")
        with heartbeat(console, "comparing the files of these units with their hashes"):
            check_digests(source, finished, work)
    missing = [unit for unit in units if unit not in done]
    start, size_done = source.position, sum(source.unit_sizes[unit] for unit in done)  # position: read for the BPE
    columns = (
        TextColumn("tokenizing"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%  {task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    writer, open_split = None, None  # open_split = split of the last piece, while its document has not ended
    with Encoders(tokenizer, cfg) as encoders, Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=sum(source.unit_sizes[unit] for unit in units), completed=size_done, rate="")
        tokens, digests = 0, {}
        for task in encoders.in_order(new_items(source, work, missing, token_bytes, digests)):
            for (unit, number, item), encoded in task:
                if writer is None:
                    segments = len(finished_segments(work, unit, token_bytes))
                    writer = SegmentWriter(work, unit, segments, tokenizer, digests[unit])
                split = encoded.split if encoded else None
                if open_split not in (None, split):  # the document continues in the other split, or cannot be read on
                    writer.end_document(open_split)
                    open_split = None
                if isinstance(item, Skipped):
                    writer.skip(item)
                elif encoded:
                    writer.add(*encoded)
                    writer.segment.endoftext += item.text.count(ENDOFTEXT)
                    tokens += len(encoded.ids)
                    open_split = split
                    if item.last:
                        writer.end_document(split)
                        open_split = None
                if item is None or (open_split is None and writer.tokens >= SEGMENT_TOKENS):
                    writer.close(number, ends_unit=item is None)
                    writer = None
            units_text = "" if source.total_bytes else f", unit {units.index(unit) + 1:,} of {len(units):,}"
            rate = f"{tokens / max(progress.tasks[0].elapsed or 0, 1e-9):,.0f} tokens/s{units_text}"
            progress.update(bar, completed=size_done + source.position - start, rate=rate)


def check_digests(source: Source, finished: list[Segment], work: Path) -> None:
    """Raises UserError if the content of a unit is no longer the one that its finished segments were made from."""
    digests: dict[int, str] = {}
    for segment in finished:
        if segment.unit not in digests:
            digests[segment.unit] = source.digest(segment.unit)
        if segment.digest not in ("", digests[segment.unit]):  # "": earlier versions recorded none
            raise UserError(
                f"{work} is an unfinished preparation of files that have changed since (those of unit "
                f"{segment.unit + 1} of {source.n_units}): restore them to continue, choose another --name, or delete "
                f"it."
            )


def all_segments(folders: list[Path], n_units: int, token_bytes: int) -> list[tuple[Path, Segment]]:
    """Returns (folder, segment) of all units, in order. Raises UserError if a unit is missing or duplicate."""
    found = []
    for folder in folders:
        beyond = [path for path in folder.glob("unit_*.json") if int(path.name.split("_")[1]) >= n_units]
        if beyond:
            raise UserError(f"{beyond[0]} is beyond the {n_units} units of its {PLAN}: prepare that part again.")
    for unit in range(n_units):
        here = [(folder, segments) for folder in folders if (segments := finished_segments(folder, unit, token_bytes))]
        if len(here) > 1:
            raise UserError(f"unit {unit} is in {here[0][0]} and in {here[1][0]}: give every part once.")
        if not here or not here[0][1][-1].ends_unit:
            raise UserError(f"unit {unit} of {n_units} is in none of the parts: give all parts, each of them finished.")
        found += [(here[0][0], segment) for segment in here[0][1]]
    return found


def write_dataset(
    folder: Path, segments: list[tuple[Path, Segment]], cfg: PrepareConfig, tokenizer: Tokenizer, source: str,
    command: str, console: Console,
) -> dict:  # fmt: skip
    """Assembles a dataset in a temporary folder, renames that to `folder`, and returns the manifest."""
    writing = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir(parents=True)
    total = sum(segment.splits[split]["tokens"] for _, segment in segments for split in SPLITS)
    columns = (TextColumn("writing shards"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TimeRemainingColumn())
    try:
        with Progress(*columns, console=console) as progress:
            bar = progress.add_task("", total=total)
            advance = functools.partial(progress.advance, bar)
            manifest = assemble(writing, segments, cfg, tokenizer, source, command, advance)
        os.replace(writing, folder)
    finally:
        shutil.rmtree(writing, ignore_errors=True)
    return manifest


def dataset_folder(cfg: PrepareConfig, root: Path) -> Path:
    """Returns the folder of the dataset: the setting name, or by default <recipe>_<injection>, inside root."""
    length = f"_{cfg.min_document_tokens}plus" if cfg.min_document_tokens else ""
    return root / (cfg.name or f"{cfg.recipe or cfg.source}_{cfg.injection}{length}")


def prepare(cfg: PrepareConfig, command: str, console: Console, root: Path = Path("data")) -> Path:
    """Prepares a dataset, or with cfg.part a part of one, and returns its folder.

    Tokenized text is kept in a hidden folder beside it, so that the same command continues after an interruption.
    Raises UserError if the folder exists, the source cannot be read, or another preparation is in progress."""
    folder = dataset_folder(cfg, root)
    if cfg.part:
        folder = folder.with_name(f"{folder.name}.part{cfg.part.replace('/', 'of')}")
    work = folder.with_name(f".{folder.name}.partial")
    finish_deletion(work)
    if folder.exists():
        raise UserError(f"{folder} exists: choose another --name, or delete it first.")
    source = open_source(cfg)
    units_of(cfg.part, source.n_units)  # raises UserError if there are too many parts
    size = f", {source.total_bytes:,} bytes" if source.total_bytes else ""
    say(console, f"{shortened(source.description)}: {source.n_units:,} units{size}")
    for note in source.notes:
        say(console, shortened(note))

    work.mkdir(parents=True, exist_ok=True)
    held = lock(work)
    fresh = not (work / PLAN).exists()
    try:
        if fresh:
            remove_leftovers(work)
        tokenizer = make_tokenizer(cfg, source, console) if fresh else Tokenizer.load(work)
        plan = make_plan(cfg, source, tokenizer)
        if fresh:
            for name, content in tokenizer.files().items():
                (work / name).write_bytes(content)
            write_plan(work, plan)
        elif conflict := plan_conflict(plan, read_plan(work), part=True):
            raise UserError(
                f"{work} is an unfinished preparation that differs from this one ({conflict}): finish it with its "
                f"original command, choose another --name, or delete it."
            )
        say(
            console,
            f"tokenizer {tokenizer.name}: {tokenizer.n_content:,} tokens, {tokenizer.n_vocab:,} rows in the embedding",
        )
        tokenize(source, work, cfg, tokenizer, console)
        if cfg.part:
            os.replace(work, folder)
            all_parts = f"{dataset_folder(cfg, root)}.part*of{cfg.part.split('/')[1]}"
            say(console, f"{folder} is finished. To merge all parts, run: python prepare.py --merge {all_parts}")
            return folder
        token_bytes = token_dtype(tokenizer.n_vocab).itemsize
        segments = all_segments([work], source.n_units, token_bytes)
        documents = sum(segment.splits[split]["documents"] for _, segment in segments for split in SPLITS)
        if cfg.separator and documents <= sum(map(len, source.units)):
            say(console, f"warning: --separator={cfg.separator} occurs in none of the files", style="yellow")
        manifest = write_dataset(folder, segments, cfg, tokenizer, source.description, command, console)
        discard(work)
    except UserError:
        if fresh:
            discard(work)
        raise
    except WorkerDied:
        raise UserError(
            f"a worker process was killed, perhaps because memory ran out: the tokenized text is kept; give the same "
            f"command with fewer --workers than {cfg.workers} to continue."
        ) from None
    except OSError as error:
        raise UserError(
            f"{folder} is not finished ({error}): the tokenized text is kept; remove the cause (full disk? network?) "
            f"and give the same command again to continue."
        ) from error
    except KeyboardInterrupt:
        if (work / PLAN).exists():
            say(console, f"the tokenized text is kept in {work}: give the same command again to continue")
        else:
            discard(work)
        raise
    finally:
        held.release()
    print_summary(folder, manifest, console)
    return folder


def merge(cfg: PrepareConfig, command: str, console: Console, root: Path = Path("data")) -> Path:
    """Merges the parts in cfg.merge into one dataset, and returns its folder. The parts are kept.

    Raises UserError if the parts do not fit together or are not complete."""
    parts = [Path(name) for name in cfg.merge]
    plans = [read_plan(part) for part in parts]
    for part, plan in zip(parts, plans, strict=True):
        if conflict := plan_conflict(plan, plans[0]):
            raise UserError(
                f"{part} and {parts[0]} do not fit together ({conflict}): prepare both with the same settings."
            )
    for name in SHARD_SETTINGS:
        values = [getattr(plan_config(plan), name) for plan in plans]
        if len(set(values)) > 1 and name not in cfg.given and not why_idle(cfg, name):
            raise UserError(
                f"the parts were prepared with different --{name} ({' and '.join(map(str, dict.fromkeys(values)))}): "
                f"say which to use with --{name}."
            )
    folder = dataset_folder(cfg, root)
    if folder.exists():
        raise UserError(f"{folder} exists: choose another --name, or delete it first.")
    tokenizer = Tokenizer.load(parts[0])
    segments = all_segments(parts, plans[0]["n_units"], token_dtype(tokenizer.n_vocab).itemsize)
    manifest = write_dataset(folder, segments, cfg, tokenizer, plans[0]["source"], command, console)
    print_summary(folder, manifest, console)
    return folder


def merge_config(argv: list[str]) -> PrepareConfig:
    """Returns the settings of a merge: those of the parts, changed by argv.

    Raises UserError if argv changes a setting that the tokenized text depends on."""
    asked = load_config(PrepareConfig, argv)
    plan = read_plan(Path(asked.merge[0]))
    whole = dataclasses.replace(plan_config(plan), part="")
    cfg = load_config(PrepareConfig, argv, default=whole)
    for name, value in to_dict(cfg).items():
        if name not in FREE and value != getattr(whole, name):
            raise UserError(
                f"{name}={value} cannot be set when merging, because the parts were prepared with "
                f"{name}={getattr(whole, name)}: leave it out, or prepare the parts again."
            )
    return cfg


def main(argv: list[str]) -> None:
    """Prepares, merges or inspects a dataset, as argv says."""
    cfg = load_config(PrepareConfig, argv, config_file=True)
    console = Console(soft_wrap=True, markup=False, emoji=False, highlight=False)
    command = shlex.join(["python", "prepare.py", *argv])
    if cfg.inspect:
        inspect(Path(cfg.inspect), console)
        return
    raise_interrupts()
    if not cfg.merge and any(arg.split("=")[0] == "--merge" for arg in argv):
        raise UserError(
            "--merge names no folder: give the folders of all parts, for example --merge data/NAME.part*of3."
        )
    if cfg.merge:
        merge(merge_config(argv), command, console)
    else:
        prepare(cfg, command, console)


if __name__ == "__main__":
    run_cli(main)
