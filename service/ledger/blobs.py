"""Blobs: which bytes the ledger counts on.

A row never precedes its bytes: whoever commits has uploaded them. What the sweep (`service.ledger.sweep`) has condemned
is refused, and comes back to life in three moves: `reprieve_blobs` holds the sweep off and hands out a token, the bytes
are uploaded again, and a commit that shows the token takes the condemnation away. `commit_uploaded` does all three.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from sqlalchemy import select, update

from service.errors import BlobCondemned
from service.ledger import locks
from service.ledger.clock import now
from service.ledger.database import Database, Transaction, writes
from service.ledger.tables import Blob

T = TypeVar("T")

#: Digest -> the instant of its reprieve. Another reprieve, or the sweep, makes it worthless.
Reprieves = Mapping[str, dt.datetime]
#: Each further try means that the sweep, or another upload of the same bytes, came in between.
_TRIES = 5


@dataclass(frozen=True)
class OutputFile:
    """A file of a step, in the store under its digest."""

    name: str
    digest: str
    size_bytes: int


def commit_blobs(tx: Transaction, files: Iterable[OutputFile], reprieves: Reprieves | None = None) -> None:
    """Enter blobs that are in the store, and lock their rows; raises `BlobCondemned` for those to upload again."""
    sizes = {file.digest: file.size_bytes for file in files}
    for digest in sorted(sizes):
        tx.connection.execute(
            tx.insert(Blob).values(digest=digest, size_bytes=sizes[digest], created_at=now()).on_conflict_do_nothing()
        )
    locks.lock_blobs(tx, sizes)
    rows = tx.connection.execute(
        select(Blob.digest, Blob.condemned_at, Blob.swept_at)
        .where(Blob.digest.in_(sorted(sizes)), Blob.condemned_at.is_not(None))
        .order_by(Blob.digest)
    ).all()
    refused = [
        row.digest for row in rows if row.swept_at is not None or (reprieves or {}).get(row.digest) != row.condemned_at
    ]
    if refused:
        raise BlobCondemned("The sweep is about to delete these bytes; upload them again.", digests=refused)
    for row in rows:
        tx.connection.execute(update(Blob).where(Blob.digest == row.digest).values(condemned_at=None))


@writes
def reprieve_blobs(tx: Transaction, digests: Iterable[str]) -> Reprieves:
    """Let condemned blobs wait as if condemned only now; return the token of each that is still condemned."""
    wanted = sorted(digests)
    locks.lock_blobs(tx, wanted)
    is_condemned = Blob.digest.in_(wanted), Blob.condemned_at.is_not(None)
    tx.connection.execute(update(Blob).where(*is_condemned).values(condemned_at=now(), swept_at=None))
    rows = tx.connection.execute(select(Blob.digest, Blob.condemned_at).where(*is_condemned))
    return {row.digest: row.condemned_at for row in rows}


def commit_uploaded(
    database: Database,
    commit: Callable[[Reprieves], T],
    upload_again: Callable[[Iterable[str]], object],
    taken: Reprieves | None = None,
) -> T:
    """Run a commit of uploaded blobs; upload again what it refuses as condemned. Raises `BlobCondemned` in the end.

    `taken`: reprieves from before the upload.
    """
    reprieves = dict(taken or {})
    for _ in range(_TRIES - 1):
        try:
            return commit(reprieves)
        except BlobCondemned as error:
            digests = error.details["digests"]
        reprieves.update(reprieve_blobs(database, digests))
        upload_again(digests)
    return commit(reprieves)
