"""Where partial downloads wait for a step's next attempt on this host.

Owns the folders below one root, each named by a digest of tenant and step key, and their age. The child that downloads
is confined to its own folder, so its worker calls this before it starts one; what the folder holds is the business of
`workers.fetch.download`.
"""

from __future__ import annotations

import re
import shutil
import time
from contextlib import suppress
from pathlib import Path

#: Partial downloads that nobody resumed for this long are deleted.
STALE_S = 7 * 24 * 3600

_KEY = re.compile(r"[0-9a-f]{64}")


def prepare_folder(root: Path, key: str) -> Path:
    """Return the folder of the step with this key, made if need be; folders that nobody resumed for a week go."""
    folder = root / key
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for other in root.iterdir():
        if other.name == key or other.is_symlink() or not _KEY.fullmatch(other.name):
            continue
        with suppress(FileNotFoundError):
            if other.stat().st_mtime < time.time() - STALE_S:
                shutil.rmtree(other, ignore_errors=True)
    return folder
