"""The end of a log that is still being written.

Owns how often it is looked at and how much of it is shown. Used by `workers.runner`; the whole log becomes a blob when
the run has ended.
"""

from __future__ import annotations

import time
from pathlib import Path

#: Shown at most this often, and at most so much of it.
INTERVAL_S = 1.0
SHOWN_BYTES = 16 << 10


class LiveLog:
    """One log; it may not exist yet."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read_at = float("-inf")
        self._size_bytes = 0

    def read_news(self) -> tuple[str, int] | None:
        """Return the end of the log and its size in bytes if it has grown since it was last shown, and not just now."""
        if time.monotonic() - self._read_at < INTERVAL_S:
            return None
        self._read_at = time.monotonic()
        if not self._path.exists():
            return None
        size_bytes = self._path.stat().st_size
        if size_bytes == self._size_bytes:
            return None
        self._size_bytes = size_bytes
        with self._path.open("rb") as stream:
            stream.seek(max(0, size_bytes - SHOWN_BYTES))
            data = stream.read(min(size_bytes, SHOWN_BYTES))
        # PostgreSQL keeps no zero character.
        return data.decode(errors="replace").replace("\0", "\ufffd"), size_bytes
