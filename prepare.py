"""Turns text into token shards with meta-tokens injected.

    python prepare.py                                    # the embedded dataset: Python's standard library
    python prepare.py --injection=none                   # the same content without markers
    python prepare.py --min_document_tokens=2048         # its long documents alone, with the same tokenizer
    python prepare.py --source=files --files 'texts/**/*.txt' --name=mine \\
        --tokenizer=gpt2 --chunk_content=922 --chunk_markers=102      # the paper's window
    python prepare.py --inspect data/stdlib_uniform      # what is in there
"""

import dataclasses
import functools
import itertools
import os
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from nanometa.common.errors import UserError
from nanometa.config import PrepareConfig
from nanometa.config.checks import to_dict
from nanometa.config.command_line import load_config, run_cli
from nanometa.data.assemble import assemble
from nanometa.data.encoders import Encoders, Item, split_of
from nanometa.data.shards import read_manifest, token_dtype
from nanometa.data.sources import Piece, Skipped, Source, open_source
from nanometa.data.staging import (  # fmt: skip
    FREE,
    PLAN,
    SEGMENT_TOKENS,
    SPLITS,
    Segment,
    SegmentWriter,
    finished_segments,
    lock,
    make_plan,
    plan_config,
    plan_conflict,
    read_plan,
    units_of,
    write_plan,
)
from nanometa.data.tokenizer import SPEC_FILE, Tokenizer, write_tokens

TOKENIZER_BYTES = 64 * 2**20  # text that a BPE is trained on at most


def make_tokenizer(cfg: PrepareConfig, source: Source) -> Tokenizer:
    if cfg.tokenizer == "gpt2":
        return Tokenizer.gpt2()
    if cfg.tokenizer != "bpe":
        folder = Path(cfg.tokenizer)
        checkpoints = sorted(folder.glob(f"step_*/{SPEC_FILE}"))  # of a run
        if not (folder / SPEC_FILE).is_file() and not checkpoints:
            raise UserError(
                f"tokenizer={cfg.tokenizer!r} is unknown: it must be bpe, gpt2, or the folder of a prepared dataset "
                f"or of a run."
            )
        return Tokenizer.load(checkpoints[-1].parent if checkpoints else folder)

    def train_texts() -> Iterator[str]:
        room = TOKENIZER_BYTES
        for item in itertools.chain.from_iterable(map(source.read, range(source.n_units))):
            if isinstance(item, Piece) and split_of(item.text, cfg) == "train":
                yield item.text
                room -= len(item.text)
                if room <= 0:
                    return

    return Tokenizer.train(train_texts(), cfg.bpe_vocab_size)


def new_items(source: Source, work: Path, units: list[int], token_bytes: int) -> Iterator[Item]:
    """What no finished segment holds yet, as (unit, number in it, piece); None in place of a piece ends a unit."""
    for unit in units:
        done = finished_segments(work, unit, token_bytes)
        if done and done[-1].ends_unit:
            continue
        start = done[-1].items if done else 0
        number = start
        for number, item in enumerate(itertools.islice(source.read(unit), start, None), start + 1):
            yield unit, number, item
        yield unit, number, None


