"""What only the folder store promises: durability, and a full disk told as one."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from service.errors import BlobMissing, DiskFull, StoreUnavailable
from service.storage import ObjectStore, blob_key, digest_bytes, digest_file, open_store, read_object
from service.storage.folder import FolderStore


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(root: Path) -> ObjectStore:
    return open_store(root.as_uri())


@contextmanager
def file_size_limit(size_bytes: int) -> Iterator[None]:
    """Make the kernel refuse longer files: the nearest thing to a full disk that needs no mount."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_refused_write_is_disk_full_and_leaves_nothing(store: ObjectStore, root: Path) -> None:
    data = b"x" * 100_000
    key = blob_key(digest_bytes(data))
    with file_size_limit(50_000), pytest.raises(DiskFull) as caught:
        store.put_bytes(key, data)
    assert caught.value.retryable
    assert [path for path in root.rglob("*") if path.is_file()] == []
    assert store.put_bytes(key, data) is True


def test_copy_to_a_full_disk_is_disk_full_and_leaves_nothing(store: ObjectStore, tmp_path: Path) -> None:
    data = b"x" * 100_000
    key = blob_key(digest_bytes(data))
    store.put_bytes(key, data)
    target = tmp_path / "inputs" / "model"
    target.parent.mkdir()
    with file_size_limit(50_000), pytest.raises(DiskFull):
        store.get_file(key, target, digest_bytes(data))
    assert list(target.parent.iterdir()) == []


#: Run in a mount namespace of its own: a disk of 1 MiB that is really full.
_ON_A_FULL_DISK = """
import subprocess, sys
from pathlib import Path
from service.errors import DiskFull
from service.storage import blob_key, digest_bytes, open_store
disk = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], check=True)
store = open_store(disk.as_uri())
kept = b"k" * 300_000
store.put_bytes(blob_key(digest_bytes(kept)), kept)
large = b"x" * 1_000_000
try:
    store.put_bytes(blob_key(digest_bytes(large)), large)
except DiskFull:
    print([path.name for path in disk.rglob("*") if path.is_file()] == [digest_bytes(kept)])
"""


def test_really_full_disk(tmp_path: Path) -> None:
    unshare = ["unshare", "--map-root-user", "--mount"]
    try:
        allowed = subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        allowed = False
    if not allowed:
        pytest.skip("This host does not allow mount namespaces.")
    result = subprocess.run(
        [*unshare, sys.executable, "-c", _ON_A_FULL_DISK, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    assert result.stdout.strip() == "True"


def test_object_is_flushed_before_it_is_named_and_its_folders_after(
    store: ObjectStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def note_fsync(handle: int) -> None:
        flushed = Path(f"/proc/self/fd/{handle}").readlink().relative_to(root.parent)
        events.append("file" if ".uploads" in flushed.parts else str(flushed))
        fsync(handle)

    def note_replace(self: Path, target: Path) -> Path:
        events.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "replace", note_replace)
    store.put_bytes("blobs/x", b"data")
    assert events == ["file", "store", "rename", "store/blobs"]


def test_failed_flush_is_not_a_stored_object(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(handle: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(StoreUnavailable, match="Input/output error"):
            store.put_bytes("blobs/x", b"data")
    with pytest.raises(BlobMissing):
        store.stat("blobs/x")


def test_object_damaged_without_a_change_of_size_is_written_again(store: ObjectStore, root: Path) -> None:
    data = b"0123456789"
    key = blob_key(digest_bytes(data))
    store.put_bytes(key, data)
    (root / key).write_bytes(b"9876543210")
    assert store.put_bytes(key, data) is True
    assert read_object(store, key, digest_bytes(data)) == data


def test_uploads_are_not_objects(store: ObjectStore, root: Path) -> None:
    (root / ".uploads" / "half").write_bytes(b"half")
    assert list(store.list()) == []


def test_root_that_is_a_file_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreUnavailable, match="cannot be used"):
        open_store((tmp_path / "file").as_uri())


def test_what_nobody_changes_is_shared(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "store")
    source, target = tmp_path / "source", tmp_path / "copy"
    source.write_bytes(b"weights")
    key = blob_key(digest_bytes(b"weights"))
    store.put_file(key, source, digest_bytes(b"weights"), is_final=True)
    store.get_file(key, target, digest_bytes(b"weights"), is_read_only=True)
    assert source.stat().st_ino == target.stat().st_ino


def test_what_may_change_is_copied(tmp_path: Path) -> None:
    """Control."""
    store = FolderStore(tmp_path / "store")
    source, target = tmp_path / "source", tmp_path / "copy"
    source.write_bytes(b"weights")
    key = blob_key(digest_bytes(b"weights"))
    store.put_file(key, source, digest_bytes(b"weights"))
    store.get_file(key, target, digest_bytes(b"weights"))
    source.write_bytes(b"changed")
    target.write_bytes(b"changed")
    with store.open(key) as chunks:
        assert b"".join(chunks) == b"weights"


def test_a_file_of_more_than_2_gib_goes_in_and_out_and_is_read_from_its_end(tmp_path: Path) -> None:
    """Sparse, and shared where the disk allows: seconds, and no space."""
    store = FolderStore(tmp_path / "store")
    source, target = tmp_path / "source", tmp_path / "copy"
    size_bytes = 2**31 + 4096
    with source.open("wb") as stream:
        stream.seek(size_bytes - 4)
        stream.write(b"tail")
    sha256, measured_bytes = digest_file(source)
    assert measured_bytes == size_bytes
    key = blob_key(sha256)
    assert store.put_file(key, source, sha256, is_final=True)
    assert store.stat(key).size_bytes == size_bytes
    assert store.get_file(key, target, sha256, is_read_only=True) == size_bytes
    with store.open(key, size_bytes - 6) as chunks:
        assert b"".join(chunks) == b"\0\0tail"
