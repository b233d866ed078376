"""Celery's entry: `celery -A workers.app worker --pool=threads ...` and `celery -A workers.app beat`.

Importing this module makes no connection and no child; the worker process is built when Celery starts one.
"""

from __future__ import annotations

from typing import Any

from celery.signals import worker_init, worker_process_shutdown, worker_ready, worker_shutdown, worker_shutting_down

from service.errors import EdgeKilnError
from service.metrics import serve_metrics
from service.process_log import begin_log
from service.queue import Poker, make_app
from service.settings import load_settings
from workers.metrics import REGISTRY
from workers.process import WorkerProcess
from workers.tasks import register

_settings = load_settings()
begin_log(_settings.log_format)
app = make_app(_settings)
_processes: list[WorkerProcess] = []


@worker_init.connect
def _build(**_: Any) -> None:
    try:
        serve_metrics(REGISTRY, _settings.metrics_host, _settings.worker_metrics_port)
        process = WorkerProcess(_settings, Poker(app))
    except EdgeKilnError as error:
        # Celery passes over exceptions of its signals: the worker would look alive and have no task.
        raise SystemExit(f"{error.code}: {error.message}") from error
    _processes.append(process)
    register(app, process)


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
