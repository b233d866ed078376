"""The device worker: follows an adb server, tells the ledger of its phones, and measures on each that has work.

One thread looks what is attached; each phone has a thread of its own, so that one that hangs keeps no other waiting.
Started by `edgekiln device-worker`. Uses no broker: it looks for work itself.
"""

from __future__ import annotations

import logging
import re
import signal
import threading
from collections.abc import Callable, Iterable

from sqlalchemy.exc import SQLAlchemyError

from service.devices import PHONE_CLASS
from service.errors import AdbUnavailable, DeviceUnauthorized, EdgeKilnError
from service.ledger import devices
from service.ledger.states import DeviceState
from service.process_log import begin_log
from service.settings import Settings, load_settings
from workers.devices.adb import Adb, is_serial
from workers.devices.android import read_record
from workers.devices.recovery import recover
from workers.devices.traces import close_runs
from workers.phone_runner import PhoneRunner, Seat
from workers.process import WorkerProcess

log = logging.getLogger(__name__)

#: Failed runs in a row after which a phone is given up, though it answers.
_MAX_FAILURES = 3
#: What the ledger's column of device ids holds.
_DEVICE_ID = re.compile(r"[A-Za-z0-9][\w.:-]{0,99}")
#: Phones that one worker serves at once, as its slots say to operators.
_MOST_PHONES = 64
_JOIN_S = 15.0


