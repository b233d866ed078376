"""A host's blobs: fetched once, whatever its workers do at once, and never trusted."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from service.errors import BlobMissing, DiskFull, LeaseLost
from service.host_cache import trim_cache
from service.storage import blob_key, digest_bytes
from service.storage.folder import FolderStore
from workers.blob_cache import BlobCache

DATA = b"weights" * 1000
DIGEST = digest_bytes(DATA)
MIB = 1024**2


class FarStore(FolderStore):
    """A store that is not on this host's disk, and remembers what was fetched."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.fetched: list[str] = []
        self.before: Callable[[], None] = lambda: None

    def shares_disk_with(self, folder: Path) -> bool:
        return False

    def get_file(self, key: str, path: Path, sha256: str, *, is_read_only: bool = False) -> int:
        self.fetched.append(sha256)
        self.before()
        return super().get_file(key, path, sha256)


@pytest.fixture
def store(tmp_path: Path) -> FarStore:
    store = FarStore(tmp_path / "far")
    store.put_bytes(blob_key(DIGEST), DATA)
    return store


@pytest.fixture
def use(tmp_path: Path, store: FarStore) -> Callable[..., tuple[Path, bool]]:
    """Play another step of another worker each time; return its file and whether the cache had it."""
    used = iter(range(100))

    def use(
        digest: str = DIGEST, *, is_read_only: bool = True, max_bytes: int = MIB, check: Callable[[], object] = list
    ) -> tuple[Path, bool]:
        path = tmp_path / f"step-{next(used)}" / "model"
        path.parent.mkdir()
        cache = BlobCache(tmp_path / "cache", store, max_bytes)
        return path, cache.get_file(digest, path, is_read_only=is_read_only, check=check)

    return use


Use = Callable[..., tuple[Path, bool]]


def cached(tmp_path: Path) -> Path:
    return tmp_path / "cache" / blob_key(DIGEST)


@pytest.mark.parametrize("is_read_only", [True, False])
def test_a_blob_is_fetched_once(use: Use, store: FarStore, is_read_only: bool) -> None:
    files = [use(is_read_only=is_read_only) for _ in range(3)]
    assert [path.read_bytes() for path, _ in files] == [DATA] * 3
    assert [was_cached for _, was_cached in files] == [False, True, True]
    assert store.fetched == [DIGEST]


def test_without_the_cache_it_is_fetched_each_time(use: Use, store: FarStore) -> None:
    """Control."""
    assert [use(max_bytes=0)[1] for _ in range(3)] == [False] * 3
    assert store.fetched == [DIGEST] * 3


def test_what_was_made_here_is_not_fetched(use: Use, store: FarStore, tmp_path: Path) -> None:
    made = tmp_path / "output"
    made.write_bytes(DATA)
    BlobCache(tmp_path / "cache", store, MIB).keep(DIGEST, made)
    made.unlink()
    assert use()[0].read_bytes() == DATA
    assert store.fetched == []


def test_workers_that_want_it_at_once_fetch_it_once(use: Use, store: FarStore) -> None:
    together = threading.Barrier(4, timeout=30)

    def want(_number: int) -> bytes:
        together.wait()
        return use()[0].read_bytes()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(want, range(4))) == [DATA] * 4
    assert store.fetched == [DIGEST]


def test_a_damaged_copy_is_fetched_again(use: Use, store: FarStore, tmp_path: Path) -> None:
    use(is_read_only=False)
    cached(tmp_path).write_bytes(DATA[:-1] + b"!")
    assert use()[0].read_bytes() == DATA
    assert use()[0].read_bytes() == DATA
    assert store.fetched == [DIGEST] * 2


def test_a_step_that_may_write_to_its_input_writes_to_its_own(use: Use, store: FarStore, tmp_path: Path) -> None:
    for _ in range(2):
        path, _was_cached = use(is_read_only=False)
        path.write_bytes(b"changed")
    assert use()[0].read_bytes() == DATA
    assert store.fetched == [DIGEST]
    assert use()[0].stat().st_ino == cached(tmp_path).stat().st_ino, "control: others share one file"


def test_a_missing_blob_is_missing_though_the_host_waits_for_nobody(use: Use, tmp_path: Path) -> None:
    with pytest.raises(BlobMissing):
        use(digest_bytes(b"never stored"))
    assert list((tmp_path / "cache").glob("blobs/*/*")) == []


