"""What a phone is, and how it is at a moment, read from its own commands.

Owns the questions and the reading of the answers, which is pure: `parse_record` and `parse_conditions` are tested on
text. What a phone does not say is None: a missing figure stays missing. Called by `workers.devices.phone` and by the
device worker.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from workers.devices.adb import Phone, join_scripts

_CPU_FILES = "for f in /sys/devices/system/cpu/cpu[0-9]*/cpufreq/{name}; do [ -r $f ] && echo $f $(cat $f); done; true"
_RECORD = (
    "getprop",
    "cat /proc/meminfo",
    _CPU_FILES.format(name="cpuinfo_max_freq"),
    "uname -r",
    "cat /proc/sys/kernel/random/boot_id",
)
_CONDITIONS = (
    "dumpsys thermalservice",
    "dumpsys battery",
    "dumpsys power",
    "cat /proc/meminfo",
    _CPU_FILES.format(name="scaling_cur_freq"),
    _CPU_FILES.format(name="scaling_governor"),
    "settings get global airplane_mode_on",
    "cat /proc/loadavg",
    "cat /proc/sys/kernel/random/boot_id",
)
#: Sizes that memory is sold in, in GiB; the kernel has less than is soldered in.
_SOLD_GIB = (1, 1.5, 2, 3, 4, 6, 8, 10, 12, 16, 18, 20, 24, 32, 48, 64, 96, 128)
#: Words of `dumpsys thermalservice`, by its number.
THERMAL_STATUSES = ("none", "light", "moderate", "severe", "critical", "emergency", "shutdown")
#: What a phone would never answer: the marks of emulators, virtual devices and our own tests.
_VIRTUAL_HARDWARE = ("goldfish", "ranchu", "cutf_cvm", "vsoc_x86")


def read_record(phone: Phone) -> dict[str, Any]:
    """Ask a phone what it is; see `parse_record`. One that tells no serial number of its own goes by adb's."""
    script, split = join_scripts(_RECORD)
    record = parse_record(split(phone.read(script)))
    return {**record, "serial": record["serial"] or phone.serial}


def read_conditions(phone: Phone) -> dict[str, Any]:
    """Ask a phone how it is; see `parse_conditions`."""
    script, split = join_scripts(_CONDITIONS)
    return parse_conditions(split(phone.read(script)))


def parse_record(parts: Sequence[str]) -> dict[str, Any]:
    """Return what does not change while a phone runs: identity, system, cores, memory.

    `kind` is `phone`, or `virtual` for what says of itself that it is none. `serial` is the hardware's, the same
    over every cable and network. `boot_id` tells whether it has been started again.
    """
    properties = dict(re.findall(r"^\[([^\]]+)\]: \[(.*)\]$", parts[0], re.MULTILINE))

    def get(*names: str) -> str | None:
        return next((properties[name] for name in names if properties.get(name)), None)

    max_khz = _read_cpu_files(parts[2])
    release = get("ro.build.version.release")
    memory_bytes = _read_kib(parts[1], "MemTotal")
    is_virtual = "1" in (get("ro.boot.qemu"), get("ro.kernel.qemu")) or get("ro.hardware") in _VIRTUAL_HARDWARE
    return {
        "kind": "virtual" if is_virtual else "phone",
        "serial": get("ro.serialno", "ro.boot.serialno"),
        "manufacturer": get("ro.product.manufacturer"),
        "model": get("ro.product.model"),
        "device": get("ro.product.device"),
        "soc_manufacturer": get("ro.soc.manufacturer"),
        "soc": get("ro.soc.model", "ro.board.platform"),
        "android": _number(release),
        "sdk": _number(get("ro.build.version.sdk")),
        "security_patch": get("ro.build.version.security_patch"),
        "os": f"Android {release}" if release else None,
        "fingerprint": get("ro.build.fingerprint"),
        "abi": get("ro.product.cpu.abi"),
        "abis": (get("ro.product.cpu.abilist") or "").split(",") if get("ro.product.cpu.abilist") else [],
        "cores": len(max_khz) or None,
        "clusters": find_clusters(max_khz),
        "memory_bytes": memory_bytes,
        "ram_gib": None if memory_bytes is None else find_sold_gib(memory_bytes),
        "kernel": parts[3].strip() or None,
        "boot_id": parts[4].strip() or None,
    }


def parse_conditions(parts: Sequence[str]) -> dict[str, Any]:
    """Return what changes: temperature, battery, clocks, load, memory, and what is switched on."""
    thermal = re.search(r"Thermal Status: (\d+)", parts[0])
    battery = dict(re.findall(r"^\s*([A-Za-z ]+): (\S+)$", parts[1], re.MULTILINE))
    wakefulness = re.search(r"mWakefulness=(\w+)", parts[2])
    temperature_dc = _number(battery.get("temperature"))
    load = parts[7].split()
    return {
        "at": datetime.now(UTC).isoformat(),
        "thermal_status": int(thermal[1]) if thermal else None,
        "temperatures_c": {
            name: float(value) for value, name in re.findall(r"mValue=([\d.]+), mType=\d+, mName=([^,}]+)", parts[0])
        },
        "battery_percent": _number(battery.get("level")),
        "battery_c": None if temperature_dc is None else temperature_dc / 10,
        "plugged": sorted(
            name.removesuffix(" powered").lower()
            for name, value in battery.items()
            if name.endswith(" powered") and value == "true"
        ),
        "wakefulness": wakefulness[1] if wakefulness else None,
        "memory_available_bytes": _read_kib(parts[3], "MemAvailable"),
        "frequencies_khz": {cpu: int(value) for cpu, value in _read_cpu_files(parts[4]).items()} or None,
        "governors": _read_cpu_files(parts[5]) or None,
        "airplane_mode": {"1": True, "0": False}.get(parts[6].strip()),
        "load_average_1m": float(load[0]) if load else None,
        "boot_id": parts[8].strip() or None,
    }


def find_big_cores(record: Mapping[str, Any]) -> str | None:
    """Return the mask, in hexadecimal, of the cores that clock above the slowest cluster; None where all are alike.

    A constant would not do: the same mask gave 15 tokens/s on one phone and 105 on another.
    """
    clusters = record.get("clusters") or []
    if len(clusters) < 2:
        return None
    cores = [core for cluster in clusters[1:] for core in cluster["cores"]]
    return format(sum(1 << core for core in cores), "x")


def find_sold_gib(memory_bytes: int) -> float:
    """Return the size of memory that a phone is sold with: the next one above what its kernel counts."""
    gib = memory_bytes / 1024**3
    return next((float(size) for size in _SOLD_GIB if size >= gib), float(round(gib)))


def find_clusters(max_khz: Mapping[int, str]) -> list[dict[str, Any]]:
    """Return cores by their highest clock, the slowest first."""
    clocks = sorted({int(value) for value in max_khz.values()})
    return [
        {"max_khz": clock, "cores": [core for core, value in max_khz.items() if int(value) == clock]}
        for clock in clocks
    ]


def _read_cpu_files(text: str) -> dict[int, str]:
    found = re.findall(r"/cpu(\d+)/cpufreq/\w+ (\S+)", text)
    return {int(cpu): value for cpu, value in sorted(found, key=lambda item: int(item[0]))}


def _read_kib(meminfo: str, name: str) -> int | None:
    found = re.search(rf"^{name}:\s+(\d+) kB", meminfo, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _number(text: str | None) -> int | None:
    found = re.match(r"\d+", text or "")
    return int(found[0]) if found else None
