"""Phones at the end of an adb server: what is attached, commands with a deadline, files.

Owns the conversation and nothing of what is measured. Three rules hold for every call. It ends at its deadline,
whatever the phone does. An answer counts only whole: with an end mark that nothing else can print, and the exit status
that the phone itself saw. Every failure is typed. Called by the other modules of this room and by the device worker.
"""

from __future__ import annotations

import re
import secrets
import shlex
import socket
import stat
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adbutils import AdbClient, AdbConnection, AdbError, AdbTimeout
from adbutils.errors import AdbConnectionError

from service.errors import AdbUnavailable, DeviceFull, DeviceHung, DeviceLost, DeviceUnauthorized, EdgeKilnError

#: Serial numbers as adb lists them: USB serials, `host:port`, mDNS names. None begins like an option.
_SERIAL = re.compile(r"[A-Za-z0-9\[][\w.:\[\]()%~ -]{0,127}")
_NO_SPACE = "No space left"
#: Largest piece of a file that the protocol allows.
_PIECE_BYTES = 64 * 1024
#: A phone that has nothing to do answers within this, unless the operator says otherwise.
ANSWER_S = 20.0
#: A push is given so many answers' time, and a second more for each of so many bytes: USB 2, a slow flash behind it.
_PUSH_ANSWERS = 3
_SLOWEST_PUSH_BYTES_PER_S = 2_000_000


@dataclass(frozen=True)
class Answer:
    """How a command on a phone ended, by the phone's own account."""

    stdout: str
    stderr: str
    status: int


def quote(*words: str) -> str:
    """Return words as one line that a phone's shell reads as these words."""
    return shlex.join(words)


def is_serial(serial: str) -> bool:
    """Tell whether adb can be given this as a serial number."""
    return _SERIAL.fullmatch(serial) is not None


def check_serial(serial: str) -> str:
    """Return a serial number that adb can be given; raises `DeviceLost` for what cannot be one."""
    if not is_serial(serial):
        raise DeviceLost(f"{serial[:80]!r} cannot be a device's serial number.", serial=serial)
    return serial


class _Deadline:
    """An instant, for any number of reads and writes together."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._ends_s = time.monotonic() + seconds

    def left_s(self) -> float:
        """Return what is left; raises `AdbTimeout` when that is nothing."""
        left_s = self._ends_s - time.monotonic()
        if left_s <= 0:
            raise AdbTimeout("the deadline is over")
        return left_s


class _Connection(AdbConnection):  # type: ignore[misc]
    """The library's, within a deadline: its own time limit starts anew with every piece that arrives."""

    def __init__(self, host: str, port: int, deadline: _Deadline) -> None:
        self._deadline = deadline
        self._address = (host, port)
        super().__init__(host, port)

    def _safe_connect(self) -> socket.socket:
        # The library would start a server of its own where none listens; servers are the operator's.
        try:
            return socket.create_connection(self._address, timeout=self._deadline.left_s())
        except OSError as error:
            raise AdbConnectionError(str(error)) from error

    @property
    def conn(self) -> socket.socket:
        """The socket, for one more read or write."""
        link: socket.socket = super().conn
        link.settimeout(self._deadline.left_s())
        return link


class _Client(AdbClient):  # type: ignore[misc]
    def __init__(self, host: str, port: int, deadline: _Deadline) -> None:
        super().__init__(host, port)
        self._deadline = deadline
        self._opened: list[_Connection] = []

    def make_connection(self, timeout: float | None = None) -> _Connection:
        self._opened.append(_Connection(self.host, self.port, self._deadline))
        return self._opened[-1]

    def close(self) -> None:
        """Close what the library leaves open when it raises."""
        for connection in self._opened:
            connection.close()


@dataclass(frozen=True)
class Adb:
    """An adb server; it may be on another host."""

    host: str
    port: int
    #: A phone that takes longer for what it has at hand counts as hung.
    answer_s: float = ANSWER_S

    def states(self) -> dict[str, str]:
        """Return serial number -> state (`device`, `offline`, `unauthorized`, ...) of what is attached."""
        with self._talk(None, self.answer_s) as client:
            return {str(found.serial): str(found.state) for found in client.list()}

    def connect(self, address: str) -> None:
        """Have the server connect to a phone at `host:port`; `states` says whether it did."""
        with self._talk(address, self.answer_s) as client:
            client.connect(address)

    def disconnect(self, address: str) -> None:
        """Have the server drop a phone at `host:port`; none of this address is no error."""
        with self._talk(address, self.answer_s) as client:
            client.disconnect(address)

    def reconnect(self, serial: str) -> None:
        """Have the server begin its conversation with a phone anew."""
        with self._talk(serial, self.answer_s) as client, client.make_connection() as link:
            link.send_command(f"host-serial:{check_serial(serial)}:reconnect")
            link.check_okay()

    def phone(self, serial: str) -> Phone:
        """Return the phone of a serial number; whether it is there shows with the first call."""
        return Phone(self, check_serial(serial))

    @contextmanager
    def _talk(self, serial: str | None, deadline_s: float) -> Iterator[_Client]:
        client = _Client(self.host, self.port, _Deadline(deadline_s))
        try:
            yield client
        except AdbConnectionError as error:
            raise AdbUnavailable(
                f"No adb server answers at {self.host}:{self.port}. Start it there (`adb start-server`), or set "
                "EDGEKILN_ADB_HOST and EDGEKILN_ADB_PORT.",
                host=self.host,
                port=self.port,
            ) from error
        except (AdbError, EOFError, OSError, struct.error) as error:
            raise _name_failure(error, serial, deadline_s) from error
        finally:
            client.close()


