"""Leaves nothing behind when the start of a new run fails, so that the same command can be given again."""

import contextlib
import shutil
from pathlib import Path

from filelock import BaseFileLock

from nanometa.training.resume import lock_new


class Start:
    """A context manager that removes the folder of a new run if its block fails before `succeeded` is called.

    Nothing that existed before the start is touched."""

    def __init__(self):
        self._lock: BaseFileLock | None = None

    def new_folder(self, folder: Path) -> BaseFileLock:
        """Creates and locks the folder of a new run, and returns the lock. Raises UserError as lock_new does."""
        missing = [path for path in (folder, *folder.parents) if not path.exists()]  # innermost first
        before = set(folder.iterdir()) if folder.is_dir() else set()
        lock = lock_new(folder)  # until now, the folder may have become that of another process
        self._folder, self._missing, self._before, self._lock = folder, missing, before, lock
        return lock

    def succeeded(self) -> None:
        """Keeps the folder from now on."""
        self._lock = None

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, trace) -> None:
        if error is None or self._lock is None:
            return
        with contextlib.suppress(OSError):  # which would hide the error that ended the start
            for path in set(self._folder.iterdir()) - self._before:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
            for path in self._missing:
                path.rmdir()
        self._lock.release()
