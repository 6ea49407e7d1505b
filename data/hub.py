"""Reads the documents of a dataset of the Hugging Face hub, or of a local folder that `datasets` can load."""

import functools
import hashlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path, PurePath

from nanometa.common.errors import UserError
from nanometa.config import PrepareConfig
from nanometa.data.rows import SAMPLED_ROWS, Skipped, cell_of, check_column, check_schema, text_of
from nanometa.data.sources import Piece, content_digest, pieces_of, refuse_changes, stamp_of

MAX_VALUES = 100_000  # in the metadata of a local dataset
UNITS = 64  # of a dataset that was downloaded as a whole; a streamed dataset has one unit for each of its files


class HubSource:
    """A source that reads a Hugging Face dataset. Each row is a document."""

    def __init__(self, cfg: PrepareConfig):
        """Opens the dataset. Raises UserError if it cannot be opened, or has no text in the column."""
        import datasets
        from huggingface_hub import HfApi, constants

        self.name, self.column = cfg.hf_dataset, cfg.text_column
        what = f"the dataset {cfg.hf_dataset!r} (configuration {cfg.hf_config or 'default'}, split {cfg.hf_split})"
        revision, folder = cfg.hf_revision or None, Path(cfg.hf_dataset)
        if folder.is_dir():
            if revision:
                raise UserError(
                    f"hf_revision={revision} has no effect, because {folder} is a local folder: leave it out."
                )
            _check_card(folder)
        try:
            if not folder.is_dir() and not constants.HF_HUB_OFFLINE:
                # pin the commit, so that all parts and restarts read the same rows
                revision = HfApi().dataset_info(cfg.hf_dataset, revision=revision).sha
            builder = datasets.load_dataset_builder(cfg.hf_dataset, cfg.hf_config or None, revision=revision)
            files = [name for names in (builder.config.data_files or {}).values() for name in names]
            _check_files(files, folder if folder.is_dir() else None)
            if cfg.streaming:
                self.dataset = builder.as_streaming_dataset(cfg.hf_split)
            else:
                builder.download_and_prepare()
                self.dataset = builder.as_dataset(cfg.hf_split)
            schema = self.dataset.features and self.dataset.features.arrow_schema
            rows = [] if schema else list(itertools.islice(self.dataset, SAMPLED_ROWS))
        except UserError:
            raise
        except Exception as error:  # many types: no network, unknown name or split, damaged file
            reason = " ".join(str(error).split())[:300].rstrip(".")
            raise UserError(
                f"{what} could not be opened ({type(error).__name__}: {reason}): check the names and the network; "
                f"without a network, use the standard library with python prepare.py, or local files with "
                f"--source=files --files='*.jsonl.gz'."
            ) from error
        if schema:
            check_schema(what, self.column, schema)
        else:
            check_column(what, self.column, rows)
        names = list(schema.names if schema else rows[0] if rows else [])
        top = self.column if self.column in names else self.column.partition(".")[0]
        self.dataset = self.dataset.select_columns([top])
        self.n_units = self.dataset.num_shards if cfg.streaming else max(1, min(UNITS, len(self.dataset)))
        self.notes: list[str] = []
        self.total_bytes, self.position = 0, 0
        self.unit_sizes = [1] * self.n_units
        self.stamps = {Path(name): stamp_of(Path(name)) for name in files if folder.is_dir()}
        self.description = f"Hugging Face {' '.join(filter(None, (cfg.hf_dataset, cfg.hf_config, cfg.hf_split)))}"
        self.description += f" at {revision}" if revision else ""
        self.fingerprint = hashlib.sha256(f"{self.description} {self.n_units}".encode()).hexdigest()

    def read(self, unit: int) -> Iterator[Piece | Skipped]:
        """Yields the pieces of all documents of a unit. Raises OSError if the dataset cannot be read any further."""
        rows = iter(self.dataset.shard(self.n_units, unit, contiguous=True))
        for number in itertools.count():
            try:
                row = next(rows, None)
            except Exception as error:  # many types: lost network, damaged file
                reason = " ".join(str(error).split())[:300]
                raise OSError(f"{self.name}, shard {unit}, row {number}: {type(error).__name__}: {reason}") from error
            if row is None:
                break
            text = text_of(cell_of(row, self.column), self.column, f"{self.name} shard {unit} row {number}")
            yield from [text] if isinstance(text, Skipped) else pieces_of([text])
        self.position += 1
        refuse_changes(self.stamps)

    def digest(self, unit: int) -> str:
        """Returns a hash of the content that a unit is read from: the commit, or all files of a local folder."""
        return self._digest

    @functools.cached_property
    def _digest(self) -> str:
        return content_digest(self.stamps) if self.stamps else self.fingerprint


def _check_card(folder: Path) -> None:
    """Raises UserError if the metadata of a local dataset name files outside of its folder."""
    from huggingface_hub import DatasetCard

    for name in ("README.md", ".huggingface.yaml"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            text = path.read_text(encoding="utf-8")
            card = DatasetCard(text if name == "README.md" else f"---\n{text}\n---\n", ignore_metadata_errors=True)
            values = card.data.to_dict()
            if _n_values(values, {}) > MAX_VALUES:
                raise ValueError(f"they have more than {MAX_VALUES:,} values")
            for entry in values.get("configs") or []:
                for value in _texts([entry.get("data_files"), entry.get("data_dir")]):
                    if "://" in value or "::" in value or os.path.isabs(value) or ".." in PurePath(value).parts:
                        raise UserError(_outside(str(path), value))
        except UserError:
            raise
        except Exception as error:  # many types: not UTF-8, no YAML, values of other types
            reason = " ".join(str(error).split())[:300].rstrip(".")
            raise UserError(f"the metadata in {path} are damaged ({reason}): correct or remove them.") from error


def _texts(value) -> Iterator[str]:
    """Yields all texts in nested lists and dictionaries."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def _n_values(value, known: dict[int, int]) -> int:
    """Returns the number of values in nested lists and dictionaries, in which a shared part counts repeatedly.

    known: numbers of the parts that were visited, by id. In few bytes, aliases of YAML can stand for billions of
    values."""
    if isinstance(value, dict | list) and id(value) not in known:
        known[id(value)] = 0  # for a part that contains itself
        items = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_n_values(item, known) for item in items)
    return known.get(id(value), 1)


def _check_files(files: list[str], folder: Path | None) -> None:
    """Raises UserError if a dataset reads files outside of its folder, or local files if it has no folder (None).

    Also refuses a folder in which links lead to a file repeatedly, as a link to the folder itself does."""
    real: dict[str, str] = {}
    for name in files:
        path = os.path.realpath(name)
        inside = folder and Path(path).is_relative_to(os.path.realpath(folder))
        if not inside and (folder or "://" not in name):
            raise UserError(_outside(str(folder or "the dataset"), name))
        if folder and real.setdefault(path, name) != name:
            raise UserError(f"{name} and {real[path]} are the same file: remove links from the folder of the dataset.")


def _outside(where: str, name: str) -> str:
    """Returns the error message for a dataset that leads to other files."""
    return (
        f"{where} leads to {name!r}, which is not a file in the folder of the dataset: a dataset may only name its own "
        f"files, so copy the file into its folder, or remove it from the dataset."
    )
