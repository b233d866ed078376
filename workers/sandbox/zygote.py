"""The process that has imported a pool's heavy libraries once and forks one supervisor per run.

Owns the preloading and the reaping of supervisors. It keeps no state of a run, sees no request and no
credential, and has no threads of its own. Started by `parent` as `python -m workers.sandbox.zygote` with a
scrubbed environment; ends when its control socket closes, that is, when the worker dies.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import os
import select
import signal
import socket
import sys
import traceback
from collections.abc import Sequence

from workers.sandbox.kernel import adopt_orphans
from workers.sandbox.packets import send_document
from workers.sandbox.process_tree import kill_session
from workers.sandbox.supervisor import supervise

#: How often ended supervisors are reaped; nobody waits for it.
_REAP_INTERVAL_MS = 500


def main(argv: list[str] | None = None) -> int:
    """Preload, then serve fork requests until the control socket closes."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--control-fd", type=int, required=True, help="the worker's packet socket")
    parser.add_argument("--preload", action="append", default=[], metavar="MODULE", help="repeatable")
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    adopt_orphans()
    control = socket.socket(fileno=arguments.control_fd)
    failure = _preload(arguments.preload)
    gc.collect()
    # Collections in a child would write to, and so copy, every page that it shares with this process.
    gc.freeze()
    _serve(control, failure)
    return 0


def _preload(modules: Sequence[str]) -> str | None:
    """Import each module; return the sentence of the first failure."""
    for name in modules:
        try:
            importlib.import_module(name)
        except Exception as error:
            traceback.print_exc()
            return f"The module {name!r} cannot be imported: {type(error).__name__}: {error}"
    return None


def _serve(control: socket.socket, failure: str | None) -> None:
    supervisors: set[int] = set()
    poller = select.poll()
    poller.register(control, select.POLLIN)
    while True:
        if poller.poll(_REAP_INTERVAL_MS if supervisors else None):
            try:
                packet, fds, _, _ = socket.recv_fds(control, 1, 1, socket.MSG_CMSG_CLOEXEC)
            except ConnectionError:
                return
            if not packet:
                return
            for fd in fds:
                with socket.socket(fileno=fd) as run_end, contextlib.suppress(OSError):
                    _answer_request(control, run_end, failure, supervisors)
        _reap(supervisors)


def _answer_request(
    control: socket.socket, run_end: socket.socket, failure: str | None, supervisors: set[int]
) -> None:
    if failure is not None:
        send_document(run_end, {"type": "not_started", "reason": failure})
        return
    try:
        pid = os.fork()
    except OSError as error:
        send_document(run_end, {"type": "not_started", "reason": f"The zygote cannot fork: {error}"})
        return
    if pid:
        supervisors.add(pid)
        return
    try:
        control.close()
        supervise(run_end)
    except BaseException:
        traceback.print_exc()
    finally:
        # Neither exit handlers nor destructors of the preloaded libraries belong to the supervisor.
        sys.stderr.flush()
        os._exit(0)


def _reap(supervisors: set[int]) -> None:
    """Reap whatever ended; what a supervisor left behind by dying early is killed first.

    Until a supervisor is reaped its pid, and so the number of its session, cannot be given to anyone else.
    """
    while True:
        try:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if ended is None:
            return
        if ended.si_pid in supervisors:
            kill_session(ended.si_pid)
        os.waitpid(ended.si_pid, 0)
        supervisors.discard(ended.si_pid)


if __name__ == "__main__":
    sys.exit(main())
