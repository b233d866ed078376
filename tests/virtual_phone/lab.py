"""A laboratory: a ledger, a store, jobs whose benchmarks are due, and device workers on virtual phones.

What comes before a benchmark is played; from the claim on everything is real, but for the tool: a script that prints a
report at once, so that a fault costs a second. Called by the tests of device workers.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import update

from service.ledger import devices, tools, uploads
from service.ledger.blobs import OutputFile
from service.ledger.clock import now
from service.ledger.database import Database
from service.ledger.tables import Attempt, Step, Worker
from service.settings import Settings
from tests.api_world import StoredPlay, make_world
from tests.kiln import IMPATIENT, clean_environment, kill_all, read_rows, wait_for
from tests.ledger_play import outputs_of
from tests.virtual_phone.bench import AdbServer, AttachedPhone, adb_server, virtual_phone
from workers.device_worker import DeviceWorker

TENANT = "default"
#: Prints what the real one does. It says that it began, and waits while the phone is held.
_TOOL = """\
#!/bin/sh
touch "$PHONE_ROOT/began"
while [ -e "$PHONE_ROOT/hold" ]; do sleep 0.05; done
[ ! -e "$PHONE_ROOT/fail" ] || exit 9
cat <<'END'
BenchmarkInfo:
  Init Phases (1):
    - Init Total: 20.00 ms
--------------------------------------------------
  Time to first token: 0.10 s
--------------------------------------------------
  Prefill Turns (Total 1 turns):
    Prefill Turn 1: Processed 128 tokens in 100.0ms duration.
      Prefill Speed: 1280.00 tokens/sec.
  Decode Turns (Total 1 turns):
    Decode Turn 1: Processed 128 tokens in 1000.0ms duration.
      Decode Speed: 128.00 tokens/sec.
