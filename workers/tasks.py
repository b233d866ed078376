"""The Celery tasks: a few lines each; the runner and the ledger do the work."""

from __future__ import annotations

from celery import Celery

from service.queue import PRUNE_TASK, RUN_TASK
from workers.process import WorkerProcess


def register(app: Celery, process: WorkerProcess) -> None:
    """Give `app` its tasks, served by this worker process."""

    @app.task(name=RUN_TASK, ignore_result=True)
    def run(resource_class: str) -> None:
        """Run one due step of a class, if there is one."""
        process.runner.run_next(resource_class)

    @app.task(name=PRUNE_TASK, ignore_result=True)
    def prune() -> None:
        """Let the housekeeper look whether it is time; it does so by itself, too, when this waits behind steps."""
        process.ask_for_housekeeping()
