"""How a run ended, as figures or as a typed error.

Owns the translation of everything that can end a child into one `ChildResult`. Pure but for reading the log's
tail; what the child said is checked here, since a step may run a stranger's bytes. Called by `parent`.
"""

from __future__ import annotations

import enum
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.errors import (
    ChildCrashed,
    DeadlineExceeded,
    DiskFull,
    EdgeKilnError,
    InvalidSettings,
    LeaseLost,
    MemoryLimitExceeded,
    RemoteError,
    StepCancelled,
)
from workers.sandbox.log import read_tail

_MIB = 1024 * 1024
_UNCONFINED: Mapping[str, Any] = {"isolation": "weak", "reasons": ["The child ended before it was confined."]}


class StopReason(enum.StrEnum):
    """Why the worker ends a run that could go on."""

    #: Another worker holds the step now, or nobody wants it any more: cancelling raises its token.
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
    #: Largest VmHWM of any process of the run; counts mapped files. None when nobody lived to report it.
    peak_rss_bytes: int | None
    #: Sum of RssAnon and RssShmem over the run's processes, at its sampled peak; pages that the child shares with the
    #: zygote count, pages that its own processes share with it count once. None when nobody lived to report it.
    peak_anon_bytes: int | None
    #: Seconds from the child's start to the end of its last process.
    duration_s: float
    #: `strong` or `weak`; `isolation_reasons` says what the host refused.
    isolation: str
    isolation_reasons: tuple[str, ...]


def describe_end(
    end: Mapping[str, Any] | None,
    *,
    pool: str,
    limits: Limits,
    stopped: StopReason | None,
    not_started: str | None,
    isolation: Mapping[str, Any] | None,
    output_dir: Path,
    log_path: Path,
    elapsed_s: float,
) -> ChildResult:
    """Translate the supervisor's last document; `end` is None when it vanished or never was."""
    document = end or {}
    answer = document.get("answer") or {}
    figures = answer.get("figures")
    error: EdgeKilnError | None = None
    if not isinstance(figures, dict):
        figures = None
        error = _find_error(document, answer, pool, limits, stopped, not_started, log_path)
    confined = isolation or _UNCONFINED
    return ChildResult(
        figures=figures,
        error=error,
        # A child that answered before the stop reached it has ended by itself.
        stopped=None if answer else stopped,
        output_dir=output_dir,
        log_path=log_path,
        peak_rss_bytes=document.get("peak_rss_bytes"),
        peak_anon_bytes=document.get("peak_anon_bytes"),
        duration_s=document.get("duration_s", elapsed_s),
        isolation=confined["isolation"],
        isolation_reasons=tuple(confined["reasons"]),
    )


def _find_error(
    end: Mapping[str, Any],
    answer: Mapping[str, Any],
    pool: str,
    limits: Limits,
    stopped: StopReason | None,
    not_started: str | None,
    log_path: Path,
) -> EdgeKilnError:
    if _is_error_document(answer.get("error")):
        return RemoteError(answer["error"])
    if stopped is not None:
        return _describe_stop(stopped)
    if not_started is not None:
        return InvalidSettings(
            f"The pool {pool!r} of this worker cannot start steps. {not_started} Check the worker's installation "
            "and its memory.",
            pool=pool,
        )
    if end.get("killed_for") == "deadline":
        return DeadlineExceeded(
            f"The step was ended after {end['duration_s']:.1f} s; its deadline is {limits.deadline_s:.1f} s. "
            "Raise the deadline, or ask for less in one job.",
            deadline_s=limits.deadline_s,
        )
    if end.get("killed_for") == "memory":
        return _describe_memory(end["peak_anon_bytes"], limits.memory_bytes or 0, log_path)
    return _describe_crash(end, log_path)


def _is_error_document(document: Any) -> bool:
    return (
        isinstance(document, dict)
        and isinstance(document.get("code"), str)
        and isinstance(document.get("message"), str)
        and isinstance(document.get("details"), dict)
        and not {"message", "self"} & set(document["details"])
    )


def _describe_stop(reason: StopReason) -> EdgeKilnError:
    if reason is StopReason.LEASE_LOST:
        return LeaseLost("The step's lease was lost while its child ran; the child was killed.")
    return StepCancelled("The worker shuts down; the step's child was killed and the step can run elsewhere.")


def _describe_memory(peak_bytes: int, limit_bytes: int, log_path: Path) -> EdgeKilnError:
    return MemoryLimitExceeded(
        f"The step used {peak_bytes / _MIB:.0f} MiB of memory; its limit is {limit_bytes / _MIB:.0f} MiB. "
        "Raise the worker's memory limit, or use a smaller checkpoint or context.",
        peak_anon_bytes=peak_bytes,
        memory_bytes=limit_bytes,
        log_tail=read_tail(log_path),
    )


def _describe_crash(end: Mapping[str, Any], log_path: Path) -> EdgeKilnError:
    exit_code = end.get("exit_code")
    details: dict[str, Any] = {"log_tail": read_tail(log_path)}
    if end.get("killed_for") == "talk":
        sentence = "The child process was ended because it sent an answer without an end."
    elif exit_code is None:
        sentence = "The child process and its supervisor vanished without an answer; something killed them."
    elif exit_code < 0:
        name = _name_signal(-exit_code)
        details["signal"] = name
        if name == "SIGBUS":
            # A mapped file found no room: only an ordinary write has an error to return.
            return DiskFull(
                f"The step was ended by SIGBUS: no space left in {log_path.parent} for a file that it wrote. Free some "
                "there; the work is taken up again.",
                folder=str(log_path.parent),
                **details,
            )
        sentence = f"The child process was killed by {name}."
        if name == "SIGKILL":
            sentence += (
                " This worker did not send it; the usual sender is the kernel when the host runs out of memory."
                " Lower the worker's memory limit or its concurrency, or use a host with more memory."
            )
    else:
        details["exit_code"] = exit_code
        sentence = f"The child process ended with exit status {exit_code} and without a usable answer."
    return ChildCrashed(f"{sentence} The end of its log is in `log_tail`.", **details)


def _name_signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
