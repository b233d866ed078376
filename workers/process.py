"""One worker process: what it is made of, from its start to its end.

Owns registration, the sweep thread and the sandbox's life. Built by `workers.app` when Celery starts a worker;
tests build one without Celery.
"""

from __future__ import annotations

import hashlib
import logging
import platform
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

from sqlalchemy.exc import SQLAlchemyError

from service.errors import EdgeKilnError
from service.host_cache import trim_cache
from service.ledger import access, claims, devices, fleet, housekeeping, schedules
from service.ledger.database import Database, migrate
from service.ledger.keys import Toolchain
from service.machine import count_memory_bytes, find_usable_cores
from service.queue import PRUNE_S
from service.settings import Settings
from service.sources import admit_source
from service.storage import open_configured_store
from service.sweep import read_retention, sweep_store
from workers.catalog import PRELOADS, read_toolchain
from workers.devices.conditions import describe_host
from workers.runner import Runner
from workers.sandbox import Sandbox, probe_isolation
from workers.work_dir import WorkDir

log = logging.getLogger(__name__)

#: How long the end of a worker waits for a sweep that is under way, whose call to the ledger may hang.
_JOIN_S = 5.0
#: How often a worker looks whether housekeeping is due; one row is read.
_HOUSEKEEPING_LOOK_S = 60.0


def identify_host() -> str:
    """Return a name that is the same for all workers of this host and differs from other hosts'."""
    machine_id = Path("/etc/machine-id")
    suffix = machine_id.read_text().strip()[:8] if machine_id.exists() else ""
    return f"{platform.node()}-{suffix}".strip("-")


def _name_host_device(host_id: str) -> str:
    """Return the id of a host as a device; every tenant sees it, so it does not hold the host's name."""
    return f"host-{hashlib.sha256(host_id.encode()).hexdigest()[:12]}"


