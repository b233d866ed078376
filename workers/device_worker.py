"""The device worker: follows an adb server, and gives each phone a thread that looks after it.

One thread looks what is attached; each phone has a thread of its own, so that one that hangs keeps no other waiting.
Started by `edgekiln device-worker`. Uses no broker: it looks for work itself.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterable

from sqlalchemy.exc import SQLAlchemyError

from service.devices import PHONE_CLASS
from service.errors import AdbUnavailable, EdgeKilnError
from service.ledger import devices
from service.process_log import begin_log
from service.settings import Settings, load_settings
from workers.devices.adb import is_serial
from workers.phone_keeper import PhoneKeeper
from workers.phone_runner import PhoneRunner, open_adb
from workers.process import WorkerProcess

log = logging.getLogger(__name__)

#: Phones that one worker serves at once, as its slots say to operators.
_MOST_PHONES = 64
_JOIN_S = 15.0


class DeviceWorker:
    """Everything a device worker holds, between `run` and `shut_down`."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._adb = open_adb(settings)
        self._closed = threading.Event()
        self.process = WorkerProcess(settings, _wake_nobody, slots={PHONE_CLASS: _MOST_PHONES}, runner_type=PhoneRunner)
        #: adb's serial number -> the thread that looks after the phone.
        self._keepers: dict[str, PhoneKeeper] = {}
        #: Device -> the thread of the connection that it is used by.
        self._holders: dict[str, PhoneKeeper] = {}
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
                self._keepers[serial] = PhoneKeeper(self._settings, self.process, self._adb, serial, self._grant)
                self._keepers[serial].see(states[serial])
                self._keepers[serial].start()
        for serial, keeper in list(self._keepers.items()):
            keeper.see(states.get(serial))
            if serial not in states and not keeper.is_alive():
                del self._keepers[serial]

    def _grant(self, device_id: str, keeper: PhoneKeeper) -> bool:
        """Give a phone to one of its connections, for as long as that one stands."""
        with self._granting:
            holder = self._holders.get(device_id, keeper)
            if holder is not keeper and holder.is_alive() and holder.is_connected:
                return False
            self._holders[device_id] = keeper
            return True


def _wake_nobody(resource_classes: Iterable[str]) -> None:
    """The sweep of other workers finds what a finished benchmark brings about."""


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
