"""Keeps the lease of one running step, and notices when it must stop.

A thread per running step: it looks every `cancel_poll_s` whether the claim still stands and extends the lease
every `heartbeat_s`. When the ledger cannot be reached for as long as the lease lasts, the step counts as lost:
another worker may own it. Used by `workers.runner` only.
"""

from __future__ import annotations

import logging
import threading
import time
from types import TracebackType
from typing import Self

from sqlalchemy.exc import SQLAlchemyError

from service.errors import EdgeKilnError, LeaseLost
from service.ledger import claims
from service.ledger.database import Database
from service.settings import Settings

log = logging.getLogger(__name__)

#: How long the end of a step waits for its keeper, whose call to the ledger may hang.
_JOIN_S = 5.0


class LeaseKeeper:
    """Holds a claim while its context is open."""

    def __init__(self, settings: Settings, database: Database, claim: claims.Claim) -> None:
        self._settings = settings
        self._database = database
        self._claim = claim
        #: When the lease runs out, by the monotonic clock, unless it is extended.
        self.held_until = time.monotonic() + settings.lease_s
        self._lost = threading.Event()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._keep, name=f"lease-{claim.step_id}", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        self._thread.join(_JOIN_S)
        if self._thread.is_alive():
            log.warning("the keeper of %s still waits for the ledger", self._claim.step_id)

    @property
    def is_lost(self) -> bool:
        """Whether the step was cancelled, taken over, or may be: its lease was not extended in time."""
        if time.monotonic() >= self.held_until:
            # For good: whoever has heard of it has stopped the step.
            self._lost.set()
        return self._lost.is_set()

    def check(self) -> None:
        """Raise `LeaseLost` if the claim no longer stands."""
        if self.is_lost:
            raise LeaseLost(f"The {self._claim.kind} step {self._claim.step_id} is no longer held by this worker.")

    def _keep(self) -> None:
        next_heartbeat = time.monotonic() + self._settings.heartbeat_s
        while not self._closed.wait(self._settings.cancel_poll_s) and not self.is_lost:
            try:
                if not claims.is_held(self._database, self._claim):
                    self._lost.set()
                    return
                started = time.monotonic()
                if started >= next_heartbeat:
                    claims.extend_lease(self._database, self._claim, self._settings.lease_s)
                    self.held_until = started + self._settings.lease_s
                    next_heartbeat = started + self._settings.heartbeat_s
            except LeaseLost:
                self._lost.set()
                return
            except (SQLAlchemyError, EdgeKilnError) as error:
                log.warning("cannot reach the ledger to keep %s: %s", self._claim.step_id, error)
            except Exception:
                # A keeper that died would let a healthy step go on without a lease.
                log.exception("cannot keep %s; the next look may", self._claim.step_id)
