"""Celery's entry: `celery -A workers.app worker --pool=threads ...` and `celery -A workers.app beat`.

Importing this module makes no connection and no child; the worker process is built when Celery starts one.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from celery.signals import worker_init, worker_process_shutdown, worker_ready, worker_shutdown, worker_shutting_down

from service.errors import EdgeKilnError
from service.ledger.database import LEDGER_AWAY
from service.metrics import serve_metrics
from service.process_log import begin_log
from service.queue import Poker, make_app
from service.settings import load_settings
from service.tracing import begin_tracing, end_tracing
from workers.metrics import REGISTRY
from workers.process import WorkerProcess
from workers.tasks import register

log = logging.getLogger(__name__)
_settings = load_settings()
begin_log(_settings.log_format)
app = make_app(_settings)
_processes: list[WorkerProcess] = []

#: How long a worker that starts waits for a ledger that does not answer, and between two tries.
_LEDGER_PATIENCE_S = 60.0
_LEDGER_PAUSE_S = 1.0


@worker_init.connect
def _build(**_: Any) -> None:
    # Celery passes over exceptions of its signals: the worker would look alive, take messages, and have no task.
    try:
        begin_tracing("edgekiln-worker")
        serve_metrics(REGISTRY, _settings.metrics_host, _settings.worker_metrics_port)
        process = _make_process()
    except EdgeKilnError as error:
        raise SystemExit(f"{error.code}: {error.message}") from error
    except Exception as error:
        log.exception("bug")
        raise SystemExit(f"The worker cannot start: {error}") from error
    _processes.append(process)
    register(app, process)


def _make_process() -> WorkerProcess:
    """Build the worker process once the ledger answers."""
    give_up_at = time.monotonic() + _LEDGER_PATIENCE_S
    while True:
        try:
            return WorkerProcess(_settings, Poker(app))
        except LEDGER_AWAY as error:
            if time.monotonic() > give_up_at:
                raise SystemExit(f"The ledger does not answer: {error}") from error
            log.warning("the ledger does not answer yet: %s", error)
        time.sleep(_LEDGER_PAUSE_S)


@worker_ready.connect
def _start(**_: Any) -> None:
    for process in _processes:
        process.start()


@worker_shutting_down.connect
def _shut_down(**_: Any) -> None:
    # SIGTERM: running steps are given back now, so that Celery's warm shutdown has little to wait for.
    for process in _processes:
        process.shut_down()


@worker_shutdown.connect
@worker_process_shutdown.connect
def _close(**_: Any) -> None:
    while _processes:
        _processes.pop().close()
    end_tracing()
