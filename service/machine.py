"""What this process may use of its machine: the whole of it, or what its control groups allow (a container's limits).

Owns the reading of cgroup v2, the only version that containers are given limits by nowadays. Called by
`service.settings` and `workers.process`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")


def count_memory_bytes() -> int:
    """Return the machine's memory, whatever this process may use of it."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def find_usable_memory_bytes(own: Path = _OWN_CGROUP, root: Path = _CGROUPS) -> int:
    """Return the memory that this process and its children may use: the least of the machine's and all limits."""
    limits = [int(text) for text in _read_limits(own, root, "memory.max") if text.isdecimal()]
    return min([count_memory_bytes(), *limits])


def find_usable_cores(own: Path = _OWN_CGROUP, root: Path = _CGROUPS) -> int:
    """Return how many cores this process may keep busy: a quota counts as whole cores, rounded up."""
    cores = [os.cpu_count() or 1]
    for text in _read_limits(own, root, "cpu.max"):
        quota, _, period = text.partition(" ")
        if quota.isdecimal() and period.isdecimal():
            cores.append(math.ceil(int(quota) / int(period)))
    return max(1, min(cores))


def _read_limits(own: Path, root: Path, name: str) -> Iterator[str]:
    """Yield a limit of every group from this process's own up to the root; nothing where there are none."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    path = next((line.removeprefix("0::") for line in lines if line.startswith("0::")), None)
    if path is None:
        return
    group = root / path.strip("/")
    for folder in (group, *group.parents):
        if folder == root.parent:
            return
        try:
            yield (folder / name).read_text().strip()
        except OSError:  # the root group has no limits, and a container may not see above its own
            continue
