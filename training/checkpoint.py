"""Writes and reads checkpoints, which survive a kill at any moment, are verified on loading and contain no pickle.

    out/<run>/step_00001000/   model.safetensors optimizer.safetensors state.json tokenizer.*, manifest.json (sha256)
    out/<run>/best_00000800/   the same files without the optimizer
    out/<run>/latest           one line: the name of the newest step_ folder

A folder is written under a temporary name, synced and renamed, and then `latest` is updated. A folder with its final
name is therefore complete. Loading takes the newest folder that verifies; `latest` is for people and their scripts.

A run may delete a checkpoint at any moment. Loading therefore opens all of its files first, and reads them afterwards:
an open file can still be read after it was deleted.
"""

import contextlib
import json
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import safetensors.torch
import torch

from nanometa.common.errors import UserError
from nanometa.common.files import (
    WRITING,
    file_inside,
    file_sha256,
    leads_out,
    open_file_sha256,
    own_file,
    parse_json,
    read_file,
    remove,
    sync,
    write_atomically,
)
from nanometa.common.formats import NewerFormatError, check_format
from nanometa.config import TrainConfig, train_config_from_dict
from nanometa.data.tokenizer import RANKS_FILE, SPEC_FILE, Tokenizer
from nanometa.model import GPT
from nanometa.training import adapters
from nanometa.training.optimizer import Optimizer
from nanometa.training.run_folders import STATE, checkpoint_folders, newest_run, suggestion
from nanometa.training.state import check_state
from nanometa.training.tensor_files import read_tensors

WEIGHTS, OPTIMIZER, MANIFEST = "model.safetensors", "optimizer.safetensors", "manifest.json"
ABANDONED = "abandoned_"  # prefix of best weights from steps after the checkpoint that the run resumed from
LINKED = "linked_"  # prefix of a link in place of a checkpoint, which a resumed run leaves to the user
DELETING = ".deleting"  # suffix of a hidden folder that is being deleted; a kill may leave one behind, as with WRITING
OPENINGS = 100  # attempts to open a checkpoint of a run that deletes each one before its files are open


def save(run_dir: Path, kind: str, step: int, files: dict[str, bytes | dict[str, torch.Tensor]], keep: int) -> Path:
    """Writes the checkpoint run_dir/<kind>_<step> atomically, and deletes all but the newest `keep` of its kind.

    kind: "step" or "best". files: contents by name, as bytes, or as a dict of tensors for a .safetensors file.
    Returns the checkpoint's folder. Raises UserError if a tensor file cannot be written."""
    final = run_dir / f"{kind}_{step:08d}"
    partial = run_dir / f".{final.name}{WRITING}"
    remove(partial)
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
    if final.is_symlink():
        _set_aside(final, LINKED)
    elif final.exists():  # an earlier checkpoint of this step was damaged, and the step was trained again
        _delete(final)
    os.rename(partial, final)
    sync(run_dir)
    _settle(final, kind, keep)
    return final


def _settle(final: Path, kind: str, keep: int) -> None:
    """Finishes a save: points `latest` to the new folder, and deletes all but the newest keep - 1 others of its kind.

    Abandoned best weights of the same step are deleted, too, since the resumed run has replaced them. Links are the
    user's, and are neither counted nor deleted."""
    if kind == "step":
        write_atomically(final.with_name("latest"), f"{final.name}\n".encode())
    remove(final.with_name(f"{ABANDONED}{final.name}"))
    others = [folder for folder in checkpoint_folders(final.parent, kind) if folder != final]
    others = [folder for folder in others if not folder.is_symlink()]
    for old in others[: max(0, len(others) - (keep - 1))]:
        _delete(old)


def _manifest(hashes: dict[str, str]) -> bytes:
    return json.dumps({"format": 1, "sha256": hashes}, indent=2).encode() + b"\n"


def latest(run_dir: Path) -> str:
    """Returns the name of the newest checkpoint, or "none was saved yet", for use in a sentence."""
    folders = checkpoint_folders(run_dir, "step")
    return folders[-1].name if folders else "none was saved yet"


def _delete(folder: Path) -> None:
    """Deletes a folder. It is renamed first, so that a folder that is half deleted never looks like a checkpoint.

    What cannot be deleted yet, such as a file on NFS that a reader has open, is left to the next `sweep`."""
    doomed = folder.with_name(f".{folder.name}{DELETING}")
    remove(doomed)
    os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _set_aside(folder: Path, prefix: str) -> None:
    """Renames a folder, so that nothing takes it for a checkpoint of the run any more. Replaces one of the new name.

    The prefix of a link is LINKED. The name of a link may be taken by another link, but a folder is not deleted."""
    if folder.is_symlink():
        os.rename(folder, folder.with_name(f"{LINKED}{folder.name}"))
    else:
        aside = folder.with_name(f"{prefix}{folder.name}")
        remove(aside)
        os.rename(folder, aside)


