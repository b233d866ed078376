"""The whole ledger as lines of text, from either database and into either.

Owns how rows are written down and read again, and what a restored ledger must change about them. Called by
`service.backup`; decides nothing about blobs.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from alembic.runtime.migration import MigrationContext
from sqlalchemy import Column, Connection, insert, inspect, literal, select, table, update
from sqlalchemy import column as plain_column

from service.ledger.base import Base, Document
from service.ledger.clock import Instant, now
from service.ledger.database import Transaction, reads, writes
from service.ledger.states import AttemptState, StepState
from service.ledger.tables import Attempt, Step

#: Rows that are held in memory at once.
_BATCH = 500
#: No step is claimed so often between a backup and the loss of what was backed up.
_TOKEN_LEAP = 1_000_000
_INSTANT, _DOCUMENT = "instant", "document"
_TYPES = {_INSTANT: Instant(), _DOCUMENT: Document()}

Row = dict[str, Any]


@reads
def write_rows(connection: Connection, stream: TextIO) -> tuple[str, dict[str, int]]:
    """Write every row of one consistent snapshot; return the schema's revision, and table name -> number of rows.

    A line is a table's head (`table`, `columns`) or a row of the table whose head came last.
    """
    # Where the transaction is repeated, what the first try has written does not count.
    stream.seek(0)
    stream.truncate()
    counts = {}
    for each in Base.metadata.sorted_tables:
        columns = {column.name: _kind(column) for column in each.columns}
        _write_line(stream, {"table": each.name, "columns": columns})
        counts[each.name] = 0
        for row in connection.execute(select(each).execution_options(yield_per=_BATCH)):
            _write_line(stream, [_encode(value) for value in row])
            counts[each.name] += 1
    return _read_revision(connection), counts


def read_rows(path: Path, table_name: str) -> Iterator[Row]:
    """Yield the rows of one table of a written ledger."""
    for name, columns, values in _read_lines(path):
        if name == table_name:
            yield _decode(columns, values)


@reads
def read_revision(connection: Connection) -> str:
    """Return the revision of a ledger's schema; empty where there is none yet."""
    return _read_revision(connection)


@reads
def is_empty(connection: Connection) -> bool:
    """Whether a ledger, whatever its schema, holds no row."""
    names = set(inspect(connection).get_table_names()) & Base.metadata.tables.keys()
    return all(
        connection.execute(select(literal(1)).select_from(table(name)).limit(1)).first() is None for name in names
    )


@writes
def load_rows(tx: Transaction, path: Path) -> dict[str, int]:
    """Insert every row of a written ledger into an empty one with the same schema, all or none; return the numbers."""
    counts: dict[str, int] = {}
    for name, columns, values in _read_batches(path):
        target = table(name, *(plain_column(each, _TYPES.get(kind)) for each, kind in columns.items()))
        tx.connection.execute(insert(target), [_decode(columns, row) for row in values])
        counts[name] = counts.get(name, 0) + len(values)
    _outdate_claims(tx)
    return counts


def _outdate_claims(tx: Transaction) -> None:
    """End every lease, and make worthless every claim that a worker of the lost ledger may still hold.

    Tokens go on from where the backup was made, and that worker may hold one that was given out later. An attempt keeps
    its step's token, so that the next claim finds it and calls it lost.
    """
    tx.connection.execute(update(Step).where(Step.state == StepState.RUNNING).values(lease_expires_at=now()))
    is_open = Step.finalized_at.is_(None)
    open_ids = select(Step.id).where(is_open)
    tx.connection.execute(
        update(Attempt)
        .where(Attempt.state == AttemptState.RUNNING, Attempt.step_id.in_(open_ids))
        .values(token=Attempt.token + _TOKEN_LEAP)
    )
    tx.connection.execute(update(Step).where(is_open).values(token=Step.token + _TOKEN_LEAP))


def _read_revision(connection: Connection) -> str:
    return MigrationContext.configure(connection).get_current_revision() or ""


def _kind(column: Column[Any]) -> str:
    if isinstance(column.type, Instant):
        return _INSTANT
    return _DOCUMENT if isinstance(column.type, Document) else "plain"


def _write_line(stream: TextIO, document: Any) -> None:
    stream.write(json.dumps(document, ensure_ascii=False, separators=(",", ":")) + "\n")


def _encode(value: Any) -> Any:
    return value.isoformat() if isinstance(value, dt.datetime) else value


def _decode(columns: dict[str, str], values: list[Any]) -> Row:
    row = dict(zip(columns, values, strict=True))
    for name, kind in columns.items():
        if kind == _INSTANT and row[name] is not None:
            row[name] = dt.datetime.fromisoformat(row[name])
    return row


def _read_lines(path: Path) -> Iterator[tuple[str, dict[str, str], list[Any]]]:
    """Yield table name, columns and values of every row."""
    name, columns = "", {}
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            document = json.loads(line)
            if isinstance(document, dict):
                name, columns = document["table"], document["columns"]
            else:
                yield name, columns, document


def _read_batches(path: Path) -> Iterator[tuple[str, dict[str, str], list[list[Any]]]]:
    """Yield rows of one table together, some hundreds at a time."""
    lines = _read_lines(path)
    batch = list(islice(lines, _BATCH))
    while batch:
        name, columns, _ = batch[0]
        same = [values for other, _, values in batch if other == name]
        yield name, columns, same
        # Tables follow one another: what is left of the batch belongs to the next ones.
        rest = batch[len(same) :]
        batch = [*rest, *islice(lines, _BATCH - len(rest))]
