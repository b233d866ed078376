"""A job's events as a person sees them: live bars on a terminal, plain lines elsewhere. Standard error only."""

from __future__ import annotations

import datetime as dt
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

from service.commands.output import format_error, format_failure, format_figure, say

#: Reads the job whole, to learn what its steps are for.
ReadJob = Callable[[], Mapping[str, Any]]

#: Kinds that are about one variant; the others serve all, even when there is but one.
_VARIANT_KINDS = frozenset({"quantize", "bundle", "verify", "benchmark", "publish"})
#: Between two plain lines about the same step.
_PLAIN_PAUSE_S = 5.0


@dataclass
class _Step:
    """What is known of a step from events."""

    label: str
    started_at: dt.datetime | None = None
    is_reused: bool = False
    state: str = ""


class Display(Protocol):
    """Where progress is shown."""

    def line(self, text: str) -> None:
        """Show something that stays."""

    def update(self, step_id: str, label: str, message: str, fraction: float | None) -> None:
        """Show how far a running step is."""

    def forget(self, step_id: str) -> None:
        """The step runs no longer."""

    def count(self, done: int, total: int) -> None:
        """Show how many steps are done."""


class ProgressView:
    """Follows one job; give its `on_event` to `Client.wait`. A context manager: a live display must be ended."""

    def __init__(self, read_job: ReadJob) -> None:
        self._read_job = read_job
        self._steps: dict[str, _Step] = {}
        self._display: Display = _LiveDisplay() if sys.stderr.isatty() else _PlainDisplay()

    def __enter__(self) -> Self:
        if isinstance(self._display, _LiveDisplay):
            self._display.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(self._display, _LiveDisplay):
            self._display.close()

    def on_event(self, event: Mapping[str, Any]) -> None:
        """Show one event."""
        data = event["data"]
        if event["kind"] == "job":
            self._display.line(f"job: {data['state']}")
        elif event["kind"] == "variant" and data["state"] not in ("pending", "running"):
            outcome = format_failure(data["state"], data["error"]) if data.get("error") else data["state"]
            self._display.line(f"variant {data['name']}: {outcome}")
        elif event["kind"] == "regression":
            self._display.line(f"{self._find({**data, 'kind': 'benchmark'}).label}: {format_regression(data)}")
        elif event["kind"] == "step":
            self._show_step(self._find(data), data, dt.datetime.fromisoformat(event["created_at"]))
        elif event["kind"] == "progress":
            step = self._find(data)
            self._display.update(data["step_id"], step.label, data["message"] or "", data["fraction"])

    def _find(self, data: Mapping[str, Any]) -> _Step:
        step_id = data["step_id"]
        if step_id not in self._steps:
            # New steps come by the dozen, when a plan is known: one look at the job names them all.
            for document in self._read_job()["steps"]:
                self._steps.setdefault(document["id"], _Step(label_step(document)))
        return self._steps.setdefault(step_id, _Step(data["kind"]))

    def _show_step(self, step: _Step, data: Mapping[str, Any], at: dt.datetime) -> None:
        state = data["state"]
        step.is_reused = step.is_reused or bool(data.get("reused"))
        if state == step.state:
            return
        step.state = state
        if state == "running":
            step.started_at = at
            self._display.update(data["step_id"], step.label, "", None)
        else:
            self._display.forget(data["step_id"])
        if state == "succeeded" and step.is_reused and step.started_at is None:
            self._display.line(f"{step.label}: reused")
        elif state == "succeeded":
            took = "" if step.started_at is None else f" in {(at - step.started_at).total_seconds():.1f} s"
            self._display.line(f"{step.label}: done{took}")
        elif state in ("failed", "queued") and data.get("error"):
            what = "failed" if state == "failed" else "will be tried again"
            self._display.line(f"{step.label}: {what} ({format_error(data['error'])})")
        known = [known for known in self._steps.values() if known.state]
        done = sum(known.state in ("succeeded", "failed", "cancelled") for known in known)
        self._display.count(done, max(len(self._steps), len(known)))


def format_regression(data: Mapping[str, Any]) -> str:
    """Return a regression as a sentence: what became worse, from what, and how sure that is."""
    before, after = (format_figure(data["metric"], data[name]) for name in ("baseline", "candidate"))
    bounds = (
        "" if data["interval"] is None else f", 95 % interval {data['interval'][0]:.3f} to {data['interval'][1]:.3f}"
    )
    return (
        f"REGRESSION, {data['verdict']}: {data['metric']} {after} after {before} (ratio {data['ratio']:.3f}{bounds}); "
        f"compare with `edgekiln difference {data['baseline_id']} {data['step_id']}`"
    )


def label_step(step: Mapping[str, Any]) -> str:
    """Return what tells a step from its neighbours: kind, its variant if it is about one, format."""
    variants = step.get("variants") or []
    variant = variants[0] if len(variants) == 1 and step["kind"] in _VARIANT_KINDS else ""
    parts = [step["kind"], variant, step.get("format") or ""]
    return " ".join(part for part in parts if part)


class _PlainDisplay:
    """Lines, for logs."""

    def __init__(self) -> None:
        self._said: dict[str, tuple[str, float]] = {}

    def line(self, text: str) -> None:
        say(text)

    def update(self, step_id: str, label: str, message: str, fraction: float | None) -> None:
        before, said_at = self._said.get(step_id, ("", float("-inf")))
        if message == before and step_id in self._said:
            return
        if message and time.monotonic() - said_at < _PLAIN_PAUSE_S:
            return
        self._said[step_id] = (message, time.monotonic() if message else float("-inf"))
        share = "" if fraction is None else f" {fraction:.0%}"
        say(f"{label}: {message or 'started'}{share}")

    def forget(self, step_id: str) -> None:
        self._said.pop(step_id, None)

    def count(self, done: int, total: int) -> None:
        return None


class _LiveDisplay:
    """Bars that move, for terminals."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

        self._console = Console(stderr=True, highlight=False)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[message]}", markup=False),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
        )
        self._tasks: dict[str, TaskID] = {}
        self._all: TaskID | None = None

    def open(self) -> None:
        """Begin to draw."""
        self._progress.start()
        self._all = self._progress.add_task("steps", total=None, message="")

    def close(self) -> None:
        """Leave the terminal clean."""
        self._progress.stop()

    def line(self, text: str) -> None:
        self._console.print(text, markup=False)

    def update(self, step_id: str, label: str, message: str, fraction: float | None) -> None:
        if step_id not in self._tasks:
            self._tasks[step_id] = self._progress.add_task(label, total=None, message="")
        total = None if fraction is None else 1.0
        self._progress.update(self._tasks[step_id], total=total, completed=fraction or 0.0, message=message)

    def forget(self, step_id: str) -> None:
        if step_id in self._tasks:
            self._progress.remove_task(self._tasks.pop(step_id))

    def count(self, done: int, total: int) -> None:
        if self._all is not None:
            self._progress.update(self._all, completed=done, total=total, message=f"{done} of {total}")