def sweep(run_dir: Path, step: int, keep: int) -> None:
    """Tidies the folder of a run that resumes from `step`. The caller holds the folder's lock.

    Later checkpoints did not verify, so they are renamed to damaged_step_*. Later best weights belong to steps that
    this run trains again, maybe with other settings, so they are renamed to abandoned_best_* and nothing loads them.
    A link in place of either is renamed to linked_*. Files that a killed process left half written or half deleted are
    removed, and an interrupted save of the resumed checkpoint is finished."""
    for kind, prefix in (("step", "damaged_"), ("best", ABANDONED)):
        for folder in checkpoint_folders(run_dir, kind):
            if int(folder.name.split("_")[1]) > step:
                _set_aside(folder, prefix)
    for suffix in (WRITING, DELETING):
        for path in run_dir.glob(f".*{suffix}"):
            with contextlib.suppress(OSError):  # as in _delete
                remove(path)
    resumed = run_dir / f"step_{step:08d}"
    if resumed.is_dir():
        _settle(resumed, "step", keep)


@dataclass
class Checkpoint:
    """A checkpoint whose files have been verified. They are open, and can be read even if the run has deleted them."""

    folder: Path
    state: dict  # state.json as train.py wrote it: step, config, data, best, source commit
    sha256: dict[str, str]  # hash of every file by its name
    files: dict[str, BinaryIO]
    _tokenizer: Tokenizer | None = None

    @property
    def step(self) -> int:
        return self.state["step"]

    @property
    def config(self) -> TrainConfig:
        try:
            return train_config_from_dict(self.state["config"])
        except UserError as error:
            raise UserError(f"{self.folder / STATE}: {error}") from error

    def optimizer(self) -> dict[str, torch.Tensor]:
        if OPTIMIZER not in self.files:
            raise UserError(f"{self.folder} contains weights but no optimizer state: use a step_ folder of the run.")
        return read_tensors(self.files[OPTIMIZER])

    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            self._tokenizer = Tokenizer.parse(self._read(SPEC_FILE), self._read(RANKS_FILE), self.folder)
        return self._tokenizer

    def _read(self, name: str) -> bytes:
        self.files[name].seek(0)
        return self.files[name].read()

    def empty_model(self) -> GPT:
        """Returns a model with the config of this checkpoint on the "meta" device, where it takes no memory.

        Raises UserError if the config does not fit the tokenizer."""
        cfg, tokenizer = self.config, self.tokenizer()
        if (tokenizer.n_vocab, tokenizer.n_content) != (cfg.model.vocab_size, cfg.model.content_vocab_size):
            raise UserError(
                f"{self.folder} is inconsistent: its tokenizer has {tokenizer.n_vocab} ids ({tokenizer.n_content} of "
                f"content) and its model {cfg.model.vocab_size} ({cfg.model.content_vocab_size}); use another "
                f"checkpoint."
            )
        with torch.device("meta"):
            return GPT(cfg.model)

    def adapted_model(self) -> GPT:
        """Returns a model like empty_model's, with the adapters that the run trains, if it trains any."""
        return adapters.attach(self.empty_model(), self.config, self.state["data"]["chunk_markers"])

    def weights(self, model: GPT) -> dict[str, torch.Tensor]:
        """Returns the weights by name. If the model has no adapters, those of the run are merged into its weights.

        Raises UserError if names, shapes or dtypes differ from those of the model."""
        if self.config.train_only != "all" and not adapters.has_adapters(model):
            tensors = adapters.merge(self.load_into(self.adapted_model(), "cpu")).state_dict()
        else:
            tensors = read_tensors(self.files[WEIGHTS])
        wanted = model.state_dict()
        for name in sorted(wanted.keys() | tensors.keys()):
            ours, found = (_brief(state.get(name)) for state in (wanted, tensors))
            if ours != found:
                raise UserError(
                    f"{self.folder / WEIGHTS} does not fit its config, because {name} is {found} in the file and "
                    f"{ours} in the model: use another checkpoint."
                )
        return tensors

    def load_into(self, model: GPT, device: str | torch.device | None = None) -> GPT:
        """Loads these weights into the model and returns it.

        device: where a model on the "meta" device gets its memory. Raises UserError as `weights` does."""
        tensors = self.weights(model)
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


def content_before(state: dict) -> int | None:
    """Returns how many content tokens a run's weights had been trained on at step 0; None if that is unknown."""
    return state.get("content_before", 0 if state.get("origin") == "scratch" else None)


