"""Processes of a tool on a phone: started, ended by the phone's own clock, and heard only when they have ended well.

Owns how a command runs there: its output goes into files, because a stream that breaks has lost whole results; it
writes its own number down, so that whoever cleans up ends it and nothing else. Knows no figure. Called by
`workers.devices.phone`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from service.errors import BenchmarkFailed, DeviceLost
from workers.devices.adb import Phone, quote
from workers.devices.traces import run_dir

#: How often a process's memory is read, by the phone itself.
_MEMORY_PERIOD_S = 0.1
#: What is kept of a tool's log.
_LOG_CHARACTERS = 100_000
#: How `timeout` says that it ended a program, and a shell that its program was killed.
_TIMED_OUT = ("124", "137", "143")

_RUN = """\
cd {folder} && rm -f pid words
timeout -k 5 {deadline} sh -c 'echo $$ > pid; exec "$0" "$@"' {command} {output} < /dev/null
echo $? > status; rm -f pid; cat /proc/sys/kernel/random/boot_id; cat status; tail -c {most} report
"""
#: Whether what is printed for people, an answer say, goes apart from the log.
_TOGETHER, _APART = "> report 2>&1", "> words 2> report"
#: The same, while the phone itself reads the process's memory, once it is the tool's and no more its starter's.
_WATCH = """\
cd {folder} && rm -f pid && : > peaks
timeout -k 5 {deadline} sh -c 'echo $$ > pid; exec "$0" "$@"' {command} > report 2>&1 < /dev/null &
while kill -0 $! 2>/dev/null; do
  pid=$(cat pid 2>/dev/null)
  case "$(tr '\\0' '\\n' < /proc/${{pid:-none}}/cmdline 2>/dev/null | head -n 1)" in
  ''|sh|*/sh|env|*/env|taskset|*/taskset) ;;
  *)
    grep -E '^(VmHWM|RssAnon|RssShmem):' /proc/$pid/status >> peaks 2>/dev/null
    grep '^Pss:' /proc/$pid/smaps_rollup >> peaks 2>/dev/null
    echo . >> peaks ;;
  esac
  sleep {period}
done
wait $!; echo $? > status; rm -f pid; cat status; cat peaks
"""


@dataclass(frozen=True)
class Finished:
    """A process that ended well."""

    log: str
    wall_s: float
    #: What it printed for people, where that was asked for apart from the log.
    words: str = ""


@dataclass(frozen=True)
class Processes:
    """What runs processes of one tool in the folder of one run."""

    phone: Phone
    run: str
    tool_name: str
    #: A process of another boot tells nothing.
    boot_id: str
    deadline_s: float

    def start(self, label: str, command: Sequence[str], *, words_apart: bool = False) -> Finished:
        """Run one process to its end. Raises `BenchmarkFailed` when it fails or hangs, `DeviceLost`, `DeviceHung`."""
        folder = run_dir(self.run)
        script = _RUN.format(
            folder=quote(folder),
            deadline=int(self.deadline_s),
            command=quote(*command),
            output=_APART if words_apart else _TOGETHER,
            most=_LOG_CHARACTERS,
        )
        started_s = time.monotonic()
        # The phone ends a process at its deadline; it may take as long as for any answer to say so.
        said = self.phone.read(script, self.deadline_s + self.phone.adb.answer_s)
        boot_id, status, log = [*said.split("\n", 2), "", ""][:3]
        wall_s = time.monotonic() - started_s
        if boot_id.strip() != self.boot_id:
            raise DeviceLost(f"{self.phone.serial} was started again during the {label}.", serial=self.phone.serial)
        self._require_success(label, status.strip(), log)
        words = self.phone.read(f"head -c {_LOG_CHARACTERS} {quote(f'{folder}/words')}") if words_apart else ""
        return Finished(log, wall_s, words)

    def watch_memory(self, command: Sequence[str]) -> dict[str, int]:
        """Run one process while the phone reads its memory, and return the peaks that it shows."""
        script = _WATCH.format(
            folder=quote(run_dir(self.run)),
            deadline=int(self.deadline_s),
            command=quote(*command),
            period=_MEMORY_PERIOD_S,
        )
        status, _, peaks = self.phone.read(script, self.deadline_s + self.phone.adb.answer_s).partition("\n")
        self._require_success("process whose memory was watched", status.strip(), "")
        return read_peaks(peaks)

    def _require_success(self, label: str, status: str, log: str) -> None:
        if status == "0":
            return
        who = f"The {label} of {self.tool_name} on {self.phone.serial}"
        lines = log.splitlines()
        if status in _TIMED_OUT:
            raise BenchmarkFailed(f"{who} did not end within {self.deadline_s:.0f} s.", log=lines[-20:])
        last = next((line for line in reversed(lines) if line.strip()), "nothing")
        raise BenchmarkFailed(
            f"{who} ended with status {status}. It said: {last.strip()[:300]!r}.",
            log=lines[-20:],
        )


def read_peaks(text: str) -> dict[str, int]:
    """Return the peaks of readings of `/proc/PID/status` and `smaps_rollup`, a `.` after each, in bytes. Pure."""
    peaks: dict[str, int] = {}
    for reading in text.split(".\n"):
        kib = {line.split(":")[0]: int(line.split()[1]) for line in reading.splitlines() if len(line.split()) == 3}
        found = {"peak_rss_bytes": kib.get("VmHWM"), "peak_pss_bytes": kib.get("Pss")}
        if "RssAnon" in kib:
            found["peak_anon_bytes"] = kib["RssAnon"] + kib.get("RssShmem", 0)
        for name, value in found.items():
            if value:
                peaks[name] = max(peaks.get(name, 0), value * 1024)
    return peaks
