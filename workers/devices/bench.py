"""A phone as one arm of a benchmark sees it: one tool, one model, one way to run it.

Owns every conversation of a measurement with the phone, and the checks of what it answers; what its samples amount to
is `workers.devices.capture`'s. Called by `workers.devices.phone`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from service.devices import BACKENDS, TOOLS
from service.errors import (
    BenchmarkFailed,
    DeviceHot,
    DeviceLost,
    DeviceUnauthorized,
    EdgeKilnError,
    RequestUnfit,
    ToolReportInvalid,
)
from service.recipes import FORMATS, require_known
from workers.devices.adb import Adb, Phone, quote
from workers.devices.android import THERMAL_STATUSES, find_big_cores, read_conditions, read_record
from workers.devices.capture import Arm, Aside, Device
from workers.devices.commands import PARSERS, PROFILE_FLAG, build_arguments, build_question, find_fallback
from workers.devices.figures import find_fault
from workers.devices.processes import Processes
from workers.devices.profiles import parse_profile
from workers.devices.reports import parse_answer, refuse_unknown_flags
from workers.devices.smoke import Answers, read_answers
from workers.devices.traces import (
    digest_file,
    run_dir,
    tool_dir,
)
from workers.steps import Progress

_DEFAULTS: dict[str, Any] = {
    "backend": "cpu",
    "processes": 6,
    "prefill_tokens": 128,
    "decode_tokens": 128,
    "threads": None,
    "signatures": [],
    "smoke_prompts": 0,
    "profile": False,
}
#: Node types of a profile that the ledger keeps; the document has all.
_TYPES_IN_FIGURES = 5
#: Cores that a language model uses well on a phone, where the job does not say.
_THREADS = 4
#: Between two looks at a phone that cools down.
_COOLING_POLL_S = 5.0


class Bench:
    """One phone, one tool, one model, one way to run it."""

    def __init__(self, params: Mapping[str, Any], inputs: Mapping[str, Path], progress: Progress, cache: str) -> None:
        host_side = params["phone"]
        defaults = {**_DEFAULTS, "process_deadline_s": host_side["process_deadline_s"]}
        self.asked = {**defaults, **{name: value for name, value in params.items() if value is not None}}
        self.asked.pop("phone")
        adb = Adb(host_side["adb_host"], host_side["adb_port"], host_side["answer_s"])
        self.phone: Phone = adb.phone(host_side["serial"])
        self.run: str = host_side["run"]
        self.tool: Mapping[str, Any] = host_side["tool"]
        self._record: Mapping[str, Any] = host_side["record"]
        self._cool_down_s: float = host_side["cool_down_s"]
        self._progress = progress
        self.model = inputs["artifact"] / f"model.{self.asked['format']}"
        self.remote_model = f"{run_dir(self.run)}/{self.model.name}"
        #: Of this arm alone: what another one cached is not what this one's first process finds.
        self.cache_dir = f"{run_dir(self.run)}/{cache}"
        self.answers = self._read_answers(inputs.get("answers"), host_side.get("logit_range"))
        self._mask = find_big_cores(self._record) if self.asked["backend"] == "cpu" else None
        if self.asked["threads"] is None:
            fast = bin(int(self._mask, 16)).count("1") if self._mask else self._record.get("cores") or _THREADS
            self.asked["threads"] = min(_THREADS, fast)

    def check_model(self) -> None:
        """Raise `BenchmarkFailed` where there is nothing to measure."""
        require_known("format", self.asked["format"], FORMATS)
        if not self.model.is_file():
            raise BenchmarkFailed(f"There is no {self.model.name} in {self.model.parent} to benchmark.")

    def find_unfit(self) -> RequestUnfit | None:
        """Return why the tool cannot be asked this, or None."""
        require_known("backend", self.asked["backend"], BACKENDS)
        try:
            build_arguments(self.asked, self.remote_model, "", None)
        except RequestUnfit as error:
            return error
        return None

    def make_arm(self) -> Arm:
        """Return what the protocol needs of this way."""
        device = Device(
            record=self.describe(),
            run_process=self.run_process,
            read_conditions=partial(read_conditions, self.phone),
            wait_until_fit=self.wait_until_cool,
            measure_memory=self.measure_memory,
            asides=self.asides,
        )
        return Arm(device, self.asked)

    def describe_outcome(self, found: Mapping[str, Any] | EdgeKilnError) -> dict[str, Any]:
        """Return an arm as the step's figures hold it: its measurement, or its name and why there is none."""
        if isinstance(found, EdgeKilnError):
            way = {name: self.asked[name] for name in ("format", "backend", "threads")}
            return {**way, "error": found.to_json()}
        return dict(found)

    def check_identity(self) -> None:
        """Make sure that the phone at this serial number is the one that the lease is for, and that it is up."""
        state = self.phone.adb.states().get(self.phone.serial)
        if state == "unauthorized":
            raise DeviceUnauthorized(f"{self.phone.serial} does not trust this host's adb key.")
        if state != "device":
            raise DeviceLost(f"{self.phone.serial} is {state or 'not attached'}.", serial=self.phone.serial)
        found = read_record(self.phone)
        if found["serial"] != self._record["serial"] or found["boot_id"] is None:
            raise DeviceLost(
                f"{self.phone.serial} is now the phone {found['serial']}, not {self._record['serial']}.",
                serial=self.phone.serial,
            )
        # Whatever started it anew before this run is no matter.
        self._record = {**self._record, "boot_id": found["boot_id"]}

    def describe(self) -> dict[str, Any]:
        """The device as the measurement names it, with what ran there."""
        self.check_identity()
        record = {name: value for name, value in self._record.items() if name != "boot_id"}
        return {
            **record,
            "tool": dict(self.tool),
            "artifact": {"sha256": digest_file(self.model), "size_bytes": self.model.stat().st_size},
            "big_core_mask": self._mask,
            "commands": [quote(*self._command(signature)) for signature in self._signatures],
        }

    def wait_until_cool(self) -> None:
        """Return when the phone holds nothing down; raises `DeviceHot` when that takes too long."""
        give_up_at = time.monotonic() + self._cool_down_s
        while True:
            status = read_conditions(self.phone)["thermal_status"]
            if not status:
                return
            word = THERMAL_STATUSES[min(status, len(THERMAL_STATUSES) - 1)]
            if time.monotonic() >= give_up_at:
                raise DeviceHot(
                    f"{self.phone.serial} is hot (thermal status {status}, {word}) and did not cool down within "
                    f"{self._cool_down_s:.0f} s.",
                    thermal_status=status,
                )
            self._progress(f"waiting for the phone to cool down: thermal status {word}")
            time.sleep(_COOLING_POLL_S)

    @property
    def _signatures(self) -> list[str | None]:
        return list(self.asked["signatures"]) or [None] if self.asked["format"] == "tflite" else [None]

    def _command(self, signature: str | None) -> list[str]:
        return self._pin(build_arguments(self.asked, self.remote_model, self.cache_dir, signature))

    def _pin(self, arguments: list[str]) -> list[str]:
        """Return the command that runs the tool on the cores that are meant."""
        home = tool_dir(self.tool["files"])
        pinned = ["taskset", self._mask] if self._mask else []
        # The tool's libraries lie beside it.
        return ["env", f"LD_LIBRARY_PATH={home}", *pinned, f"{home}/{self.tool['name']}", *arguments]

    def run_process(self, label: str) -> dict[str, Any]:
        """Run one fresh process, or one a signature, and return its sample, checked."""
        if self.asked["format"] != "tflite":
            return self._run_tool(label, None)
        runs = {signature: self._run_tool(label, signature) for signature in self._signatures}
        sample = {
            "init_s": max(run["init_s"] for run in runs.values()),
            "latency_ms": {
                signature or "default": {**run["latency_ms"], "first": run["first_ms"]}
                for signature, run in runs.items()
            },
            "delegations": {signature or "default": run["delegations"] for signature, run in runs.items()},
            "logs": [run["log"] for run in runs.values()],
        }
        ran_on = [run["ran_on"] for run in runs.values() if "ran_on" in run]
        return {**sample, "ran_on": ran_on[0]} if ran_on else sample

    def _run_tool(self, label: str, signature: str | None) -> dict[str, Any]:
        finished = self._processes.start(label, self._command(signature))
        sample = {**PARSERS[self.asked["format"]](finished.log), "wall_s": finished.wall_s, "log": finished.log}
        if fault := find_fault({**sample, "latency_ms": {"": sample.get("latency_ms")}}, self.asked["format"]):
            raise ToolReportInvalid(f"The {label} of {self.tool['name']} on {self.phone.serial} {fault}.")
        fallback = find_fallback(self.asked, sample)
        return {**sample, "ran_on": fallback} if fallback else sample

    @property
    def _processes(self) -> Processes:
        return Processes(
            self.phone, self.run, self.tool["name"], self._record["boot_id"], self.asked["process_deadline_s"]
        )

    def measure_memory(self) -> dict[str, Any]:
        """Read the peaks of one more process while it runs; what the phone does not show stays missing."""
        return self._processes.watch_memory(self._command(self._signatures[0]))

    def _read_answers(self, folder: Path | None, logit_range: float | None) -> Answers | None:
        """Read what the host's graph answered, where smoke generation is asked for and can be compared."""
        count = self.asked["smoke_prompts"]
        if (
            folder is None
            or logit_range is None
            or not count
            or TOOLS[self.asked["format"]] != "litert_lm_advanced_main"
        ):
            return None
        return read_answers(folder, count, self.asked["backend"], logit_range)

    @property
    def asides(self) -> dict[str, Callable[[], Aside]]:
        """What is asked beside figures, where it is asked for and the tool can tell it."""
        asked: dict[str, Callable[[], Aside]] = {}
        if self.answers is not None:
            asked["smoke"] = self.answer_prompts
        if self.asked["profile"] and TOOLS[self.asked["format"]] == "benchmark_model":
            asked["profile"] = self.profile
        return asked

    def profile(self) -> Aside:
        """Run a process a signature that tells what each node takes; its times are never pooled with others."""
        figures, whole = {}, {}
        for signature in self._signatures:
            name = signature or "default"
            finished = self._processes.start(f"profile of {name}", [*self._command(signature), PROFILE_FLAG])
            refuse_unknown_flags(self.tool["name"], finished.log)
            graphs = parse_profile(finished.log)
            figures[name] = [
                {
                    "graph": graph["graph"],
                    "nodes_executed": graph["nodes_executed"],
                    "by_type": graph["by_type"][:_TYPES_IN_FIGURES],
                }
                for graph in graphs
            ]
            whole[name] = {"graphs": graphs, "log": finished.log}
        return Aside(figures, whole)

    def answer_prompts(self) -> Aside:
        """Ask the artifact, a process a prompt; the document gets every word of both sides."""
        assert self.answers is not None
        found = []
        for number, question in enumerate(self.answers.questions, 1):
            label = f"answer {number} of {len(self.answers.questions)}"
            arguments = build_question(
                self.asked, self.remote_model, self.cache_dir, question.prompt, question.limit_tokens
            )
            finished = self._processes.start(label, self._pin(arguments), words_apart=True)
            found.append({**parse_answer(finished.words, finished.log), "log": finished.log})
        told = [
            {"prompt": question.prompt, "expected": self.answers.decode(question.expected.tokens), **answer}
            for question, answer in zip(self.answers.questions, found, strict=True)
        ]
        figures = self.answers.compare(found)
        return Aside(figures, {**figures, "answers": told})
