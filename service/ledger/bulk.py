"""Rows of several tables in one statement, where the database can: PostgreSQL waits for each statement's answer, SQLite
for none. Called where a transaction is waited for; knows no table.
"""

from __future__ import annotations

import datetime as dt
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Insert, bindparam, column, func, insert, select

from service.ledger.base import Base, Document
from service.ledger.database import Transaction

Rows = Sequence[Mapping[str, Any]]


def insert_together(tx: Transaction, *parts: tuple[type[Base], Rows]) -> None:
    """Insert rows of several tables, parents before children; all rows of a part have the same columns."""
    parts = tuple((table, rows) for table, rows in parts if rows)
    if not parts:
        return
    if not tx.is_postgresql:
        for table, rows in parts:
            tx.connection.execute(insert(table), list(rows))
        return
    shape = tuple((table, tuple(rows[0])) for table, rows in parts)
    documents = {f"rows_{number}": _encode(rows) for number, (_, rows) in enumerate(parts)}
    tx.connection.execute(_compose(shape), documents)


def _encode(rows: Rows) -> list[dict[str, Any]]:
    return [
        {name: value.isoformat() if isinstance(value, dt.datetime) else value for name, value in row.items()}
        for row in rows
    ]


@functools.lru_cache(maxsize=32)
def _compose(shape: tuple[tuple[type[Base], tuple[str, ...]], ...]) -> Insert:
    """Return the statement that takes each part's rows as one document; foreign keys are checked at its end."""
    inserts = []
    for number, (table, names) in enumerate(shape):
        columns = table.__table__.c
        records = func.jsonb_to_recordset(bindparam(f"rows_{number}", type_=Document())).table_valued(
            *(column(name, columns[name].type) for name in names), name=f"records_{number}"
        )
        rows = select(*records.render_derived(with_types=True).c)
        inserts.append(insert(table).from_select(list(names), rows))
    *others, last = inserts
    return last.add_cte(*(each.cte(f"part_{number}") for number, each in enumerate(others)))
