"""The cache of a host: partial downloads that a later attempt resumes, and blobs, bounded by age and by bytes.

Owns where they stand and which of them go. A fetch fills a download's folder and holds it by a lock while it uses it;
`workers.blob_cache` fills `blobs/`. Called by the sweep of every worker, since each host has a cache of its own, by a
worker whose disk is full, and by `edgekiln gc`.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

_DOWNLOADS, _BLOBS = "downloads", "blobs"
_KEY = re.compile(r"[0-9a-f]{64}")
#: What becomes a blob when it is whole.
_PARTIAL = ".part-"
_WORDS = {"download": "partial download, not resumed", "copy": "copy of a blob, not used"}


@dataclass(frozen=True)
class CachedItem:
    """Something in the cache: a folder of partial downloads, a copy of a blob, or part of a copy."""

    kind: Literal["download", "copy", "part"]
    path: Path
    #: What it takes on disk; a file that is written in pieces has holes.
    size_bytes: int
    #: When something was last written to it, or it was last used, as seconds since the epoch.
    used_at_s: float


def make_download_folder(cache_dir: Path, key: str) -> Path:
    """Return the folder in which partial downloads of a step wait for its next attempt, made if need be.

    `key`: a digest, of tenant and step key: the child that downloads sees no other folder.
    """
    folder = download_folder(cache_dir, key)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


def download_folder(cache_dir: Path, key: str) -> Path:
    """Return where the partial downloads of a step would be."""
    return cache_dir / _DOWNLOADS / key


def trim_cache(
    cache_dir: Path, *, max_bytes: int, keep_s: float, dry_run: bool = False
) -> Iterator[tuple[CachedItem, str]]:
    """Delete what nobody has used for `keep_s`, then the oldest until `max_bytes` are kept; yield each, and why.

    Downloads in use stay, and so does the one used last, however large: it would begin anew at each attempt. A copy may
    go at any time: who uses it has a name of its own for it. A dry run deletes nothing.
    """
    items = [*_read_downloads(cache_dir / _DOWNLOADS), *_read_blobs(cache_dir / _BLOBS)]
    found = sorted(items, key=lambda each: each.used_at_s)
    latest = max((each for each in found if each.kind == "download"), key=lambda each: each.used_at_s, default=None)
    kept_bytes = sum(each.size_bytes for each in found)
    for each in found:
        if each.kind == "part":
            why = "left by a worker that was killed"
        elif each.used_at_s <= time.time() - keep_s:
            why = f"{_WORDS[each.kind]} for long"
        elif kept_bytes > max_bytes and each is not latest:
            why = f"{_WORDS[each.kind].partition(',')[0]}, more than the cache may hold"
        else:
            continue
        if _delete(each, dry_run):
            kept_bytes -= each.size_bytes
            yield each, why


def _read_downloads(root: Path) -> Iterator[CachedItem]:
    with suppress(FileNotFoundError):
        for folder in root.iterdir():
            if folder.is_symlink() or not _KEY.fullmatch(folder.name):
                continue
            # A fetch that ends takes its folder away.
            with suppress(FileNotFoundError):
                stats = [folder.stat(), *(path.lstat() for path in folder.rglob("*"))]
                size_bytes = sum(stat.st_blocks * 512 for stat in stats)
                yield CachedItem("download", folder, size_bytes, max(stat.st_mtime for stat in stats))


def _read_blobs(root: Path) -> Iterator[CachedItem]:
    for path in root.glob("*/*"):
        kind: Literal["copy", "part"] = "part" if path.name.startswith(_PARTIAL) else "copy"
        if kind == "part" or _KEY.fullmatch(path.name):
            with suppress(FileNotFoundError):
                stat = path.lstat()
                yield CachedItem(kind, path, stat.st_blocks * 512, stat.st_mtime)


def _delete(item: CachedItem, dry_run: bool) -> bool:
    """Delete something unless it is in use; return whether it went, or would."""
    if item.kind == "copy":
        if not dry_run:
            item.path.unlink(missing_ok=True)
        return True
    # A download is held by its fetch, half a blob by the lock of its folder.
    held = item.path if item.kind == "download" else item.path.parent
    try:
        descriptor = os.open(held, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not dry_run and item.kind == "part":
            item.path.unlink(missing_ok=True)
        elif not dry_run:
            # Whoever opened it meanwhile sees that it is gone when the lock is free.
            shutil.rmtree(item.path, ignore_errors=True)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True
