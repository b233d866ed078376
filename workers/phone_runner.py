"""Runs benchmarks on phones: the same orchestration, around two children and a phone that is left clean.

    1. claim the next step that a phone fits
    2. copy the artifact and the phone's tool from the store
    3. `prepare` in a child: may be repeated, here or on another phone
    4. write down that the tool starts; from here on nothing is repeated by itself
    5. `measure` in a child
    6. take from the phone what is ours, whatever happened, before the step ends and another may have the phone

Called by `workers.device_worker`, one thread a phone.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.devices import TOOLS
from service.errors import DeviceFull, DeviceHot, DeviceHung, DeviceLost, DeviceUnauthorized, EdgeKilnError
from service.ledger import claims, tools
from service.settings import Settings
from workers.catalog import MEASURE_PHONE, PREPARE_PHONE
from workers.devices.adb import Adb
from workers.devices.smoke import NEEDED_FILES
from workers.devices.traces import close_runs
from workers.keeper import LeaseKeeper
from workers.runner import Runner
from workers.sandbox import ChildResult
from workers.transfer import Transfer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Seat:
    """A phone that is attached here."""

    device_id: str
    #: adb's serial number of the connection in use.
    serial: str
    record: Mapping[str, Any]


def open_adb(settings: Settings) -> Adb:
    """Return the adb server that a device worker follows."""
    return Adb(settings.adb_host, settings.adb_port, settings.device_answer_s)


#: Codes of what is the phone's own, whatever was measured on it; from a child, an error has nothing else of its class.
PHONE_FAULTS = frozenset(error.code for error in (DeviceLost, DeviceHung, DeviceUnauthorized, DeviceFull, DeviceHot))


@dataclass(frozen=True)
class PhoneOutcome:
    """How a run on a phone ended."""

    has_succeeded: bool
    #: Code of how the phone failed; requests that no tool can meet, models that crash and cancelled runs are not its
    #: fault.
    fault: str | None


class PhoneRunner(Runner):
    """Runs steps on phones for one device worker."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        #: Step -> the phone it runs on.
        self._seats: dict[str, Seat] = {}
        #: Those of them whose phone failed, whoever asked for what, and how.
        self._let_down: dict[str, str] = {}

    def run_on(self, seat: Seat) -> PhoneOutcome | None:
        """Claim and run one step on a phone; return how it ended, or None when there was none."""
        if self._shutdown.is_set():
            return None
        claim = claims.claim_for_device(self._database, self._worker_id, seat.device_id, self.policy)
        if claim is None:
            return None
        self._seats[claim.step_id] = seat
        self._count(claim.resource_class, 1)
        try:
            outcome = self._perform(claim)
            return PhoneOutcome(outcome == "succeeded", self._let_down.get(claim.step_id))
        finally:
            self._let_down.pop(claim.step_id, None)
            del self._seats[claim.step_id]

    def _run_child(self, claim: claims.Claim, step_dir: Path, transfer: Transfer, keeper: LeaseKeeper) -> ChildResult:
        seat = self._seats[claim.step_id]
        inputs = transfer.place_inputs(step_dir / "inputs")
        tool = tools.find_tool(self._database, TOOLS[claim.params["format"]], seat.record["abis"])
        inputs["tool"] = transfer.place_files(step_dir / "inputs" / "tool", tool.files)
        inputs |= self._place_answers(claim, step_dir / "inputs" / "answers", transfer)
        params = {**self._params(claim), "phone": self._describe(claim, seat, tool)}
        try:
            result = self._start_child(claim, PREPARE_PHONE, params, inputs, step_dir / "prepare", keeper)
            if result.error is None and result.stopped is None:
                claims.pin_attempt(self._database, claim)
                result = self._start_child(claim, MEASURE_PHONE, params, inputs, step_dir, keeper)
            code = result.error.to_json()["code"] if result.error else None
            if code in PHONE_FAULTS:
                self._let_down[claim.step_id] = code
            return result
        finally:
            self._leave(seat)

    def _place_answers(self, claim: claims.Claim, folder: Path, transfer: Transfer) -> dict[str, Path]:
        """Bring what the host's graph answered, where the phone is asked the same: three small files of two steps."""
        suppliers = [claim.inputs[name] for name in ("reference", "graph") if name in claim.inputs]
        files = {output.name: output.digest for supplier in suppliers for output in supplier.outputs}
        wanted = {name: files[name] for name in NEEDED_FILES if name in files}
        if not claim.params.get("smoke_prompts") or len(wanted) < len(NEEDED_FILES):
            return {}
        return {"answers": transfer.place_files(folder, wanted)}

    def _describe(self, claim: claims.Claim, seat: Seat, tool: tools.ToolVersion) -> dict[str, Any]:
        """What only this worker knows of the phone; never enters a key."""
        return {
            "adb_host": self._settings.adb_host,
            "adb_port": self._settings.adb_port,
            "answer_s": self._settings.device_answer_s,
            "serial": seat.serial,
            "record": dict(seat.record),
            # The fencing token is in the name: whoever comes later takes away what an earlier one left.
            "run": f"{claim.step_id}-{claim.token}",
            "cool_down_s": self._settings.cool_down_s,
            "process_deadline_s": self._settings.device_process_s,
            "tool": tool.to_json(),
            "logit_range": _find_logit_range(claim),
        }

    def _leave(self, seat: Seat) -> None:
        """Take away what is ours; where the phone does not answer, whoever sees it next does."""
        try:
            close_runs(open_adb(self._settings).phone(seat.serial))
        except EdgeKilnError as error:
            log.warning("%s could not be cleaned now: %s", seat.device_id, error)


def _find_logit_range(claim: claims.Claim) -> float | None:
    graph = claim.inputs.get("graph")
    return None if graph is None else (graph.figures.get("parity") or {}).get("logit_range")
