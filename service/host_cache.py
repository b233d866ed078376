"""The cache of a host: partial downloads that a later attempt resumes, bounded by age and by bytes.

Owns which of them go; `workers.fetch` fills the folders and holds each by a lock while it uses it. Called by the sweep
of every worker, since each host has a cache of its own, and by `edgekiln gc`.
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

_DOWNLOADS = "downloads"
_KEY = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class CachedDownload:
    """A folder of partial downloads."""

    path: Path
    #: What it takes on disk; a file that is written in pieces has holes.
    size_bytes: int
    #: When something was last written to it, as seconds since the epoch.
    used_at_s: float


def trim_cache(
    cache_dir: Path, *, max_bytes: int, keep_s: float, dry_run: bool = False
) -> Iterator[tuple[CachedDownload, str]]:
    """Delete what nobody has used for `keep_s`, then the oldest until `max_bytes` are kept; yield each, and why.

    What is in use stays, and so does the one used last, however large: it would begin anew at each attempt. A dry run
    deletes nothing.
    """
    found = sorted(_read_downloads(cache_dir / _DOWNLOADS), key=lambda each: each.used_at_s)
    kept_bytes = sum(each.size_bytes for each in found)
    for each in found:
        if each.used_at_s <= time.time() - keep_s:
            why = "partial download, not resumed for long"
        elif kept_bytes > max_bytes and each is not found[-1]:
            why = "partial download, more than the cache may hold"
        else:
            continue
        if _delete(each.path, dry_run):
            kept_bytes -= each.size_bytes
            yield each, why


def _read_downloads(root: Path) -> Iterator[CachedDownload]:
    with suppress(FileNotFoundError):
        for folder in root.iterdir():
            if folder.is_symlink() or not _KEY.fullmatch(folder.name):
                continue
            # A fetch that ends takes its folder away.
            with suppress(FileNotFoundError):
                stats = [folder.stat(), *(path.lstat() for path in folder.rglob("*"))]
                size_bytes = sum(stat.st_blocks * 512 for stat in stats)
                yield CachedDownload(folder, size_bytes, max(stat.st_mtime for stat in stats))


def _delete(folder: Path, dry_run: bool) -> bool:
    """Delete a folder unless a fetch holds it; return whether it went, or would."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not dry_run:
            # Whoever opened it meanwhile sees that it is gone when the lock is free.
            shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True
