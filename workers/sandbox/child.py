"""The child: confines itself, calls one step function, and answers over a pipe.

Owns everything that happens inside the child process. Every line it writes to the pipe starts with a letter:
`I` its isolation, `P` progress, `A` the answer, followed by JSON. Called by `supervisor` in a fresh fork; never
returns.
"""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import gc
import importlib
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from service.errors import DiskFull, EdgeKilnError, MemoryLimitExceeded, describe_bug
from workers.sandbox import kernel
from workers.sandbox.isolation import isolate
from workers.sandbox.process_tree import measure_process

#: An answer is figures, not data: files belong into the output folder.
ANSWER_LIMIT_BYTES = 16 * 1024 * 1024
_MESSAGE_LIMIT = 2000
_OPEN_FILES_LIMIT = 4096
#: Makes the child the kernel's first choice when memory runs out, before its zygote and its worker.
_OOM_SCORE = "500"
_DISK_FULL_TEXT = "No space left on device"
_OUT_OF_MEMORY_TEXTS = ("std::bad_alloc", "not enough memory: you tried to allocate", "Cannot allocate memory")


class _Answers:
    """The child's end of the pipe; may be used from several threads."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._lock = threading.Lock()
        self._started_s = time.monotonic()
        self._last_message: str | None = None

    def write(self, letter: str, document: Mapping[str, Any]) -> None:
        line = memoryview(f"{letter}{json.dumps(document, allow_nan=False)}\n".encode())
        with self._lock:
            while line:
                line = line[os.write(self._fd, line) :]

    def report_progress(self, message: str, fraction: float | None = None) -> None:
        """Pass progress on, thinned out by the supervisor, and say in the log what begins when."""
        share = None if fraction is None else min(1.0, max(0.0, float(fraction)))
        if message != self._last_message:
            self._last_message = message
            print(f"[{time.monotonic() - self._started_s:8.2f} s] {str(message)[:_MESSAGE_LIMIT]}", flush=True)
        self.write("P", {"message": str(message)[:_MESSAGE_LIMIT], "fraction": share})


def run_child(request: Mapping[str, Any], supervisor_pid: int, answer_fd: int, log_fd: int) -> None:
    """Become the child that `request` asks for; ends the process with status 0 once it has answered."""
    kernel.die_with_parent()
    if os.getppid() != supervisor_pid:
        os._exit(1)
    answers = _Answers(answer_fd)
    try:
        _redirect_output(log_fd)
        print(f"[{0.0:8.2f} s] {request['target']}", flush=True)
        _enter_step_folder(request)
        isolation = isolate(
            network=request["network"],
            readable=[Path(folder) for folder in request["inputs"].values()],
            writable=[Path(folder) for folder in request["writable"]],
        )
        # The kernel forgets this setting when a process changes its credentials.
        kernel.die_with_parent()
        answers.write("I", isolation.to_json())
        answer = _call_step(request, answers)
    except BaseException as error:
        traceback.print_exc()
        answer = {"error": _describe(error, request)}
    answer["anon_bytes"] = measure_process(os.getpid()).anon_bytes
    _flush_output()
    answers.write("A", answer)
    # Exit handlers of the preloaded libraries would run in a process that is not theirs.
    os._exit(0)


def _redirect_output(log_fd: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (log_fd, 1), (log_fd, 2)):
        os.dup2(source, target)
    os.close(nothing)
    os.close(log_fd)
    # New streams: the old ones believe in the kind of file that the zygote wrote to.
    sys.stdout = os.fdopen(1, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)
    # A crash in native code leaves the Python stack in the log.
    faulthandler.enable()


def _flush_output() -> None:
    for stream in (sys.stdout, sys.stderr, sys.__stdout__):
        if stream is None:
            continue
        # A full disk shows in the log as what is missing; the answer is still due.
        with contextlib.suppress(OSError):
            stream.flush()
    kernel.flush_c_streams()


def _enter_step_folder(request: Mapping[str, Any]) -> None:
    os.setpgid(0, 0)
    Path("/proc/self/oom_score_adj").write_text(_OOM_SCORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = _OPEN_FILES_LIMIT if hard == resource.RLIM_INFINITY else min(_OPEN_FILES_LIMIT, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, allowed))
    os.umask(0o077)
    os.chdir(request["scratch_dir"])
    os.environ.clear()
    os.environ.update(request["environment"])
    time.tzset()
    tempfile.tempdir = None
    hub_constants = sys.modules.get("huggingface_hub.constants")
    if hub_constants is not None:
        # A preloaded library has read the zygote's environment, not this one.
        setattr(hub_constants, "HF_HUB_OFFLINE", not request["network"])  # noqa: B010 - a constant to type checkers
    gc.enable()


def _call_step(request: Mapping[str, Any], answers: _Answers) -> dict[str, Any]:
    module_name, _, function_name = request["target"].partition(":")
    function = getattr(importlib.import_module(module_name), function_name)
    params = dict(request["params"])
    if request["credential"] is not None:
        params["credential"] = request["credential"]
    inputs = {name: Path(folder) for name, folder in request["inputs"].items()}
    figures = function(params, inputs, Path(request["output_dir"]), answers.report_progress)
    if not isinstance(figures, dict):
        raise TypeError(f"{request['target']} returned {type(figures).__name__}, not a dict of figures")
    size_bytes = len(json.dumps(figures, allow_nan=False))
    if size_bytes > ANSWER_LIMIT_BYTES:
        raise ValueError(f"{request['target']} returned {size_bytes} bytes of figures")
    return {"figures": figures}


def _describe(error: BaseException, request: Mapping[str, Any]) -> dict[str, Any]:
    """Return the wire form of whatever the step raised; a full disk or memory is found below any wrapping."""
    for cause in _walk_causes(error):
        text = str(cause)
        is_disk_full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)
        if is_disk_full or (not isinstance(cause, EdgeKilnError) and _DISK_FULL_TEXT in text):
            return _describe_full_disk(request["output_dir"])
        if isinstance(cause, MemoryError) or any(known in text for known in _OUT_OF_MEMORY_TEXTS):
            return MemoryLimitExceeded(
                f"The step could not allocate memory ({text or 'no more was given'}). Use a host with more memory, "
                "or a smaller checkpoint or context."
            ).to_json()
    document = error.to_json() if isinstance(error, EdgeKilnError) else describe_bug(error)
    try:
        json.dumps(document, allow_nan=False)
    except (TypeError, ValueError):
        document["details"] = {name: repr(value) for name, value in document["details"].items()}
    return document


def _describe_full_disk(folder: str) -> dict[str, Any]:
    try:
        free_bytes: int | None = shutil.disk_usage(folder).free
    except OSError:
        free_bytes = None
    return DiskFull(
        f"No space is left on the disk of {folder}. Free some space, or move the data folder to a larger disk; "
        "the step is tried again.",
        folder=folder,
        free_bytes=free_bytes,
    ).to_json()


def _walk_causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
