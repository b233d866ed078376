"""How strangers' bytes get into the store.

Owns two rules. They pass through a file without a name, so that nothing is left of it whatever happens. And they are
always written, even where the store has them already: how long an upload takes must not tell whether another tenant has
the same bytes. Called by the routes of uploads, and by `service.api.assembly`.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

from service.api.context import Context
from service.ledger.blobs import OutputFile, Reprieves, commit_uploaded, reprieve_blobs
from service.storage import blob_key
from service.storage.disk import disk_errors
from service.user_files import UPLOAD_FILE

T = TypeVar("T")


@dataclass(frozen=True)
class Mark:
    """A place in a spool to return to."""

    size_bytes: int
    digest: hashlib._Hash


class Spool:
    """Bytes on their way, digested as they come."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._digest = hashlib.sha256()
        self.size_bytes = 0

    def write(self, data: bytes) -> None:
        """Take the next bytes."""
        self._digest.update(data)
        self.size_bytes += self._stream.write(data)

    def mark(self) -> Mark:
        """Return where it stands."""
        return Mark(self.size_bytes, self._digest.copy())

    def return_to(self, mark: Mark) -> None:
        """Forget what came after a mark."""
        self._stream.seek(mark.size_bytes)
        self._stream.truncate()
        self.size_bytes, self._digest = mark.size_bytes, mark.digest.copy()

    @property
    def digest(self) -> str:
        """SHA-256 of what came so far."""
        return self._digest.hexdigest()

    def keep(self, context: Context, commit: Callable[[OutputFile, Reprieves], T]) -> T:
        """Put the bytes into the store, then run the commit that enters them into the ledger."""
        self._stream.flush()
        file = OutputFile(UPLOAD_FILE, self.digest, self.size_bytes)
        path = Path(f"/proc/self/fd/{self._stream.fileno()}")

        def store(_digests: object = None) -> None:
            context.store.put_file(blob_key(file.digest), path, file.digest, anew=True)

        # Before, so that bytes which the sweep was about to delete take no longer than others.
        taken = reprieve_blobs(context.database, [file.digest])
        store()
        return commit_uploaded(context.database, lambda reprieves: commit(file, reprieves), store, taken)


@contextmanager
def open_spool(context: Context) -> Iterator[Spool]:
    """Open an empty spool on this host's disk; raises `DiskFull`."""
    with upload_disk(context) as folder, tempfile.TemporaryFile(dir=folder) as stream:
        yield Spool(stream)


@contextmanager
def upload_disk(context: Context) -> Iterator[Path]:
    """Yield the folder of this host where strangers' bytes may lie for a while; raises `DiskFull`."""
    folder = context.settings.cache_dir / "uploads"
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
