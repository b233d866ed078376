"""A large object in parts: several on their way at once, digested in order, in bounded memory.

Owns how a file is cut, how many parts are under way, and the one pass that compares the bytes with their digest. Knows
no server: whoever calls says how a part is sent or opened. Used by `service.storage.s3`.
"""

from __future__ import annotations

import hashlib
import io
import os
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from service.errors import StoreUnavailable
from service.storage.digests import report_corrupt
from service.storage.disk import disk_errors

_CHUNK_BYTES = 1 << 20
#: Times that a range is asked for again in a row without one byte of it arriving.
_TRIES = 3

T = TypeVar("T")
#: Opens the bytes `[start, end)` of an object as chunks.
OpenRange = Callable[[int, int], AbstractContextManager[Iterator[bytes]]]


@dataclass(frozen=True)
class Part:
    """The bytes `[start, end)` of a file."""

    #: From 1, as S3 counts.
    number: int
    start: int
    end: int


def cut(size_bytes: int, part_size_bytes: int, max_parts: int | None = None) -> Iterator[Part]:
    """Yield the parts of a file, of `part_size_bytes` but for the last, or larger where `max_parts` asks for it."""
    if max_parts is not None:
        part_size_bytes = max(part_size_bytes, -(-size_bytes // max_parts))
    for number, start in enumerate(range(0, size_bytes, part_size_bytes), start=1):
        yield Part(number, start, min(start + part_size_bytes, size_bytes))


class PartBody(io.RawIOBase):
    """A part as a file of its own, read from the disk's cache as it is sent; any number share one descriptor."""

    def __init__(self, descriptor: int, part: Part) -> None:
        self._descriptor = descriptor
        self._part = part
        self._position = part.start

    def __len__(self) -> int:
        return self._part.end - self._part.start

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """A request that is tried again begins anew."""
        return True

    def tell(self) -> int:
        """Return the position within the part."""
        return self._position - self._part.start

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move within the part."""
        origin = {os.SEEK_SET: self._part.start, os.SEEK_CUR: self._position, os.SEEK_END: self._part.end}[whence]
        self._position = max(self._part.start, origin + offset)
        return self.tell()

    def read(self, size: int | None = -1) -> bytes:
        """Return the next bytes of the part."""
        left = max(0, self._part.end - self._position)
        data = os.pread(self._descriptor, left if size is None or size < 0 else min(size, left), self._position)
        self._position += len(data)
        return data


def send_parts(
    descriptor: int,
    parts: Iterable[Part],
    key: str,
    sha256: str,
    *,
    checksum: Callable[[], hashlib._Hash],
    send: Callable[[Part, PartBody, bytes], T],
    parallel: int,
) -> list[T]:
    """Digest a file in order and send its parts, `parallel` at once; return what `send` returned, in order.

    One pass yields the digest of the whole and the checksum of each part, which the server compares with what arrives:
    the bytes that are stored are those that were digested. Raises `BlobCorrupt` when they are not `sha256`.
    """
    whole = hashlib.sha256()
    size_bytes = 0
    done: list[T] = []
    with _window(parallel) as window:
        for part in parts:
            own = checksum()
            for chunk in iter_part(descriptor, part):
                whole.update(chunk)
                own.update(chunk)
                size_bytes += len(chunk)
            done.extend(window.add(send, part, PartBody(descriptor, part), own.digest()))
        done.extend(window.drain())
    if whole.hexdigest() != sha256:
        raise report_corrupt(key, sha256, whole.hexdigest(), size_bytes)
    return done


def copy_ranges(
    open_range: OpenRange, key: str, path: Path, sha256: str, parts: Iterable[Part], *, parallel: int
) -> int:
    """Copy an object to `path`, `parallel` ranges at once, and return its size in bytes.

    Ranges are digested in order as they become whole, from the disk's cache, while later ones are on their way. The
    file appears only when its digest is right; raises `BlobCorrupt`. Not flushed, as `copy_object`.
    """
    partial = path.with_name(f".part-{uuid.uuid4().hex}")
    whole = hashlib.sha256()
    size_bytes = 0
    with disk_errors(path.parent):
        try:
            with partial.open("x+b") as stream, _window(parallel) as window:
                descriptor = stream.fileno()

                def fetch(part: Part) -> Part:
                    _fetch_range(open_range, key, descriptor, part, path.parent)
                    return part

                def digest(whole_parts: Iterable[Part]) -> None:
                    nonlocal size_bytes
                    for part in whole_parts:
                        for chunk in iter_part(descriptor, part):
                            whole.update(chunk)
                            size_bytes += len(chunk)

                for part in parts:
                    digest(window.add(fetch, part))
                digest(window.drain())
            if whole.hexdigest() != sha256:
                raise report_corrupt(key, sha256, whole.hexdigest(), size_bytes)
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    return size_bytes


def iter_part(descriptor: int, part: Part) -> Iterator[bytes]:
    """Yield a part of a file in chunks; fewer bytes where the file has ended before."""
    position = part.start
    while position < part.end:
        chunk = os.pread(descriptor, min(_CHUNK_BYTES, part.end - position), position)
        if not chunk:
            return
        position += len(chunk)
        yield chunk


def _fetch_range(open_range: OpenRange, key: str, descriptor: int, part: Part, folder: Path) -> None:
    """Write a range into its place; one that breaks off is taken up where it ended."""
    position, failures = part.start, 0
    while position < part.end:
        before = position
        failure = StoreUnavailable(f"Object {key} ended at byte {position}, before its size.", key=key)
        try:
            with open_range(position, part.end) as chunks:
                for chunk in chunks:
                    with disk_errors(folder):
                        _write_at(descriptor, chunk, position)
                    position += len(chunk)
        except StoreUnavailable as error:
            failure = error
        failures = 0 if position > before else failures + 1
        if failures >= _TRIES:
            raise failure


def _write_at(descriptor: int, data: bytes, position: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, position)
        view, position = view[written:], position + written


class _Window(Generic[T]):
    """Calls in threads, so many ahead of the oldest and no more; results come in order."""

    def __init__(self, pool: ThreadPoolExecutor, size: int) -> None:
        self._pool = pool
        self._size = size
        self._pending: deque[Future[T]] = deque()

    def add(self, call: Callable[..., T], *arguments: object) -> list[T]:
        """Start a call; return the results that must be taken before the next one."""
        self._pending.append(self._pool.submit(call, *arguments))
        return self.drain(self._size - 1)

    def drain(self, left: int = 0) -> list[T]:
        """Wait until at most so many calls are left, and return the results of those that ended."""
        done = []
        while len(self._pending) > left:
            done.append(self._pending.popleft().result())
        return done


@contextmanager
def _window(parallel: int) -> Iterator[_Window[Any]]:
    """Twice as many calls are waiting or running as run at once, so that none waits for the digest."""
    pool = ThreadPoolExecutor(parallel, thread_name_prefix="part")
    try:
        yield _Window(pool, 2 * parallel)
    finally:
        # Whoever aborts an upload must know that none of its parts is under way.
        pool.shutdown(wait=True, cancel_futures=True)
