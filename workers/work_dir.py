"""The folder below which one worker process has its steps' folders.

Owns its lock, which the kernel drops with the process, and so the removal of what killed workers left: a step's folder
holds gigabytes, and only its own worker would remove it. Knows neither ledger nor steps. Used by `workers.process`.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path


class WorkDir:
    """A folder of this process alone; opening one removes those of dead processes."""

    def __init__(self, root: Path, name: str) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self.path = root / name
        root_lock = _open(root)
        try:
            # Nobody looks for dead folders between a folder's making and its locking.
            fcntl.flock(root_lock, fcntl.LOCK_EX)
            abandoned = [(path, lock) for path in root.iterdir() if (lock := _lock(path)) is not None]
            self.path.mkdir()
            lock = _lock(self.path)
            assert lock is not None
            self._lock = lock
        finally:
            os.close(root_lock)
        for path, lock in abandoned:
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)

    def close(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _open(folder: Path) -> int:
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def _lock(folder: Path) -> int | None:
    """Return a descriptor that holds the folder's lock, or None if a living process holds it."""
    try:
        descriptor = _open(folder)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor
