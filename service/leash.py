"""`python -m service.leash PARENT_PID COMMAND...`: becomes COMMAND, and dies with its parent.

Owns one system call. It runs in the child, before the command, because a hook between fork and exec is not safe in a
process with threads. Called by `service.supervisor`.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int) -> None:
    """Ask the kernel to kill this process as soon as the thread that started it ends (Linux only).

    Outlives exec, but not fork: children of the command need a leash of their own.
    """
    if not sys.platform.startswith("linux"):
        return
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent_pid:  # it died before the call
        os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    """Take the leash, then become the command."""
    die_with_parent(int(sys.argv[1]))
    os.execv(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()
