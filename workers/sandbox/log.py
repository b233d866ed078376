"""The log of a run: what the child prints, up to a limit.

Owns the limit: the first half of it is kept as it comes, then the last half, with a line between that says how
much was left out, so that neither the beginning nor the last words of a crash are lost. Called by `supervisor`
(writing) and `parent` (the tail).
"""

from __future__ import annotations

import os
from collections import deque
from pathlib import Path

_TAIL_BYTES = 4096
_TAIL_LINES = 20


class CappedLog:
    """A file that never exceeds its limit by more than one short line.

    A full disk silences the log; the step itself reports the disk.
    """

    def __init__(self, path: str, limit_bytes: int) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        self._head_room_bytes = limit_bytes // 2
        self._tail_room_bytes = limit_bytes - self._head_room_bytes
        self._tail: deque[bytes] = deque()
        self._tail_bytes = 0
        self._left_out_bytes = 0

    def write(self, piece: bytes) -> None:
        """Append `piece`, or keep it back as part of the tail."""
        head, rest = piece[: self._head_room_bytes], piece[self._head_room_bytes :]
        self._head_room_bytes -= len(head)
        self._put(head)
        if not rest:
            return
        self._tail.append(rest)
        self._tail_bytes += len(rest)
        while self._tail_bytes > self._tail_room_bytes:
            excess_bytes = self._tail_bytes - self._tail_room_bytes
            first = self._tail.popleft()
            if len(first) > excess_bytes:
                self._tail.appendleft(first[excess_bytes:])
            dropped_bytes = min(len(first), excess_bytes)
            self._tail_bytes -= dropped_bytes
            self._left_out_bytes += dropped_bytes

    def close(self) -> None:
        """Write what was kept back and close the file."""
        if self._left_out_bytes:
            self._put(f"\n... {self._left_out_bytes} bytes left out ...\n".encode())
        for piece in self._tail:
            self._put(piece)
        self.forget()

    def forget(self) -> None:
        """Close the file and write nothing more; for a process that inherited it."""
        os.close(self._fd)

    def _put(self, piece: bytes) -> None:
        try:
            while piece:
                piece = piece[os.write(self._fd, piece) :]
        except OSError:
            return


def read_tail(path: Path) -> str:
    """Return the last lines of a log, at most 20 and 4 KiB; empty if there is none."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
    return "\n".join(text.splitlines()[-_TAIL_LINES:])
