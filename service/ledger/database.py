"""The connection to the ledger's database: engines, transactions, retries, migrations.

Owns how a transaction begins, is repeated after a deadlock, and tells the queues after it has committed.
Knows no table. Every other module of this room is called through `writes` or `reads`.
"""

from __future__ import annotations

import functools
import logging
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import alembic.command
import alembic.config
from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, DisconnectionError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import DeclarativeBase

from service.errors import LedgerBusy

log = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")

#: A server that vanished is noticed within seconds, a lock or statement that hangs within a minute: who holds a lease
#: must not wait longer. A process that is frozen in the middle of a transaction loses it: others wait for its locks.
#: What the URL says of these wins.
_POSTGRESQL_ARGUMENTS = {
    "connect_timeout": 10,
    "tcp_user_timeout": 10_000,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "options": "-c lock_timeout=10s -c statement_timeout=60s -c idle_in_transaction_session_timeout=10s",
}
#: Deadlock, serialization failure, lock timeout, frozen for too long: the transaction did nothing and may run again.
_RETRYABLE_SQLSTATES = {"40P01", "40001", "55P03", "25P03"}
#: What is raised when the ledger does not answer, or not in time, or its disk is full. Not what a wrong statement
#: raises: that is a bug.
LEDGER_AWAY = (OperationalError, InterfaceError, LedgerBusy)
_TRANSACTION_TRIES = 10
#: A connection that was used this recently is not asked whether it lives.
_TRUSTED_IDLE_S = 1.0
#: Half the longest pause before the second try; doubles each time.
_PAUSE_S = 0.01


