"""What is ours on a phone: one folder, the processes of runs, one changed setting; and how all of it goes again.

    /data/local/tmp/edgekiln/
      tools/SHA256/NAME      kept: pushed once, checked before every use
      runs/RUN/              gone when the run has ended: the model, its caches, reports
        pid                  of the tool that runs, written by itself
        stay_on              the setting as it was before

Everything here may be done again: a worker that was killed leaves what the next one takes away. Called by
`workers.devices.phone`, and by the device worker when a run ends and when a phone comes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

from service.errors import DeviceFull, DeviceLost
from workers.devices.adb import Phone, quote

HOME = "/data/local/tmp/edgekiln"
_RUNS = f"{HOME}/runs"
_STAY_ON = "stay_on_while_plugged_in"
#: A digest of a file takes a phone a second more for each of so many bytes.
_SLOWEST_DIGEST_BYTES_PER_S = 20_000_000
#: Left free beside the model for each cache: it is about as large as the weights.
_CACHE_SHARE = 1.2
_LEAST_FREE_BYTES = 64 * 1024 * 1024

#: Ends one run (`$run`) and puts back what it changed. A process is killed only if it is still the one that was
#: written down: its number may be another's by now.
_END_RUN = f"""\
if [ -s "$run/pid" ]; then
  pid=$(cat "$run/pid")
  if grep -q {HOME}/ /proc/$pid/cmdline 2>/dev/null; then kill -9 $pid 2>/dev/null; fi
fi
if [ -s "$run/{_STAY_ON}" ]; then
  case "$(cat "$run/{_STAY_ON}")" in
  # What was not set reads as this word, and would be set to it.
  null) settings delete global {_STAY_ON} ;;
  *) settings put global {_STAY_ON} "$(cat "$run/{_STAY_ON}")" ;;
  esac
fi
rm -rf "$run"
"""


def run_dir(run: str) -> str:
    """Return a run's folder on the phone."""
    return f"{_RUNS}/{run}"


def open_run(phone: Phone, run: str) -> None:
    """Take away what other runs left, make this run's folder, and keep the screen from going to sleep.

    Whoever may use the phone is decided before: its lease is held.
    """
    folder = quote(run_dir(run))
    phone.read(
        f'for run in {_RUNS}/*; do [ -d "$run" ] || continue\n{_END_RUN}done\n'
        f"mkdir -p {folder}/cache && settings get global {_STAY_ON} > {folder}/{_STAY_ON} && svc power stayon true"
    )


def close_runs(phone: Phone) -> None:
    """End all runs, and leave nothing of them: processes, files, the setting."""
    phone.read(f'for run in {_RUNS}/*; do [ -d "$run" ] || continue\n{_END_RUN}done; rm -rf {_RUNS}')


def require_room(phone: Phone, model_bytes: int, caches: int = 1) -> None:
    """Raise `DeviceFull` unless a model, its caches and a reserve fit."""
    needed_bytes = int(model_bytes * (1 + caches * _CACHE_SHARE)) + _LEAST_FREE_BYTES
    lines = phone.read("df -k /data/local/tmp").strip().splitlines()
    try:
        free_bytes = int(lines[-1].split()[3]) * 1024
    except (IndexError, ValueError):
        raise DeviceLost(f"{phone.serial} does not say how much room it has: {lines[-1:]}.") from None
    if free_bytes < needed_bytes:
        raise DeviceFull(
            f"{phone.serial} has {free_bytes / 1e6:.0f} MB of storage left; the model and its caches take "
            f"{needed_bytes / 1e6:.0f} MB.",
            needed_bytes=needed_bytes,
            free_bytes=free_bytes,
        )


def place_tool(phone: Phone, folder: Path, files: Mapping[str, str]) -> tuple[str, bool]:
    """Bring a tool's files (name -> SHA-256), unless they are there whole; return their folder and whether it was new.

    A tool lies under the digest of all its files, so that two versions never mix.
    """
    home = tool_dir(files)
    is_new = any(_read_digest(phone, f"{home}/{name}", 0) != digest for name, digest in files.items())
    if is_new:
        phone.read(f"rm -rf {quote(home)} && mkdir -p {quote(home)}")
        for name, digest in files.items():
            push_checked(phone, folder / name, f"{home}/{name}", digest, mode=0o755)
    return home, is_new


def tool_dir(files: Mapping[str, str]) -> str:
    """Return the folder on the phone of a tool that is made of these files."""
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(files.items()))
    return f"{HOME}/tools/{hashlib.sha256(lines.encode()).hexdigest()}"


def digest_file(path: Path) -> str:
    """Return the SHA-256 of a file here."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def push_checked(
    phone: Phone,
    source: Path,
    target: str,
    digest: str,
    mode: int = 0o644,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> None:
    """Copy a file and compare its SHA-256 there; raises `DeviceLost` for one that did not arrive as it is."""
    phone.push(source, target, mode, on_bytes)
    found = _read_digest(phone, target, source.stat().st_size)
    if found != digest:
        raise DeviceLost(
            f"{source.name} arrived on {phone.serial} damaged: its SHA-256 there is {found}, not {digest}.",
            expected=digest,
            found=found,
        )


def _read_digest(phone: Phone, path: str, size_bytes: int) -> str | None:
    answer = phone.run(f"sha256sum {quote(path)}", phone.adb.answer_s + size_bytes / _SLOWEST_DIGEST_BYTES_PER_S)
    return answer.stdout.split()[0] if answer.status == 0 and answer.stdout.strip() else None
