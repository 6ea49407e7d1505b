"""Writes and reads checkpoints, which survive a kill at any moment, are verified on loading and contain no pickle.

    out/<run>/step_00001000/   model.safetensors optimizer.safetensors state.json tokenizer.*, manifest.json (sha256)
    out/<run>/best_00000800/   the same files without the optimizer
    out/<run>/latest           one line: the name of the newest step_ folder

A folder is written under a temporary name, synced and renamed, and then `latest` is updated. A folder with its final
name is therefore complete. Loading takes the newest folder that verifies; `latest` is for people and their scripts.
"""

import dataclasses
import json
import math
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import safetensors.torch
import torch

from nanometa.common.errors import UserError
from nanometa.common.files import (
    WRITING,
    file_inside,
    file_sha256,
    is_count,
    read_file,
    read_json,
    sync,
    write_atomically,
)
from nanometa.common.formats import NewerFormatError, check_format
from nanometa.config import TrainConfig, train_config_from_dict
from nanometa.data.tokenizer import RANKS_FILE, SPEC_FILE, Tokenizer
from nanometa.model import GPT
from nanometa.training.optimizer import Optimizer
from nanometa.training.run_folders import STATE, checkpoint_folders, newest_run, suggestion

T = TypeVar("T")
WEIGHTS, OPTIMIZER, MANIFEST = "model.safetensors", "optimizer.safetensors", "manifest.json"
ABANDONED = "abandoned_"  # prefix of best weights from steps after the checkpoint that the run resumed from
DELETING = ".deleting"  # suffix of a hidden folder that is being deleted; a kill may leave one behind, as with WRITING


def save(run_dir: Path, kind: str, step: int, files: dict[str, bytes | dict[str, torch.Tensor]], keep: int) -> Path:
    """Writes the checkpoint run_dir/<kind>_<step> atomically, and deletes all but the newest `keep` of its kind.

    kind: "step" or "best". files: contents by name, as bytes, or as a dict of tensors for a .safetensors file.
    Returns the checkpoint's folder. Raises UserError if a tensor file cannot be written."""
    final = run_dir / f"{kind}_{step:08d}"
    partial = run_dir / f".{final.name}{WRITING}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for name, content in files.items():
        if isinstance(content, dict):
            try:
                safetensors.torch.save_file({k: t.detach().contiguous() for k, t in content.items()}, partial / name)
            except safetensors.SafetensorError as error:  # for example, because the disk is full
                raise UserError(
                    f"{partial / name} could not be written ({error}): free some disk space, then resume."
                ) from error
        else:
            (partial / name).write_bytes(content)
    hashes = {name: file_sha256(partial / name) for name in files}
    (partial / MANIFEST).write_bytes(_manifest(hashes))
    for name in [*files, MANIFEST]:
        shutil.copymode(partial / MANIFEST, partial / name)  # safetensors makes files that only their owner can read
        sync(partial / name)
    sync(partial)
    if final.exists():  # an earlier checkpoint of this step was damaged, and the step was trained again
        _delete(final)
    os.rename(partial, final)
    sync(run_dir)
    _settle(final, kind, keep)
    return final


def _settle(final: Path, kind: str, keep: int) -> None:
    """Finishes a save: points `latest` to the new folder, and deletes all but the newest keep - 1 others of its kind.

    Abandoned best weights of the same step are deleted, too, since the resumed run has replaced them."""
    if kind == "step":
        write_atomically(final.with_name("latest"), f"{final.name}\n".encode())
    shutil.rmtree(final.with_name(f"{ABANDONED}{final.name}"), ignore_errors=True)
    others = [folder for folder in checkpoint_folders(final.parent, kind) if folder != final]
    for old in others[: max(0, len(others) - (keep - 1))]:
        _delete(old)


def _manifest(hashes: dict[str, str]) -> bytes:
    return json.dumps({"format": 1, "sha256": hashes}, indent=2).encode() + b"\n"


def latest(run_dir: Path) -> str:
    """Returns the name of the newest checkpoint, or "none was saved yet", for use in a sentence."""
    folders = checkpoint_folders(run_dir, "step")
    return folders[-1].name if folders else "none was saved yet"


