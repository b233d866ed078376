"""The Celery app and the poke.

A message says "there may be work of this class" and carries nothing else: the ledger owns the work, so a lost,
doubled or late message delays a step at most. Called by `service.api` and `workers.app`; `poke` runs after commits.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable

from celery import Celery
from kombu.exceptions import OperationalError

from service import folder_broker
from service.devices import PHONE_CLASS
from service.settings import Settings

log = logging.getLogger(__name__)

#: Task names and queue names are wire format.
RUN_TASK = "step.run"
PRUNE_TASK = "ledger.prune"
#: How often one worker does the fleet's housekeeping, and the beat asks for it.
PRUNE_S = 600.0
#: The longest sleep of the beat. It writes its schedule at the first tick three minutes after the last time, which
#: `edgekiln health beat` counts on.
_BEAT_TICK_S = 30.0
#: How long a Redis may take to connect, or to answer. Kombu asks for messages with BRPOP and a timeout of one second,
#: so an answer never takes longer because there is nothing to say.
_REDIS_TIMEOUT_S = 3.0
#: How long a broker that failed is left alone: shorter than the pause between two sweeps.
_QUIET_S = 5.0
#: After a wake-up the next ones wait so long for each other.
_BURST_S = 0.005


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
        beat_max_loop_interval=_BEAT_TICK_S,
        beat_schedule={"prune": {"task": PRUNE_TASK, "schedule": PRUNE_S, "options": {"queue": "light"}}},
    )
    if settings.broker_url:
        if settings.broker_url.startswith("redis"):
            app.conf.broker_transport_options = {
                # Longer than the longest step, or Redis delivers a running task again.
                "visibility_timeout": 7 * 24 * 3600,
                "socket_connect_timeout": _REDIS_TIMEOUT_S,
                "socket_timeout": _REDIS_TIMEOUT_S,
                "socket_keepalive": True,
                # Of a poke's connection; workers connect again and again by `broker_connection_retry`.
                "max_retries": 0,
            }
    else:
        app.conf.broker_transport_options = {"folder": str(settings.data_dir / "broker"), "polling_interval": 0.1}
    return app


class Poker:
    """Wakes the workers of a resource class, and leaves a broker that failed alone for a while.

    Sends from a thread of its own, which lives only as long as there is something to send: whoever commits does not
    wait, and of a burst of commits one message tells.
    """

    def __init__(self, app: Celery) -> None:
        self.app = app
        self._quiet_until = 0.0
        self._lock = threading.Lock()
        #: Classes to be woken, in the order that they were named.
        self._due: dict[str, None] = {}
        self._sender: threading.Thread | None = None

    def __call__(self, resource_classes: Iterable[str]) -> None:
        """See that each class is sent a wake-up after this; raises nothing, and does not wait.

        A broker that is away only costs the wait for the next sweep.
        """
        # Device workers look for themselves.
        names = [name for name in resource_classes if name != PHONE_CLASS]
        if not names or time.monotonic() < self._quiet_until:
            return
        with self._lock:
            self._due.update(dict.fromkeys(names))
            if self._sender is None:
                # No daemon: a process that ends sends its last wake-ups first.
                sender = threading.Thread(target=self._send_due, name="poker", daemon=False)
                try:
                    sender.start()
                except RuntimeError as error:
                    log.warning("could not poke workers (the sweep will): %s", error)
                else:
                    self._sender = sender

    def close(self) -> None:
        """Return when what was to be sent has been."""
        with self._lock:
            sender = self._sender
        if sender is not None:
            sender.join()

    def _send_due(self) -> None:
        while True:
            with self._lock:
                names, self._due = list(self._due), {}
                if not names:
                    self._sender = None
                    return
            for name in names:
                if time.monotonic() >= self._quiet_until:
                    self._send(name)
            # What is committed meanwhile goes with one message.
            time.sleep(_BURST_S)

    def _send(self, name: str) -> None:
        try:
            self.app.send_task(RUN_TASK, args=(name,), queue=name, ignore_result=True)
        except Exception as error:
            self._quiet_until = time.monotonic() + _QUIET_S
            is_expected = isinstance(error, OperationalError | OSError)
            log.warning("could not poke %s workers (the sweep will): %s", name, error, exc_info=not is_expected)
