"""The few Linux calls that Python's standard library does not offer.

Owns the ctypes declarations; decides nothing. Called by the other modules of this room. Source: the manual
pages prctl(2), unshare(2), capset(2), seccomp(2), landlock(7) and the kernel's headers under include/uapi/linux.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import signal
import stat
import struct
from collections.abc import Sequence
from pathlib import Path

CLONE_NEWUSER = 0x10000000
CLONE_NEWNET = 0x40000000

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_PR_SET_SECCOMP = 22
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NO_NEW_PRIVS = 38
_SECCOMP_MODE_FILTER = 2

_SYS_LANDLOCK_CREATE_RULESET = 444
_SYS_LANDLOCK_ADD_RULE = 445
_SYS_LANDLOCK_RESTRICT_SELF = 446
_LANDLOCK_CREATE_RULESET_VERSION = 1
_LANDLOCK_RULE_PATH_BENEATH = 1

ACCESS_EXECUTE = 1 << 0
ACCESS_WRITE_FILE = 1 << 1
ACCESS_READ_FILE = 1 << 2
ACCESS_READ_DIR = 1 << 3
ACCESS_TRUNCATE = 1 << 14
ACCESS_IOCTL = 1 << 15
#: What a rule for a file, not a folder, may grant.
_ACCESSES_OF_FILES = ACCESS_EXECUTE | ACCESS_WRITE_FILE | ACCESS_READ_FILE | ACCESS_TRUNCATE | ACCESS_IOCTL

_CAPABILITY_VERSION_3 = 0x20080522

#: Per machine: audit architecture, and the numbers of socket(2) and io_uring_setup(2).
_SECCOMP_NUMBERS = {"x86_64": (0xC000003E, 41, 425), "aarch64": (0xC00000B7, 198, 425)}

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _prctl(option: int, argument: int, what: str) -> None:
    _check(
        _libc.prctl(option, ctypes.c_ulong(argument), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0)),
        what,
    )


def die_with_parent() -> None:
    """Have the kernel kill this process when the thread that forked it ends."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, "PR_SET_PDEATHSIG")


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1, "PR_SET_CHILD_SUBREAPER")


def set_process_name(name: str) -> None:
    """Set the name that `ps` and `top` show; at most 15 bytes."""
    buffer = ctypes.create_string_buffer(name.encode()[:15])
    _prctl(_PR_SET_NAME, ctypes.addressof(buffer), "PR_SET_NAME")


def yield_processor(niceness: int) -> None:
    """Let others go first on a busy host: by `niceness`, also between sessions where the kernel groups them."""
    os.nice(niceness)
    # Without groups of sessions there is no such file, and niceness alone counts.
    with contextlib.suppress(OSError):
        Path("/proc/self/autogroup").write_text(str(niceness))


def renounce_privileges() -> None:
    """Make sure that no later exec can gain privileges; Landlock and seccomp ask for it."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1, "PR_SET_NO_NEW_PRIVS")


def unshare(flags: int) -> None:
    """Leave namespaces; the calling process must have one thread for `CLONE_NEWUSER`."""
    _check(_libc.unshare(flags), "unshare")


def keep_capabilities(kept: int) -> None:
    """Drop every capability outside the bit mask `kept` from this process, for good."""
    permitted = kept & _read_permitted_capabilities()
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    low, high = permitted & 0xFFFFFFFF, permitted >> 32
    data = struct.pack("=6I", low, low, 0, high, high, 0)
    _check(_libc.capset(header, data), "capset")


def _read_permitted_capabilities() -> int:
    status = Path("/proc/self/status").read_text(errors="replace")
    return next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("CapPrm:"))


def flush_c_streams() -> None:
    """Write out what C code has printed and not yet flushed."""
    _libc.fflush(None)


def landlock_version() -> int:
    """Return the version of Landlock's interface; raises `OSError` where the kernel has none."""
    return _check(
        _libc.syscall(
            _SYS_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(_LANDLOCK_CREATE_RULESET_VERSION)
        ),
        "Landlock",
    )


def landlock_restrict(handled: int, scoped: int, rules: Sequence[tuple[str, int]]) -> None:
    """Deny the file accesses in `handled` except where a rule (path, allowed accesses) grants them.

    `scoped` needs version 6. A path that does not exist, or that this user cannot reach, is
    skipped: there is nothing to grant.
    """
    attributes = struct.pack("=QQQ", handled, 0, scoped)
    size = 24 if scoped else 8
    ruleset = _check(
        _libc.syscall(_SYS_LANDLOCK_CREATE_RULESET, attributes, ctypes.c_size_t(size), ctypes.c_uint32(0)),
        "landlock_create_ruleset",
    )
    try:
        for path, allowed in rules:
            _add_rule(ruleset, path, allowed)
        _check(_libc.syscall(_SYS_LANDLOCK_RESTRICT_SELF, ruleset, ctypes.c_uint32(0)), "landlock_restrict_self")
    finally:
        os.close(ruleset)


def _add_rule(ruleset: int, path: str, allowed: int) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return
    try:
        is_folder = stat.S_ISDIR(os.fstat(fd).st_mode)
        rule = struct.pack("=Qi", allowed if is_folder else allowed & _ACCESSES_OF_FILES, fd)
        _check(
            _libc.syscall(
                _SYS_LANDLOCK_ADD_RULE, ruleset, ctypes.c_int(_LANDLOCK_RULE_PATH_BENEATH), rule, ctypes.c_uint32(0)
            ),
            f"landlock_add_rule for {path}",
        )
    finally:
        os.close(fd)


class _FilterProgram(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def refuse_sockets(allowed_families: Sequence[int]) -> None:
    """Install a seccomp filter that refuses every socket but of these families, and io_uring, which could open one.

    Pairs of connected sockets stay: they lead nowhere. Raises `OSError` where the kernel or the machine is not known to
    support it.
    """
    machine = platform.machine()
    if machine not in _SECCOMP_NUMBERS:
        raise OSError(f"no seccomp filter is written for {machine}")
    architecture, socket_number, io_uring_number = _SECCOMP_NUMBERS[machine]
    load, equal, at_least, give = 0x20, 0x15, 0x35, 0x06
    allow, refuse = 0x7FFF0000, 0x00050000 | 1  # SECCOMP_RET_ALLOW; SECCOMP_RET_ERRNO with EPERM
    refusal = 7 + len(allowed_families)
    allowance = refusal + 1
    # A jump counts from the next instruction: to 5, from 3, is 1.
    program = [
        (load, 0, 0, 4),  # the architecture of the call
        (equal, 0, refusal - 2, architecture),
        (load, 0, 0, 0),  # its number
        (at_least, refusal - 4, 0, 0x40000000),  # the second calling convention of x86-64
        (equal, refusal - 5, 0, io_uring_number),
        (equal, 0, allowance - 6, socket_number),
        (load, 0, 0, 16),  # the address family
        *((equal, allowance - place, 0, family) for place, family in enumerate(allowed_families, start=8)),
        (give, 0, 0, refuse),
        (give, 0, 0, allow),
    ]
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
    _prctl_filter(_FilterProgram(len(program), code))


def _prctl_filter(program: _FilterProgram) -> None:
    _check(
        _libc.prctl(_PR_SET_SECCOMP, ctypes.c_ulong(_SECCOMP_MODE_FILTER), ctypes.byref(program)),
        "PR_SET_SECCOMP",
    )
