"""Stores tokenized text in segments on disk, so that an interrupted preparation continues and parts can be merged.

    data/.NAME.partial/            plan.json, tokenizer.*, the segments; deleted after it was renamed to *.deleting
    unit_000003_000001.json        second segment of unit 3 of the source: counts and the SHA-256 of both token files
    unit_000003_000001.train, .val its raw ids: documents that end with <|endoftext|>, without markers

The .json of a segment is written last and renamed into place, so a segment with a .json is complete. It names the plan
that it belongs to, so the segments of another plan are never used. Segments depend only on the source and the settings;
in the order of their names, they are the content stream. A part that another machine prepared is therefore such a
folder with the segments of some units, and merging reads all of these folders.
"""

import hashlib
import json
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from nanometa.common.errors import UserError
from nanometa.common.files import is_count, lock_folder, own_file, read_json, write_atomically
from nanometa.common.formats import NewerFormatError, check_format
from nanometa.config import PrepareConfig
from nanometa.config.checks import field_names, to_dict
from nanometa.data.rows import Skipped
from nanometa.data.shards import SPLITS, token_dtype
from nanometa.data.sources import Source
from nanometa.data.tokenizer import Tokenizer

PLAN = "plan.json"
COUNTS = ("tokens", "bytes", "documents")  # counted for each split of a segment
SEGMENT_TOKENS = 2**24  # a segment ends with the document that exceeds this: seconds of work, and few files
BLOCK_TOKENS = 2**16  # read at a time; intermediate results fit in the cache of a core
ADDED = ("separator", "val_files")  # settings that plans of earlier versions lack
SKIPPED_NAMED = 100  # at most this many skipped documents of a segment are named; all are counted
# settings that do not affect the segments, so that they may differ when merging or on another machine
FREE = ("name", "recipe", "injection", "chunk_content", "chunk_markers", "min_document_tokens", "shard_tokens",
        "workers", "merge", "inspect")  # fmt: skip


def make_plan(cfg: PrepareConfig, source: Source, tokenizer: Tokenizer) -> dict:
    """Returns the content of plan.json: everything that the segments depend on, and the settings of the shards."""
    return {
        "format": 1,
        "id": secrets.token_hex(16),  # of this plan and its segments, as opposed to any other preparation
        "config": to_dict(cfg),
        "source": source.description,
        "source_fingerprint": source.fingerprint,
        "stamps": hashlib.sha256(repr(sorted(source.stamps.items())).encode()).hexdigest(),
        "n_units": source.n_units,
        "tokenizer": tokenizer.fingerprint,
    }


def plan_conflict(a: dict, b: dict, part: bool = False) -> str | None:
    """Returns the first difference of two plans that affects segments, such as "seed=1 against seed=2", or None.

    part: whether the number of the part and the times of the files must be equal, too, as when a preparation
    continues."""
    free = FREE if part else (*FREE, "part")
    settings = [to_dict(plan_config(plan)) for plan in (a, b)]
    pairs = [(f"{key}={{}}", *(values[key] for values in settings)) for key in settings[0] if key not in free]
    pairs += [("one of {} parts", *((plan["config"]["part"] or "1/1").split("/")[1] for plan in (a, b)))]
    pairs += [(f"{key} {{}}", a[key], b[key]) for key in ("source", "n_units", "tokenizer")]
    for form, x, y in pairs:
        if x != y:
            return f"{form.format(x)} against {form.format(y)}"
    if a["source_fingerprint"] != b["source_fingerprint"]:
        return "their files differ in name or size"
    # on another machine, the same files may have other times; plans of earlier versions have no stamps
    changed = part and a.get("stamps", "") != b.get("stamps", a.get("stamps", ""))
    return "its files have been written to or replaced since" if changed else None


def write_plan(folder: Path, plan: dict) -> None:
    """Writes plan.json."""
    write_atomically(folder / PLAN, (json.dumps(plan, indent=2) + "\n").encode())


def read_plan(folder: Path) -> dict:
    """Returns the content of plan.json. Raises UserError if it is missing, damaged or of a newer version."""
    try:
        plan = read_json(own_file(folder / PLAN))
        check_format(folder / PLAN, plan)
        texts = [plan[key] for key in ("source", "source_fingerprint", "tokenizer")]
        if not (all(type(text) is str for text in texts) and is_count(plan["n_units"]) and plan["n_units"]):
            raise TypeError("a value has the wrong type")
        if plan["config"].keys() | set(ADDED) != set(field_names(PrepareConfig)):
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


