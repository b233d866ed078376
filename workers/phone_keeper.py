"""Looks after one connection to a phone: registers it, measures on it, brings it back, gives it up.

A thread of `workers.device_worker`'s, one a connection. What it tells the ledger is read by operators of every tenant's
work: it says how the phone is, never what ran on it.
"""

from __future__ import annotations

import contextlib
import logging
import re
import threading
import time
from collections.abc import Callable, Mapping

from sqlalchemy.exc import SQLAlchemyError

from service.errors import (
    AdbUnavailable,
    DeviceFull,
    DeviceHot,
    DeviceHung,
    DeviceLost,
    DeviceUnauthorized,
    EdgeKilnError,
)
from service.ledger import devices
from service.ledger.states import DeviceState
from service.settings import Settings
from workers.devices.adb import Adb
from workers.devices.android import read_record
from workers.devices.recovery import is_on_network, is_up, recover
from workers.devices.traces import close_runs
from workers.phone_runner import PhoneRunner, Seat
from workers.process import WorkerProcess

log = logging.getLogger(__name__)

#: Failed runs in a row after which a phone is given up, though it answers.
_MAX_FAILURES = 3
#: What the ledger's column of device ids holds.
_DEVICE_ID = re.compile(r"[A-Za-z0-9][\w.:-]{0,99}")
#: How often a phone without work is asked whether it answers, and one given up is connected to again.
_LOOK_S = 30.0
#: How long a connection may take to begin or to end.
_SETTLE_S = 5.0
#: How long a phone on the network that has gone is looked for.
_SEEK_S = 3600.0
#: States of adb in which a phone does not talk though it should; in others a person is at work on it.
_SILENT = ("offline", "connecting", "device")
_NO_CONSENT = "It does not trust this host's adb key: accept it on its screen."
#: What a failure says of the phone.
_FAILURES: Mapping[str, str] = {
    DeviceHung.code: "it did not answer",
    DeviceLost.code: "it went away, or its answer had no end",
    DeviceFull.code: "its storage was full",
    DeviceHot.code: "it was hot",
    DeviceUnauthorized.code: "it did not trust this host's adb key",
}


def say_failure(code: str) -> str:
    """Return what a failure says of the phone; the error's own words may tell whose work was on it."""
    return _FAILURES.get(code, "it could not be used")


