"""The worker's side of the sandbox: ask for a run, watch it, say how it ended.

Owns the zygotes (one per pool, started when first needed) and the conversation with a run's supervisor; what
an end means is `outcome`'s. Knows nothing of steps, ledger or store. Called by `workers.runner` from several
threads at once.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from workers.sandbox.environment import build_base_environment, build_child_environment
from workers.sandbox.outcome import ChildResult, Limits, StopReason, describe_end
from workers.sandbox.packets import DocumentReader, open_pair, send_document

#: How long a killed tree may take to vanish before its supervisor is killed too. Processes that wait for a dead
#: disk cannot be killed at all; the worker must not hang with them.
_END_GRACE_S = 10.0
_LOG_LIMIT_BYTES = 4 * 1024 * 1024


class _Zygote:
    """One preloaded process and the worker's end of its control socket."""

    def __init__(self, modules: Sequence[str], environment: Mapping[str, str]) -> None:
        own_end, zygote_end = open_pair()
        command = [sys.executable, "-P", "-m", "workers.sandbox.zygote", f"--control-fd={zygote_end.fileno()}"]
        command += [f"--preload={module}" for module in modules]
        with zygote_end:
            self._process = subprocess.Popen(
                command,
                env=dict(environment),
                cwd="/",
                stdin=subprocess.DEVNULL,
                pass_fds=(zygote_end.fileno(),),
                start_new_session=True,
            )
        self._control = own_end

    @property
    def pid(self) -> int:
        return self._process.pid

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def fork(self, run_end: socket.socket) -> None:
        """Have a supervisor forked that serves `run_end`; raises `OSError` if the zygote is gone."""
        socket.send_fds(self._control, [b"F"], [run_end.fileno()])

    def close(self) -> None:
        """End the process; supervisors that it has forked live on by themselves."""
        self._control.close()
        self._process.kill()
        self._process.wait()


