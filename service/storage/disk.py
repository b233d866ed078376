"""Errors of the local disk, told as sentences.

Owns the mapping from `OSError` to the tree in `service.errors`, for the folder store and for files that are
copied out of any store.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from service.errors import DiskFull, StoreUnavailable

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn `OSError` below this point into `DiskFull` or `StoreUnavailable` that name `folder`."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise DiskFull(
                f"No space left in {folder}. Free some there; the work is taken up again.", folder=str(folder)
            ) from error
        raise StoreUnavailable(
            f"{folder} cannot be used: {error.strerror or error}. Check that it is mounted and that this process "
            "may read and write it.",
            folder=str(folder),
        ) from error