def plan_id(folder: Path) -> str:
    """Returns the id of the plan in a folder; "" if there is none, as in a folder of an earlier version."""
    try:
        return str(read_json(folder / PLAN)["id"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def discard(folder: Path) -> None:
    """Deletes a folder of segments, if it exists. It first gets another name, so that a kill in between leaves no
    incomplete folder."""
    finish_deletion(folder)
    if folder.exists():
        os.replace(folder, _doomed(folder))
        finish_deletion(folder)


def finish_deletion(folder: Path) -> None:
    """Completes a deletion of a folder of segments that was interrupted."""
    shutil.rmtree(_doomed(folder), ignore_errors=True)  # another process may be deleting it, too


def _doomed(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.deleting")


def remove_leftovers(folder: Path) -> None:
    """Removes all files of a folder without a plan except the lock, because no plan says what they were made from."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != ".lock":
            path.unlink()


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
    """The content of a segment's .json.

    items: pieces and skipped documents of the unit up to the segment's end. digest: hash of the content of the unit's
    files. plan: id of the plan. endoftext: how often <|endoftext|> occurs in the text. skipped_by_kind: number of
    skipped documents for each kind of reason. Segments of earlier versions lack the last four."""

    unit: int
    number: int
    items: int
    ends_unit: bool
    splits: dict[str, dict]  # split -> tokens, bytes, documents, sha256
    skipped: int = 0
    skipped_named: list[list[str]] = field(default_factory=list)
    digest: str = ""
    plan: str = ""
    endoftext: int = 0
    skipped_by_kind: dict[str, int] = field(default_factory=dict)

    def check(self, unit: int, number: int) -> None:
        """Raises KeyError, TypeError or ValueError unless this is a valid segment with this unit and number."""
        counts = [self.items, self.skipped, self.endoftext, *self.skipped_by_kind.values()]
        counts += [self.splits[split][key] for split in SPLITS for key in COUNTS]
        texts = [text for pair in self.skipped_named for text in pair] + [self.splits[s]["sha256"] for s in SPLITS]
        texts += [self.digest, self.plan]
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
    """Returns the complete segments of a unit, in order, up to the first incomplete one or one of another plan.

    Only the sizes of the token files are checked here. read_segment verifies their content."""
    found: list[Segment] = []
    plan = plan_id(folder)
    while not (found and found[-1].ends_unit):
        path = folder / f"unit_{unit:06d}_{len(found):06d}.json"
        try:
            segment = Segment(**read_json(own_file(path)))
            segment.check(unit, len(found))
            files = {split: folder / f"{segment.name}.{split}" for split in SPLITS}
            sizes = {split: path.stat().st_size if path.is_file() else None for split, path in files.items()}
        except (
            OSError,
            ValueError,
            TypeError,
            KeyError,
            AttributeError,
            UserError,
        ):  # a damaged segment counts as not written
            break
        if segment.plan != plan or any(
            sizes[split] != segment.splits[split]["tokens"] * token_bytes for split in SPLITS
        ):
            break
        found.append(segment)
    return found


class SegmentWriter:
    """A writer of one segment. The segment is incomplete until `close`."""

    def __init__(self, folder: Path, unit: int, number: int, tokenizer: Tokenizer, digest: str = ""):
        self.folder = folder
        self.segment = Segment(unit, number, 0, False, {}, digest=digest, plan=plan_id(folder))
        self.end = np.array([tokenizer.eot], token_dtype(tokenizer.n_vocab))
        self.tokens = 0
        self.counts = {split: dict.fromkeys(COUNTS, 0) for split in SPLITS}
        self.hashes = {split: hashlib.sha256() for split in SPLITS}
        self.files = {split: open(self._path(split, ".writing"), "wb") for split in SPLITS}
        self.skipped: Counter = Counter()

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
        self.skipped[skipped.kind] += 1
        if len(self.segment.skipped_named) < SKIPPED_NAMED:
            self.segment.skipped_named.append([skipped.where, skipped.reason])

    def close(self, items: int, ends_unit: bool) -> None:
        """Completes the segment, after `items` pieces and skipped documents of the unit."""
        segment = self.segment
        segment.items, segment.ends_unit, segment.skipped_by_kind = items, ends_unit, dict(self.skipped)
        for split in SPLITS:
            self.files[split].close()
            os.replace(self._path(split, ".writing"), self._path(split))
            segment.splits[split] = {**self.counts[split], "sha256": self.hashes[split].hexdigest()}
        write_atomically(self.folder / f"{segment.name}.json", (json.dumps(vars(segment)) + "\n").encode())


def read_segment(folder: Path, segment: Segment, split: str, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """Yields the ids of a segment in blocks, all of them ids of content.

    Raises UserError if the file's SHA-256 is wrong, after the last block or in place of the first one with another
    id."""
    dtype = token_dtype(tokenizer.n_vocab)
    path, sha256 = folder / f"{segment.name}.{split}", hashlib.sha256()
    with open(own_file(path), "rb") as file:  # not memory-mapped, because mapped pages count as memory of the process
        while block := file.read(BLOCK_TOKENS * dtype.itemsize):
            sha256.update(block)
            if len(block) % dtype.itemsize:
                break
            ids = np.frombuffer(block, dtype)
            if ids.max() >= tokenizer.n_content:
                break
            yield ids
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
