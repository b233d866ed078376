"""How Alembic reaches the database: one transaction, one process at a time."""

from __future__ import annotations

import logging

from alembic import context
from sqlalchemy import create_engine, text

from service.ledger.tables import Job

log = logging.getLogger(__name__)

#: Any constant: who holds this PostgreSQL advisory lock migrates.
_LOCK = 0x45444745


def run() -> None:
    """Migrate the database that `service.ledger.database.migrate` names."""
    url = context.config.attributes.get("url") or context.config.get_main_option("sqlalchemy.url")
    if not url:
        raise SystemExit("No database named: call service.ledger.database.migrate(url).")
    is_sqlite = url.startswith("sqlite")
    engine = create_engine(url, connect_args={"timeout": 60.0} if is_sqlite else {})
    with engine.connect() as connection:
        if is_sqlite:
            connection.connection.driver_connection.isolation_level = None  # type: ignore[union-attr]
            connection.exec_driver_sql("PRAGMA journal_mode=WAL")
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        else:
            connection.execute(text("SET lock_timeout = '30s'"))
            connection.execute(text(f"SELECT pg_advisory_xact_lock({_LOCK})"))
        context.configure(connection=connection, target_metadata=Job.metadata, render_as_batch=is_sqlite)
        with context.begin_transaction():
            if _is_known(context.get_context().get_current_revision()):
                context.run_migrations()
        if is_sqlite:
            connection.exec_driver_sql("COMMIT")
        else:
            connection.commit()
    engine.dispose()


def _is_known(revision: str | None) -> bool:
    """Tell whether these migrations lead to where the database is; a newer version's lead further, and take nothing."""
    if revision is None or any(each.revision == revision for each in context.script.walk_revisions()):
        return True
    log.warning("a newer version has migrated the ledger to %s; this one goes on with what it knows of it", revision)
    return False


run()
