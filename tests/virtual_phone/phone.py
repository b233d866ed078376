"""The phone behind the protocol: its files, its properties, its commands, its faults.

A fault is an entry of `faults.json` in the phone's folder, read whenever it matters, so that a test changes it while
the phone runs:

- `lose_after_bytes`: the line goes dead after so many more bytes, in both directions together
- `hang`: nothing is answered any more; `stall`: a command that matches this pattern never ends
- `truncate_push`: a pushed file keeps so many bytes, and the push says it went well
- `no_exit_packet`: a command that matches ends without saying how
- `statuses`: pattern -> the exit status that a command is said to have
- `auth`: `refuse`; `disk_full`: pushes fail and `df` has nothing left; `hot`: the thermal status
- `reboot_on`: the phone reboots as soon as a command matches, and is away for `reboot_s`
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
import time
import uuid
from pathlib import Path
from typing import Any

#: What of a phone's file system is its own folder here; the rest (`/proc` of its processes) is this machine's.
_OWN = re.compile(r"(?<![\w./-])(/(?:data|sdcard|sys)(?=/|\b)|/proc/sys/kernel/random(?=/))")
_POLL_S = 0.02

PROPERTIES = {
    "ro.product.manufacturer": "EdgeKiln",
    "ro.product.brand": "edgekiln",
    "ro.product.name": "virtual",
    "ro.product.model": "Virtual phone",
    "ro.product.device": "virtual",
    "ro.soc.manufacturer": "None",
    "ro.soc.model": "VIRT1",
    "ro.build.version.release": "15",
    "ro.build.version.sdk": "35",
    "ro.build.version.security_patch": "2026-10-05",
    "ro.build.fingerprint": "edgekiln/virtual/virtual:15/VP1A.261121.001/1:user/release-keys",
    "ro.product.cpu.abi": "x86_64",
    "ro.product.cpu.abilist": "x86_64",
    "ro.boot.qemu": "1",
    "sys.boot_completed": "1",
}
#: Two little cores, one big one.
_CLUSTERS_KHZ = (1_800_000, 1_800_000, 3_000_000)

_COMMANDS = {
    "getprop": """\
if [ $# -eq 0 ]; then sed 's/^\\([^=]*\\)=\\(.*\\)$/[\\1]: [\\2]/' "$PHONE_ROOT/properties"
else sed -n "s/^$1=//p" "$PHONE_ROOT/properties"; fi
""",
    "dumpsys": """\
case "$1" in
thermalservice) sed "s/STATUS/$(cat "$PHONE_ROOT/thermal")/" <<'END'
IsStatusOverride: false
ThermalEventListeners:
	callbacks: 1
Thermal Status: STATUS
Cached temperatures:
	Temperature{mValue=31.5, mType=3, mName=skin, mStatus=0}
END
;;
battery) cat <<'END'
Current Battery Service state:
  AC powered: false
  USB powered: true
  level: 84
  scale: 100
  temperature: 287
END
;;
power) echo "POWER MANAGER (dumpsys power)"; echo "  mWakefulness=Awake" ;;
*) echo "Can't find service: $1" >&2; exit 1 ;;
esac
""",
    "settings": """\
case "$1" in
get) cat "$PHONE_ROOT/settings/$3" 2>/dev/null || echo null ;;
put) echo "$4" > "$PHONE_ROOT/settings/$3" ;;
delete) rm -f "$PHONE_ROOT/settings/$3" ;;
esac
""",
    "svc": """\
[ "$1 $2" = "power stayon" ] || exit 1
case "$3" in true) echo 7 ;; false) echo 0 ;; esac > "$PHONE_ROOT/settings/stay_on_while_plugged_in"
""",
    # This machine may have other cores; the mask is only written down.
    "taskset": 'echo "$1" >> "$PHONE_ROOT/masks"\nshift\nexec "$@"\n',
    "df": """\
