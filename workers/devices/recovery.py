"""A phone that does not answer is brought back, by steps that grow harsher; what none brings back is given up.

    look, reconnect, disconnect and connect, reboot

Restarting the adb server is no step of it: that would drop every other phone of the host in the middle of its run.
Called by the device worker, after a failure and before a phone is used again.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable

from service.errors import AdbUnavailable, DeviceUnauthorized, EdgeKilnError
from workers.devices.adb import Phone

log = logging.getLogger(__name__)

#: Between two looks at a phone that starts.
_BOOTING_POLL_S = 2.0
#: How long a connection may take to come back by itself.
_RECONNECT_S = 10.0


def recover(phone: Phone, boot_s: float, is_wanted: Callable[[], bool] = lambda: True) -> str:
    """Bring a phone back and return by which step: `look`, `reconnect`, `connect` or `reboot`.

    Raises what the last look raised when nothing helped. A phone that waits for a person's consent is left alone.
    `is_wanted` ends it early.
    """
    ladder: tuple[tuple[str, Callable[[Phone], None], float], ...] = (
        ("look", lambda phone: None, 0.0),
        ("reconnect", lambda phone: phone.adb.reconnect(phone.serial), _RECONNECT_S),
        ("connect", _connect_again, _RECONNECT_S),
        ("reboot", _reboot, boot_s),
    )
    failure: EdgeKilnError | None = None
    for name, act, patience_s in ladder:
        try:
            act(phone)
        except EdgeKilnError as error:
            log.info("%s: %s did not work: %s", phone.serial, name, error)
        failure = _wait_until_up(phone, patience_s, is_wanted)
        if failure is None:
            return name
        if isinstance(failure, AdbUnavailable | DeviceUnauthorized) or not is_wanted():
            break
    assert failure is not None
    raise failure


def is_up(phone: Phone) -> None:
    """Raise what keeps a phone from being used; return when nothing does."""
    if phone.adb.states().get(phone.serial) == "unauthorized":
        raise DeviceUnauthorized(f"{phone.serial} does not trust this host's adb key: accept it on its screen.")
    phone.read('[ "$(getprop sys.boot_completed)" = 1 ]')


def _wait_until_up(phone: Phone, patience_s: float, is_wanted: Callable[[], bool]) -> EdgeKilnError | None:
    give_up_at = time.monotonic() + patience_s
    while True:
        try:
            is_up(phone)
            return None
        except EdgeKilnError as error:
            if time.monotonic() >= give_up_at or not is_wanted():
                return error
        time.sleep(min(_BOOTING_POLL_S, patience_s))
        if ":" in phone.serial:
            # A network connection does not come back by itself.
            with contextlib.suppress(EdgeKilnError):
                phone.adb.connect(phone.serial)


def _connect_again(phone: Phone) -> None:
    """Drop and make a network connection; a cable has none."""
    if ":" in phone.serial:
        phone.adb.disconnect(phone.serial)
        phone.adb.connect(phone.serial)


def _reboot(phone: Phone) -> None:
    # It goes away before it has answered.
    with contextlib.suppress(EdgeKilnError):
        phone.run("reboot")
    _connect_again(phone)
