"""A database whose clock a test sets: it stands still until it is set again.

The ledger asks its database what time it is. In SQLite the function that tells it is replaced in every connection; in
PostgreSQL a function of the same name comes first in the search path.
"""

from __future__ import annotations

import datetime as dt
import re

from sqlalchemy import event, text

from service.ledger.database import Database


class LedgerClock:
    """The clock of one ledger; every `Database` that shall go by it is given to `lead`."""

    def __init__(self, database: Database, instant: str) -> None:
        self.now = _parse(instant)
        self._database = database
        if database.engine.dialect.name == "postgresql":
            name = database.engine.url.database
            for statement in (
                "CREATE SCHEMA set_clock",
                "CREATE TABLE set_clock.hands (instant timestamptz)",
                "INSERT INTO set_clock.hands VALUES (now())",
                "CREATE FUNCTION set_clock.clock_timestamp() RETURNS timestamptz VOLATILE LANGUAGE sql "
                "AS 'SELECT instant FROM set_clock.hands'",
                f"ALTER DATABASE {name} SET search_path = set_clock, pg_catalog, public",
            ):
                with database.engine.begin() as connection:
                    connection.execute(text(statement))
        self.lead(database)
        self.set(instant)

    def lead(self, database: Database) -> None:
        """Let connections that are opened from here on go by this clock."""
        database.engine.dispose()
        if database.engine.dialect.name == "sqlite":
            event.listen(database.engine, "connect", self._replace)

    def set(self, instant: str) -> None:
        """Set the clock, e.g. `2026-03-29 00:59:59.5`; UTC."""
        self.now = _parse(instant)
        if self._database.engine.dialect.name == "postgresql":
            with self._database.engine.begin() as connection:
                connection.execute(text("UPDATE set_clock.hands SET instant = :now"), {"now": self.now})

    def pass_time(self, **span: float) -> None:
        """Put the clock forward, e.g. `hours=1`; back, if negative."""
        self.set((self.now + dt.timedelta(**span)).replace(tzinfo=None).isoformat(" "))

    def _replace(self, raw: object, _record: object) -> None:
        raw.create_function("strftime", -1, self._strftime)  # type: ignore[attr-defined]

    def _strftime(self, layout: str, moment: str, *shifts: str) -> str:
        assert (layout, moment) == ("%Y-%m-%d %H:%M:%f", "now"), "not how the ledger asks for the time"
        instant = self.now
        for shift in shifts:
            match = re.fullmatch(r"([+-]\d+\.\d+) seconds", shift)
            assert match is not None
            instant += dt.timedelta(seconds=float(match[1]))
        return instant.strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]


def _parse(instant: str) -> dt.datetime:
    return dt.datetime.fromisoformat(instant).replace(tzinfo=dt.UTC)