[ -e "$PHONE_ROOT/full" ] || exec /bin/df "$@"
echo "Filesystem 1K-blocks Used Available Use% Mounted on"
echo "/dev/block/dm-9 100 100 0 100% /data"
""",
    "reboot": 'touch "$PHONE_ROOT/reboot"\n',
}


class ConnectionLost(Exception):
    """The line is dead."""


class Phone:
    """What there is of a phone: a folder, and processes that run in it."""

    def __init__(self, root: Path, properties: dict[str, str]) -> None:
        self.root = root
        self.properties = {**PROPERTIES, **properties}
        self._processes: list[subprocess.Popen[bytes]] = []
        self._spent_bytes = 0
        self._counting = threading.Lock()
        self.rebooting = threading.Event()
        self._make_root()

    def _make_root(self) -> None:
        for name in ("bin", "settings", "data/local/tmp", "sdcard", "proc/sys/kernel/random"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        lines = "".join(f"{name}={value}\n" for name, value in self.properties.items())
        (self.root / "properties").write_text(lines)
        for name, script in _COMMANDS.items():
            path = self.root / "bin" / name
            path.write_text(f"#!/bin/sh\n{script}")
            path.chmod(0o755)
        for number, khz in enumerate(_CLUSTERS_KHZ):
            folder = self.root / f"sys/devices/system/cpu/cpu{number}/cpufreq"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "cpuinfo_max_freq").write_text(f"{khz}\n")
            (folder / "scaling_cur_freq").write_text(f"{khz // 2}\n")
            (folder / "scaling_governor").write_text("walt\n")
        stay_on = self.root / "settings" / "stay_on_while_plugged_in"
        if not stay_on.exists():
            stay_on.write_text("0\n")
        (self.root / "settings" / "airplane_mode_on").write_text("0\n")
        self._boot()

    def _boot(self) -> None:
        (self.root / "proc/sys/kernel/random/boot_id").write_text(f"{uuid.uuid4()}\n")

    # --- faults ----------------------------------------------------------------------------------

    @property
    def faults(self) -> dict[str, Any]:
        """The faults in force."""
        try:
            found: dict[str, Any] = json.loads((self.root / "faults.json").read_text())
        except (OSError, ValueError):
            return {}
        return found

    def matches(self, fault: str, command: str) -> bool:
        """Whether a fault is about this command."""
        pattern = self.faults.get(fault)
        return bool(pattern and re.search(pattern, command))

    def spend_bytes(self, count: int) -> int:
        """Return how many of `count` bytes still pass the line."""
        limit = self.faults.get("lose_after_bytes")
        with self._counting:
            if limit is None:
                self._spent_bytes = 0
                return count
            allowed = max(0, min(count, limit - self._spent_bytes))
            self._spent_bytes += count
            return allowed

    def wait_while_hung(self) -> None:
        """Answer nothing for as long as the phone hangs."""
        while self.faults.get("hang"):
            time.sleep(_POLL_S)

    def alter_status(self, command: str, status: int) -> int:
        """Return the exit status that is told."""
        for pattern, told in self.faults.get("statuses", {}).items():
            if re.search(pattern, command):
                return int(told)
        return status if status >= 0 else 128 - status

    # --- files and commands ----------------------------------------------------------------------

    def locate(self, path: str) -> Path:
        """Return where a path of the phone is here."""
        return Path(self._own_paths(path))

    def _own_paths(self, text: str) -> str:
        return _OWN.sub(lambda found: f"{self.root}{found[0]}", text)

    def show_paths(self, data: bytes) -> bytes:
        """Return what a command printed with paths as the phone has them."""
        return data.replace(str(self.root).encode() + b"/", b"/")

    def start_command(self, command: str, *, merged: bool) -> subprocess.Popen[bytes]:
        """Start what a shell was asked for; it outlives the connection."""
        faults = self.faults
        (self.root / "thermal").write_text(f"{faults.get('hot', 0)}\n")
        full = self.root / "full"
        full.touch() if faults.get("disk_full") else full.unlink(missing_ok=True)
        stalls = self.matches("stall", command)
        process = subprocess.Popen(
            ["/bin/sh", "-c", "sleep 1000000" if stalls else self._own_paths(command)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if merged else subprocess.PIPE,
            cwd=self.root,
            start_new_session=True,
            env={
                "PATH": f"{self.root}/bin:/usr/bin:/bin",
                "PHONE_ROOT": str(self.root),
                "HOME": str(self.root),
                "TMPDIR": f"{self.root}/data/local/tmp",
            },
        )
        with self._counting:
            self._processes = [one for one in self._processes if one.poll() is None] + [process]
        if self.matches("reboot_on", command):
            self.rebooting.set()
        return process

    def asks_for_reboot(self) -> bool:
        """Whether something on the phone, or a fault, wants it to reboot; asking takes the wish away."""
        asked = self.root / "reboot"
        if asked.exists():
            asked.unlink()
            self.rebooting.set()
        wants = self.rebooting.is_set()
        self.rebooting.clear()
        return wants

    def kill_all(self) -> None:
        """End every process of the phone, those that left their session too."""
        marker = f"PHONE_ROOT={self.root}\0".encode()
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            try:
                if marker in (entry / "environ").read_bytes():
                    os.kill(int(entry.name), signal.SIGKILL)
            except OSError:
                continue

    def reboot(self) -> float:
        """Go down, and return how long to stay away, in seconds."""
        away_s = float(self.faults.get("reboot_s", 0.5))
        faults = {name: value for name, value in self.faults.items() if name != "reboot_on"}
        (self.root / "faults.json").write_text(json.dumps(faults))
        self.kill_all()
        self._boot()
        return away_s
