"""Shows the end of a log that is still being written.

A thread per running child, so that neither a slow ledger nor a long log keeps anyone from noticing a cancellation. Owns
how often the log is looked at; the whole of it becomes a blob when the run has ended. Used by `workers.runner` only.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from workers.sandbox.log import read_end

log = logging.getLogger(__name__)

#: Shown at most this often.
INTERVAL_S = 1.0
#: How long the end of a run waits for a look that is under way.
_JOIN_S = 1.0


class LiveLog:
    """Shows one log while its context is open; the file may not exist yet."""

    def __init__(self, path: Path, show: Callable[[str, int], None]) -> None:
        """`show` takes the end of the log and the number of bytes printed in all; what it raises is only told."""
        self._path = path
        self._show = show
        #: Nothing printed yet is worth showing, too: somebody may wait for more.
        self._shown_bytes = -1
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name=f"log-{path.parent.name}", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        self._thread.join(_JOIN_S)

    def show_news(self) -> None:
        """Show the end of the log if it has grown since it was last shown."""
        data, size_bytes = read_end(self._path)
        if size_bytes == self._shown_bytes:
            return
        # PostgreSQL keeps no zero character.
        self._show(data.decode(errors="replace").replace("\0", "\ufffd"), size_bytes)
        self._shown_bytes = size_bytes

    def _watch(self) -> None:
        while not self._closed.wait(INTERVAL_S):
            try:
                self.show_news()
            except Exception as error:
                # Nothing depends on it: the whole log is stored at the end.
                log.warning("cannot show the log: %s", error)
