"""The Celery app and the poke.

A message says "there may be work of this class" and carries nothing else: the ledger owns the work, so a lost,
doubled or late message delays a step at most. Called by `service.api` and `workers.app`; `poke` runs after commits.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from celery import Celery
from kombu.exceptions import OperationalError

from service import folder_broker
from service.settings import Settings

log = logging.getLogger(__name__)

#: Task names and queue names are wire format.
RUN_TASK = "step.run"
PRUNE_TASK = "ledger.prune"
#: How often the beat asks for housekeeping.
_PRUNE_S = 600.0


def make_app(settings: Settings) -> Celery:
    """Return a Celery app for this deployment; no connection is made yet."""
    app = Celery("edgekiln", broker=settings.broker_url or f"{folder_broker.SCHEME}://")
    app.conf.update(
        task_ignore_result=True,
        task_acks_late=False,
        task_create_missing_queues=True,
        worker_prefetch_multiplier=1,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_hijack_root_logger=False,
        worker_enable_remote_control=False,
        worker_send_task_events=False,
        broker_connection_retry_on_startup=True,
        # A poke that cannot be sent is repeated by the sweep; nobody waits for it.
        task_publish_retry=False,
        beat_schedule={"prune": {"task": PRUNE_TASK, "schedule": _PRUNE_S, "options": {"queue": "light"}}},
    )
    if settings.broker_url:
        if settings.broker_url.startswith("redis"):
            # Longer than the longest step, or Redis delivers a running task again.
            app.conf.broker_transport_options = {"visibility_timeout": 7 * 24 * 3600}
    else:
        app.conf.broker_transport_options = {"folder": str(settings.data_dir / "broker"), "polling_interval": 0.1}
    return app


class Poker:
    """Wakes the workers of a resource class."""

    def __init__(self, app: Celery) -> None:
        self.app = app

    def __call__(self, resource_classes: Iterable[str]) -> None:
        """Send one wake-up a class; a broker that is away only costs the wait for the next sweep."""
        for name in resource_classes:
            try:
                self.app.send_task(RUN_TASK, args=(name,), queue=name, ignore_result=True)
            except (OperationalError, OSError) as error:
                log.warning("could not poke %s workers (the sweep will): %s", name, error)
