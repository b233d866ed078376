"""The protocol of a measurement, the same on every device: which processes run, and what their samples amount to.

    1. one process that nobody pools: the first ever on this device builds caches and reads the file (`cold`)
    2. what is asked beside the figures, in processes of its own, before time goes into nonsense: answers, a profile
    3. `processes` fresh ones, each after the device was found fit
    4. a capture that is noisy or hot is kept, marked, and run once more; the last one counts, whatever it says

Several arms (ways to run one artifact on one device) go through this together: in each round of 3. and 4. every arm
runs one process, in an order that turns from round to round, so that what drifts disturbs all alike (decision 31).
An arm that fails takes no other's figures away.

Owns the order and the documents; knows no device, and `workers.devices.figures` makes the figures. A device gives
`Device`: how one process is run, and how one waits until it is fit. Called by `workers.devices.host` and
`workers.devices.phone`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from service.errors import BenchmarkFailed, DeviceHot, EdgeKilnError, RequestUnfit, ToolReportInvalid
from workers.devices.figures import summarize_capture, summarize_cold
from workers.devices.statistics import Verdict
from workers.steps import Progress

log = logging.getLogger(__name__)

#: What becomes of a measurement besides its figures: every sample, the conditions, the commands, the raw logs.
DOCUMENT = "measurement.json"
#: Captures that are worth another try: what disturbed them may be over.
_RUN_AGAIN = (Verdict.NOISY, Verdict.HOT)


@dataclass(frozen=True)
class Aside:
    """What a device was asked beside its speed."""

    #: For the ledger.
    figures: Mapping[str, Any]
    #: For the document: all of it.
    whole: Mapping[str, Any]


@dataclass(frozen=True)
class Device:
    """What the protocol needs of a device."""

    #: As figures and documents name it, with its `kind`.
    record: Mapping[str, Any]
    #: Runs one fresh process to its end and returns its sample, checked; is told which one it is.
    run_process: Callable[[str], dict[str, Any]]
    #: How the device is now; `thermal_status` above 0 means that it holds its clocks down.
    read_conditions: Callable[[], dict[str, Any]]
    #: Waits until the device is fit to be measured, as long as it may take.
    wait_until_fit: Callable[[], None] = lambda: None
    #: Measures memory in a process of its own, where watching would disturb the others.
    measure_memory: Callable[[], dict[str, Any]] = dict
    #: Name -> what else is asked, each in processes of its own.
    asides: Mapping[str, Callable[[], Aside]] = field(default_factory=dict)


@dataclass(frozen=True)
class Arm:
    """One way to measure an artifact: a device as it is seen that way, and what is asked of it."""

    device: Device
    #: `format`, `processes`, `threads`, `backend`, and for bundles `prefill_tokens` and `decode_tokens`.
    asked: Mapping[str, Any]


@dataclass(eq=False)
class _Course:
    """What has become of an arm so far."""

    arm: Arm
    before: Mapping[str, Any] = field(default_factory=dict)
    cold: dict[str, Any] = field(default_factory=dict)
    asides: Mapping[str, Aside] = field(default_factory=dict)
    captures: list[dict[str, Any]] = field(default_factory=list)
    #: Its own; what befalls the device ends all arms.
    error: EdgeKilnError | None = None

    @contextmanager
    def owning_faults(self) -> Iterator[None]:
        """Keep an arm's own failure from the others."""
        try:
            yield
        except (BenchmarkFailed, RequestUnfit, ToolReportInvalid) as error:
            self.error = error

    def run(self, label: str) -> dict[str, Any]:
        """Run one process once the device is fit, and return its sample."""
        device = self.arm.device
        device.wait_until_fit()
        sample = device.run_process(label)
        return {**sample, "thermal_status": device.read_conditions().get("thermal_status")}

    def begin(self) -> None:
        """Do what comes before anything is timed."""
        self.before = self.arm.device.read_conditions()
        self.cold = self.run("cold process")
        self.asides = {name: ask() for name, ask in self.arm.device.asides.items()}

    def add_capture(self, samples: list[dict[str, Any]]) -> None:
        """Judge a whole capture and keep it."""
        earlier = self.captures[-1]["samples"] if self.captures else ()
        figures, verdict = summarize_capture(self.arm.asked, samples, earlier)
        self.captures.append({"verdict": str(verdict), "figures": figures, "samples": samples})

    def end(self, interleaved: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the figures, and the document with all that they are made of."""
        device, asked, last = self.arm.device, self.arm.asked, self.captures[-1]
        memory = device.measure_memory()
        ran_on = {sample["ran_on"]: None for sample in last["samples"] if "ran_on" in sample}
        found = {
            "device": dict(device.record),
            "backend": asked["backend"],
            # Where at least one process really ran, where that is not the backend that was asked for.
            **({"ran_on": " and ".join(ran_on)} if ran_on else {}),
            # What each delegate took of the graph: all, a part, or nothing.
            **({"delegations": last["samples"][-1]["delegations"]} if last["samples"][-1].get("delegations") else {}),
            "threads": asked["threads"],
            "format": asked["format"],
            "conditions": {"before": self.before, "after": device.read_conditions()},
            **last["figures"],
            **memory,
            "cold": summarize_cold(asked, self.cold),
            **{name: dict(aside.figures) for name, aside in self.asides.items()},
            "captures": len(self.captures),
            "verdict": last["verdict"],
            **interleaved,
        }
        whole = {name: dict(aside.whole) for name, aside in self.asides.items()}
        return found, {**found, **whole, "asked": dict(asked), "cold_sample": self.cold, "captures": self.captures}


def measure(device: Device, asked: Mapping[str, Any], output_dir: Path, progress: Progress) -> dict[str, Any]:
    """Run the protocol for one arm and return its figures; writes `DOCUMENT` with all that they are made of."""
    (found,) = measure_arms([Arm(device, asked)], "", output_dir, progress)
    if isinstance(found, EdgeKilnError):
        raise found
    return found


def measure_arms(
    arms: Sequence[Arm], run: str, output_dir: Path, progress: Progress
) -> list[dict[str, Any] | EdgeKilnError]:
    """Run the protocol for arms of one device, interleaved; return each one's figures, or why it has none.

    `run` names this run among all. Several arms have a document each, which their figures name (`document`), and say
    which capture of which run they are of (`interleaved`): samples of equal ones, and of one `round`, ran in turns.
    """
    courses = [_Course(arm) for arm in arms]
    for course in courses:
        with course.owning_faults():
            progress(f"benchmark {_name(course.arm)}: cold process", 0.0)
            course.begin()
    _take_capture(courses, 0, progress)
    try:
        _take_capture([course for course in courses if _is_worth_another(course)], 1, progress)
    except DeviceHot:
        # The first captures stand, with their verdicts.
        log.info("too hot for a second capture")
    found: list[dict[str, Any] | EdgeKilnError] = []
    for number, course in enumerate(courses, 1):
        is_one_of_many = len(courses) > 1
        name = f"measurement-{number}.json" if is_one_of_many else DOCUMENT
        with course.owning_faults():
            if course.error is None:
                together = {"interleaved": f"{run}/{len(course.captures)}", "document": name} if is_one_of_many else {}
                figures, document = course.end(together)
                (output_dir / name).write_text(json.dumps(document, indent=1))
                found.append(figures)
        if course.error is not None:
            found.append(course.error)
    return found


def _take_capture(courses: Sequence[_Course], number: int, progress: Progress) -> None:
    """Run a capture of the arms that can go on: rounds of a process each. A capture that breaks off is none."""
    courses = [course for course in courses if course.error is None]
    if not courses:
        return
    processes = courses[0].arm.asked["processes"]
    samples: dict[_Course, list[dict[str, Any]]] = {course: [] for course in courses}
    for turn in range(processes):
        first = turn % len(courses)
        for course in (*courses[first:], *courses[:first]):
            if course.error is None:
                with course.owning_faults():
                    label = f"process {turn + 1} of {processes}"
                    again = ", once more" if number else ""
                    progress(f"benchmark {_name(course.arm)}: {label}{again}", (turn + 1) / (processes + 1))
                    samples[course].append({**course.run(label), "round": number * processes + turn + 1})
    for course in courses:
        if course.error is None:
            course.add_capture(samples[course])


def _is_worth_another(course: _Course) -> bool:
    return course.error is None and course.captures[-1]["verdict"] in _RUN_AGAIN


def _name(arm: Arm) -> str:
    return (
        f"{arm.asked['format']} on {arm.device.record['name']} ({arm.asked['backend']}, {arm.asked['threads']} threads)"
    )
