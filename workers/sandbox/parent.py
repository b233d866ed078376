"""The worker's side of the sandbox: ask for a run, watch it, say how it ended.

Owns the zygotes (one per pool, started when first needed) and the translation of every end of a child into
figures or a typed error. Knows nothing of steps, ledger or store. Called by `workers.runner` from several
threads at once.
"""

from __future__ import annotations

import contextlib
import enum
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
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from service.errors import (
    ChildCrashed,
    DeadlineExceeded,
    EdgeKilnError,
    InvalidSettings,
    LeaseLost,
    MemoryLimitExceeded,
    RemoteError,
    StepCancelled,
)
from workers.sandbox.environment import build_base_environment, build_child_environment
from workers.sandbox.log import read_tail
from workers.sandbox.packets import DocumentReader, open_pair, send_document

#: How long a killed tree may take to vanish before its supervisor is killed too. Processes that wait for a dead
#: disk cannot be killed at all; the worker must not hang with them.
_END_GRACE_S = 10.0
_LOG_LIMIT_BYTES = 4 * 1024 * 1024
_MIB = 1024 * 1024


class StopReason(enum.StrEnum):
    """Why the worker ends a run that could go on."""

    CANCELLED = "cancelled"
    LEASE_LOST = "lease_lost"
    SHUTDOWN = "shutdown"


@dataclass(frozen=True)
class Limits:
    """What one run may use."""

    #: Seconds from the start of the child; waiting for a zygote does not count.
    deadline_s: float
    #: Limit of `ChildResult.peak_anon_bytes`; None for no limit.
    memory_bytes: int | None = None


