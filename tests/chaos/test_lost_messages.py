"""Messages that vanish before anyone reads them: the ledger owns the work, the sweep wakes the workers."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.chaos.conftest import Fire
from tests.kiln import Kiln, check_published_once, wait_for

_NEVER_S = 3600
#: The worker looks for messages every 0.1 s: most are gone by then.
_EATEN_EVERY_S = 0.04
#: How long the control is watched. Every sweep but the first is off; no time could change the outcome.
_WATCHED_S = 3.0


class MessageEater:
    """Deletes whatever the embedded broker holds, again and again."""

    def __init__(self, kiln: Kiln) -> None:
        self.folder = kiln.data_dir / "broker"
        self.eaten = 0
        self._is_full = threading.Event()
        self._thread = threading.Thread(target=self._eat)

    def find_messages(self) -> list[Path]:
        """Return the messages that nobody has read or eaten yet."""
        return list(self.folder.glob("*/[0-9]*"))

    def _eat(self) -> None:
        while not self._is_full.wait(_EATEN_EVERY_S):
            for path in self.find_messages():
                try:
                    path.unlink()
                except FileNotFoundError:  # a worker was faster
                    continue
                self.eaten += 1

    @contextmanager
    def at_work(self) -> Iterator[None]:
        self._thread.start()
        try:
            yield
        finally:
            self._is_full.set()
            self._thread.join()


@contextmanager
def paused(pid: int | None) -> Iterator[None]:
    """Let a process stand still meanwhile."""
    assert pid is not None, "no worker runs"
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_a_job_ends_although_its_messages_are_lost(fire: Fire, checkpoint: Path) -> None:
    kiln = fire(sweep_s=0.2)
    eater = MessageEater(kiln)
    with eater.at_work():
        job_id = kiln.submit(checkpoint, recipes=["dynamic_int8"], formats=["tflite"])
        job = kiln.finished(job_id)
    assert job["state"] == "succeeded", job
    assert eater.eaten >= len(job["steps"])
    assert {state for states in kiln.attempts(job_id).values() for state in states} == {"succeeded"}
    check_published_once(kiln.database, kiln.data_dir / "store", job_id)


def test_the_control_without_a_sweep_waits_for_ever(fire: Fire, checkpoint: Path) -> None:
    # A worker that sweeps once at its start is known as long as its lease.
    kiln = fire(sweep_s=_NEVER_S, lease_s=_NEVER_S)
    eater = MessageEater(kiln)
    with eater.at_work():
        with paused(kiln.worker_pid):  # else it may be faster than the eater
            job_id = kiln.submit(checkpoint, recipes=["dynamic_int8"], formats=["tflite"])
            wait_for(lambda: eater.eaten >= 1 and not eater.find_messages(), "the poke is lost")
        threading.Event().wait(_WATCHED_S)
        assert kiln.client.get(job_id)["state"] == "queued"
        assert kiln.attempts(job_id) == {}
    # Any message wakes it: those of the next job carry no work of their own.
    other = kiln.finished(kiln.submit(checkpoint, recipes=["dynamic_int8"], formats=["tflite"]))
    assert other["state"] == "succeeded"
    assert kiln.finished(job_id)["state"] == "succeeded"
