"""Blobs that this host has had: what one of its workers fetched or made, the others need not fetch.

Owns how a blob gets from the cache or the store to a step's folder, and how the host's workers do not fetch one twice
at once; `service.host_cache` owns the bounds. Nothing in it is trusted: every use checks the digest, so that damage, a
crash or a power cut costs a download. A store on the same disk needs no cache: it gives its own files. Used by
`workers.transfer`.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from service.errors import BlobCorrupt, BlobMissing, DiskFull, StoreUnavailable
from service.host_cache import trim_cache
from service.storage import ObjectStore, blob_key
from service.storage.folder import FolderStore

log = logging.getLogger(__name__)

#: Between two looks at a blob that another worker is fetching.
_PAUSE_S = 0.1


class BlobCache:
    """A host's copies of blobs in `store`, below `cache_dir`; safe between threads, workers and crashes."""

    def __init__(self, cache_dir: Path, store: ObjectStore, max_bytes: int) -> None:
        cache_dir.mkdir(parents=True, exist_ok=True)
        self._cache_dir = cache_dir
        self._store = store
        self._max_bytes = max_bytes
        # Its layout is a folder store's; that it may lose any object at any time is the only difference.
        self._copies = None if store.shares_disk_with(cache_dir) else FolderStore(cache_dir)

    def get_file(self, digest: str, path: Path, *, is_read_only: bool, check: Callable[[], object]) -> bool:
        """Bring a blob to `path`, as `ObjectStore.get_file`; return whether it came from the cache.

        `check` is called while another worker of the host fetches the same blob: what it raises ends the waiting.
        """
        if self._copies is None:
            self._store.get_file(blob_key(digest), path, digest, is_read_only=is_read_only)
            return False
        if self._give(self._copies, digest, path, is_read_only):
            return True
        with self._lock(digest, check):
            if self._give(self._copies, digest, path, is_read_only):
                return True
            self._fetch(digest, path)
            self._enter(digest, path, may_link=is_read_only)
        return False

    def keep(self, digest: str, path: Path) -> None:
        """Remember a blob that was made here and stored; nobody writes to the file any more."""
        if self._copies is not None:
            self._enter(digest, path, may_link=True)

    def _give(self, copies: FolderStore, digest: str, path: Path, is_read_only: bool) -> bool:
        key = blob_key(digest)
        try:
            copies.get_file(key, path, digest, is_read_only=is_read_only)
        except BlobMissing:
            return False
        except BlobCorrupt as error:
            log.warning("a copy on this host is damaged and is fetched again: %s", error)
            with suppress(StoreUnavailable):
                copies.delete(key)
            return False
        except (DiskFull, StoreUnavailable) as error:
            # On a full disk the fetch makes room for itself.
            log.warning("the cache cannot give a copy: %s", error)
            return False
        with suppress(OSError):  # trimmed meanwhile, but the step has it
            os.utime(self._cache_dir / key)
        return True

    def _fetch(self, digest: str, path: Path) -> None:
        try:
            self._store.get_file(blob_key(digest), path, digest)
        except DiskFull:
            # What is kept for later must not stand in the way of work.
            if not list(trim_cache(self._cache_dir, max_bytes=0, keep_s=float("inf"))):
                raise
            self._store.get_file(blob_key(digest), path, digest)

    def _enter(self, digest: str, path: Path, *, may_link: bool) -> None:
        """Take a file into the cache, by a second name where nobody will write to it; without it, work goes on."""
        target = self._cache_dir / blob_key(digest)
        partial = target.with_name(f".part-{uuid.uuid4().hex}")
        try:
            if path.stat().st_size > self._max_bytes:
                return
            target.parent.mkdir(parents=True, exist_ok=True)
            if may_link:
                os.link(path, partial)
            else:
                shutil.copyfile(path, partial)
            os.utime(partial)
            partial.replace(target)
        except OSError as error:
            log.warning("%s is not kept on this host: %s", digest, error)
        finally:
            # A rename onto another name of the same file leaves both.
            partial.unlink(missing_ok=True)

    @contextmanager
    def _lock(self, digest: str, check: Callable[[], object]) -> Iterator[None]:
        """Hold the folder of the blobs whose digests begin alike; the kernel drops the lock with the process.

        Where there is no room even for a folder, two may fetch the same.
        """
        folder = (self._cache_dir / blob_key(digest)).parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            log.warning("the cache cannot be used: %s", error)
            yield
            return
        try:
            while not _try_lock(descriptor):
                check()
                time.sleep(_PAUSE_S)
            yield
        finally:
            os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
