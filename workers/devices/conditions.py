"""What the host is, and how it was while it measured.

Owns reading `/proc` and `/sys`. What cannot be read is None: a missing figure stays missing. Called by
`workers.devices.host`, and by workers that measure, to register their host.
"""

from __future__ import annotations

import os
import platform
import re
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from workers.devices.android import find_clusters, find_sold_gib

_CPUS = Path("/sys/devices/system/cpu")
_THERMAL = Path("/sys/class/thermal")
#: Who made the machine; Arm boards have none.
_MAKER = Path("/sys/class/dmi/id")


def describe_host() -> dict[str, Any]:
    """Return what does not change while it runs; without the host's name, which is nobody's business.

    The same fields as of a phone (`workers.devices.android.parse_record`), and what only a host tells.
    """
    fields = _read_fields(Path("/proc/cpuinfo"))
    # Arm kernels print no model name.
    model = fields.get("model name") or fields.get("Hardware")
    memory_bytes = _read_memory("MemTotal")
    return {
        "kind": "host",
        "name": "host",
        "manufacturer": _read_first(_MAKER / "sys_vendor"),
        "model": _read_first(_MAKER / "product_name"),
        "device": None,
        "soc_manufacturer": fields.get("vendor_id"),
        "soc": model,
        "android": None,
        "sdk": None,
        "abi": platform.machine(),
        "abis": [platform.machine()],
        "cpu_model": model,
        "cpu_architecture": platform.machine(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)),
        "clusters": find_clusters(_read_clocks()),
        "memory_bytes": memory_bytes,
        "ram_gib": None if memory_bytes is None else find_sold_gib(memory_bytes),
        "os": _describe_os(),
        "kernel": platform.release(),
    }


def read_conditions() -> dict[str, Any]:
    """Return what may change: time, load, memory, governors, clocks, temperatures."""
    return {
        "at": datetime.now(UTC).isoformat(),
        "load_average_1m": os.getloadavg()[0],
        "memory_available_bytes": _read_memory("MemAvailable"),
        "governors": _read_all(_CPUS, "cpu[0-9]*/cpufreq/scaling_governor"),
        "frequencies_khz": _to_integers(_read_all(_CPUS, "cpu[0-9]*/cpufreq/scaling_cur_freq")),
        "temperatures_mc": _to_integers(_read_all(_THERMAL, "thermal_zone*/temp")),
    }


def describe_tools(*distributions: str) -> dict[str, str]:
    """Return the installed version of each distribution."""
    return {name: metadata.version(name) for name in distributions}


def read_process_memory(pid: int) -> tuple[int, int] | None:
    """Return (VmHWM, RssAnon + RssShmem) of a process in bytes, or None when it has ended."""
    fields = _read_fields(Path(f"/proc/{pid}/status"))
    try:
        return _to_bytes(fields["VmHWM"]), _to_bytes(fields["RssAnon"]) + _to_bytes(fields["RssShmem"])
    except KeyError:  # a process that has ended has no memory fields
        return None


def _read_memory(name: str) -> int | None:
    value = _read_fields(Path("/proc/meminfo")).get(name)
    return None if value is None else _to_bytes(value)


def _to_bytes(value: str) -> int:
    return int(value.removesuffix("kB")) * 1024


def _read_fields(path: Path) -> dict[str, str]:
    try:
        text = path.read_text()
    except OSError:
        return {}
    fields: dict[str, str] = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    return fields


def _read_all(folder: Path, pattern: str) -> list[str] | None:
    values = []
    for path in sorted(
        folder.glob(pattern), key=lambda found: [int(digits) for digits in re.findall(r"\d+", str(found))]
    ):
        try:
            values.append(path.read_text().strip())
        except OSError:
            continue
    return values or None


def _to_integers(values: list[str] | None) -> list[int] | None:
    return None if values is None else [int(value) for value in values]


def _read_clocks() -> dict[int, str]:
    """Return core -> its highest clock in kHz; virtual machines mostly tell none."""
    clocks = {}
    for path in _CPUS.glob("cpu[0-9]*/cpufreq/cpuinfo_max_freq"):
        value = _read_first(path)
        if value is not None:
            clocks[int(path.parts[-3].removeprefix("cpu"))] = value
    return dict(sorted(clocks.items()))


def _read_first(path: Path) -> str | None:
    try:
        return path.read_text().strip() or None
    except OSError:
        return None


def _describe_os() -> str | None:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME")
    except OSError:
        return None
