"""Files from servers: resumed, in parallel ranges, bounded and checked.

Owns the transfer of a list of files whose sizes (and digests, where stated) are known beforehand, whatever the kind of
server: each source brings its own way to open a range of a file. A body longer than stated is cut off, one that comes
too slowly counts as broken. Partial files live in the cache folder, if there is one, and are resumed by the next
attempt. Called by `workers.fetch.hub`, `https` and `s3`.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from service.checkpoint_files import SourceFile
from service.errors import SourceUnavailable
from workers.fetch.sources import CHUNK_BYTES, ByteProgress, FetchedFile, report_full_disk

#: Connections for one file in one attempt of the step; the second in a row that brings next to nothing ends it.
MAX_CONNECTIONS = 50
MAX_STALLS = 2
#: A range that one of several connections asks for at a time, and holds in memory.
SEGMENT_BYTES = 8 * 2**20
#: A connection that brings fewer bytes than this in such a time counts as broken.
SLOW_BYTES = 32 * 1024
SLOW_S = 30.0


class Interrupted(Exception):
    """A connection broke, or came to a crawl; what it had brought of a range that was held in memory is `rest`."""

    def __init__(self, rest: bytes = b"") -> None:
        super().__init__()
        self.rest = rest


@dataclass(frozen=True)
class Body:
    """What a server answers to a request for a range."""

    #: The first byte that comes: the one asked for, or 0 where the server ignores ranges.
    start: int
    #: Bytes as they arrive, without any encoding.
    chunks: Iterator[bytes]


class OpenRange(Protocol):
    """How a kind of source opens bytes [start, end) of a file; `end` is None for all that follow.

    Raises `Interrupted` when the connection fails, then or later, and a typed error when the server refuses.
    """

    def __call__(self, file: SourceFile, start: int, end: int | None) -> AbstractContextManager[Body]:
        """Open the range."""


def download_all(
    files: list[SourceFile],
    open_range: OpenRange,
    cache_dir: Path | None,
    output_dir: Path,
    count: ByteProgress,
    *,
    connections: int = 1,
) -> list[FetchedFile]:
    """Download every file into `output_dir`, smallest first, and return them with their digests, sorted by name.

    Files larger than one segment come over several `connections` at once. With `cache_dir`, which belongs to this one
    source, the files are completed there and moved at the end, so that a failure keeps what arrived; it is removed when
    all did.
    """
    fetched: list[FetchedFile] = []
    with report_full_disk(output_dir), _claim_folder(cache_dir) as working_dir:
        parts_dir = working_dir or output_dir
        for file in sorted(files, key=lambda each: each.size_bytes):
            part = parts_dir / file.path
            _complete(file, part, open_range, count, connections)
            fetched.append(_check(file, part))
        if working_dir is not None:
            for each in fetched:
                shutil.move(working_dir / each.path, output_dir / each.path)
            shutil.rmtree(working_dir, ignore_errors=True)
    return sorted(fetched, key=lambda each: each.path)


@contextmanager
def _claim_folder(cache_dir: Path | None) -> Iterator[Path | None]:
    """Hold the cache folder of one source alone; a second fetch of it on this host is told to come back."""
    if cache_dir is None:
        yield None
        return
    cache_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor = os.open(cache_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SourceUnavailable("The same source is being fetched on this host already; retry later.") from None
        if not cache_dir.is_dir() or cache_dir.stat().st_ino != os.fstat(descriptor).st_ino:
            raise SourceUnavailable("The same source was just fetched on this host; retry.")
        os.utime(cache_dir)
        yield cache_dir
    finally:
        os.close(descriptor)


def _complete(file: SourceFile, part: Path, open_range: OpenRange, count: ByteProgress, connections: int) -> None:
    """Append to `part` until it has the stated size, over as many connections as bring progress."""
    part.touch(mode=0o600)
    if part.stat().st_size > file.size_bytes:
        os.truncate(part, 0)
    count.add(part.stat().st_size, file.path)
    stalled = 0
    for _ in range(MAX_CONNECTIONS):
        before = part.stat().st_size
        if before == file.size_bytes:
            return
        try:
            with part.open("r+b") as stream:
                stream.seek(before)
                if connections > 1 and file.size_bytes - before > SEGMENT_BYTES:
                    _append_segments(file, stream, open_range, count, connections)
                else:
                    _append_rest(file, stream, open_range, count)
        except Interrupted:
            # A broken connection is resumed at once, by one alone: its server may take no more. What keeps breaking
            # waits for the step's next attempt.
            connections = 1
        except _RangesIgnored:
            connections = 1
            continue
        grown = part.stat().st_size - before
        stalled = 0 if grown >= min(SLOW_BYTES, file.size_bytes - before) else stalled + 1
        if stalled == MAX_STALLS:
            break
    done = part.stat().st_size
    if done != file.size_bytes:
        raise SourceUnavailable(
            f"The download of {file.path} broke off after {done} of {file.size_bytes} bytes; retry later.",
            file=file.path,
        )


def _append_rest(file: SourceFile, stream: IO[bytes], open_range: OpenRange, count: ByteProgress) -> None:
    """Open one connection and append what it brings; never beyond the stated size."""
    done = stream.tell()
    with open_range(file, done, None) as body:
        if body.start != done:
            # The server ignores ranges: begin again.
            count.add(-done, file.path)
            done = 0
            stream.seek(0)
            stream.truncate()
        for chunk in _require_pace(body.chunks):
            done += len(chunk)
            if done > file.size_bytes:
                raise _report_surplus(file)
            stream.write(chunk)
            count.add(len(chunk), file.path)


class _RangesIgnored(Exception):
    """The server sends the whole file whatever is asked for."""


def _append_segments(
    file: SourceFile, stream: IO[bytes], open_range: OpenRange, count: ByteProgress, connections: int
) -> None:
    """Append the rest in order, while several connections each hold one of the segments that come next."""
    stop = threading.Event()
    pending: deque[Future[bytes]] = deque()
    with ThreadPoolExecutor(connections, thread_name_prefix="download") as pool:
        try:
            for start in range(stream.tell(), file.size_bytes, SEGMENT_BYTES):
                end = min(start + SEGMENT_BYTES, file.size_bytes)
                pending.append(pool.submit(_read_segment, file, start, end, open_range, stop))
                if len(pending) == connections:
                    _append_chunk(file, stream, pending.popleft().result(), count)
            while pending:
                _append_chunk(file, stream, pending.popleft().result(), count)
        except Interrupted as broken:
            _append_chunk(file, stream, broken.rest, count)
            raise
        finally:
            stop.set()
            for future in pending:
                future.cancel()


def _append_chunk(file: SourceFile, stream: IO[bytes], chunk: bytes, count: ByteProgress) -> None:
    stream.write(chunk)
    count.add(len(chunk), file.path)


def _read_segment(file: SourceFile, start: int, end: int, open_range: OpenRange, stop: threading.Event) -> bytes:
    """Return bytes [start, end); an `Interrupted` holds what came of them."""
    data = bytearray()
    try:
        with open_range(file, start, end) as body:
            if body.start != start:
                raise _RangesIgnored
            for chunk in _require_pace(body.chunks):
                data += chunk
                if start == 0 and len(data) > end:
                    raise _RangesIgnored
                if len(data) > end - start:
                    raise _report_surplus(file)
                if stop.is_set():
                    raise Interrupted
    except Interrupted:
        raise Interrupted(bytes(data)) from None
    if len(data) < end - start:
        raise Interrupted(bytes(data))
    return bytes(data)


def _require_pace(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Pass chunks on; raises `Interrupted` when they come to a crawl."""
    began, arrived = time.monotonic(), 0
    for chunk in chunks:
        arrived += len(chunk)
        yield chunk
        if time.monotonic() - began >= SLOW_S:
            if arrived < SLOW_BYTES:
                raise Interrupted
            began, arrived = time.monotonic(), 0


def _report_surplus(file: SourceFile) -> SourceUnavailable:
    return SourceUnavailable(
        f"The source sends more bytes of {file.path} than the {file.size_bytes} it states; retry later.", file=file.path
    )


def _check(file: SourceFile, part: Path) -> FetchedFile:
    """Hash a complete file and compare it with what the source states; a damaged one is deleted."""
    sha256 = hashlib.sha256()
    git_blob = hashlib.sha1(b"blob %d\x00" % file.size_bytes, usedforsecurity=False)
    with part.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            sha256.update(chunk)
            if file.git_blob is not None:
                git_blob.update(chunk)
    found = sha256.hexdigest()
    is_other = file.sha256 is not None and file.sha256 != found
    is_other = is_other or (file.git_blob is not None and file.git_blob != git_blob.hexdigest())
    if is_other:
        part.unlink()
        raise SourceUnavailable(
            f"{file.path} arrived with other bytes than the source states (SHA-256 {found}); retry later.",
            file=file.path,
            found_sha256=found,
        )
    return FetchedFile(file.path, file.size_bytes, found)