class Sandbox:
    """Runs step functions in confined children; one per worker process, a context manager.

    `preloads` names for each pool the modules that its zygote imports once. `target_prefixes` bounds what may
    be called. `threads` bounds the threads of numeric libraries in children (default: theirs). `home_root` is where
    the zygotes' home folder is made (default: the system's place for temporary files).
    """

    def __init__(
        self,
        preloads: Mapping[str, Sequence[str]],
        *,
        threads: int | None = None,
        log_limit_bytes: int = _LOG_LIMIT_BYTES,
        target_prefixes: tuple[str, ...] = ("workers.",),
        home_root: Path | None = None,
    ) -> None:
        self._preloads = {pool: tuple(modules) for pool, modules in preloads.items()}
        self._threads = threads
        self._log_limit_bytes = log_limit_bytes
        self._target_prefixes = target_prefixes
        self._zygotes: dict[str, _Zygote] = {}
        self._lock = threading.Lock()
        self._is_closed = False
        self._home = tempfile.TemporaryDirectory(prefix="edgekiln-zygote-", dir=home_root, ignore_cleanup_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the zygotes; runs in other threads stop as `StopReason.SHUTDOWN` within their poll interval."""
        with self._lock:
            self._is_closed = True
            zygotes, self._zygotes = self._zygotes, {}
        for zygote in zygotes.values():
            zygote.close()
        self._home.cleanup()

    def warm(self, pool: str) -> None:
        """Start the pool's zygote if none lives; returns at once, while it still imports."""
        self._find_zygote(pool)

    def zygote_pid(self, pool: str) -> int | None:
        """Return the pid of the pool's zygote if one lives."""
        with self._lock:
            zygote = self._zygotes.get(pool)
            return zygote.pid if zygote is not None and zygote.is_alive() else None

    def run(
        self,
        target: str,
        params: Mapping[str, Any],
        inputs: Mapping[str, Path],
        step_dir: Path,
        *,
        pool: str,
        network: bool,
        limits: Limits,
        on_progress: Callable[[str, float | None], None],
        should_stop: Callable[[], StopReason | None],
        credential: Any = None,
        writable: Sequence[Path] = (),
        niceness: int = 0,
        poll_s: float = 0.5,
    ) -> ChildResult:
        """Run `target` ("package.module:function") in a child and block until all its processes are gone.

        The child may write into `step_dir`'s `output/` (its outputs), `home/` and `scratch/` (also its working
        directory), and into the existing folders named in `writable`; its log is `step_dir/log.txt`. Without
        network it may read its inputs and those folders, and of the rest only the system and the interpreter.
        With `niceness` (0 to 19) it lets other processes of a busy host go first.
        `credential`, any JSON value, reaches the function as `params["credential"]` and is written nowhere.
        `should_stop` is called every `poll_s` seconds in this thread; what it or `on_progress` raises ends the run and
        is raised here. Every end of the child itself is a `ChildResult`.
        """
        if not target.startswith(self._target_prefixes) or ":" not in target:
            raise ValueError(f"{target!r} is no step function: it must start with one of {self._target_prefixes}.")
        folders = {name: step_dir.absolute() / name for name in ("output", "home", "scratch")}
        for folder in folders.values():
            folder.mkdir(parents=True, exist_ok=True)
        log_path = step_dir.absolute() / "log.txt"
        request = {
            "target": target,
            "params": dict(params),
            "inputs": {name: str(folder.absolute()) for name, folder in inputs.items()},
            "output_dir": str(folders["output"]),
            "scratch_dir": str(folders["scratch"]),
            "writable": [str(folder.absolute()) for folder in [*folders.values(), *writable]],
            "network": network,
            "niceness": niceness,
            "credential": credential,
            "environment": build_child_environment(folders["home"], folders["scratch"], self._threads, network=network),
            "deadline_s": limits.deadline_s,
            "memory_bytes": limits.memory_bytes,
            "log_path": str(log_path),
            "log_limit_bytes": self._log_limit_bytes,
        }
        own_end, supervisor_end = open_pair()
        run = _Run(own_end, limits, folders["output"], log_path)
        try:
            with supervisor_end:
                self._hand_over(pool, supervisor_end)
            with contextlib.suppress(OSError):
                send_document(own_end, request)
            run.watch(on_progress, lambda: StopReason.SHUTDOWN if self._is_closed else should_stop(), poll_s)
        finally:
            run.finish()
        if run.not_started is not None:
            self._discard(pool)
        return run.describe(pool)

    def _find_zygote(self, pool: str) -> _Zygote:
        with self._lock:
            if self._is_closed:
                raise RuntimeError("The sandbox is closed.")
            zygote = self._zygotes.get(pool)
            if zygote is None or not zygote.is_alive():
                if zygote is not None:
                    zygote.close()
                environment = build_base_environment(Path(self._home.name), self._threads)
                zygote = self._zygotes[pool] = _Zygote(self._preloads[pool], environment)
            return zygote

    def _hand_over(self, pool: str, supervisor_end: socket.socket) -> None:
        try:
            self._find_zygote(pool).fork(supervisor_end)
        except OSError:
            # It died since it was last looked at; nothing of this run has started.
            self._find_zygote(pool).fork(supervisor_end)

    def _discard(self, pool: str) -> None:
        """Forget a zygote that cannot serve, so that the next run starts another."""
        with self._lock:
            zygote = self._zygotes.pop(pool, None)
        if zygote is not None:
            zygote.close()


class _Run:
    """One run as the worker sees it."""

    def __init__(self, own_end: socket.socket, limits: Limits, output_dir: Path, log_path: Path) -> None:
        self._asked = time.monotonic()
        self._end = own_end
        self._reader = DocumentReader(own_end)
        self._limits = limits
        self._output_dir = output_dir
        self._log_path = log_path
        self._supervisor_fd: int | None = None
        self._isolation: dict[str, Any] | None = None
        self._end_document: dict[str, Any] | None = None
        self._is_over = False
        self._stopped: StopReason | None = None
        #: Why no child was started, if none was.
        self.not_started: str | None = None

    def watch(
        self,
        on_progress: Callable[[str, float | None], None],
        should_stop: Callable[[], StopReason | None],
        poll_s: float,
    ) -> None:
        """Return when the run is over or must be stopped."""
        next_question = time.monotonic()
        while not self._is_over:
            if time.monotonic() >= next_question:
                self._stopped = should_stop()
                if self._stopped is not None:
                    return
                next_question = time.monotonic() + poll_s
            progress = self._receive(max(0.0, next_question - time.monotonic()))
            if progress is not None:
                on_progress(progress["message"], progress["fraction"])

    def finish(self) -> None:
        """End the run if it is not over, and return when its processes are gone."""
        if not self._is_over:
            with contextlib.suppress(OSError):
                send_document(self._end, {"type": "stop"})
            give_up_at = time.monotonic() + _END_GRACE_S
            # Without a supervisor there is nothing to wait for: it will find its socket closed.
            while self._supervisor_fd is not None and not self._is_over and time.monotonic() < give_up_at:
                self._receive(give_up_at - time.monotonic())
        if self._supervisor_fd is not None:
            if not self._is_over:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self._supervisor_fd, signal.SIGKILL)
            os.close(self._supervisor_fd)
        self._end.close()

    def describe(self, pool: str) -> ChildResult:
        """Translate what has happened; see `outcome.describe_end`."""
        return describe_end(
            self._end_document,
            pool=pool,
            limits=self._limits,
            stopped=self._stopped,
            not_started=self.not_started,
            isolation=self._isolation,
            output_dir=self._output_dir,
            log_path=self._log_path,
            elapsed_s=time.monotonic() - self._asked,
        )

    def _receive(self, wait_s: float) -> dict[str, Any] | None:
        """Wait for one packet and take it in; return it if it is progress."""
        poller = select.poll()
        poller.register(self._end, select.POLLIN)
        if not poller.poll(wait_s * 1000):
            return None
        try:
            document = self._reader.read_packet()
        except EOFError:
            self._is_over = True
            return None
        if document is None:
            return None
        kind = document["type"]
        if kind == "progress":
            return document
        if kind == "started":
            self._supervisor_fd = self._reader.fds.pop()
        elif kind == "isolation" and self._isolation is None:
            self._isolation = document
        elif kind == "not_started":
            self.not_started = document["reason"]
            self._is_over = True
        elif kind == "end":
            self._end_document = document
            self._is_over = True
        self._reader.close_fds()
        return None
