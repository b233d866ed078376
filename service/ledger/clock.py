"""Time as the database tells it.

Every instant in the ledger is written by the database itself, so that hosts with wrong clocks cannot take
each other's leases. PostgreSQL's `now()` is the transaction's start, hence `clock_timestamp()`; SQLite 3.40
knows no sub-second `unixepoch`, hence `strftime`.
"""

from __future__ import annotations

import datetime as dt
from typing import Any

from sqlalchemy import DateTime, String
from sqlalchemy.engine import Dialect
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.expression import ColumnElement
from sqlalchemy.sql.visitors import InternalTraversal
from sqlalchemy.types import TypeDecorator, TypeEngine

_SQLITE_FORMAT = "%Y-%m-%d %H:%M:%S.%f"


class Instant(TypeDecorator[dt.datetime]):
    """An aware UTC instant with millisecond resolution or better.

    SQLite keeps text that sorts as time (`2026-01-31 12:00:00.123`); PostgreSQL keeps `timestamptz`.
    """

    impl = DateTime(timezone=True)
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        return dialect.type_descriptor(String(26) if dialect.name == "sqlite" else DateTime(timezone=True))

    def process_bind_param(self, value: dt.datetime | None, dialect: Dialect) -> Any:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("The ledger takes aware datetimes only.")
        value = value.astimezone(dt.UTC)
        return value.strftime(_SQLITE_FORMAT)[:-3] if dialect.name == "sqlite" else value

    def process_result_value(self, value: Any, dialect: Dialect) -> dt.datetime | None:
        if value is None:
            return None
        if isinstance(value, str):
            return dt.datetime.strptime(value, _SQLITE_FORMAT).replace(tzinfo=dt.UTC)
        instant: dt.datetime = value
        return instant.astimezone(dt.UTC)


class now(ColumnElement[dt.datetime]):  # noqa: N801 - reads as the SQL function it stands for
    """The database's own clock, `offset_s` seconds from now."""

    #: The shift is written into the statement, so it belongs to what a compiled statement is found again by.
    _traverse_internals: Any = [("offset_s", InternalTraversal.dp_plain_obj)]  # noqa: RUF012 - SQLAlchemy's own protocol
    inherit_cache = True
    type = Instant()

    def __init__(self, offset_s: float = 0.0) -> None:
        self.offset_s = float(offset_s)


@compiles(now, "sqlite")
def _compile_sqlite(element: now, compiler: SQLCompiler, **_: Any) -> str:
    shift = f", '{element.offset_s:+.3f} seconds'" if element.offset_s else ""
    # The percent signs are doubled for drivers that format parameters; SQLite's driver does not.
    return f"strftime('%Y-%m-%d %H:%M:%f', 'now'{shift})"


@compiles(now, "postgresql")
def _compile_postgresql(element: now, compiler: SQLCompiler, **_: Any) -> str:
    shift = f" + interval '{element.offset_s:.3f} seconds'" if element.offset_s else ""
    return f"(clock_timestamp(){shift})"
