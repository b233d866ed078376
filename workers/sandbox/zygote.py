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
from workers.sandbox.process_tree import list_children
from workers.sandbox.supervisor import supervise

#: How often ended supervisors are reaped; nobody waits for it.
_REAP_INTERVAL_MS = 500
#: How soon the next generation of a killed tree is looked for.
_KILL_INTERVAL_MS = 20


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
    wait_ms: int | None = None
    while True:
        if poller.poll(wait_ms):
            try:
                packet, fds, _, _ = socket.recv_fds(control, 1, 1, socket.MSG_CMSG_CLOEXEC)
            except ConnectionError:
                return
            if not packet:
                return
            for fd in fds:
                with socket.socket(fileno=fd) as run_end, contextlib.suppress(OSError):
                    _answer_request(control, run_end, failure, supervisors)
        has_strangers = _reap(supervisors)
        wait_ms = _KILL_INTERVAL_MS if has_strangers else _REAP_INTERVAL_MS if supervisors else None


def _answer_request(control: socket.socket, run_end: socket.socket, failure: str | None, supervisors: set[int]) -> None:
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


def _reap(supervisors: set[int]) -> bool:
    """Reap whatever ended and kill what supervisors left behind; return whether any of that still lives.

    A supervisor adopts its run's orphans, so a child of this process that is no supervisor lost its own one. Nobody
    else reaps these children: their pids are theirs until then.
    """
    with contextlib.suppress(ChildProcessError):
        while (pid := os.waitpid(-1, os.WNOHANG)[0]) != 0:
            supervisors.discard(pid)
    strangers = set(list_children(os.getpid())) - supervisors
    for pid in strangers:
        os.kill(pid, signal.SIGKILL)
    return bool(strangers)


if __name__ == "__main__":
    sys.exit(main())
