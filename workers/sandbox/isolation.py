"""What a child may reach: the network, the file system, other processes.

Owns the child's confinement and the account of what the host allowed of it. A measure that the host refuses is
not an error: it makes the isolation `weak` and stands among the reasons. Called by `child` in every run;
`probe_isolation`, for `/readyz` and manifests, tries the same measures in a process of its own.
"""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workers.sandbox import kernel

_READ = kernel.ACCESS_EXECUTE | kernel.ACCESS_READ_FILE | kernel.ACCESS_READ_DIR
#: The accesses that Landlock controls, by the version that began to: all of its first, then renaming between
#: folders, truncation, device calls.
_ACCESSES_SINCE = ((1, (1 << 13) - 1), (2, 1 << 13), (3, kernel.ACCESS_TRUNCATE), (5, kernel.ACCESS_IOCTL))
_SCOPE_ABSTRACT_SOCKETS_AND_SIGNALS = 0b11
_SCOPE_VERSION = 6

#: What programs and libraries need of any Linux host. `/proc` shows other processes' names, not their
#: environments: Landlock refuses those to a confined process.
_SYSTEM_FOLDERS = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin", "/etc", "/proc", "/sys", "/dev", "/nix")
_WRITABLE_DEVICES = ("/dev/null", "/dev/zero", "/dev/full")
_SHARED_MEMORY = "/dev/shm"
#: What a step with network may open; names are looked up by way of netlink.
_NETWORK_FAMILIES = (socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK)

#: CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER: what a worker that runs as root reads its files by.
_KEPT_CAPABILITIES = 0b1111


@dataclass(frozen=True)
class Isolation:
    """How far a child is confined."""

    #: `namespace` or `filter` when it is cut off, `granted` when the step may use it, else `open`.
    network: str
    #: `landlock`, or `open` when the child can reach what its user can.
    files: str
    #: `filter` when it can connect to no socket of the file system (a database's, a container engine's), else `open`.
    sockets: str = "filter"
    #: One sentence per measure that the host refused.
    reasons: tuple[str, ...] = ()

    @property
    def level(self) -> str:
        """`strong` when every measure holds, else `weak`."""
        return "weak" if "open" in (self.network, self.files, self.sockets) else "strong"

    def to_json(self) -> dict[str, Any]:
        """Return the form that `/readyz` and manifests show."""
        return {
            "isolation": self.level,
            "network": self.network,
            "files": self.files,
            "sockets": self.sockets,
            "reasons": list(self.reasons),
        }


def isolate(*, network: bool, readable: Iterable[Path], writable: Iterable[Path]) -> Isolation:
    """Confine the calling process and everything it will fork; cannot be undone.

    With `network` the step may read any file of its user, for its source may lie anywhere, and may still write
    below `writable` alone. The process must have one thread.
    """
    reasons: list[str] = []
    kernel.renounce_privileges()
    refused = None if network else _empty_network()
    sockets_state = _refuse_sockets(_NETWORK_FAMILIES if network else (), reasons)
    if network:
        network_state = "granted"
    elif refused is None:
        network_state = "namespace"
    else:
        network_state = "filter" if sockets_state == "filter" else "open"
        if network_state == "open":
            reasons.append(f"{refused}: steps can reach the network.")
    files_state = _confine_files(["/"] if network else _expand_readable(readable), writable, reasons)
    kernel.keep_capabilities(_KEPT_CAPABILITIES if os.geteuid() == 0 else 0)
    return Isolation(network_state, files_state, sockets_state, tuple(reasons))


def _empty_network() -> str | None:
    """Enter an empty network namespace; return why the host refuses."""
    user_id, group_id = os.geteuid(), os.getegid()
    try:
        kernel.unshare(kernel.CLONE_NEWNET)
        return None
    except OSError:
        # Without the privilege a user namespace grants it, where the host allows those.
        pass
    try:
        kernel.unshare(kernel.CLONE_NEWUSER | kernel.CLONE_NEWNET)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user_id} {user_id} 1")
        Path("/proc/self/gid_map").write_text(f"{group_id} {group_id} 1")
    except OSError as error:
        return f"The host allows no network namespace ({error})"
    return None


def _refuse_sockets(allowed_families: Sequence[int], reasons: list[str]) -> str:
    """Refuse new sockets but of these families: one in the file system leads to a service of this host."""
    try:
        kernel.refuse_sockets(allowed_families)
    except OSError as error:
        reasons.append(f"No filter of sockets ({error}): steps can reach services of this host by its file system.")
        return "open"
    return "filter"


def _confine_files(readable: Iterable[str], writable: Iterable[Path], reasons: list[str]) -> str:
    try:
        version = kernel.landlock_version()
    except OSError as error:
        reasons.append(f"The kernel offers no Landlock ({error}): steps can read and write what their user can.")
        return "open"
    handled = 0
    for since, accesses in _ACCESSES_SINCE:
        handled |= accesses if version >= since else 0
    rules = [(path, _READ) for path in readable]
    rules += [(str(path), handled) for path in [*writable, _SHARED_MEMORY, *_WRITABLE_DEVICES]]
    scoped = _SCOPE_ABSTRACT_SOCKETS_AND_SIGNALS if version >= _SCOPE_VERSION else 0
    try:
        kernel.landlock_restrict(handled, scoped, rules)
    except OSError as error:
        reasons.append(f"Landlock could not be used ({error}): steps can read and write what their user can.")
        return "open"
    return "landlock"


def _expand_readable(readable: Iterable[Path]) -> Sequence[str]:
    """Return the given folders, what symbolic links in them point to, the interpreter's and the system's."""
    paths = [*_SYSTEM_FOLDERS, sys.prefix, sys.base_prefix, str(Path(__file__).parents[2]), *filter(None, sys.path)]
    for folder in readable:
        paths.append(str(folder))
        paths += [str(path.resolve()) for path in folder.rglob("*") if path.is_symlink()]
    return list(dict.fromkeys(paths))


@functools.cache
def probe_isolation() -> dict[str, Any]:
    """Return how far this host lets a step without network be confined; see `Isolation.to_json`.

    Starts one short process the first time and remembers its answer.
    """
    environment = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "LANG") if name in os.environ}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    command = [sys.executable, "-P", "-c", "from workers.sandbox.isolation import _probe; _probe()"]
    try:
        answer = subprocess.run(command, env=environment, capture_output=True, check=True, timeout=60, text=True)
        document = json.loads(answer.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        return Isolation("open", "open", "open", (f"The isolation could not be probed: {error}",)).to_json()
    return dict(document)


def _probe() -> None:
    with tempfile.TemporaryDirectory(prefix="edgekiln-probe-") as folder:
        pid = os.fork()
        if pid == 0:
            print(json.dumps(isolate(network=False, readable=[], writable=[Path(folder)]).to_json()), flush=True)
            os._exit(0)
        os.waitpid(pid, 0)