def _delete(folder: Path) -> None:
    """Deletes a folder. It is renamed first, so that a folder that is half deleted never looks like a checkpoint."""
    doomed = folder.with_name(f".{folder.name}{DELETING}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(folder, doomed)
    shutil.rmtree(doomed)


def sweep(run_dir: Path, step: int, keep: int) -> None:
    """Tidies the folder of a run that resumes from `step`. The caller holds the folder's lock.

    Later checkpoints did not verify, so they are renamed to damaged_step_*. Later best weights belong to steps that
    this run trains again, maybe with other settings, so they are renamed to abandoned_best_* and nothing loads them.
    Files that a killed process left half written or half deleted are removed, and an interrupted save of the resumed
    checkpoint is finished."""
    for kind, prefix in (("step", "damaged_"), ("best", ABANDONED)):
        for folder in checkpoint_folders(run_dir, kind):
            if int(folder.name.split("_")[1]) > step:
                aside = folder.with_name(f"{prefix}{folder.name}")
                shutil.rmtree(aside, ignore_errors=True)
                os.rename(folder, aside)
    for suffix in (WRITING, DELETING):
        for path in run_dir.glob(f".*{suffix}"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    resumed = run_dir / f"step_{step:08d}"
    if resumed.is_dir():
        _settle(resumed, "step", keep)


@dataclass
class Checkpoint:
    """A checkpoint whose files have been verified."""

    folder: Path
    state: dict  # state.json as train.py wrote it: step, config, data, best, source commit
    _tokenizer: Tokenizer | None = None

    @property
    def step(self) -> int:
        return self.state["step"]

    @property
    def config(self) -> TrainConfig:
        return train_config_from_dict(self.state["config"])

    def weights(self) -> dict[str, torch.Tensor]:
        return read_tensors(self.folder / WEIGHTS)

    def optimizer(self) -> dict[str, torch.Tensor]:
        return read_tensors(self.folder / OPTIMIZER)

    def tokenizer(self) -> Tokenizer:
        """Returns the tokenizer. It is read only once, because a run that is being trained may delete the folder."""
        self._tokenizer = self._tokenizer or Tokenizer.load(self.folder)
        return self._tokenizer

    def load_into(self, model: GPT, device: str | torch.device | None = None) -> GPT:
        """Loads these weights into the model and returns it.

        device: where a model on the "meta" device gets its memory. Raises UserError, before any memory is allocated, if
        names, shapes or dtypes differ from those of the model."""
        tensors, wanted = self.weights(), model.state_dict()
        for name in sorted(wanted.keys() | tensors.keys()):
            ours, found = (_brief(state.get(name)) for state in (wanted, tensors))
            if ours != found:
                raise UserError(
                    f"{self.folder / WEIGHTS} does not fit its config, because {name} is {found} in the file and "
                    f"{ours} in the model: use another checkpoint."
                )
        if device is not None:
            model = model.to_empty(device=device)
        model.load_state_dict(tensors)
        return model

    def restore(self, optimizer: Optimizer) -> None:
        """Loads this state into the optimizer. Raises UserError if it is not the state of the same parameters."""
        try:
            optimizer.restore(self.optimizer())
        except ValueError as error:
            raise UserError(
                f"{self.folder / OPTIMIZER} does not fit the model ({error}): use another checkpoint."
            ) from None


def _brief(tensor: torch.Tensor | None) -> str:
    return "missing" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Returns the tensors of a safetensors file by name. Raises UserError if it is missing or damaged."""
    try:
        return safetensors.torch.load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist, or its run has just deleted it: use another one.") from None
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RuntimeError, OSError) as error:
        raise UserError(f"{path} is damaged ({' '.join(str(error).split())}): use another one.") from error


def _check_state(state: dict) -> None:
    """Raises KeyError, TypeError or ValueError if train.py could not have written this state. Its settings are checked
    when Checkpoint.config reads them."""
    best, data, config = state["best"], state["data"], state["config"]
    texts = [data["dataset"], data["tokenizer"], state.get("origin", "")]
    for table in (data["shards"], data["content_sha256"]):
        texts += [text for item in table.items() for text in item]
    counts = [state["step"], data["chunk_content"], data["chunk_markers"], *([] if best is None else [best["step"]])]
    losses = [] if best is None else [best["loss"], best["bits_per_byte"]]
    if "guard" in state:
        counts += [state["guard"]["in_a_row"], state["guard"]["skipped"]]
        losses += state["guard"]["norms"]
    counts += [state[name] for name in ("evaluated", "content_before") if state.get(name) is not None]
    if not (all(type(text) is str for text in texts) and all(map(is_count, counts)) and type(config) is dict):
        raise TypeError("a value has the wrong type")
    if not all(type(loss) is float and math.isfinite(loss) for loss in losses):
        raise TypeError("a loss or a norm is not a finite number")
    if not 1 <= data["chunk_content"] <= 2**20 or data["chunk_markers"] > 2**20:
        raise ValueError("the size of a chunk is out of range")
    if data["injection"] not in ("uniform", "periodic", "none") or (data["injection"] == "none") != (
        data["chunk_markers"] == 0
    ):
        raise ValueError(f"injection {data['injection']} does not go with {data['chunk_markers']} markers")


def content_before(state: dict) -> int | None:
    """Returns how many content tokens a run's weights had been trained on at step 0; None if that is unknown."""
    return state.get("content_before", 0 if state.get("origin") == "scratch" else None)


def content_tokens(state: dict, cfg: TrainConfig) -> int | None:
    """Returns how many content tokens a checkpoint's weights were trained on; None if that is unknown.

    Texts of tasks do not count."""
    before = content_before(state)
    if before is None or cfg.task.tasks:
        return before
    chunk = state["data"]["chunk_content"] + state["data"]["chunk_markers"]
    return before + state["step"] * cfg.batch_size * (cfg.model.block_size // chunk) * state["data"]["chunk_content"]


def open_checkpoint(folder: Path) -> Checkpoint:
    """Opens a checkpoint after verifying every file in its folder.

    Raises UserError if a file is missing or damaged; the message names the file and both hashes."""
    try:
        manifest = read_json(folder / MANIFEST)
        check_format(folder / MANIFEST, manifest)
        hashes = manifest["sha256"]
        if read_file(folder / MANIFEST) != _manifest(hashes):  # no hash protects the manifest itself
            raise ValueError("its text has changed since it was written")
        missing = {WEIGHTS, STATE, SPEC_FILE, RANKS_FILE} - hashes.keys()
        if missing:
            raise ValueError(f"it does not list {min(missing)}")
        for name, expected in hashes.items():
            found = file_sha256(file_inside(folder, name))
            if found != expected:
                raise UserError(
                    f"{folder / name} is damaged: its sha256 is {found}, but the manifest says {expected}; use another "
                    f"checkpoint."
                )
        state = read_json(folder / STATE)
    except FileNotFoundError as error:
        if not folder.is_dir():
            raise UserError(f"{folder} does not exist, or its run has just deleted it: use another one.") from None
        raise UserError(
            f"{folder} is not a complete checkpoint, because {Path(error.filename).name} is missing: use another one."
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise UserError(
            f"{folder / MANIFEST} is damaged ({type(error).__name__}: {error}): use another checkpoint."
        ) from error
    try:
        _check_state(state)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder / STATE} was not written by train.py ({type(error).__name__}: {error}): use another checkpoint."
        ) from error
    return Checkpoint(folder, state)


def newest(run_dir: Path, warn) -> Checkpoint | None:
    """Returns the newest checkpoint that verifies, or None if there are none.

    Calls warn(sentence) for each damaged checkpoint. Raises UserError if all of them are damaged."""
    return _newest_of(run_dir, "step", lambda error: warn(f"{error} Falling back to the checkpoint before it."))


def _newest_of(run_dir: Path, kind: str, warn) -> Checkpoint | None:
    """Returns the newest folder of one kind that verifies, as `newest` does.

    A run that is being trained deletes old folders. If one disappears while it is read, there are newer ones, and the
    folder is listed again."""
    why: dict[Path, str] = {}
    while True:
        for folder in reversed([folder for folder in checkpoint_folders(run_dir, kind) if folder not in why]):
            try:
                return open_checkpoint(folder)
            except NewerFormatError:  # the checkpoint is intact, and falling back would train finished steps again
                raise
            except UserError as error:
                if not folder.is_dir():
                    break
                why[folder] = str(error).rstrip(".")
                warn(error)
        else:
            break
    if why and kind == "step":
        reasons = "; ".join(why.values())
        raise UserError(f"no checkpoint in {run_dir} is intact ({reasons}): start again with another --run_name.")
    return None


@dataclass
class Run:
    """A trained model with everything that is needed to use it."""

    model: GPT
    tokenizer: Tokenizer
    config: TrainConfig
    state: dict
    folder: Path


def open_run(path: str | Path = "") -> Checkpoint:
    """Opens the best checkpoint of a run, or the newest one if no best is intact.

    path: out/<run>, or the folder of one checkpoint; "" means the run in out/ that saved last. Raises UserError if
    there is no checkpoint, or none that is intact."""
    path = Path(path) if path else newest_run(Path("out"))
    if (path / STATE).is_file():
        return open_checkpoint(path)
    best = _newest_of(path, "best", lambda error: _warn(f"{error} Using the newest checkpoint instead."))
    found = best or newest(path, _warn)
    if found is None:
        raise UserError(f"there is no checkpoint in {str(path)!r}: {suggestion(path)}")
    return found


def read_run(path: str | Path, read: Callable[[Checkpoint], T]) -> T:
    """Returns read(checkpoint) for the checkpoint of open_run(path).

    If the run deletes that checkpoint while it is read, the next one is tried."""
    while True:
        found = open_run(path)
        try:
            return read(found)
        except (UserError, OSError):
            if found.folder.is_dir() or Path(path) == found.folder:
                raise


def load_run(path: str | Path = "", device: str | torch.device = "cpu") -> Run:
    """Loads a run for use. path: as for open_run. Raises UserError if there is no intact checkpoint."""
    run = read_run(path, _load)
    return dataclasses.replace(run, model=run.model.to(device).eval())


def _load(checkpoint: Checkpoint) -> Run:
    cfg, tokenizer = checkpoint.config, checkpoint.tokenizer()
    if (tokenizer.n_vocab, tokenizer.n_content) != (cfg.model.vocab_size, cfg.model.content_vocab_size):
        raise UserError(
            f"{checkpoint.folder} is inconsistent: its tokenizer has {tokenizer.n_vocab} ids ({tokenizer.n_content} of "
            f"content) and its model {cfg.model.vocab_size} ({cfg.model.content_vocab_size}); use another checkpoint."
        )
    with torch.device("meta"):  # allocate no memory before the shapes are known to match the file
        model = GPT(cfg.model)
    return Run(checkpoint.load_into(model, "cpu"), tokenizer, cfg, checkpoint.state, checkpoint.folder)


def _warn(sentence: str) -> None:
    print(f"warning: {sentence}", file=sys.stderr)
