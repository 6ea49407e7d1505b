"""Stores tokenized text in segments on disk, so that an interrupted preparation continues and parts can be merged.

    data/.NAME.partial/            plan.json, tokenizer.*, the segments
    unit_000003_000001.json        second segment of unit 3 of the source: counts and the SHA-256 of both token files
    unit_000003_000001.train, .val its raw ids: documents that end with <|endoftext|>, without markers

The .json of a segment is written last and renamed into place, so a segment with a .json is complete. Segments depend
only on the source and the settings; in the order of their names, they are the content stream. A part that another
machine prepared is therefore such a folder with the segments of some units, and merging reads all of these folders.
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
COUNTS = ("tokens", "bytes", "documents")  # counted for each split of a segment
SEGMENT_TOKENS = 2**24  # a segment ends with the document that exceeds this: seconds of work, and few files
BLOCK_TOKENS = 2**16  # read at a time; intermediate results fit in the cache of a core
SKIPPED_NAMED = 100  # at most this many skipped documents of a segment are named; all are counted
# settings that do not affect the segments, so that they may differ when merging or on another machine
FREE = ("name", "recipe", "injection", "chunk_content", "chunk_markers", "min_document_tokens", "shard_tokens",
        "workers", "merge", "inspect")  # fmt: skip


def make_plan(cfg: PrepareConfig, source: Source, tokenizer: Tokenizer) -> dict:
    """Returns the content of plan.json: everything that the segments depend on, and the settings of the shards."""
    return {
        "format": 1,
        "config": to_dict(cfg),
        "source": source.description,
        "source_fingerprint": source.fingerprint,
        "n_units": source.n_units,
        "tokenizer": tokenizer.fingerprint,
    }


def plan_conflict(a: dict, b: dict, part: bool = False) -> str | None:
    """Returns the first difference of two plans that affects segments, such as "seed=1 against seed=2", or None.

    part: whether the number of the part must be equal, too."""
    free = FREE if part else (*FREE, "part")
    pairs = [(f"{key}={{}}", a["config"][key], b["config"][key]) for key in a["config"] if key not in free]
    pairs += [("one of {} parts", *((plan["config"]["part"] or "1/1").split("/")[1] for plan in (a, b)))]
    pairs += [(f"{key} {{}}", a[key], b[key]) for key in ("source", "n_units", "tokenizer")]
    for form, x, y in pairs:
        if (list(x) if isinstance(x, tuple) else x) != (list(y) if isinstance(y, tuple) else y):
            return f"{form.format(x)} against {form.format(y)}"
    return None if a["source_fingerprint"] == b["source_fingerprint"] else "their files differ in name or size"


def write_plan(folder: Path, plan: dict) -> None:
    """Writes plan.json."""
    write_atomically(folder / PLAN, (json.dumps(plan, indent=2) + "\n").encode())


def read_plan(folder: Path) -> dict:
    """Returns the content of plan.json. Raises UserError if it is missing, damaged or of a newer version."""
    try:
        plan = read_json(folder / PLAN)
        check_format(folder / PLAN, plan)
        texts = [plan[key] for key in ("source", "source_fingerprint", "tokenizer")]
        if not (all(type(text) is str for text in texts) and is_count(plan["n_units"]) and plan["n_units"]):
            raise TypeError("a value has the wrong type")
        if plan["config"].keys() != set(field_names(PrepareConfig)):
            raise ValueError("its settings are not those of this version")
        plan_config(plan)
        return plan
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{folder} is not a part of a dataset ({PLAN} is missing): give folders that --part prepared."
        ) from None
    except NewerFormatError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, OSError, UserError) as error:
        raise UserError(f"{folder / PLAN} is damaged ({error}): prepare this part again.") from error


def plan_config(plan: dict) -> PrepareConfig:
    """Returns the settings of a plan, with the lists of JSON converted to tuples."""
    config = {key: tuple(value) if isinstance(value, list) else value for key, value in plan["config"].items()}
    return PrepareConfig(**config)


def units_of(part: str, n_units: int) -> list[int]:
    """Returns the units of part "i/n": every n-th unit, so that all parts have about the same size. "" = all units.

    Raises UserError if there are more parts than units."""
    if not part:
        return list(range(n_units))
    i, n = map(int, part.split("/"))
    if n > n_units:
        raise UserError(f"part={part} asks for more parts than the source has units: use {n_units} parts or fewer.")
    return list(range(i - 1, n_units, n))


@dataclass
class Segment:
    """The content of a segment's .json. `items`: pieces and skipped documents of the unit up to the segment's end."""

    unit: int
    number: int
    items: int
    ends_unit: bool
    splits: dict[str, dict]  # split -> tokens, bytes, documents, sha256
    skipped: int = 0
    skipped_named: list[list[str]] = field(default_factory=list)

    def check(self, unit: int, number: int) -> None:
        """Raises KeyError, TypeError or ValueError unless this is a valid segment with this unit and number."""
        counts = [self.items, self.skipped, *(self.splits[s][key] for s in SPLITS for key in COUNTS)]
        texts = [text for pair in self.skipped_named for text in pair] + [self.splits[s]["sha256"] for s in SPLITS]
        if not (all(map(is_count, counts)) and all(type(text) is str for text in texts)):
            raise TypeError("a value has the wrong type")
        if (self.unit, self.number) != (unit, number) or type(self.ends_unit) is not bool:
            raise ValueError(f"it is not segment {number} of unit {unit}")
        if type(self.skipped_named) is not list or any(len(pair) != 2 for pair in self.skipped_named):
            raise ValueError("skipped_named is not a list of pairs")

    @property
    def name(self) -> str:
        """The name of the segment's files, without suffix."""
        return f"unit_{self.unit:06d}_{self.number:06d}"


