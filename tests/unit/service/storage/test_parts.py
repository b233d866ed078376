"""Large objects in parts: cut to what servers take, some on their way at once, digested in order."""

from __future__ import annotations

import hashlib
import io
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from service.errors import BlobCorrupt, StoreUnavailable
from service.storage.parts import OpenRange, Part, PartBody, copy_ranges, cut, send_parts

GIB = 1 << 30
PART = 16 << 20
#: Of S3.
LARGEST_PART = 5 * GIB
DATA = random.Random(3).randbytes(10_000)
DIGEST = hashlib.sha256(DATA).hexdigest()


@pytest.mark.parametrize("size_bytes", [1, PART, PART + 1, 5 * GIB + 1, 16 * GIB, 1024 * GIB, 1024 * GIB + 1])
def test_parts_cover_a_file_of_any_size_within_what_servers_take(size_bytes: int) -> None:
    parts = list(cut(size_bytes, PART, 1000))
    assert [part.start for part in parts] == [0, *(part.end for part in parts[:-1])]
    assert parts[-1].end == size_bytes
    assert [part.number for part in parts] == list(range(1, len(parts) + 1))
    assert len(parts) <= 1000
    assert all(part.end - part.start <= LARGEST_PART for part in parts)
    assert all(part.end - part.start >= PART for part in parts[:-1])


def test_a_part_reads_as_a_file_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    with path.open("rb") as stream:
        body = PartBody(stream.fileno(), Part(2, 3, 8))
        assert (len(body), body.read(2), body.tell(), body.read(), body.read()) == (5, b"34", 2, b"567", b"")
        assert (body.seek(0), body.read(1)) == (0, b"3")
        assert (body.seek(0, io.SEEK_END), body.read()) == (5, b"")


@pytest.fixture
def file(tmp_path: Path) -> Iterator[io.FileIO]:
    path = tmp_path / "file"
    path.write_bytes(DATA)
    with path.open("rb", buffering=0) as stream:
        yield stream


def send(file: io.FileIO, call: Callable[[Part, PartBody, bytes], int], sha256: str = DIGEST) -> list[int]:
    parts = cut(len(DATA), 1000)
    return send_parts(file.fileno(), parts, "key", sha256, checksum=hashlib.sha256, send=call, parallel=3)


def test_parts_go_side_by_side_and_are_told_in_order(file: io.FileIO) -> None:
    together = threading.Barrier(3, timeout=30)

    def keep(part: Part, body: PartBody, checksum: bytes) -> int:
        if part.number <= 3:
            together.wait()
        data = body.read()
        assert data == DATA[part.start : part.end]
        assert checksum == hashlib.sha256(data).digest()
        return part.number

    assert send(file, keep) == list(range(1, 11))


def test_a_file_with_another_digest_is_found_before_anybody_completes_it(file: io.FileIO) -> None:
    with pytest.raises(BlobCorrupt):
        send(file, lambda part, body, checksum: part.number, hashlib.sha256(b"other").hexdigest())


def test_no_part_is_under_way_once_one_has_failed(file: io.FileIO) -> None:
    """Whoever aborts an upload while a part is being sent leaves that part behind."""
    running, started = set(), []

    def fail(part: Part, body: PartBody, checksum: bytes) -> int:
        started.append(part.number)
        running.add(part.number)
        try:
            if part.number == 2:
                raise StoreUnavailable("away")
            return part.number
        finally:
            running.discard(part.number)

    with pytest.raises(StoreUnavailable):
        send(file, fail)
    assert running == set()
    assert len(started) < 10, "the rest was not begun"


@contextmanager
def pieces(start: int, end: int) -> Iterator[Iterator[bytes]]:
    yield (DATA[at : min(at + 300, end)] for at in range(start, end, 300))


def copy(tmp_path: Path, open_range: OpenRange, sha256: str = DIGEST, size_bytes: int = len(DATA)) -> bytes:
    target = tmp_path / "copy"
    assert copy_ranges(open_range, "key", target, sha256, cut(size_bytes, 1000), parallel=3) == size_bytes
    return target.read_bytes()


def test_ranges_make_a_file(tmp_path: Path) -> None:
    assert copy(tmp_path, pieces) == DATA


def test_a_range_that_breaks_off_is_taken_up_where_it_ended(tmp_path: Path) -> None:
    asked: list[tuple[int, int]] = []

    @contextmanager
    def break_off(start: int, end: int) -> Iterator[Iterator[bytes]]:
        asked.append((start, end))

        def chunks() -> Iterator[bytes]:
            yield DATA[start : min(start + 400, end)]
            if end - start > 400:
                raise StoreUnavailable("broke off")

        yield chunks()

    assert copy(tmp_path, break_off) == DATA
    assert {(0, 1000), (400, 1000), (800, 1000)} <= set(asked)


def test_a_range_that_brings_nothing_is_given_up(tmp_path: Path) -> None:
    @contextmanager
    def refuse(start: int, end: int) -> Iterator[Iterator[bytes]]:
        raise StoreUnavailable("away")
        yield

    with pytest.raises(StoreUnavailable, match="away"):
        copy(tmp_path, refuse)
    assert list(tmp_path.iterdir()) == []


def test_an_object_that_is_shorter_than_it_was_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable, match="before its size"):
        copy(tmp_path, lambda start, end: pieces(start, min(end, 9500)))
    assert list(tmp_path.iterdir()) == []


def test_other_bytes_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(BlobCorrupt):
        copy(tmp_path, pieces, hashlib.sha256(b"other").hexdigest())
    assert list(tmp_path.iterdir()) == []
