"""Unfinished preparations: tokenized text in segments on disk, from which any interruption goes on.

    data/.NAME.partial/            plan.json, tokenizer.*, the segments
    unit_000003_000001.json        tokens of unit 3 of the source, second segment: counts, sha256 of both files
    unit_000003_000001.train, .val raw ids, documents ended by <|endoftext|>, no markers yet

A segment's .json is written last and renamed into place, so a segment that has one is whole. Segments depend on the
source and the settings alone: in the order of their names they are the content stream, whoever made them. So a part
that another machine prepared is the same folder with the segments of some units, and merging is reading all of them.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from nanometa.common.errors import UserError
from nanometa.common.files import is_count, lock_folder, read_json, write_atomically
from nanometa.common.formats import NewerFormatError, check_format
from nanometa.config import PrepareConfig
from nanometa.config.checks import field_names, to_dict
from nanometa.data.shards import SPLITS, token_dtype
from nanometa.data.sources import Skipped, Source
from nanometa.data.tokenizer import Tokenizer

PLAN = "plan.json"
COUNTS = ("tokens", "bytes", "documents")  # of each split in a segment
SEGMENT_TOKENS = 2**24  # a segment ends with the first document beyond: some seconds of work, and few files
BLOCK_TOKENS = 2**16  # read at a time: what is computed from them stays in a core's cache
SKIPPED_NAMED = 100  # so many of a segment's skipped documents are named, all are counted
# settings that merging or another machine may choose anew; all others decide about the segments
FREE = ("name", "recipe", "injection", "chunk_content", "chunk_markers", "min_document_tokens", "shard_tokens",
        "workers", "merge", "inspect")  # fmt: skip


def make_plan(cfg: PrepareConfig, source: Source, tokenizer: Tokenizer) -> dict:
    """All that segments depend on, and the settings for the shards."""
    return {
        "format": 1,
        "config": to_dict(cfg),
        "source": source.description,
        "source_fingerprint": source.fingerprint,
        "n_units": source.n_units,
        "tokenizer": tokenizer.fingerprint,
    }


def plan_conflict(a: dict, b: dict, part: bool = False) -> str | None:
    """The first thing in which the segments of two plans would differ: "seed=1 against seed=2", or None.

    part: the number of the part counts, too."""
    free = FREE if part else (*FREE, "part")
    pairs = [(f"{key}={{}}", a["config"][key], b["config"][key]) for key in a["config"] if key not in free]
    pairs += [("one of {} parts", *((plan["config"]["part"] or "1/1").split("/")[1] for plan in (a, b)))]
    pairs += [(f"{key} {{}}", a[key], b[key]) for key in ("source", "n_units", "tokenizer")]
    for form, x, y in pairs:
        if (list(x) if isinstance(x, tuple) else x) != (list(y) if isinstance(y, tuple) else y):
            return f"{form.format(x)} against {form.format(y)}"
    return None if a["source_fingerprint"] == b["source_fingerprint"] else "their files differ in name or size"


def write_plan(folder: Path, plan: dict) -> None:
    write_atomically(folder / PLAN, (json.dumps(plan, indent=2) + "\n").encode())


def read_plan(folder: Path) -> dict:
    try:
        plan = read_json(folder / PLAN)
        check_format(folder / PLAN, plan)
        texts = [plan[key] for key in ("source", "source_fingerprint", "tokenizer")]
        if not (all(type(text) is str for text in texts) and is_count(plan["n_units"]) and plan["n_units"]):
            raise TypeError("a value is of another type")
        if plan["config"].keys() != set(field_names(PrepareConfig)):
            raise ValueError("its settings are not those of this version")
        plan_config(plan)
        return plan
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder} is no part of a dataset ({PLAN} is missing): give the folders of --part.") from None
    except NewerFormatError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, OSError, UserError) as error:
        raise UserError(f"{folder / PLAN} is damaged ({error}): prepare this part again.") from error


def plan_config(plan: dict) -> PrepareConfig:
    """The settings of a plan; JSON has lists where they have tuples."""
    config = {key: tuple(value) if isinstance(value, list) else value for key, value in plan["config"].items()}
    return PrepareConfig(**config)


def units_of(part: str, n_units: int) -> list[int]:
    """The units of part "i/n": every n-th, so that the parts are of about one size. "" = all. Raises UserError."""
    if not part:
        return list(range(n_units))
    i, n = map(int, part.split("/"))
    if n > n_units:
        raise UserError(f"part={part}, but the source has {n_units} units to share: make it {n_units} parts at most.")
    return list(range(i - 1, n_units, n))


@dataclass
class Segment:
    """What a segment's .json holds; `items` of its unit are done by its end, pieces and skipped ones."""

    unit: int
    number: int
    items: int
    ends_unit: bool
    splits: dict[str, dict]  # split -> tokens, bytes, documents, sha256
    skipped: int = 0
    skipped_named: list[list[str]] = field(default_factory=list)

    def check(self, unit: int, number: int) -> None:
        """Raises KeyError, TypeError or ValueError unless it is what was written for this place."""
        counts = [self.items, self.skipped, *(self.splits[s][key] for s in SPLITS for key in COUNTS)]
        texts = [text for pair in self.skipped_named for text in pair] + [self.splits[s]["sha256"] for s in SPLITS]
        if not (all(map(is_count, counts)) and all(type(text) is str for text in texts)):
            raise TypeError("a value is of another type")
        if (self.unit, self.number) != (unit, number) or type(self.ends_unit) is not bool:
            raise ValueError(f"it is not segment {number} of unit {unit}")
        if type(self.skipped_named) is not list or any(len(pair) != 2 for pair in self.skipped_named):
            raise ValueError("skipped_named is no list of pairs")

    @property
    def name(self) -> str:
        return f"unit_{self.unit:06d}_{self.number:06d}"


