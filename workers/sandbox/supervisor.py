"""The process beside each child: starts it, measures it, keeps its log, and ends its whole process tree.

Owns one run. It adopts every orphan of its run, so that nothing a step starts outlives the step, and it is the
only one to reap them, so that no signal can reach a pid that was given to another process. It passes progress
and the answer on to the worker, and treats whatever the child says as untrusted text. Forked by `zygote`;
talks with `parent` through one packet socket, and kills its tree when that socket closes.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import socket
import time
from collections.abc import Mapping
from typing import Any

from workers.sandbox import kernel
from workers.sandbox.child import ANSWER_LIMIT_BYTES, run_child
from workers.sandbox.log import CappedLog
from workers.sandbox.packets import DocumentReader, send_document
from workers.sandbox.process_tree import kill_children, measure_tree

#: How often the tree's memory is sampled and waiting progress is passed on.
SAMPLE_INTERVAL_S = 0.2
_READ_BYTES = 64 * 1024
#: Room for the answer beside its figures: letter, error text, quoting.
_LINE_LIMIT_BYTES = 2 * ANSWER_LIMIT_BYTES


def supervise(run_end: socket.socket) -> None:
    """Serve one run: read the request, run the child, report its end."""
    os.setsid()
    kernel.adopt_orphans()
    kernel.set_process_name("ek-supervisor")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.disable()
    try:
        request = DocumentReader(run_end).read_document()
    except EOFError:
        return
    if request["niceness"]:
        kernel.yield_processor(request["niceness"])
    _Supervisor(run_end, request).run()


class _Supervisor:
    def __init__(self, run_end: socket.socket, request: Mapping[str, Any]) -> None:
        self._run_end = run_end
        self._request = request
        self._log = CappedLog(request["log_path"], request["log_limit_bytes"])
        self._child_pid = 0
        self._lines = b""
        self._answer: dict[str, Any] | None = None
        self._progress: bytes | None = None
        self._next_progress = 0.0
        self._killed_for: str | None = None
        self._peak_anon_bytes = 0
        self._peak_rss_bytes = 0

    def run(self) -> None:
        started = time.monotonic()
        log_in, log_out = os.pipe()
        answer_in, answer_out = os.pipe()
        supervisor_pid = os.getpid()
        self._child_pid = child_pid = os.fork()
        if child_pid == 0:
            try:
                self._run_end.close()
                self._log.forget()
                os.close(log_in)
                os.close(answer_in)
                run_child(self._request, supervisor_pid, answer_out, log_out)
            finally:
                os._exit(1)
        try:
            os.close(log_out)
            os.close(answer_out)
            self._tell_started()
            child_fd = os.pidfd_open(child_pid)
            self._watch(child_fd, log_in, answer_in, started + self._request["deadline_s"])
            os.close(child_fd)
        finally:
            # Also after a failure of this very process: no step outlives its supervisor.
            status, rss_bytes = _end_tree(child_pid)
        duration_s = time.monotonic() - started
        self._drain(log_in, answer_in)
        self._log.close()
        self._peak_rss_bytes = max(self._peak_rss_bytes, rss_bytes)
        self._tell_end(status, duration_s)

    def _watch(self, child_fd: int, log_in: int, answer_in: int, deadline: float) -> None:
        """Return when the child has ended or must be killed; `_killed_for` says which."""
        poller = select.poll()
        for fd in (child_fd, log_in, answer_in, self._run_end.fileno()):
            os.set_blocking(fd, fd == self._run_end.fileno())
            poller.register(fd, select.POLLIN)
        next_sample = time.monotonic()
        while self._killed_for is None:
            wait_s = max(0.0, min(next_sample, deadline) - time.monotonic())
            ready = {fd for fd, _ in poller.poll(wait_s * 1000)}
            if log_in in ready and not self._read_log(log_in):
                poller.unregister(log_in)
            if answer_in in ready and not self._read_answers(answer_in):
                poller.unregister(answer_in)
            if child_fd in ready:
                return
            if self._run_end.fileno() in ready:
                # The worker says nothing but "stop", or is gone.
                self._killed_for = "stop"
            elif time.monotonic() >= deadline:
                self._killed_for = "deadline"
            elif time.monotonic() >= next_sample:
                started = time.monotonic()
                self._sample()
                # Sampling a large tree takes a while; it may take a tenth of one core.
                next_sample = time.monotonic() + max(SAMPLE_INTERVAL_S, 9 * (time.monotonic() - started))
            self._pass_progress_on()

    def _sample(self) -> None:
        _reap_orphans(self._child_pid)
        memory = measure_tree(os.getpid())
        self._peak_anon_bytes = max(self._peak_anon_bytes, memory.anon_bytes)
        self._peak_rss_bytes = max(self._peak_rss_bytes, memory.rss_bytes)
        limit_bytes = self._request["memory_bytes"]
        if limit_bytes is not None and memory.anon_bytes > limit_bytes:
            self._killed_for = "memory"

    def _read_log(self, log_in: int) -> bool:
        """Move one piece of output into the log; return False when there is none."""
        with contextlib.suppress(BlockingIOError):
            if piece := os.read(log_in, _READ_BYTES):
                self._log.write(piece)
                return True
        return False

    def _read_answers(self, answer_in: int) -> bool:
        """Take in what the child says; return False when it says nothing."""
        try:
            piece = os.read(answer_in, _READ_BYTES)
        except BlockingIOError:
            return False
        self._lines += piece
        if b"\n" in piece:
            *complete, self._lines = self._lines.split(b"\n")
            for line in complete:
                self._take_line(line)
        if len(self._lines) > _LINE_LIMIT_BYTES:
            self._killed_for = "talk"
        return bool(piece)

    def _take_line(self, line: bytes) -> None:
        letter, body = line[:1], line[1:]
        if letter == b"P":
            self._progress = body
            return
        document = _parse(body)
        if document is None:
            return
        if letter == b"A":
            self._answer = document
        elif letter == b"I":
            self._send({"type": "isolation", **document})

    def _pass_progress_on(self, *, is_last: bool = False) -> None:
        """Send the newest progress, at most one per interval; the last one whenever it came."""
        now = time.monotonic()
        if self._progress is None or (now < self._next_progress and not is_last):
            return
        self._next_progress = now + SAMPLE_INTERVAL_S
        document = _parse(self._progress)
        self._progress = None
        if document is not None:
            with contextlib.suppress(OSError, ValueError):
                # Progress is worth nothing when the worker has no time for it.
                send_document(self._run_end, {"type": "progress", **document}, wait=False)

    def _drain(self, log_in: int, answer_in: int) -> None:
        while self._read_answers(answer_in):
            pass
        while self._read_log(log_in):
            pass
        self._pass_progress_on(is_last=True)
        os.close(answer_in)
        os.close(log_in)

    def _tell_started(self) -> None:
        own_fd = os.pidfd_open(os.getpid())
        self._send({"type": "started"}, [own_fd])
        os.close(own_fd)

    def _tell_end(self, status: int, duration_s: float) -> None:
        answer = self._answer or {}
        last_anon_bytes = answer.pop("anon_bytes", 0)
        if isinstance(last_anon_bytes, int):
            self._peak_anon_bytes = max(self._peak_anon_bytes, last_anon_bytes)
        self._send(
            {
                "type": "end",
                "exit_code": os.waitstatus_to_exitcode(status),
                "killed_for": self._killed_for,
                "answer": self._answer,
                "peak_anon_bytes": self._peak_anon_bytes,
                "peak_rss_bytes": self._peak_rss_bytes,
                "duration_s": duration_s,
            }
        )

    def _send(self, document: Mapping[str, Any], fds: list[int] | None = None) -> None:
        # A worker that is gone shows as the end of its socket in the next round.
        with contextlib.suppress(OSError):
            send_document(self._run_end, document, fds or [])


def _end_tree(child_pid: int) -> tuple[int, int]:
    """Kill and reap the child and all it started; return its wait status and its own peak resident bytes."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child_pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child_pid, signal.SIGKILL)
    _, status, usage = os.wait4(child_pid, 0)
    kill_children()
    return status, usage.ru_maxrss * 1024


def _reap_orphans(child_pid: int) -> None:
    """Reap adopted processes that have ended; stop at the child itself, whose status is still due."""
    while True:
        ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended is None or ended.si_pid == child_pid:
            return
        os.waitpid(ended.si_pid, 0)


def _parse(body: bytes) -> dict[str, Any] | None:
    try:
        document = json.loads(body)
    except ValueError:
        return None
    return document if isinstance(document, dict) else None
