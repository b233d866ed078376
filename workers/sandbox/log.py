"""The log of a run: what the child prints, up to a limit.

Owns the limit: the first half of it is kept as it comes, then the last half, with a line between that says how
much was left out, so that neither the beginning nor the last words of a crash are lost. What is kept back until the
end is shown meanwhile by a small ring beside the log. Called by `supervisor` (writing), `parent` (the tail) and
`workers.live_log` (the end of what still grows).
"""

from __future__ import annotations

import os
import struct
from collections import deque
from pathlib import Path

_TAIL_BYTES = 4096
_TAIL_LINES = 20
#: How much of a growing log is shown.
SHOWN_BYTES = 16 << 10
#: Before the ring's bytes: how many were written to it in all.
_TOTAL = struct.Struct("<Q")


class CappedLog:
    """A file that never exceeds its limit by more than one short line.

    A full disk silences the log; the step itself reports the disk.
    """

    def __init__(self, path: str, limit_bytes: int) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        self._ring = _Ring(f"{path}.ring")
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
        self._ring.write(rest)
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
        self._ring.close()

    def _put(self, piece: bytes) -> None:
        try:
            while piece:
                piece = piece[os.write(self._fd, piece) :]
        except OSError:
            return


class _Ring:
    """A file of fixed size that holds the last of what was written; it is made by the first write."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._fd: int | None = None
        self._total_bytes = 0

    def write(self, piece: bytes) -> None:
        """Append; a full disk silences the ring, too."""
        try:
            if self._fd is None:
                self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            self._total_bytes += len(piece)
            piece = piece[-SHOWN_BYTES:]
            start = (self._total_bytes - len(piece)) % SHOWN_BYTES
            room_bytes = SHOWN_BYTES - start
            os.pwrite(self._fd, piece[:room_bytes], _TOTAL.size + start)
            if piece[room_bytes:]:
                os.pwrite(self._fd, piece[room_bytes:], _TOTAL.size)
            os.pwrite(self._fd, _TOTAL.pack(self._total_bytes), 0)
        except OSError:
            return

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)


def read_end(path: Path) -> tuple[bytes, int]:
    """Return the end of a log that still grows, and how many bytes were printed in all; empty if there is none.

    A write in the same instant may garble what is read; the next look is whole.
    """
    try:
        size_bytes = path.stat().st_size
        with path.open("rb") as file:
            file.seek(max(0, size_bytes - SHOWN_BYTES))
            head = file.read(min(size_bytes, SHOWN_BYTES))
    except FileNotFoundError:
        return b"", 0
    try:
        ring = Path(f"{path}.ring").read_bytes()
    except FileNotFoundError:
        return head, size_bytes
    if len(ring) <= _TOTAL.size:
        return head, size_bytes
    (total_bytes,) = _TOTAL.unpack_from(ring)
    kept = ring[_TOTAL.size :]
    cut = total_bytes % SHOWN_BYTES if total_bytes > SHOWN_BYTES else 0
    return (head + kept[cut:] + kept[:cut])[-SHOWN_BYTES:], size_bytes + total_bytes


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