def content_per_window(state: dict, cfg: TrainConfig) -> int:
    """Returns the number of content tokens in a window of a run on text."""
    data = state["data"]
    return cfg.model.block_size // (data["chunk_content"] + data["chunk_markers"]) * data["chunk_content"]


def content_tokens(state: dict, cfg: TrainConfig) -> int | None:
    """Returns how many content tokens a checkpoint's weights were trained on; None if that is unknown.

    Texts of tasks do not count."""
    before = content_before(state)
    if before is None or cfg.task.tasks:
        return before
    return before + state["step"] * cfg.batch_size * content_per_window(state, cfg)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Opens all files of a checkpoint, and then verifies them.

    Raises UserError if a file is missing or damaged; the message names the file and both hashes."""
    with contextlib.ExitStack() as opened:
        try:
            raw = read_file(own_file(folder / MANIFEST))
            manifest = parse_json(raw)
            check_format(folder / MANIFEST, manifest)
            hashes = manifest["sha256"]
            if raw != _manifest(hashes):  # no hash protects the manifest itself
                raise ValueError("its text has changed since it was written")
            missing = {WEIGHTS, STATE, SPEC_FILE, RANKS_FILE} - hashes.keys()
            if missing:
                raise ValueError(f"it does not list {min(missing)}")
            files = {name: opened.enter_context(open(file_inside(folder, name), "rb")) for name in hashes}
            for name, expected in hashes.items():
                found = open_file_sha256(files[name])
                if found != expected:
                    raise UserError(
                        f"{folder / name} is damaged: its sha256 is {found}, but the manifest says {expected}; use "
                        f"another checkpoint."
                    )
        except FileNotFoundError as error:
            if not folder.is_dir():
                raise UserError(f"{folder} does not exist, or its run has just deleted it: use another one.") from None
            raise UserError(
                f"{folder} is not a complete checkpoint, because {Path(error.filename).name} is missing: use another "
                f"one."
            ) from None
        except OSError as error:
            raise UserError(
                f"{folder} cannot be read ({error}): check its permissions, or use another checkpoint."
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{folder / MANIFEST} is damaged ({type(error).__name__}: {error}): use another checkpoint."
            ) from error
        saved = Checkpoint(folder, {}, hashes, files)
        try:
            saved.state = parse_json(saved._read(STATE))
            check_state(saved.state)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{folder / STATE} was not written by train.py ({type(error).__name__}: {error}): use another "
                f"checkpoint."
            ) from error
        opened.pop_all()  # the files stay open
        return saved


def newest(run_dir: Path, warn) -> Checkpoint | None:
    """Returns the newest checkpoint that verifies, or None if there are none.

    Calls warn(sentence) for each damaged checkpoint. Raises UserError if all of them are damaged."""
    return _newest_of(run_dir, "step", lambda error: warn(f"{error} Falling back to the checkpoint before it."))


def _newest_of(run_dir: Path, kind: str, warn) -> Checkpoint | None:
    """Returns the newest folder of one kind that verifies, as `newest` does.

    A run that is being trained deletes old folders. If one disappears before its files are open, there are newer ones,
    and the folder is listed again. A link out of the run's folder counts as damaged."""
    why: dict[Path, str] = {}
    for _ in range(OPENINGS):
        for folder in reversed([folder for folder in checkpoint_folders(run_dir, kind) if folder not in why]):
            try:
                if leads_out(folder):
                    raise UserError(
                        f"{folder} is a link out of {run_dir}, so it is not used: replace the link with the folder "
                        f"itself, or name that folder with --run, --init_from or --branch_from."
                    )
                found = open_checkpoint(folder)
                if found.step != int(folder.name.rpartition("_")[2]):
                    raise UserError(f"{folder / STATE} is of step {found.step}: rename or remove the folder.")
                return found
            except NewerFormatError:  # the checkpoint is intact, and falling back would train finished steps again
                raise
            except UserError as error:
                if not folder.is_dir():
                    time.sleep(0.01)
                    break
                why[folder] = str(error).rstrip(".")
                warn(error)
        else:
            break
    else:
        raise UserError(
            f"each checkpoint in {run_dir} was deleted before its files were open, {OPENINGS} times: wait until the "
            f"run saves less often, or name a copy of a checkpoint."
        )
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
    weights_sha256: str = ""


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


def load_run(path: str | Path = "", device: str | torch.device = "cpu") -> Run:
    """Loads a run for use. path: as for open_run. Raises UserError if there is no intact checkpoint."""
    saved = open_run(path)
    model = saved.load_into(saved.empty_model(), "cpu").to(device).eval()
    return Run(model, saved.tokenizer(), saved.config, saved.state, saved.folder, saved.sha256[WEIGHTS])


def _warn(sentence: str) -> None:
    print(f"warning: {sentence}", file=sys.stderr)
