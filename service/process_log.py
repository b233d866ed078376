"""What a process says of itself on standard error: one line a record, as text or as JSON.

Owns the form of the lines and what is bound to those of one step. What a step's child prints is another log, a blob of
its own (`service.api.logs`). Called by the entries of the processes and by `workers.runner`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

from pythonjsonlogger.json import JsonFormatter

Form = Literal["text", "json"]

_TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s%(bound_text)s"
_JSON = "%(asctime)s %(levelname)s %(name)s %(message)s"
#: As the REST API writes instants, in UTC.
_JSON_TIME = "%Y-%m-%dT%H:%M:%S+00:00"
_bound: ContextVar[dict[str, str | int]] = ContextVar("bound", default={})  # noqa: B039 - it is replaced, never changed


def begin_log(form: Form) -> None:
    """Write the records of this process to standard error from now on."""
    handler = logging.StreamHandler()
    handler.addFilter(_add_bound)
    handler.addFilter(_cut_query)
    if form == "json":
        renamed = {"asctime": "time", "levelname": "level", "name": "logger"}
        formatter = JsonFormatter(_JSON, rename_fields=renamed, datefmt=_JSON_TIME, reserved_attrs=_RESERVED)
        formatter.converter = time.gmtime
        handler.setFormatter(formatter)
    else:
        handler.setFormatter(logging.Formatter(_TEXT))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    # It tells every migration that is in place already.
    logging.getLogger("alembic").setLevel(logging.WARNING)


@contextmanager
def bound(**fields: str | int | None) -> Iterator[None]:
    """Give every record of this thread these fields meanwhile; None is left out."""
    token = _bound.set({**_bound.get(), **{name: value for name, value in fields.items() if value is not None}})
    try:
        yield
    finally:
        _bound.reset(token)


def _add_bound(record: logging.LogRecord) -> bool:
    fields = _bound.get()
    record.__dict__.update(fields)
    record.bound_text = "".join(f" {name}={value}" for name, value in fields.items())
    return True


def _cut_query(record: logging.LogRecord) -> bool:
    """Leave the query out of the server's line about a request: people put secrets there."""
    if record.name == "uvicorn.access" and isinstance(record.args, tuple):
        record.args = tuple(
            value.partition("?")[0] if isinstance(value, str) and value.startswith("/") else value
            for value in record.args
        )
    return True


#: What is in every record and not worth a field; the message and the time have theirs.
_RESERVED = [*logging.makeLogRecord({}).__dict__, "asctime", "message", "taskName", "bound_text"]
