"""Who serves a data directory: one process at a time, and everybody can find out which.

Owns `up.lock` (an advisory lock that the kernel drops with its holder) and `server.json` (its process and URL, to be
believed only while the lock is held). Called by `service.supervisor`.
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

from service.errors import DataDirBusy, InvalidSettings

_LOCK = "up.lock"
_SERVER = "server.json"


class DataDirLock:
    """The right to serve a data directory."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Take the right, or raise `DataDirBusy` that names the holder."""
        try:
            self.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(self.data_dir / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise InvalidSettings(
                f"The data directory {self.data_dir} cannot be used: {error.strerror}. Choose another with --data-dir."
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise self._busy() from None
        self._descriptor = descriptor
        (self.data_dir / _SERVER).unlink(missing_ok=True)

    def announce(self, url: str) -> None:
        """Tell other processes where the holder serves."""
        partial = self.data_dir / f"{_SERVER}.part"
        partial.write_text(json.dumps({"pid": os.getpid(), "url": url}))
        partial.replace(self.data_dir / _SERVER)

    def release(self) -> None:
        """Give the right back; nothing happens when it was not held."""
        if self._descriptor is not None:
            (self.data_dir / _SERVER).unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None

    def _busy(self) -> DataDirBusy:
        server = read_server(self.data_dir)
        holder = f"process {server['pid']} ({server['url']})" if server else "another process that is just starting"
        return DataDirBusy(
            f"{self.data_dir} is served by {holder}. Stop that one, or choose another directory with --data-dir.",
            data_dir=str(self.data_dir),
            **server,
        )


def read_server(data_dir: Path) -> dict[str, Any]:
    """Return `pid` and `url` of whoever last announced itself; empty when nobody has."""
    try:
        document = json.loads((data_dir / _SERVER).read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return {"pid": document["pid"], "url": document["url"]} if isinstance(document, dict) else {}
