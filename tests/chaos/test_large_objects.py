"""Objects of more than 5 GiB, which no single request of S3 takes: up, down and from the middle, in bounded memory.

The long form (`make chaos`) uses a sparse file of that size; the short one a small file, cut as large ones are.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from service.storage import ObjectStore, blob_key, digest_file, open_store
from service.storage.parts import cut
from tests.chaos import scale
from tests.services import s3_store

TAIL = b"the end"
#: Of the short form: the parts of a file in as many as 4.
_FEW_PARTS = 4
#: What transfers may hold in memory, whatever the size: pieces of parts, buffers of connections.
_MEMORY_BYTES = 200 << 20


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A file that takes no disk, with something at its end."""
    path = tmp_path / "source"
    with path.open("wb") as stream:
        stream.truncate(scale.OBJECT_BYTES)
        stream.seek(-len(TAIL), os.SEEK_END)
        stream.write(TAIL)
    return path


@pytest.fixture
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    if scale.OBJECT_BYTES <= 5 << 30:
        monkeypatch.setattr("service.storage.s3._MAX_PARTS", _FEW_PARTS)
    if request.param == "folder":
        yield open_store((tmp_path / "store").as_uri())
        return
    with s3_store(tmp_path / "server") as store:
        yield store


@contextmanager
def bounded_memory() -> Iterator[None]:
    """Fail when this process grows by more than transfers may."""
    Path("/proc/self/clear_refs").write_text("5")
    before = read_memory("VmRSS")
    yield
    assert read_memory("VmHWM") - before < _MEMORY_BYTES


def read_memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


@pytest.mark.parametrize(
    ("store", "is_final"),
    [("folder", True), ("folder", False), ("s3", False)],
    ids=["shared", "copied", "s3"],
    indirect=["store"],
)
def test_an_object_of_any_size_goes_up_and_comes_down(
    store: ObjectStore, source: Path, tmp_path: Path, is_final: bool
) -> None:
    sha256, size_bytes = digest_file(source)
    key, target = blob_key(sha256), tmp_path / "copy"
    with bounded_memory():
        assert store.put_file(key, source, sha256, is_final=is_final) is True
        source.unlink()
        assert store.stat(key).size_bytes == size_bytes == scale.OBJECT_BYTES
        with store.open(key, size_bytes - len(TAIL) - 2) as chunks:
            assert b"".join(chunks) == b"\0\0" + TAIL
        with store.open(key, size_bytes // 2, size_bytes // 2 + 3) as chunks:
            assert b"".join(chunks) == b"\0\0\0"
        assert store.get_file(key, target, sha256, is_read_only=is_final) == size_bytes
    assert store.abort_stale_uploads(-3600) == 0
    with target.open("rb") as stream:
        stream.seek(-len(TAIL), os.SEEK_END)
        assert stream.read() == TAIL


def test_it_needs_parts_that_are_larger_than_usual() -> None:
    """Control: with parts of the usual size there would be more than a server takes."""
    usual: Callable[[int], int] = lambda size_bytes: len(list(cut(size_bytes, 16 << 20)))  # noqa: E731
    assert usual(1 << 40) > 10_000
    assert len(list(cut(1 << 40, 16 << 20, 1000))) <= 1000