def finished_segments(folder: Path, unit: int, token_bytes: int) -> list[Segment]:
    """The whole segments of a unit, in order, up to the first that is not. Bodies are verified when they are read."""
    found: list[Segment] = []
    while not (found and found[-1].ends_unit):
        path = folder / f"unit_{unit:06d}_{len(found):06d}.json"
        try:
            segment = Segment(**read_json(path))
            segment.check(unit, len(found))
            files = {split: folder / f"{segment.name}.{split}" for split in SPLITS}
            sizes = {split: path.stat().st_size if path.is_file() else None for split, path in files.items()}
        except (OSError, ValueError, TypeError, KeyError):  # as if it had not been written
            break
        if any(sizes[split] != segment.splits[split]["tokens"] * token_bytes for split in SPLITS):
            break
        found.append(segment)
    return found


class SegmentWriter:
    """Writes one segment: `add` tokens to their split, `end_document`, `skip`, and `close` makes it count."""

    def __init__(self, folder: Path, unit: int, number: int, tokenizer: Tokenizer):
        self.folder = folder
        self.segment = Segment(unit, number, 0, False, {})
        self.end = np.array([tokenizer.eot], token_dtype(tokenizer.n_vocab))
        self.tokens = 0
        self.counts = {split: dict.fromkeys(COUNTS, 0) for split in SPLITS}
        self.hashes = {split: hashlib.sha256() for split in SPLITS}
        self.files = {split: open(self._path(split, ".writing"), "wb") for split in SPLITS}

    def _path(self, split: str, suffix: str = "") -> Path:
        return self.folder / f"{self.segment.name}.{split}{suffix}"

    def add(self, split: str, ids: np.ndarray, n_bytes: int) -> None:
        """ids (N,) of the dtype of shards, which stand for n_bytes of text."""
        self.files[split].write(ids)
        self.hashes[split].update(ids)
        self.counts[split]["tokens"] += len(ids)
        self.counts[split]["bytes"] += n_bytes
        self.tokens += len(ids)

    def end_document(self, split: str) -> None:
        self.add(split, self.end, 0)
        self.counts[split]["documents"] += 1

    def skip(self, what: Skipped) -> None:
        self.segment.skipped += 1
        if len(self.segment.skipped_named) < SKIPPED_NAMED:
            self.segment.skipped_named.append(list(what))

    def close(self, items: int, ends_unit: bool) -> None:
        segment = self.segment
        segment.items, segment.ends_unit = items, ends_unit
        for split in SPLITS:
            self.files[split].close()
            os.replace(self._path(split, ".writing"), self._path(split))
            segment.splits[split] = {**self.counts[split], "sha256": self.hashes[split].hexdigest()}
        write_atomically(self.folder / f"{segment.name}.json", (json.dumps(vars(segment)) + "\n").encode())


def read_segment(folder: Path, segment: Segment, split: str, dtype: np.dtype) -> Iterator[np.ndarray]:
    """The ids of a segment in blocks. Raises UserError, at its end, if the file is not what was written."""
    path, sha256 = folder / f"{segment.name}.{split}", hashlib.sha256()
    with open(path, "rb") as file:  # not mapped: pages of a mapped file count as the process's memory
        while block := file.read(BLOCK_TOKENS * dtype.itemsize):
            sha256.update(block)
            if len(block) % dtype.itemsize:
                break
            yield np.frombuffer(block, dtype)
    if sha256.hexdigest() != segment.splits[split]["sha256"]:
        raise UserError(
            f"{path} is damaged (its sha256 is {sha256.hexdigest()[:12]}.., not {segment.splits[split]['sha256'][:12]}"
            f"..): delete {path.with_suffix('.json')} and prepare it again with the command that made it."
        )


def lock(folder: Path):
    """Returns the lock of a folder of segments. Raises UserError if another process holds it."""
    held = lock_folder(folder)
    if held is None:
        raise UserError(f"another process is preparing {folder}: wait for it, or choose another --name.")
    return held