def tokenize(source: Source, work: Path, cfg: PrepareConfig, tokenizer: Tokenizer, console: Console) -> None:
    """Fills `work` with the segments of this part that are not there yet."""
    units = units_of(cfg.part, source.n_units)
    token_bytes = token_dtype(tokenizer.n_vocab).itemsize
    finished = [segment for unit in units for segment in finished_segments(work, unit, token_bytes)]
    if finished:
        units_done = sum(segment.ends_unit for segment in finished)
        console.print(f"going on in {work}: {units_done} of {len(units)} units are tokenized")
    bytes_done = sum(segment.splits[split]["bytes"] for segment in finished for split in SPLITS)
    total = source.total_bytes * len(units) // source.n_units or None
    columns = (
        TextColumn("tokenizing"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%  {task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    writer, run = None, None  # run = the split that the current document's last piece went to
    with Encoders(tokenizer, cfg) as encoders, Progress(*columns, console=console) as progress:
        bar, tokens = progress.add_task("", total=total, completed=bytes_done, rate=""), 0
        for task in encoders.in_order(new_items(source, work, units, token_bytes)):
            n_bytes = 0
            for (unit, number, item), encoded in task:
                if writer is None:
                    writer = SegmentWriter(work, unit, len(finished_segments(work, unit, token_bytes)), tokenizer)
                split = encoded.split if encoded else None
                if run not in (None, split):  # the document goes on in the other split, or its rest cannot be read
                    writer.end_document(run)
                    run = None
                if isinstance(item, Skipped):
                    writer.skip(item)
                elif encoded:
                    writer.add(*encoded)
                    tokens, n_bytes = tokens + len(encoded.ids), n_bytes + encoded.n_bytes
                    run = split
                    if item.last:
                        writer.end_document(split)
                        run = None
                if item is None or (run is None and writer.tokens >= SEGMENT_TOKENS):
                    writer.close(number, ends_unit=item is None)
                    writer = None
            units_text = "" if total else f", unit {units.index(unit) + 1:,} of {len(units):,}"
            rate = f"{tokens / max(progress.tasks[0].elapsed or 0, 1e-9):,.0f} tokens/s{units_text}"
            progress.update(bar, advance=n_bytes, rate=rate)


def all_segments(folders: list[Path], n_units: int, token_bytes: int) -> list[tuple[Path, Segment]]:
    """(folder, segment) of every unit in order. Raises UserError for a unit that is not whole, or there twice."""
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
            raise UserError(f"unit {unit} of {n_units} is in none of the parts: give all of them, each prepared whole.")
        found += [(here[0][0], segment) for segment in here[0][1]]
    return found


def write_dataset(
    folder: Path, segments: list[tuple[Path, Segment]], cfg: PrepareConfig, tokenizer: Tokenizer, source: str,
    command: str, console: Console,
) -> dict:  # fmt: skip
    """Assembles `folder` beside itself and renames it when all is written -> manifest."""
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
    length = f"_{cfg.min_document_tokens}plus" if cfg.min_document_tokens else ""
    return root / (cfg.name or f"{cfg.recipe or cfg.source}_{cfg.injection}{length}")


def prepare(cfg: PrepareConfig, command: str, console: Console, root: Path = Path("data")) -> Path:
    """Prepares a dataset, or with cfg.part a part of one -> its folder.

    What is tokenized lies in a hidden folder beside it, from which the same command goes on after an interruption."""
    folder = dataset_folder(cfg, root)
    if cfg.part:
        folder = folder.with_name(f"{folder.name}.part{cfg.part.replace('/', 'of')}")
    if folder.exists():
        raise UserError(f"{folder} exists: choose another --name, or delete it first.")
    source = open_source(cfg)
    units_of(cfg.part, source.n_units)  # refuses too many parts
    size = f", {source.total_bytes:,} bytes" if source.total_bytes else ""
    console.print(f"{source.description}: {source.n_units:,} units{size}")

    work = folder.with_name(f".{folder.name}.partial")
    fresh = not (work / PLAN).exists()
    work.mkdir(parents=True, exist_ok=True)
    held = lock(work)
    try:
        tokenizer = make_tokenizer(cfg, source) if fresh else Tokenizer.load(work)
        plan = make_plan(cfg, source, tokenizer)
        if fresh:
            for name, content in tokenizer.files().items():
                (work / name).write_bytes(content)
            write_plan(work, plan)
        elif conflict := plan_conflict(plan, read_plan(work), part=True):
            raise UserError(
                f"{work} is an unfinished preparation that differs from this one ({conflict}): finish it with its own "
                f"command, choose another --name, or delete it."
            )
        console.print(
            f"tokenizer {tokenizer.name}: {tokenizer.n_content:,} tokens, embedding of {tokenizer.n_vocab:,} rows"
        )
        tokenize(source, work, cfg, tokenizer, console)
        if cfg.part:
            os.replace(work, folder)
            all_parts = f"{dataset_folder(cfg, root)}.part*of{cfg.part.split('/')[1]}"
            console.print(f"{folder} is done; with all parts in one place: python prepare.py --merge {all_parts}")
            return folder
        token_bytes = token_dtype(tokenizer.n_vocab).itemsize
        segments = all_segments([work], source.n_units, token_bytes)
        manifest = write_dataset(folder, segments, cfg, tokenizer, source.description, command, console)
        shutil.rmtree(work)
    except UserError:
        if fresh:
            shutil.rmtree(work, ignore_errors=True)
        raise
    except BrokenProcessPool:
        raise UserError(
            f"a worker process was ended from outside (is memory short?): what is tokenized is kept, give the same "
            f"command with fewer --workers than {cfg.workers}."
        ) from None
    except OSError as error:
        raise UserError(
            f"{folder} is not finished ({error}): what is tokenized is kept, see to the cause (space? network?) and "
            f"give the same command again."
        ) from error
    except KeyboardInterrupt:
        if (work / PLAN).exists():
            console.print(f"what is tokenized is kept in {work}: the same command goes on from there")
        else:
            shutil.rmtree(work)
        raise
    finally:
        held.release()
    print_summary(folder, manifest, console)
    return folder


def merge(cfg: PrepareConfig, command: str, console: Console, root: Path = Path("data")) -> Path:
    """Checks that the parts fit together and writes their dataset; the parts stay -> its folder."""
    parts = [Path(name) for name in cfg.merge]
    plans = [read_plan(part) for part in parts]
    for part, plan in zip(parts, plans, strict=True):
        if conflict := plan_conflict(plan, plans[0]):
            raise UserError(f"{part} and {parts[0]} do not fit together ({conflict}): prepare both with one command.")
    folder = dataset_folder(cfg, root)
    if folder.exists():
        raise UserError(f"{folder} exists: choose another --name, or delete it first.")
    tokenizer = Tokenizer.load(parts[0])
    segments = all_segments(parts, plans[0]["n_units"], token_dtype(tokenizer.n_vocab).itemsize)
    manifest = write_dataset(folder, segments, cfg, tokenizer, plans[0]["source"], command, console)
    print_summary(folder, manifest, console)
    return folder


def merge_config(argv: list[str]) -> PrepareConfig:
    """The settings of a merge: those of its parts, but for what argv says of lengths, chunks, markers and shards."""
    asked = load_config(PrepareConfig, argv)
    plan = read_plan(Path(asked.merge[0]))
    whole = dataclasses.replace(plan_config(plan), part="")
    cfg = load_config(PrepareConfig, argv, default=whole)
    for name, value in to_dict(cfg).items():
        if name not in FREE and value != getattr(whole, name):
            raise UserError(f"{name}={value} comes too late: the parts were prepared with {getattr(whole, name)}.")
    return cfg


def print_summary(folder: Path, manifest: dict, console: Console) -> None:
    C, M = manifest["chunk_content"], manifest["chunk_markers"]
    console.print(f"\n{folder}: {manifest['source']}")
    console.print(f"made by: {manifest['command']}")
    console.print(
        f"chunks of {C} content tokens + {M} markers ({manifest['injection']}, k = {M / (C + M):.4f}), "
        f"seed {manifest['seed']}, tokenizer {manifest['tokenizer']['name']}"
    )
    for name, split in manifest["splits"].items():
        console.print(
            f"  {name:5} {split['content_tokens']:>14,} content tokens + {split['markers']:,} markers, "
            f"{split['documents']:,} documents, {split['bytes']:,} bytes "
            f"({split['bytes'] / split['content_tokens']:.2f} a token), {len(split['shards'])} shards, "
            f"content sha256 {split['content_sha256'][:12]}"
        )
    packed = manifest["val_text_compressed"]
    console.print(
        f"  validation text: gzip -9 reaches {packed['gzip_9_bits_per_byte']:.3f} bits per byte, "
        f"xz {packed['xz_bits_per_byte']:.3f} (on {packed['bytes']:,} bytes)"
    )
    if least := manifest["min_document_tokens"]:
        short = manifest["too_short"]
        console.print(
            f"  {short['documents']:,} of {short['of_documents']:,} documents, {short['tokens']:,} of "
            f"{short['of_tokens']:,} content tokens, were left out as too short: each had fewer than {least:,} tokens "
            f"(min_document_tokens)"
        )
    if manifest["documents_skipped"]:
        console.print(f"  {manifest['documents_skipped']} documents were skipped:", style="yellow")
        for path, reason in manifest["skipped"][:10]:
            console.print(f"    {path}: {reason}", style="yellow")


def inspect(folder: Path, console: Console, windows: int = 2) -> None:
    """Prints a dataset's manifest and its first windows with the markers made visible."""
    from nanometa.data.loader import Windows  # brings torch, which nothing else here needs: seconds, and 200 MB

    manifest = read_manifest(folder)
    print_summary(folder, manifest, console)
    chunk = manifest["chunk_content"] + manifest["chunk_markers"]
    for split in SPLITS:
        data = Windows(folder, split, chunk, "ignore")
        for window in range(min(windows, data.n_windows)):
            tokens = data.batch(np.array([window])).tokens[0].tolist()
            console.rule(f"{split}, window {window} of {data.n_windows:,}", style="dim")
            write_tokens(tokens, data.tokenizer)
            console.print()


def main(argv: list[str]) -> None:
    cfg = load_config(PrepareConfig, argv, config_file=True)
    console = Console(soft_wrap=True, markup=False, emoji=False, highlight=False)
    command = " ".join(["python prepare.py", *argv])
    if cfg.inspect:
        inspect(Path(cfg.inspect), console)
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # tidies up as Ctrl-C does
    if not cfg.merge and any(arg.split("=")[0] == "--merge" for arg in argv):
        raise UserError("merge has no folder: give those of all parts, --merge data/NAME.part*of3.")
    if cfg.merge:
        merge(merge_config(argv), command, console)
    else:
        prepare(cfg, command, console)


if __name__ == "__main__":
    run_cli(main)