class WorkerProcess:
    """Everything a worker process holds; `close` gives running work back."""

    def __init__(
        self,
        settings: Settings,
        poke: Callable[[Iterable[str]], None],
        toolchain: Toolchain | None = None,
        *,
        slots: Mapping[str, int] | None = None,
        runner_type: type[Runner] = Runner,
    ) -> None:
        """`slots`: what it runs at once, of each class (default: as set); `runner_type`: how steps are run."""
        self._settings = settings
        migrate(settings.ledger_url)
        self.database = Database(settings.ledger_url, poke)
        access.ensure_tenant(self.database, access.DEFAULT_TENANT)
        toolchain = toolchain or read_toolchain()
        cores = find_usable_cores()
        isolation = probe_isolation()
        settings.work_dir.mkdir(parents=True, exist_ok=True)
        disk = shutil.disk_usage(settings.work_dir)
        host_id = settings.host_name or identify_host()
        self.worker_id = fleet.register_worker(
            self.database,
            host_id,
            cores=cores,
            memory_bytes=count_memory_bytes(),
            memory_limit_bytes=settings.memory_limit_bytes,
            slots=settings.slots() if slots is None else slots,
            toolchain=toolchain,
            isolation=isolation,
            disk_bytes=disk.total,
            disk_free_bytes=disk.free,
        )
        if (settings.slots() if slots is None else slots).get("device", 0) > 0:
            devices.enter_host(self.database, self.worker_id, _name_host_device(host_id), describe_host())
        self._work_dir = WorkDir(settings.work_dir, self.worker_id)
        self.sandbox = Sandbox(PRELOADS, threads=cores, home_root=self._work_dir.path)
        self.store = open_configured_store(settings)
        self.runner = runner_type(
            settings,
            self.database,
            self.store,
            self.sandbox,
            self.worker_id,
            toolchain,
            self._work_dir.path,
            inputs_are_read_only=isolation["files"] == "landlock",
        )
        self._refusals: schedules.Refusals = {}
        self._closed = threading.Event()
        self._sweeper = threading.Thread(target=self._sweep, name="sweep", daemon=True)
        #: Set when somebody asks for housekeeping, and at the end.
        self._housekeeping = threading.Event()
        self._housekeeper = threading.Thread(target=self._keep_house, name="housekeeping", daemon=True)

    def start(self) -> None:
        """Begin to sweep, and say which worker this is to whoever checks its health."""
        self._sweeper.start()
        self._housekeeper.start()
        if self._settings.worker_file:
            Path(self._settings.worker_file).write_text(f"{self.worker_id}\n")

    def shut_down(self) -> None:
        """Claim nothing more and give running steps back; returns at once."""
        self.runner.shut_down()
        self._closed.set()
        self._housekeeping.set()

    def ask_for_housekeeping(self) -> None:
        """Let this worker's housekeeper look now whether it is time; returns at once."""
        self._housekeeping.set()

    def _keep_house(self) -> None:
        """Do the fleet's housekeeping when it is due and no other worker does, for ever; no step waits for it."""
        while not self._closed.is_set():
            try:
                if housekeeping.take_chore(self.database, "prune", PRUNE_S):
                    self.prune()
            except (SQLAlchemyError, EdgeKilnError) as error:
                log.warning("housekeeping could not reach the ledger: %s", error)
            except Exception:
                log.exception("housekeeping failed; the next round may not")
            self._housekeeping.wait(_HOUSEKEEPING_LOOK_S)
            self._housekeeping.clear()

    def prune(self) -> None:
        """Remove what ledger and store need not keep: old bookkeeping, unused files, remains of unfinished uploads."""
        try:
            self._prune()
        except (SQLAlchemyError, EdgeKilnError) as error:
            log.warning("housekeeping could not be done; the next round will: %s", error)

    def _prune(self) -> None:
        housekeeping.prune(self.database)
        self.store.abort_stale_uploads(older_than_s=self._settings.condemned_s)
        for finding in sweep_store(self.database, self.store, read_retention(self._settings)):
            level = logging.WARNING if finding.fate == "missing" else logging.INFO
            log.log(level, "%s %s (%d bytes): %s", finding.fate, finding.digest, finding.size_bytes, finding.why)

    def fire_schedules(self) -> None:
        """Fire the schedules' ticks that have come."""
        admit = partial(admit_source, settings=self._settings)
        for tick in schedules.fire_due(self.database, admit, self._refusals, max_variants=self._settings.max_variants):
            log.info("schedule %s, tick of %s: %s %s", tick.name, tick.tick_at, tick.outcome, tick.job_id or "")

    def trim_cache(self) -> None:
        """Keep this host's partial downloads and blobs within their bounds."""
        settings = self._settings
        for item, why in trim_cache(
            settings.cache_dir, max_bytes=settings.max_cache_bytes, keep_s=settings.keep_cache_s
        ):
            log.info("deleted %s (%d bytes): %s", item.path.name, item.size_bytes, why)

    def close(self) -> None:
        """End the zygotes and give the connections back."""
        self.shut_down()
        self.sandbox.close()
        if self._sweeper.is_alive():
            self._sweeper.join(_JOIN_S)
        if self._housekeeper.is_alive():
            self._housekeeper.join(_JOIN_S)
        try:
            fleet.end_worker(self.database, self.worker_id)
        except (SQLAlchemyError, EdgeKilnError) as error:
            log.warning("could not tell the ledger that this worker ends: %s", error)
        self.database.close()
        self._work_dir.close()

    def _sweep(self) -> None:
        """Poke whatever is due and fire schedules, for ever: lost messages and lost workers are repaired here."""
        while True:
            try:
                free_bytes = shutil.disk_usage(self._settings.work_dir).free
                fleet.beat_worker(self.database, self.worker_id, free_bytes)
                claims.shorten_leases(self.database, self.runner.policy)
                claims.end_hopeless_steps(self.database, self.runner.policy)
                self.database.poke(claims.due_classes(self.database))
                self.fire_schedules()
                self.trim_cache()
            except (SQLAlchemyError, EdgeKilnError) as error:
                log.warning("sweep could not reach the ledger: %s", error)
            except Exception:
                # Without the sweep this worker would take no lost work up, and pass for dead.
                log.exception("the sweep failed; it goes on")
            if self._closed.wait(self._settings.sweep_s):
                return