@dataclass(frozen=True)
class Phone:
    """One attached phone."""

    adb: Adb
    serial: str

    def run(self, script: str, deadline_s: float | None = None) -> Answer:
        """Run a script in the phone's shell and return how it ended, whatever its status.

        Without a deadline it is one that a phone answers at once.

        Raises `DeviceLost`, `DeviceHung`, `DeviceUnauthorized`, `AdbUnavailable`. What it started may run on.
        """
        mark = secrets.token_hex(8)
        # In a shell of its own: an `exit` of the script must not skip the mark.
        wrapped = f"(\n{script}\n)\nstatus=$?; echo; echo {mark} $status; exit $status"
        deadline_s = deadline_s or self.adb.answer_s
        with self.adb._talk(self.serial, deadline_s) as client:
            found = client.device(self.serial).shell2(wrapped, timeout=deadline_s, v2=True)
        body, _, end = found.stdout.replace("\r\n", "\n").rpartition(f"\n{mark} ")
        if not re.fullmatch(r"\d{1,3}\n", end):
            raise DeviceLost(f"The answer of {self.serial} to a command has no end.", serial=self.serial)
        # The status that adb tells is not looked at: it has been 0 for phones that had vanished.
        return Answer(body, found.stderr, int(end))

    def read(self, script: str, deadline_s: float | None = None) -> str:
        """Do as `run`, and return what the script prints; raises `DeviceLost` or `DeviceFull` too, when it fails."""
        answer = self.run(script, deadline_s)
        if answer.status != 0:
            said = (answer.stderr or answer.stdout).strip()[-300:]
            if _NO_SPACE in said:
                raise DeviceFull(f"The storage of {self.serial} is full: {said}.", serial=self.serial)
            raise DeviceLost(
                f"A command on {self.serial} ended with status {answer.status}: {said or 'it said nothing'}.",
                serial=self.serial,
            )
        return answer.stdout

    def push(
        self,
        source: Path,
        target: str,
        mode: int = 0o644,
        on_bytes: Callable[[int], None] = lambda count: None,
    ) -> None:
        """Copy a file to the phone; whether it arrived whole, its digest there tells. Raises `DeviceFull` too."""
        size_bytes = source.stat().st_size
        deadline_s = _PUSH_ANSWERS * self.adb.answer_s + size_bytes / _SLOWEST_PUSH_BYTES_PER_S
        with source.open("rb") as file, self.adb._talk(self.serial, deadline_s) as client:
            # The library's own push has no deadline, and a send that was cut short corrupts the file.
            with client.device(self.serial).open_transport() as link:
                link.send_command("sync:")
                link.check_okay()
                head = f"{target},{stat.S_IFREG | mode}".encode()
                link.conn.sendall(struct.pack("<4sI", b"SEND", len(head)) + head)
                sent_bytes = 0
                while piece := file.read(_PIECE_BYTES):
                    link.conn.sendall(struct.pack("<4sI", b"DATA", len(piece)) + piece)
                    sent_bytes += len(piece)
                    on_bytes(sent_bytes)
                link.conn.sendall(struct.pack("<4sI", b"DONE", int(time.time())))
                verdict, length = struct.unpack("<4sI", link.read_exact(8))
                if verdict != b"OKAY":
                    raise AdbError(link.read_exact(length).decode(errors="replace"))


def _name_failure(error: Exception, serial: str | None, deadline_s: float) -> EdgeKilnError:
    """Return what went wrong in a conversation, as an error of ours."""
    who = serial or "the adb server"
    details: dict[str, Any] = {"serial": serial} if serial else {}
    text = str(error)
    if isinstance(error, (AdbTimeout, TimeoutError)):
        return DeviceHung(f"{who} did not answer within {deadline_s:.0f} s.", **details)
    if "unauthorized" in text:
        return DeviceUnauthorized(f"{who} does not trust this host's adb key: accept it on its screen.", **details)
    if _NO_SPACE in text:
        return DeviceFull(f"The storage of {who} is full: {text}.", **details)
    return DeviceLost(f"{who} went away: {text or type(error).__name__}.", **details)


def join_scripts(parts: Sequence[str]) -> tuple[str, Callable[[str], list[str]]]:
    """Return one script of several, and what splits its output again: a phone is asked once instead of many times."""
    mark = secrets.token_hex(8)
    script = f"\necho; echo {mark}\n".join(f"( {part} ) 2>/dev/null" for part in parts)
    return f"{script}\ntrue", lambda output: output.split(f"\n{mark}\n")
