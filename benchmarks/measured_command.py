"""A command, its wall time, and the memory of all that it starts.

Owns measuring commands for the scripts of this folder, in one way for every contender.
"""

from __future__ import annotations

import ctypes
import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

#: Adopts orphans of the measured command, so that a daemon's children still count.
_PR_SET_CHILD_SUBREAPER = 36
#: Walking page tables takes milliseconds, so not more often.
_MEMORY_PERIOD_S = 0.5
_LOG_LINES = 30


class CommandError(Exception):
    """The command ended with another status than those that were expected."""


@dataclass(frozen=True)
class Measured:
    """What one run of a command cost."""

    wall_s: float
    #: Processor time of the command and of all children that it waited for.
    cpu_s: float
    #: Before it started: other work on the host makes wall times worthless.
    load_average_1m: float
    #: VmHWM of the largest process of the tree; counts mapped files.
    peak_rss_bytes: int
    #: The largest sum of Pss_Anon + Pss_Shmem over the tree at one moment, sampled: pages that forked processes share
    #: are counted once. None where the kernel does not let this user read it.
    peak_anon_bytes: int | None
    status: int
    stdout: str

    def to_json(self) -> dict[str, Any]:
        """Return times and memory, without the output."""
        figures = asdict(self)
        del figures["stdout"]
        return figures


def measure(
    command: Sequence[str], log_path: Path, environment: Mapping[str, str] | None = None, statuses: Sequence[int] = (0,)
) -> Measured:
    """Run `command` to its end with standard error in `log_path`; raises `CommandError` with the log's tail."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    stdout_path = log_path.with_suffix(".stdout")
    load_average_1m = os.getloadavg()[0]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started_s = time.monotonic()
    with log_path.open("wb") as log, stdout_path.open("wb") as stdout:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=log, env={**os.environ, **(environment or {})}
        )
        try:
            peak_rss_bytes, peak_anon_bytes = _watch(process.pid)
        finally:
            # Interrupted: let the command stop what it started.
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
            status = process.wait()
    wall_s = time.monotonic() - started_s
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    text = stdout_path.read_text(errors="replace")
    if status not in statuses:
        tail = "\n".join((log_path.read_text(errors="replace") + text).splitlines()[-_LOG_LINES:])
        raise CommandError(f"{' '.join(command)} ended with status {status}:\n{tail}")
    return Measured(wall_s, cpu_s, load_average_1m, peak_rss_bytes, peak_anon_bytes, status, text)


def _watch(pid: int) -> tuple[int, int | None]:
    peak_rss_bytes = 0
    peak_anon_bytes: int | None = 0
    handle = os.pidfd_open(pid)
    try:
        poller = select.poll()
        poller.register(handle, select.POLLIN)
        while not poller.poll(_MEMORY_PERIOD_S * 1000):
            anon_bytes = 0
            for member in _list_tree():
                peak_rss_bytes = max(peak_rss_bytes, _read_fields(member, "status").get("VmHWM", 0))
                try:
                    proportional = _read_fields(member, "smaps_rollup")
                except PermissionError:
                    peak_anon_bytes = None
                    continue
                anon_bytes += proportional.get("Pss_Anon", 0) + proportional.get("Pss_Shmem", 0)
            if peak_anon_bytes is not None:
                peak_anon_bytes = max(peak_anon_bytes, anon_bytes)
    finally:
        os.close(handle)
    return peak_rss_bytes, peak_anon_bytes


def _list_tree() -> list[int]:
    """Return the process ids below this process: its command and what that started, orphans included."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                stat = (folder / "stat").read_text()
            except OSError:
                continue
            # The name in parentheses may hold anything.
            parent = int(stat.rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(folder.name))
    found: list[int] = []
    waiting = [os.getpid()]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def _read_fields(pid: int, name: str) -> dict[str, int]:
    """Return the fields in kB of a file of `/proc/PID`, in bytes; none if the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/{name}").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    pairs = (line.split(":", 1) for line in lines if line.endswith(" kB"))
    return {field: int(value.removesuffix("kB")) * 1024 for field, value in pairs}


def say(text: str) -> None:
    """Tell a person how far it is, on standard error."""
    print(text, file=sys.stderr, flush=True)