class PhoneKeeper(threading.Thread):
    """Looks after one connection."""

    def __init__(
        self,
        settings: Settings,
        process: WorkerProcess,
        adb: Adb,
        serial: str,
        grant: Callable[[str, PhoneKeeper], bool],
    ) -> None:
        """`grant` says whether this connection is the one that its phone is used by."""
        super().__init__(name=f"phone-{serial}", daemon=True)
        self._settings = settings
        self._process = process
        self._grant = grant
        self._phone = adb.phone(serial)
        self._stopped = threading.Event()
        self._changed = threading.Event()
        #: As adb says; None when it does not know the phone.
        self._state: str | None = None
        #: Since when, by the monotonic clock.
        self._changed_s = time.monotonic()
        #: The phone, once the ledger knows of it; by adb's serial number until it has told its own.
        self._seat: Seat | None = None
        #: The phone's own serial number, while this connection stands.
        self._known_id: str | None = None
        self._failures = 0
        #: How often it has looked after the phone.
        self.look_count = 0
        #: When the phone has last answered, or was last connected to, by the monotonic clock.
        self._looked_s = 0.0
        #: Given up until it was away, or an operator releases it.
        self._is_held = False
        #: Adb did not know a phone that is held; when it does again, that one has been away.
        self._was_away = False
        #: Until when a phone on the network that has gone is connected to again, by the monotonic clock.
        self._seek_until_s = 0.0
        self._told: tuple[DeviceState, str | None] | None = None

    @property
    def is_connected(self) -> bool:
        """Whether adb knows the phone by this connection."""
        return self._state is not None

    def see(self, state: str | None) -> None:
        """Take note of how adb sees the phone."""
        if state != self._state:
            self._state = state
            self._changed_s = time.monotonic()
            self._changed.set()

    def stop(self) -> None:
        """End after the run in progress, which is being ended too."""
        self._stopped.set()
        self._changed.set()

    def run(self) -> None:
        """Look after the phone until it is told to stop, or the phone has gone."""
        while not self._stopped.is_set():
            try:
                is_busy = self._tend()
            except (EdgeKilnError, SQLAlchemyError) as error:
                log.warning("%s: %s", self._phone.serial, error)
                is_busy = False
            except Exception:
                log.exception("%s: the next look may go better", self._phone.serial)
                is_busy = False
            self.look_count += 1
            if not is_busy:
                self._changed.wait(self._settings.device_poll_s)
                self._changed.clear()

    def _tend(self) -> bool:
        """Do what the phone's state asks for; return whether there may be more to do at once."""
        # Read once: the thread that follows adb changes it meanwhile.
        state = self._state
        if state is None:
            self._note_absence()
        elif state == "unauthorized":
            self._tell(DeviceState.UNAUTHORIZED, _NO_CONSENT)
        elif self._is_held:
            self._look_for_release(state)
        elif state not in _SILENT:
            self._tell(DeviceState.OFFLINE, f"adb says {state[:80]}.")
        elif state != "device" and time.monotonic() - self._changed_s < _SETTLE_S:
            # A connection that begins or ends passes through such states.
            if self._seat is not None:
                self._tell(DeviceState.OFFLINE, f"adb says {state}.")
        elif state != "device":
            self._bring_back(f"adb says {state}.")
        elif self._seat is None or self._told != (DeviceState.READY, None):
            # Not known yet, or it was away: it is asked what it is, and the ledger is told that it is there.
            self._take_seat()
        else:
            return self._measure(self._seat)
        return False

    # --- coming and going ------------------------------------------------------------------------

    def _take_seat(self) -> None:
        """Ask the phone what it is, register it, and take away what a crashed worker left."""
        if self._known_id and not self._may_use(self._known_id):
            # The same phone hangs here twice, by cable and by network, or another worker follows it. It is not asked
            # again and again: a measurement may be running on it.
            return
        try:
            is_up(self._phone)
            record = read_record(self._phone)
        except EdgeKilnError as error:
            log.warning("%s is not usable: %s", self._phone.serial, error)
            self._bring_back(f"{say_failure(error.code).capitalize()}.")
            return
        device_id = record["serial"]
        if not _DEVICE_ID.fullmatch(device_id):
            raise DeviceUnauthorized(
                f"{self._phone.serial} calls itself {device_id[:80]!r}, which is no serial number."
            )
        self._known_id = device_id
        record = {
            **record,
            "serial": device_id,
            "name": " ".join(filter(None, (record["manufacturer"], record["model"]))),
        }
        database, worker_id = self._process.database, self._process.worker_id
        if self._seat is not None and self._seat.device_id != device_id:
            devices.forget_silent_device(database, worker_id, self._seat.device_id)
            self._seat = None
        if not self._may_use(device_id):
            return
        # Not ready before it is clean.
        state = devices.register_device(
            database, worker_id, device_id, record, [self._phone.serial], DeviceState.OFFLINE
        )
        if state is None:
            return
        # Should it go away now, the ledger is told so.
        self._seat, self._told = Seat(device_id, self._phone.serial, record), None
        if state is DeviceState.QUARANTINED:
            # By an earlier worker, or before this one was started anew.
            self._is_held = True
            return
        # Only now: while another follows the phone, a run of its own is on it.
        close_runs(self._phone)
        self._looked_s = time.monotonic()
        self._tell(DeviceState.READY, None)
        log.info("%s is %s, %s", self._phone.serial, device_id, record["name"])

    def _may_use(self, device_id: str) -> bool:
        """Whether the phone is this connection's, of all that lead to it."""
        return self._grant(device_id, self) and devices.may_follow(
            self._process.database, self._process.worker_id, device_id
        )

    def _note_absence(self) -> None:
        self._known_id = None
        self._was_away = True
        if self._is_held and is_on_network(self._phone.serial):
            # Adb drops what does not answer; that is no reason to use it again.
            self._is_held = not self._is_released()
        else:
            self._is_held = False
            if self._seat is not None and self._is_unknown(self._seat):
                devices.forget_silent_device(self._process.database, self._process.worker_id, self._seat.device_id)
            else:
                self._tell(DeviceState.ABSENT, "adb does not know it.")
            self._seat = None
        now_s = time.monotonic()
        if now_s >= self._seek_until_s and not self._is_held:
            # Another thread begins when it comes again: connections by network come at ever new ports.
            self._stopped.set()
        elif now_s < self._seek_until_s and now_s - self._looked_s >= _LOOK_S:
            self._looked_s = now_s
            with contextlib.suppress(EdgeKilnError):
                self._phone.adb.connect(self._phone.serial)

    def _look_for_release(self, state: str) -> None:
        """Use the phone again once it was away, or an operator has released it."""
        if (self._was_away and state == "device") or self._is_released():
            if self._was_away:
                self._tell(DeviceState.ABSENT, "adb did not know it.")
            self._is_held = self._was_away = False
            self._told = None

    def _is_released(self) -> bool:
        states = devices.read_states(self._process.database, self._process.worker_id)
        return self._seat is None or states.get(self._seat.device_id) != DeviceState.QUARANTINED

    # --- work and failure ------------------------------------------------------------------------

    def _measure(self, seat: Seat) -> bool:
        runner = self._process.runner
        assert isinstance(runner, PhoneRunner)
        outcome = runner.run_on(seat)
        if outcome is None:
            self._look_at_times(seat)
            return False
        if outcome.has_succeeded:
            self._failures = 0
        elif outcome.fault is not None:
            self._failures += 1
            said = say_failure(outcome.fault)
            if self._failures >= _MAX_FAILURES:
                self._hold(f"{self._failures} benchmarks in a row failed on it; the last time {said}.")
            else:
                self._bring_back(f"{said.capitalize()}.")
        return True

    def _look_at_times(self, seat: Seat) -> None:
        """See that a phone without work still answers, and still is this worker's."""
        if time.monotonic() - self._looked_s < _LOOK_S:
            return
        self._looked_s = time.monotonic()
        try:
            is_up(self._phone)
        except EdgeKilnError as error:
            self._bring_back(f"{say_failure(error.code).capitalize()}.")
            return
        if not devices.see_device(self._process.database, self._process.worker_id, seat.device_id):
            self._told = None

    def _bring_back(self, reason: str) -> None:
        """Climb the ladder of recovery; a phone that stays away is given up, with the reason."""
        try:
            is_up(self._phone)
            self._clean()
            return
        except EdgeKilnError as error:
            is_hung = isinstance(error, DeviceHung)
            self._tell(DeviceState.OFFLINE, reason)
        if self._seat is None:
            # Another follows it by this connection, and may be in the middle of a run.
            return
        try:
            step = recover(
                self._phone,
                self._settings.boot_s,
                self._is_wanted,
                self._settings.power_cycle_program,
                is_gentle=self._is_unknown(self._seat),
            )
            self._clean()
        except (DeviceUnauthorized, AdbUnavailable) as error:
            log.warning("%s", error)
        except EdgeKilnError as error:
            log.warning("%s: %s", self._phone.serial, error)
            if is_on_network(self._phone.serial):
                # No plug tells that it is back, and adb has dropped it.
                self._seek_until_s = time.monotonic() + _SEEK_S
            # What has hung is given up. What is not there any more is absent, as the next look finds.
            if self._is_wanted() and (is_hung or self._phone.serial in self._phone.adb.states()):
                self._hold(f"Nothing brought it back: {say_failure(error.code)}.")
        else:
            log.info("%s is back after %s", self._phone.serial, step)
            self._seek_until_s = 0.0
            # It may have been started anew, and is asked again what it is.
            self._told = None

    def _clean(self) -> None:
        """Take away what runs have left, on a phone that is ours."""
        if self._seat is not None and not self._is_unknown(self._seat):
            close_runs(self._phone)

    def _is_wanted(self) -> bool:
        """Whether the phone is still to be brought back; adb drops what the ladder itself has disconnected."""
        is_attached = self._state is not None or is_on_network(self._phone.serial)
        return is_attached and not self._stopped.is_set()

    def _hold(self, reason: str) -> None:
        log.warning("%s is given up: %s", self._phone.serial, reason)
        self._is_held, self._was_away, self._failures = True, False, 0
        self._looked_s = time.monotonic()
        self._tell(DeviceState.QUARANTINED, reason)

    # --- what the ledger is told -----------------------------------------------------------------

    def _tell(self, state: DeviceState, reason: str | None) -> None:
        """Write down how the phone is, once; another connection that it is used by since knows better."""
        if self._seat is None and state is not DeviceState.ABSENT:
            self._enter_silent()
        if self._seat is None or self._told == (state, reason) or not self._grant(self._seat.device_id, self):
            return
        connections = [] if state is DeviceState.ABSENT else [self._phone.serial]
        devices.tell_state(
            self._process.database, self._process.worker_id, self._seat.device_id, state, reason, connections
        )
        self._told = (state, reason)

    def _enter_silent(self) -> None:
        """Show a phone that has not told yet which one it is, unless this connection is known to be another's."""
        serial = self._phone.serial
        if not _DEVICE_ID.fullmatch(serial) or self._known_id is not None or not self._grant(serial, self):
            return
        record = devices.enter_silent_device(self._process.database, self._process.worker_id, serial)
        if record is not None:
            self._seat, self._told = Seat(serial, serial, record), None

    @staticmethod
    def _is_unknown(seat: Seat) -> bool:
        """Whether nobody knows which phone this is; another connection may lead to it, and a run be on it."""
        return bool(seat.record["kind"] == "unknown")