--------------------------------------------------
END
"""
_OPTIONS = {
    **IMPATIENT,
    # What failed waits until the test says that it is time.
    "retry_pause_s": 3600,
    "device_poll_s": 0.1,
    "boot_s": 2,
    "cool_down_s": 0,
}


class Lab:
    """One installation below `folder`."""

    def __init__(self, folder: Path, adb: AdbServer, database: Database, play: StoredPlay, **settings: Any) -> None:
        self.folder = folder
        self.adb = adb
        self.database = database
        self.play = play
        self.options = {**_OPTIONS, "data_dir": folder / "data", "adb_port": adb.port, **settings}
        self._count = 0

    def submit(self, phone: AttachedPhone) -> str:
        """Submit a job whose benchmark is due on a phone; return the benchmark's step."""
        self._count += 1
        job_id = self.play.submit(
            f"/models/{self._count}",
            recipes=["none"],
            formats=["litertlm"],
            devices=[f"serial={phone.hardware_serial}"],
        )
        while (claim := self.play.claim("fetch", "convert", "light")) is not None:
            outputs = outputs_of(claim)
            if claim.kind == "bundle":
                outputs = [self.play.put("model.litertlm", b"a model")]
            self.play.finish(claim, outputs if claim.kind == "bundle" else None)
        (step_id,) = [step["id"] for step in self.play.job(job_id)["steps"] if step["kind"] == "benchmark"]
        return str(step_id)

    def step(self, step_id: str) -> dict[str, Any]:
        """Return a step's row."""
        (row,) = read_rows(self.database, Step, Step.id == step_id)
        return row

    def attempts(self, step_id: str) -> list[tuple[str, str | None]]:
        """Return state and error code of the attempts at a step, oldest first."""
        rows = read_rows(self.database, Attempt, Attempt.step_id == step_id)
        return [(row["state"], (row["error"] or {}).get("code")) for row in rows]

    def wait_for_attempt(self, step_id: str, state: str, code: str) -> None:
        """Wait until the newest attempt at a step has ended so."""
        wait_for(lambda: self.attempts(step_id)[-1:] == [(state, code)], f"{step_id} {state}: {self.attempts(step_id)}")

    def let_time_pass(self, step_id: str) -> None:
        """Let a step that waits be due now."""
        due = update(Step).where(Step.id == step_id).values(run_after=now())
        self.database.write(lambda tx: tx.connection.execute(due))

    def silence(self, worker_id: str) -> None:
        """Let a worker not have been heard of for long."""
        silent = update(Worker).where(Worker.id == worker_id).values(heartbeat_at=now(-3600))
        self.database.write(lambda tx: tx.connection.execute(silent))

    def ended(self, step_id: str) -> dict[str, Any]:
        """Wait until a step has ended; return its row."""
        wait_for(
            lambda: self.step(step_id)["finalized_at"] is not None, f"{step_id} has ended: {self.attempts(step_id)}"
        )
        return self.step(step_id)

    def devices(self) -> dict[str, dict[str, Any]]:
        """Return the devices by id, without hosts."""
        return {each["id"]: each for each in devices.list_devices(self.database) if each["kind"] != "host"}

    def state(self, device_id: str) -> str | None:
        """Return a device's state."""
        found = self.devices().get(device_id)
        return str(found["state"]) if found else None

    def wait_for_state(self, device_id: str, state: str) -> dict[str, Any]:
        """Wait until a device is in a state; return it."""
        wait_for(lambda: self.state(device_id) == state, f"{device_id} is {state}: {self.devices().get(device_id)}")
        return self.devices()[device_id]

    def begin(self, phone: AttachedPhone) -> str:
        """Submit a benchmark and return its step once its tool runs; it does so until `phone.let_go`."""
        phone.hold()
        step_id = self.submit(phone)
        wait_for(phone.has_begun, f"the tool of {step_id} runs: {self.attempts(step_id)}")
        return step_id

    def detach(self, phone: AttachedPhone) -> None:
        """Disconnect a phone without work, and wait until its worker knows."""

        def is_absent() -> bool:
            self.adb.command("disconnect", phone.serial)
            return self.state(phone.hardware_serial) == "absent"

        wait_for(is_absent, f"{phone.hardware_serial} is absent")

    @contextlib.contextmanager
    def phone(self, name: str, **properties: str) -> Iterator[AttachedPhone]:
        """Yield an attached phone."""
        with virtual_phone(self.adb, self.folder / "phones" / name, **properties) as attached:
            yield attached

    @contextlib.contextmanager
    def worker(self, **settings: Any) -> Iterator[DeviceWorker]:
        """Yield a device worker that runs in a thread."""
        worker = DeviceWorker(Settings(**{**self.options, **settings}))
        thread = threading.Thread(target=worker.run)
        thread.start()
        try:
            yield worker
        finally:
            worker.shut_down()
            thread.join()

    @contextlib.contextmanager
    def worker_process(self) -> Iterator[subprocess.Popen[bytes]]:
        """Yield a device worker that is a process, as operators start it; whatever becomes of it."""
        environment = clean_environment(self.folder / "process", self.options)
        with (self.folder / "worker.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "workers.device_worker"], env=environment, stdout=log, stderr=log
            )
        try:
            yield process
        finally:
            kill_all(self.folder / "process")
            process.wait()


@contextlib.contextmanager
def laboratory(folder: Path, **settings: Any) -> Iterator[Lab]:
    """Yield a laboratory with a tool for virtual phones."""
    with make_world(folder / "world") as world, adb_server(folder / "adb") as adb:
        options = {"data_dir": world.settings.data_dir, **settings}
        play = world.play()
        tool: OutputFile = play.put("litert_lm_advanced_main", _TOOL.encode())
        uploads.enter_upload(world.database, TENANT, tool, tool.name)
        tools.add_tool(world.database, TENANT, tool.name, "1.2.3", "x86_64", {tool.name: tool.digest})
        yield Lab(folder, adb, world.database, play, **options)