class Transaction:
    """One open write transaction; collects the resource classes to poke once it has committed."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.due_classes: set[str] = set()
        #: Job -> kind and data of what happened to it, written last of all.
        self.events: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
        #: What is done last, before the commit.
        self.closing: list[Callable[[], None]] = []

    @property
    def is_postgresql(self) -> bool:
        """Whether rows can be locked one by one; SQLite locks the whole database."""
        return self.connection.dialect.name == "postgresql"

    def insert(self, table: type[DeclarativeBase]) -> Any:
        """Return an INSERT that takes `on_conflict_...` clauses, whichever the database."""
        return (postgresql.insert if self.is_postgresql else sqlite.insert)(table)


class StaleView(Exception):
    """What a transaction read before it held its locks has changed; it runs again from the start."""


class Database:
    """A pool of connections to one ledger.

    `poke` is called after a commit with the resource classes that have new work; it must not raise.
    """

    def __init__(self, url: str, poke: Callable[[Iterable[str]], None] | None = None) -> None:
        self.url = url
        self.poke = poke or (lambda _classes: None)
        self.engine = _make_engine(url)

    def close(self) -> None:
        """Give all connections back."""
        self.engine.dispose()

    def write(self, function: Callable[[Transaction], T]) -> T:
        """Run `function` in one transaction; repeat it after a deadlock; poke after the commit.

        Raises `LedgerBusy` when there is no connection to spare, or when the repetitions are used up.
        """

        def run() -> tuple[T, set[str]]:
            with self._connect() as connection, connection.begin():
                transaction = Transaction(connection)
                result = function(transaction)
                for finish in transaction.closing:
                    finish()
                return result, transaction.due_classes

        result, due_classes = _repeat(run)
        if due_classes:
            self.poke(sorted(due_classes))
        return result

    def read(self, function: Callable[[Connection], T]) -> T:
        """Run `function` on one consistent snapshot; raises `LedgerBusy` when there is no connection to spare."""

        def run() -> T:
            with self._connect() as connection:
                if connection.dialect.name == "postgresql":
                    connection = connection.execution_options(isolation_level="REPEATABLE READ")
                else:
                    connection = connection.execution_options(is_read=True)
                with connection.begin():
                    return function(connection)

        return _repeat(run)

    def ask(self, function: Callable[[Connection], T]) -> T:
        """Run the one SELECT of `function`, which needs no transaction to be consistent; see `read`."""

        def run() -> T:
            with self._connect() as connection:
                if connection.dialect.name == "postgresql":
                    return function(connection.execution_options(isolation_level="AUTOCOMMIT"))
                with connection.execution_options(is_read=True).begin():
                    return function(connection)

        return _repeat(run)

    @contextmanager
    def _connect(self) -> Iterator[Connection]:
        try:
            connection = self.engine.connect()
        except PoolTimeout as error:
            raise LedgerBusy("Every connection to the ledger is in use; try again.") from error
        with connection:
            yield connection


def writes(
    function: Callable[Concatenate[Transaction, P], T],
) -> Callable[Concatenate[Database, P], T]:
    """Turn a function of a transaction into one of a database: one call, one transaction."""

    @functools.wraps(function)
    def call(database: Database, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return database.write(lambda transaction: function(transaction, *args, **kwargs))

    return call


def reads(
    function: Callable[Concatenate[Connection, P], T],
) -> Callable[Concatenate[Database, P], T]:
    """Turn a function of a connection into one of a database that reads one snapshot."""

    @functools.wraps(function)
    def call(database: Database, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return database.read(lambda connection: function(connection, *args, **kwargs))

    return call


def asks(
    function: Callable[Concatenate[Connection, P], T],
) -> Callable[Concatenate[Database, P], T]:
    """Turn a function that executes one SELECT into one of a database: one call, one round trip."""

    @functools.wraps(function)
    def call(database: Database, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return database.ask(lambda connection: function(connection, *args, **kwargs))

    return call


def migrate(url: str, revision: str = "head") -> None:
    """Bring the database to the newest schema, or to `revision`; safe when several processes start at once.

    One that a newer version has migrated stays as it is: its tables and columns are there (`tests/migration`).
    """
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite" and parsed.database:
        Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
    config = alembic.config.Config()
    config.set_main_option("script_location", str(resources.files("migrations")))
    config.attributes["url"] = url
    alembic.command.upgrade(config, revision)


def ping(database: Database) -> None:
    """Raise if the database does not answer."""
    database.read(lambda connection: connection.execute(text("SELECT 1")).scalar_one())


def _repeat(run: Callable[[], T]) -> T:
    """Return what a transaction returns; run it again as long as it may be."""
    for attempt in range(_TRANSACTION_TRIES):
        # Rivals that met once must not meet again.
        time.sleep(random.uniform(0, _PAUSE_S * 2**attempt) if attempt else 0)
        try:
            return run()
        except (StaleView, DBAPIError) as error:
            if isinstance(error, DBAPIError) and not _may_repeat(error):
                raise
            cause = error
    raise LedgerBusy("The ledger is too busy to do this; try again.") from cause


def _may_repeat(error: DBAPIError) -> bool:
    if getattr(error.orig, "sqlstate", None) in _RETRYABLE_SQLSTATES:
        return True
    return isinstance(error, OperationalError) and "database is locked" in str(error.orig)


def _check_idle_connections(engine: Engine) -> None:
    """Ask a connection whether it still lives if it was idle for a while; one in constant use need not be asked."""

    @event.listens_for(engine, "checkin")
    def _remember(_raw: object, record: Any) -> None:
        record.info["idle_since"] = time.monotonic()

    @event.listens_for(engine, "checkout")
    def _ask(raw: Any, record: Any, _proxy: object) -> None:
        if time.monotonic() - record.info.get("idle_since", float("inf")) < _TRUSTED_IDLE_S:
            return
        try:
            engine.dialect.do_ping(raw)
        except engine.dialect.loaded_dbapi.Error as error:
            # The pool takes the next one, and in the end a new one.
            raise DisconnectionError from error


def _make_engine(url: str) -> Engine:
    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite":
        arguments = {name: value for name, value in _POSTGRESQL_ARGUMENTS.items() if name not in parsed.query}
        engine = create_engine(url, connect_args=arguments, pool_size=10, max_overflow=20)
        _check_idle_connections(engine)
        return engine
    engine = create_engine(
        url, connect_args={"timeout": 30.0, "check_same_thread": False}, pool_size=10, max_overflow=20
    )

    @event.listens_for(engine, "connect")
    def _prepare(raw: object, _record: object) -> None:
        # The driver must not open transactions of its own: `_begin` below does.
        raw.isolation_level = None  # type: ignore[attr-defined]
        cursor = raw.cursor()  # type: ignore[attr-defined]
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=30000"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        # A write transaction that starts as a reader fails at its first write when another has written meanwhile.
        is_read = connection.get_execution_options().get("is_read", False)
        connection.exec_driver_sql("BEGIN" if is_read else "BEGIN IMMEDIATE")

    return engine
