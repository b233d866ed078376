"""One supervised child process: its start, its end, its log file.

Owns a process group and a log. Knows nothing of what the command does. Called by `service.supervisor`, always from
the same thread: the kernel ties the child's life to the thread that started it.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

#: A log is set aside as `NAME.log.1` at a start above the first size, and while it is written above the second.
_LOG_START_BYTES = 4 << 20
_LOG_MOST_BYTES = 64 << 20
_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 30.0
#: A child that lived this long starts with a clean record.
_HEALTHY_S = 60.0


@dataclass(frozen=True)
class Command:
    """What a child runs."""

    name: str
    argv: Sequence[str]
    #: File descriptors that it inherits.
    pass_fds: tuple[int, ...] = ()
    #: Variables that it does not get.
    withheld: tuple[str, ...] = ()


class Child:
    """A command that is kept running."""

    def __init__(self, command: Command, log_path: Path, environment: Mapping[str, str], work_dir: Path) -> None:
        self.command = command
        self.log_path = log_path
        self._environment = {name: value for name, value in environment.items() if name not in command.withheld}
        self._work_dir = work_dir
        self._process: subprocess.Popen[bytes] | None = None
        self._started_at = 0.0
        #: Not to be started again before this instant of the monotonic clock.
        self.due_at = 0.0
        #: Ends without a healthy life in between.
        self.failures = 0

    @property
    def pid(self) -> int | None:
        """Its process id, which is its group's too; None while it does not run."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start the command in a session of its own, its output appended to the log."""
        _set_aside(self.log_path, _LOG_START_BYTES)
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "service.leash", str(os.getpid()), *self.command.argv],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                cwd=self._work_dir,
                start_new_session=True,
                pass_fds=self.command.pass_fds,
            )
        self._started_at = time.monotonic()

    def has_ended(self) -> bool:
        """Whether the process has exited; it stays a zombie, so that its group's number stays its own."""
        if self._process is None:
            return True
        options = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, self._process.pid, options) is not None

    def bury(self) -> str:
        """Kill what is left of the group, take the exit status, set the time of the next start; say how it ended."""
        assert self._process is not None
        self.signal_group(signal.SIGKILL)
        status = self._process.wait()
        self._process = None
        lived_s = time.monotonic() - self._started_at
        self.failures = 1 if lived_s >= _HEALTHY_S else self.failures + 1
        pause_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** (self.failures - 1))
        self.due_at = time.monotonic() + pause_s
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit code {status}"
        return f"{how}; next start in {pause_s:g} s"

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the process, not to its group."""
        if self._process is not None and not self.has_ended():
            self._process.send_signal(number)

    def signal_group(self, number: signal.Signals) -> None:
        """Send a signal to the process and whatever it left in its group."""
        if self._process is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, number)

    def trim_log(self) -> None:
        """Keep a log that grows without end within bounds; the child goes on writing to the emptied file."""
        with suppress(FileNotFoundError):
            if self.log_path.stat().st_size > _LOG_MOST_BYTES:
                shutil.copyfile(self.log_path, _old(self.log_path))
                os.truncate(self.log_path, 0)

    def last_lines(self, count: int = 12) -> str:
        """Return the end of the log."""
        try:
            with self.log_path.open("rb") as log:
                log.seek(max(0, self.log_path.stat().st_size - 8192))
                lines = log.read().decode(errors="replace").splitlines()
        except FileNotFoundError:
            return ""
        return "\n".join(lines[-count:])


def _old(path: Path) -> Path:
    return path.with_name(f"{path.name}.1")


def _set_aside(path: Path, above_bytes: int) -> None:
    if path.exists() and path.stat().st_size > above_bytes:
        path.replace(_old(path))