def test_a_store_on_the_same_disk_gives_its_own_files(tmp_path: Path) -> None:
    near = FolderStore(tmp_path / "near")
    near.put_bytes(blob_key(DIGEST), DATA)
    cache = BlobCache(tmp_path / "cache", near, MIB)
    assert cache.get_file(DIGEST, tmp_path / "input", is_read_only=True, check=list) is False
    cache.keep(DIGEST, tmp_path / "input")
    assert (tmp_path / "input").stat().st_ino == (near.root / blob_key(DIGEST)).stat().st_ino
    assert list((tmp_path / "cache").rglob("*")) == []


def test_a_use_keeps_a_copy_and_the_bound_lets_the_oldest_go(use: Use, store: FarStore, tmp_path: Path) -> None:
    other = digest_bytes(b"x" * 5000)
    store.put_bytes(blob_key(other), b"x" * 5000)
    for digest in (DIGEST, other):
        use(digest)
        os.utime(tmp_path / "cache" / blob_key(digest), (1, 1))
    use(DIGEST)
    trimmed = list(trim_cache(tmp_path / "cache", max_bytes=10_000, keep_s=float("inf")))
    assert [item.path.name for item, _ in trimmed] == [other]
    assert [item.path.name for item, _ in trim_cache(tmp_path / "cache", max_bytes=0, keep_s=float("inf"))] == [DIGEST]


def test_a_full_disk_takes_from_the_cache_first(use: Use, store: FarStore, tmp_path: Path) -> None:
    other = digest_bytes(b"other")
    store.put_bytes(blob_key(other), b"other")
    use(other)

    def refuse_while_something_is_kept() -> None:
        if any((tmp_path / "cache").glob("blobs/*/*")):
            raise DiskFull("full")

    store.before = refuse_while_something_is_kept
    assert use()[0].read_bytes() == DATA
    store.delete(blob_key(other))


def test_a_copy_that_finds_no_room_makes_some(
    use: Use, store: FarStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy is in the cache, and the step's own file of it fills the disk."""
    use()
    give = FolderStore.get_file
    refused: list[str] = []

    def refuse_while_something_is_kept(self: FolderStore, key: str, *rest: Any, **options: Any) -> int:
        if any((tmp_path / "cache").glob("blobs/*/*")):
            refused.append(key)
            raise DiskFull("full")
        return give(self, key, *rest, **options)

    monkeypatch.setattr(FolderStore, "get_file", refuse_while_something_is_kept)
    path, was_cached = use(is_read_only=False)
    assert (path.read_bytes(), was_cached) == (DATA, False)
    assert len(refused) == 3, "by the cache, by the cache once more under its lock, and by the store"


def test_a_disk_without_room_for_a_folder_costs_the_cache_and_nothing_else(
    use: Use, store: FarStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mkdir = Path.mkdir

    def refuse(path: Path, *rest: Any, **options: Any) -> None:
        if path.is_relative_to(tmp_path / "cache" / "blobs"):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        mkdir(path, *rest, **options)

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert [use()[0].read_bytes() for _ in range(2)] == [DATA] * 2
    assert store.fetched == [DIGEST] * 2


def test_a_disk_that_is_full_without_the_cache_is_full(use: Use, store: FarStore) -> None:
    def refuse() -> None:
        raise DiskFull("full")

    store.before = refuse
    with pytest.raises(DiskFull):
        use()


#: Fetches for ever, holding the host's lock.
_HOLDER = """
import sys, time
from pathlib import Path
from service.storage import blob_key
from service.storage.folder import FolderStore
from workers.blob_cache import BlobCache

class Far(FolderStore):
    def shares_disk_with(self, folder):
        return False
    def get_file(self, key, path, sha256, *, is_read_only=False):
        print("fetching", flush=True)
        sys.stdin.read()

root = Path(sys.argv[1])
path = root / "held" / "model"
path.parent.mkdir()
BlobCache(root / "cache", Far(root / "far"), 2**20).get_file(sys.argv[2], path, is_read_only=True, check=list)
"""


def test_who_waits_for_a_killed_worker_goes_on(use: Use, store: FarStore, tmp_path: Path) -> None:
    command = [sys.executable, "-c", _HOLDER, str(tmp_path), DIGEST]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "fetching\n"

        def lose() -> None:
            raise LeaseLost("taken over")

        with pytest.raises(LeaseLost):
            use(check=lose)
        left = cached(tmp_path).with_name(".part-left")
        left.write_bytes(b"half")
        assert list(trim_cache(tmp_path / "cache", max_bytes=MIB, keep_s=60)) == [], "somebody is writing there"
        path, was_cached = use(check=lambda: holder.send_signal(signal.SIGKILL))
    assert (path.read_bytes(), was_cached) == (DATA, False)
    assert [item.path for item, _ in trim_cache(tmp_path / "cache", max_bytes=MIB, keep_s=60)] == [left]