@dataclass(frozen=True)
class ChildResult:
    """How a run ended: exactly one of `figures` and `error` is set."""

    figures: dict[str, Any] | None
    error: EdgeKilnError | None
    #: Set when the worker stopped the run; then `error` describes the stop, not a fault of the step.
    stopped: StopReason | None
    #: Where the step's files are; complete only when `error` is None.
    output_dir: Path
    log_path: Path
    #: Largest VmHWM of any process of the run; counts mapped files.
    peak_rss_bytes: int
    #: Sum of RssAnon and RssShmem over the run's processes, at its sampled peak; counts pages that are shared
    #: with the zygote.
    peak_anon_bytes: int
    #: Seconds from the child's start to the end of its last process.
    duration_s: float
    #: `strong` or `weak`; `isolation_reasons` says what the host refused.
    isolation: str
    isolation_reasons: tuple[str, ...]


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
    be called. `threads` bounds the threads of numeric libraries in children (default: theirs).
    """

    def __init__(
        self,
        preloads: Mapping[str, Sequence[str]],
        *,
        threads: int | None = None,
        log_limit_bytes: int = _LOG_LIMIT_BYTES,
        target_prefixes: tuple[str, ...] = ("workers.",),
    ) -> None:
        self._preloads = {pool: tuple(modules) for pool, modules in preloads.items()}
        self._threads = threads
        self._log_limit_bytes = log_limit_bytes
        self._target_prefixes = target_prefixes
        self._zygotes: dict[str, _Zygote] = {}
        self._lock = threading.Lock()
        self._is_closed = False
        self._home = tempfile.TemporaryDirectory(prefix="edgekiln-zygote-", ignore_cleanup_errors=True)

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
        credential: str | None = None,
        poll_s: float = 0.5,
    ) -> ChildResult:
        """Run `target` ("package.module:function") in a child and block until all its processes are gone.

        The child may write below `step_dir` alone, into `output/` (its outputs), `home/` and `scratch/` (also
        its working directory); its log is `step_dir/log.txt`. `credential` reaches the function as
        `params["credential"]`. `should_stop` is called every `poll_s` seconds in this thread; what it or
        `on_progress` raises ends the run and is raised here. Every end of the child itself is a `ChildResult`.
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
            "network": network,
            "credential": credential,
            "environment": build_child_environment(
                folders["home"], folders["scratch"], self._threads, network=network
            ),
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
        self._end = own_end
        self._reader = DocumentReader(own_end)
        self._limits = limits
        self._output_dir = output_dir
        self._log_path = log_path
        self._supervisor_fd: int | None = None
        self._isolation: dict[str, Any] | None = None
        self._outcome: dict[str, Any] | None = None
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
        """Translate what has happened."""
        outcome = self._outcome or {}
        figures: dict[str, Any] | None = None
        error = self._find_error(pool, outcome)
        if error is None:
            figures = outcome["answer"]["figures"]
        isolation = self._isolation or {"isolation": "weak", "reasons": ["The child ended before it was confined."]}
        return ChildResult(
            figures=figures,
            error=error,
            stopped=self._stopped if isinstance(error, (StepCancelled, LeaseLost)) else None,
            output_dir=self._output_dir,
            log_path=self._log_path,
            peak_rss_bytes=outcome.get("peak_rss_bytes", 0),
            peak_anon_bytes=outcome.get("peak_anon_bytes", 0),
            duration_s=outcome.get("duration_s", 0.0),
            isolation=isolation["isolation"],
            isolation_reasons=tuple(isolation["reasons"]),
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
            self._outcome = document
            self._is_over = True
        self._reader.close_fds()
        return None

    def _find_error(self, pool: str, outcome: Mapping[str, Any]) -> EdgeKilnError | None:
        answer = outcome.get("answer")
        killed_for = outcome.get("killed_for")
        if self.not_started is not None:
            return InvalidSettings(
                f"The pool {pool!r} of this worker cannot start steps. {self.not_started} Check the worker's "
                "installation and its memory.",
                pool=pool,
            )
        if answer is not None and "figures" in answer:
            return None
        if answer is not None:
            return RemoteError(answer["error"])
        if self._stopped is not None:
            return _describe_stop(self._stopped)
        if killed_for == "deadline":
            return DeadlineExceeded(
                f"The step was ended after {outcome['duration_s']:.0f} s; its deadline is "
                f"{self._limits.deadline_s:.0f} s. Raise the deadline, or ask for less in one job.",
                deadline_s=self._limits.deadline_s,
            )
        if killed_for == "memory":
            return self._describe_memory(outcome)
        return self._describe_crash(outcome)

    def _describe_memory(self, outcome: Mapping[str, Any]) -> EdgeKilnError:
        peak_bytes, limit_bytes = outcome["peak_anon_bytes"], self._limits.memory_bytes or 0
        return MemoryLimitExceeded(
            f"The step used {peak_bytes / _MIB:.0f} MiB of memory; its limit is {limit_bytes / _MIB:.0f} MiB. "
            "Raise the worker's memory limit, or use a smaller checkpoint or context.",
            peak_anon_bytes=peak_bytes,
            memory_bytes=limit_bytes,
        )

    def _describe_crash(self, outcome: Mapping[str, Any]) -> EdgeKilnError:
        exit_code = outcome.get("exit_code")
        details: dict[str, Any] = {"log_tail": read_tail(self._log_path)}
        if exit_code is None:
            sentence = "The child process and its supervisor vanished without an answer. Something killed them."
        elif exit_code < 0:
            name = _name_signal(-exit_code)
            details["signal"] = name
            sentence = f"The child process was killed by {name}."
            if name == "SIGKILL":
                sentence += (
                    " This worker did not send it; the usual sender is the kernel when the host runs out of memory."
                    " Lower the worker's memory limit or its concurrency, or use a host with more memory."
                )
        else:
            details["exit_code"] = exit_code
            sentence = f"The child process ended with exit status {exit_code} and without an answer."
        return ChildCrashed(f"{sentence} The end of its log is in `log_tail`.", **details)


def _describe_stop(reason: StopReason) -> EdgeKilnError:
    if reason is StopReason.LEASE_LOST:
        return LeaseLost("The step's lease was lost while its child ran; the child was killed.")
    if reason is StopReason.SHUTDOWN:
        return StepCancelled("The worker shuts down; the step's child was killed and the step can run elsewhere.")
    return StepCancelled("The step was cancelled; its child process was killed.")


def _name_signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