def finished_segments(folder: Path, unit: int, token_bytes: int) -> list[Segment]:
    """Returns the complete segments of a unit, in order, up to the first incomplete one.

    Only the sizes of the token files are checked here. read_segment verifies their content."""
    found: list[Segment] = []
    while not (found and found[-1].ends_unit):
        path = folder / f"unit_{unit:06d}_{len(found):06d}.json"
        try:
            segment = Segment(**read_json(path))
            segment.check(unit, len(found))
            files = {split: folder / f"{segment.name}.{split}" for split in SPLITS}
            sizes = {split: path.stat().st_size if path.is_file() else None for split, path in files.items()}
        except (OSError, ValueError, TypeError, KeyError):  # a damaged segment counts as not written
            break
        if any(sizes[split] != segment.splits[split]["tokens"] * token_bytes for split in SPLITS):
            break
        found.append(segment)
    return found


class SegmentWriter:
    """A writer of one segment. The segment is incomplete until `close`."""

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
        """Adds ids (N,), in the dtype of the shards, which encode n_bytes of text."""
        self.files[split].write(ids)
        self.hashes[split].update(ids)
        self.counts[split]["tokens"] += len(ids)
        self.counts[split]["bytes"] += n_bytes
        self.tokens += len(ids)

    def end_document(self, split: str) -> None:
        """Adds <|endoftext|> and counts a document."""
        self.add(split, self.end, 0)
        self.counts[split]["documents"] += 1

    def skip(self, skipped: Skipped) -> None:
        """Counts a skipped document, and names it if there are not too many."""
        self.segment.skipped += 1
        if len(self.segment.skipped_named) < SKIPPED_NAMED:
            self.segment.skipped_named.append(list(skipped))

    def close(self, items: int, ends_unit: bool) -> None:
        """Completes the segment, after `items` pieces and skipped documents of the unit."""
        segment = self.segment
        segment.items, segment.ends_unit = items, ends_unit
        for split in SPLITS:
            self.files[split].close()
            os.replace(self._path(split, ".writing"), self._path(split))
            segment.splits[split] = {**self.counts[split], "sha256": self.hashes[split].hexdigest()}
        write_atomically(self.folder / f"{segment.name}.json", (json.dumps(vars(segment)) + "\n").encode())


def read_segment(folder: Path, segment: Segment, split: str, dtype: np.dtype) -> Iterator[np.ndarray]:
    """Yields the ids of a segment in blocks. Raises UserError after the last one if the file's SHA-256 is wrong."""
    path, sha256 = folder / f"{segment.name}.{split}", hashlib.sha256()
    with open(path, "rb") as file:  # not memory-mapped, because mapped pages count as memory of the process
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
    """Locks a folder of segments and returns the lock. Raises UserError if another process holds it."""
    held = lock_folder(folder)
    if held is None:
        raise UserError(f"another process is preparing {folder}: wait for it, or choose another --name.")
    return held
