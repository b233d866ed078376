"""The embedded profile's broker: a queue is a folder, a message is a file.

Owns the transport that Celery knows as `folder://`. A message appears, and is taken, by one rename, so that no reader
ever sees half of one and no two readers get the same. Kombu's own `filesystem://` writes messages in place: whoever
reads the file meanwhile dies of what is not JSON yet (github.com/celery/kombu/issues/1551), and its channel errors are
no `OSError`. Called by Celery, set up by `service.queue`.
"""

from __future__ import annotations

import logging
import time
import uuid
from pathlib import Path
from queue import Empty
from typing import Any
from urllib.parse import quote

from kombu.transport import TRANSPORT_ALIASES, virtual
from kombu.utils.json import dumps, loads

log = logging.getLogger(__name__)

SCHEME = "folder"
#: Messages that may wait in a queue: the sweep would fill one that nobody reads, for ever. Nothing is lost with those
#: beyond, for whoever takes one of these and has run a step pokes again.
_MOST_MESSAGES = 100


class FolderChannel(virtual.Channel):  # type: ignore[misc]  # kombu publishes no types
    """Puts and takes messages; exchanges and bindings are each process's own."""

    def _put(self, queue: str, message: Any, **_: Any) -> None:
        folder = self._folder(queue)
        if self._size(queue) >= _MOST_MESSAGES:
            return
        name = f"{time.time_ns()}-{uuid.uuid4().hex}"
        partial = folder / f".{name}"
        try:
            partial.write_text(dumps(message), encoding="utf-8")
            partial.rename(folder / name)
        except OSError:
            partial.unlink(missing_ok=True)
            raise

    def _get(self, queue: str, timeout: float | None = None) -> Any:
        """Return the oldest message; raise `Empty` when there is none."""
        folder = self._folder(queue)
        for name in sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")):
            taken = folder / f".{name}"
            try:
                (folder / name).rename(taken)
                text = taken.read_text(encoding="utf-8")
                taken.unlink()
            except FileNotFoundError:
                # Another worker was faster.
                continue
            try:
                return loads(text)
            except ValueError:
                # A power cut may empty a file that was just written. A wake-up more or less is nothing to die of.
                log.warning("dropped an unreadable message of %s", queue)
        raise Empty

    def _size(self, queue: str) -> int:
        return sum(not path.name.startswith(".") for path in self._folder(queue).iterdir())

    def _purge(self, queue: str) -> int:
        paths = list(self._folder(queue).iterdir())
        for path in paths:
            path.unlink(missing_ok=True)
        return len(paths)

    def _folder(self, queue: str) -> Path:
        folder = Path(self.connection.client.transport_options["folder"]) / quote(queue, safe="")
        folder.mkdir(parents=True, exist_ok=True)
        return folder


class FolderTransport(virtual.Transport):  # type: ignore[misc]  # kombu publishes no types
    """Connections to a folder."""

    Channel = FolderChannel
    default_port = 0
    driver_type = SCHEME
    driver_name = SCHEME

    def driver_version(self) -> str:
        """Return the version of the message format."""
        return "1"


TRANSPORT_ALIASES[SCHEME] = f"{__name__}:FolderTransport"
