"""A phone that does not answer is brought back, by steps that grow harsher; what none brings back is given up.

    look, reconnect, disconnect and connect, power off and on, reboot

Restarting the adb server is no step of it: that would drop every other phone of the host in the middle of its run.
Called by the device worker, after a failure and before a phone is used again.
"""

from __future__ import annotations

import contextlib
import logging
import subprocess
import time
from collections.abc import Callable
from functools import partial

from service.errors import AdbUnavailable, DeviceHung, DeviceLost, DeviceUnauthorized, EdgeKilnError
from workers.devices.adb import Phone

log = logging.getLogger(__name__)

#: Between two looks at a phone that starts.
_BOOTING_POLL_S = 2.0
#: How long a connection may take to come back by itself, unless even a phone's start is given less.
_RECONNECT_S = 10.0
#: How long a host may take to switch a port off and on.
_POWER_CYCLE_S = 60.0

_Act = Callable[[Phone], None]


def recover(
    phone: Phone,
    boot_s: float,
    is_wanted: Callable[[], bool] = lambda: True,
    power_cycle_program: str = "",
    *,
    is_gentle: bool = False,
) -> str:
    """Bring a phone back and return by which step: `look`, `reconnect`, `connect`, `power-cycle` or `reboot`.

    Raises what the last look raised when nothing helped. A phone that waits for a person's consent is left alone.
    `is_wanted` ends it early. `is_gentle`: only the connection is touched, since another's run may be on the phone.
    """
    reconnect_s = min(_RECONNECT_S, boot_s)
    ladder: list[tuple[str, _Act, float]] = [
        ("look", lambda phone: None, 0.0),
        ("reconnect", lambda phone: phone.adb.reconnect(phone.serial), reconnect_s),
        ("connect", _connect_again, reconnect_s),
    ]
    if not is_gentle:
        if power_cycle_program:
            ladder.append(("power-cycle", partial(_power_cycle, power_cycle_program), boot_s))
        ladder.append(("reboot", _reboot, boot_s))
    failure: EdgeKilnError | None = None
    for name, act, patience_s in ladder:
        try:
            act(phone)
        except EdgeKilnError as error:
            log.info("%s: %s did not work: %s", phone.serial, name, error)
        failure = _wait_until_up(phone, patience_s, boot_s, is_wanted)
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
    if phone.read("getprop sys.boot_completed").strip() != "1":
        raise DeviceLost(f"{phone.serial} is still starting.", serial=phone.serial, is_starting=True)


def is_on_network(serial: str) -> bool:
    """Whether a connection was made to an address, and does not come back by itself."""
    return ":" in serial


def _wait_until_up(
    phone: Phone, patience_s: float, boot_s: float, is_wanted: Callable[[], bool]
) -> EdgeKilnError | None:
    """Wait for a phone to be up and return why it is not; one that is starting gets the time that a start takes."""
    begun = time.monotonic()
    while True:
        try:
            is_up(phone)
            return None
        except EdgeKilnError as error:
            given_s = boot_s if error.details.get("is_starting") else patience_s
            if time.monotonic() - begun >= given_s or not is_wanted():
                return error
        time.sleep(min(_BOOTING_POLL_S, given_s))
        if is_on_network(phone.serial):
            with contextlib.suppress(EdgeKilnError):
                phone.adb.connect(phone.serial)


def _connect_again(phone: Phone) -> None:
    """Drop and make a network connection; a cable has none."""
    if is_on_network(phone.serial):
        phone.adb.disconnect(phone.serial)
        phone.adb.connect(phone.serial)


def _power_cycle(program: str, phone: Phone) -> None:
    """Have the host's program switch the phone's power off and on; no shell reads the serial number."""
    try:
        done = subprocess.run(
            [program, phone.serial], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_POWER_CYCLE_S
        )
    except subprocess.TimeoutExpired:
        raise DeviceHung(f"{program} did not end within {_POWER_CYCLE_S:.0f} s.", serial=phone.serial) from None
    except OSError as error:
        raise DeviceLost(f"{program} cannot be run: {error}.", serial=phone.serial) from error
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip()[-300:]
        raise DeviceLost(f"{program} ended with status {done.returncode}: {said!r}.", serial=phone.serial)
    _connect_again(phone)


def _reboot(phone: Phone) -> None:
    # It goes away before it has answered.
    with contextlib.suppress(EdgeKilnError):
        phone.run("reboot")
    _connect_again(phone)