class DeviceWorker:
    """Everything a device worker holds, between `run` and `shut_down`."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._adb = Adb(settings.adb_host, settings.adb_port)
        self._closed = threading.Event()
        self.process = WorkerProcess(settings, _wake_nobody, slots={PHONE_CLASS: _MOST_PHONES}, runner_type=PhoneRunner)
        #: adb's serial number -> the thread that looks after the phone.
        self._keepers: dict[str, _PhoneKeeper] = {}
        #: Device -> the thread of the connection that it is used by.
        self._holders: dict[str, _PhoneKeeper] = {}
        self._granting = threading.Lock()

    def run(self) -> None:
        """Follow the adb server until `shut_down`."""
        self.process.start()
        was_heard = True
        try:
            while not self._closed.is_set():
                try:
                    self._follow(self._adb.states())
                    was_heard = True
                except AdbUnavailable as error:
                    if was_heard:
                        log.warning("%s", error)
                    was_heard = False
                    self._follow({})
                except (EdgeKilnError, SQLAlchemyError) as error:
                    log.warning("could not look at the phones; the next look may: %s", error)
                self._closed.wait(self._settings.device_poll_s)
        finally:
            self._close()

    def shut_down(self) -> None:
        """End soon: give back what runs, and leave the phones clean."""
        self._closed.set()
        self.process.shut_down()
        for keeper in self._keepers.values():
            keeper.stop()

    def _close(self) -> None:
        self.shut_down()
        for keeper in self._keepers.values():
            keeper.join(_JOIN_S)
        try:
            devices.leave_devices(self.process.database, self.process.worker_id)
        except (EdgeKilnError, SQLAlchemyError) as error:
            log.warning("could not tell the ledger that the phones are left: %s", error)
        self.process.close()

    def _follow(self, states: dict[str, str]) -> None:
        """Start a thread for what has come; tell each how adb sees its phone."""
        for serial in states:
            keeper = self._keepers.get(serial)
            if not is_serial(serial):
                # What adb prints for a phone without permission, say. Others must not suffer from it.
                log.debug("adb lists %r, which is no serial number", serial)
            elif keeper is None or not keeper.is_alive():
                self._keepers[serial] = _PhoneKeeper(self._settings, self.process, self._adb, serial, self._grant)
                self._keepers[serial].see(states[serial])
                self._keepers[serial].start()
        for serial, keeper in list(self._keepers.items()):
            keeper.see(states.get(serial))

    def _grant(self, device_id: str, keeper: _PhoneKeeper) -> bool:
        """Give a phone to one of its connections, for as long as that one stands."""
        with self._granting:
            holder = self._holders.get(device_id, keeper)
            if holder is not keeper and holder.is_alive() and holder.is_connected:
                return False
            self._holders[device_id] = keeper
            return True


def _wake_nobody(resource_classes: Iterable[str]) -> None:
    """The sweep of other workers finds what a finished benchmark brings about."""


class _PhoneKeeper(threading.Thread):
    """Looks after one connection: registers the phone, measures on it, brings it back, gives it up."""

    def __init__(
        self,
        settings: Settings,
        process: WorkerProcess,
        adb: Adb,
        serial: str,
        grant: Callable[[str, _PhoneKeeper], bool],
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
        self._seat: Seat | None = None
        self._failures = 0
        #: How often it has looked after the phone.
        self.look_count = 0
        #: Given up until it was away, or an operator releases it.
        self._is_held = False
        self._told: tuple[DeviceState, str | None] | None = None

    @property
    def is_connected(self) -> bool:
        """Whether adb knows the phone by this connection."""
        return self._state is not None

    def see(self, state: str | None) -> None:
        """Take note of how adb sees the phone."""
        if state != self._state:
            self._state = state
            self._changed.set()

    def stop(self) -> None:
        """End after the run in progress, which is being ended too."""
        self._stopped.set()
        self._changed.set()

    def run(self) -> None:
        """Look after the phone until it is told to stop."""
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
        if self._state is None:
            self._is_held = False
            self._tell(DeviceState.ABSENT, "adb does not know it.")
            self._seat = None
        elif self._state == "unauthorized":
            self._tell(DeviceState.UNAUTHORIZED, "It does not trust this host's adb key: accept it on its screen.")
        elif self._is_held:
            self._look_for_release()
        elif self._state != "device":
            self._tell(DeviceState.OFFLINE, f"adb says {self._state}.")
            self._bring_back()
        elif self._seat is None or self._told != (DeviceState.READY, None):
            # Not known yet, or it was away: it is asked what it is, and the ledger is told that it is there.
            self._take_seat()
        else:
            return self._measure(self._seat)
        return False

    def _take_seat(self) -> None:
        """Ask the phone what it is, register it, and take away what a crashed worker left."""
        try:
            record = read_record(self._phone)
        except EdgeKilnError as error:
            log.warning("%s is not usable: %s", self._phone.serial, error)
            self._bring_back()
            return
        device_id = record["serial"]
        if not _DEVICE_ID.fullmatch(device_id):
            raise DeviceUnauthorized(
                f"{self._phone.serial} calls itself {device_id[:80]!r}, which is no serial number."
            )
        record = {
            **record,
            "serial": device_id,
            "name": " ".join(filter(None, (record["manufacturer"], record["model"]))),
        }
        if not self._grant(device_id, self):
            # The same phone hangs here twice, by cable and by network; one connection is enough.
            return
        worker_id = self._process.worker_id
        if devices.register_device(self._process.database, worker_id, device_id, record, [self._phone.serial]):
            # Should it go away now, the ledger is told so.
            self._seat, self._told = Seat(device_id, self._phone.serial, record), None
            # Only now: while another follows the phone, a run of its own is on it.
            close_runs(self._phone)
            self._told = (DeviceState.READY, None)
            log.info("%s is %s, %s", self._phone.serial, device_id, record["name"])

    def _measure(self, seat: Seat) -> bool:
        runner = self._process.runner
        assert isinstance(runner, PhoneRunner)
        outcome = runner.run_on(seat)
        if outcome is None:
            return False
        if outcome.has_succeeded:
            self._failures = 0
        elif outcome.is_phones_fault:
            self._failures += 1
            if self._failures >= _MAX_FAILURES:
                self._hold(f"{self._failures} benchmarks in a row failed on it.")
            else:
                self._bring_back()
        return True

    def _bring_back(self) -> None:
        """Climb the ladder of recovery; a phone that stays away is given up, with the reason."""
        if self._seat is None:
            # It may be another's, and in the middle of a run.
            return
        try:
            step = recover(self._phone, self._settings.boot_s, self._is_attached)
            close_runs(self._phone)
        except (DeviceUnauthorized, AdbUnavailable) as error:
            log.warning("%s", error)
        except EdgeKilnError as error:
            if self._is_attached():
                self._hold(error.message)
        else:
            if step != "look":
                log.info("%s is back after %s", self._phone.serial, step)
                # It may have been started anew, and is asked again what it is.
                self._told = None

    def _is_attached(self) -> bool:
        return not self._stopped.is_set() and self._state is not None

    def _hold(self, reason: str) -> None:
        log.warning("%s is given up: %s", self._phone.serial, reason)
        self._is_held = True
        self._failures = 0
        self._tell(DeviceState.QUARANTINED, reason)

    def _look_for_release(self) -> None:
        """Use the phone again once an operator has released it."""
        states = devices.read_states(self._process.database, self._process.worker_id)
        if self._seat is None or states.get(self._seat.device_id) != DeviceState.QUARANTINED:
            self._is_held = False
            self._seat = None

    def _tell(self, state: DeviceState, reason: str | None) -> None:
        """Write down how the phone is, once; another connection that it is used by since knows better."""
        if self._seat is None or self._told == (state, reason) or not self._grant(self._seat.device_id, self):
            return
        connections = [] if state is DeviceState.ABSENT else [self._phone.serial]
        devices.tell_state(
            self._process.database, self._process.worker_id, self._seat.device_id, state, reason, connections
        )
        self._told = (state, reason)


def main() -> None:
    """Run a device worker with the settings of the environment until it is told to end."""
    settings = load_settings()
    begin_log(settings.log_format)
    worker = DeviceWorker(settings)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: worker.shut_down())
    worker.run()


if __name__ == "__main__":
    main()
