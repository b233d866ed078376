"""Claim, inputs, child process, outputs, fenced finish: the only orchestration.

    1. claim the most urgent due step of a class
    2. copy its inputs from the store, checking every digest
    3. run its function in a child, while a keeper holds the lease
    4. upload what it made and its log
    5. finish, fail or give back the step under the claim's token

Called by `workers.tasks` from several threads at once. Owns the step folders below its worker's
work folder.
"""

from __future__ import annotations

import errno
import logging
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy.exc import InterfaceError, OperationalError

from service.errors import (
    DiskFull,
    EdgeKilnError,
    LeaseLost,
    LedgerBusy,
    MemoryInsufficient,
    RemoteError,
    ToolchainChanged,
    describe_bug,
)
from service.ledger import claims, fleet, results
from service.ledger.blobs import Reprieves, commit_uploaded
from service.ledger.database import Database
from service.ledger.keys import Toolchain, digest_json
from service.process_log import bound
from service.settings import Settings
from service.storage import ObjectStore
from workers.catalog import CATALOG
from workers.fetch.partial_downloads import prepare_folder
from workers.keeper import LeaseKeeper
from workers.live_log import LiveLog
from workers.metrics import Outcome, record_attempt, record_memory
from workers.publish import publish
from workers.sandbox import ChildResult, Limits, Sandbox, StopReason
from workers.transfer import Transfer

log = logging.getLogger(__name__)

#: The ledger does not answer, or not in time, or its disk is full. Not what a wrong statement raises: that is a bug.
_LEDGER_AWAY = (OperationalError, InterfaceError, LedgerBusy)
#: Progress is written to the ledger at most this often.
_PROGRESS_S = 1.0
#: Between two tries to end a step while the ledger is away.
_LEDGER_PAUSE_S = 1.0


class Runner:
    """Runs steps for one worker process."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        store: ObjectStore,
        sandbox: Sandbox,
        worker_id: str,
        toolchain: Toolchain,
        work_dir: Path,
        *,
        inputs_are_read_only: bool = False,
    ) -> None:
        """`inputs_are_read_only`: this host keeps children from writing to their inputs, so that they need no copy."""
        self._settings = settings
        self._database = database
        self._store = store
        self._sandbox = sandbox
        self._worker_id = worker_id
        self._toolchain = toolchain
        self._work_dir = work_dir
        self._inputs_are_read_only = inputs_are_read_only
        # The host that measures chooses the threads: it may have more or fewer cores than this one.
        self._benchmark = {"processes": settings.benchmark_processes}
        self._shutdown = threading.Event()
        self.policy = claims.LeasePolicy(
            lease_s=settings.lease_s,
            benchmark_patience_s=settings.benchmark_patience_s,
            max_failures=settings.max_failures,
            max_losses=settings.max_losses,
            retry_pause_s=settings.retry_pause_s,
        )

    def shut_down(self) -> None:
        """Stop claiming; running children are killed and their steps given back at once."""
        self._shutdown.set()

    def run_next(self, resource_class: str) -> bool:
        """Claim and run one step of a class; return whether there was one."""
        if self._shutdown.is_set():
            return False
        claim = claims.claim_next(self._database, self._worker_id, resource_class, self.policy)
        if claim is None:
            return False
        started = time.monotonic()
        outcome: Outcome = "lost"
        try:
            with bound(step=claim.step_id, kind=claim.kind, attempt=claim.token, job=claim.job_id):
                log.info("running")
                outcome = self._run(claim)
        finally:
            record_attempt(claim.kind, outcome, time.monotonic() - started)
            # A slot, or the whole host, is free again: whoever found it taken must be woken.
            self._database.poke(claims.due_classes(self._database))
        return True

    def _run(self, claim: claims.Claim) -> Outcome:
        """Perform a claimed step; return how the attempt ended."""
        step_dir = self._work_dir / f"{claim.step_id}-{claim.token}"
        usage = results.Usage()
        output_dir = step_dir
        try:
            with LeaseKeeper(self._settings, self._database, claim) as keeper:
                transfer = Transfer(
                    self._database,
                    self._store,
                    claim,
                    keeper,
                    self._shutdown,
                    inputs_are_read_only=self._inputs_are_read_only,
                )
                try:
                    self._check_toolchain(claim)
                    self._check_memory(claim)
                    if claim.kind == "publish":
                        figures = publish(self._database, self._store, claim, self._toolchain)
                        success = results.Success(figures)
                    else:
                        result = self._run_child(claim, step_dir, transfer, keeper)
                        usage = self._measure(result)
                        if result.stopped is not None:
                            return self._end_stopped(claim, result.stopped, result, usage, transfer)
                        if result.error is not None:
                            usage = self._add_log(usage, result, transfer)
                            raise result.error
                        record_memory(claim.kind, claim.predicted_peak_anon_bytes, usage.peak_anon_bytes)
                        output_dir = result.output_dir
                        outputs = transfer.store_outputs(output_dir)
                        usage = self._add_log(usage, result, transfer)
                        success = results.Success(result.figures or {}, outputs, usage)
                    self._finish(claim, success, output_dir, transfer, keeper)
                    log.info("finished")
                    if claim.kind == "fetch":
                        shutil.rmtree(self._download_dir(claim), ignore_errors=True)
                    return "succeeded"
                except (LeaseLost, *_LEDGER_AWAY):
                    raise
                except Exception as error:
                    return self._end_badly(claim, error, usage, step_dir)
        except LeaseLost:
            log.warning("lost; nothing was written")
        except _LEDGER_AWAY as error:
            # No fault of the step: when its lease has run out it is taken up again.
            log.warning("cannot reach the ledger to end the step: %s", error)
        finally:
            shutil.rmtree(step_dir, ignore_errors=True)
        return "lost"

    def _check_toolchain(self, claim: claims.Claim) -> None:
        is_current = (claim.toolchain_id, claim.revision) == (
            self._toolchain.id,
            self._toolchain.revisions.get(claim.kind, ""),
        )
        if claim.revision and not is_current:
            raise ToolchainChanged(
                f"This {claim.kind} step was planned for other tool versions than this worker has. "
                "Retry the job to plan it anew; finished work is kept."
            )

    def _check_memory(self, claim: claims.Claim) -> None:
        """Refuse what only a larger worker could do, when there is none: the ledger hands it out for that."""
        predicted_bytes, limit_bytes = claim.predicted_peak_anon_bytes, self._settings.memory_limit_bytes
        if predicted_bytes is not None and predicted_bytes > limit_bytes:
            largest_bytes = fleet.find_largest_memory(self._database, claim.resource_class)
            raise MemoryInsufficient.from_prediction(claim.kind, predicted_bytes, largest_bytes or limit_bytes)

    def _run_child(self, claim: claims.Claim, step_dir: Path, transfer: Transfer, keeper: LeaseKeeper) -> ChildResult:
        code = CATALOG[claim.kind]
        inputs = transfer.place_inputs(step_dir / "inputs")
        if claim.kind in ("resolve", "fetch") and self._settings.convert_slots:
            # A checkpoint will be converted, perhaps here: import the converter meanwhile.
            self._sandbox.warm("convert")
        if code.is_pinned:
            claims.pin_attempt(self._database, claim)
        return self._sandbox.run(
            code.target,
            self._params(claim),
            inputs,
            step_dir,
            pool=code.pool,
            network=code.network,
            limits=Limits(
                deadline_s=self._settings.deadline_s(claim.resource_class),
                memory_bytes=self._settings.memory_limit_bytes,
            ),
            on_progress=self._reporter(claim, keeper),
            should_stop=self._watcher(claim, keeper, step_dir / "log.txt"),
            credential=(self._settings.hub_token or None) if code.network else None,
            writable=[self._download_dir(claim)] if claim.kind == "fetch" else (),
            niceness=code.niceness,
            poll_s=self._settings.cancel_poll_s / 2,
        )

    def _params(self, claim: claims.Claim) -> dict[str, Any]:
        """The step's parameters, and what only this host knows; the latter never enters a key."""
        params = dict(claim.params)
        if claim.kind == "fetch":
            downloads = self._download_dir(claim)
            params["cache_dir"] = str(prepare_folder(downloads.parent, downloads.name))
        if params.get("source", {}).get("kind") == "hub" and self._settings.hub_endpoint:
            params["source"] = {"endpoint": self._settings.hub_endpoint, **params["source"]}
        return params

    def _download_dir(self, claim: claims.Claim) -> Path:
        """Where partial downloads wait for the next attempt; no two tenants share one, though keys may be equal."""
        return self._settings.cache_dir / "downloads" / digest_json([claim.tenant_id, claim.key])

    def _watcher(self, claim: claims.Claim, keeper: LeaseKeeper, log_path: Path) -> Callable[[], StopReason | None]:
        """Return what says whether the run must stop, and meanwhile shows what it prints."""
        live_log = LiveLog(log_path)

        def watch() -> StopReason | None:
            if keeper.is_lost:
                return StopReason.LEASE_LOST
            if self._shutdown.is_set():
                return StopReason.SHUTDOWN
            try:
                if news := live_log.read_news():
                    claims.report_log(self._database, claim, *news)
            except (*_LEDGER_AWAY, OSError) as error:
                # Nothing depends on it: the whole log is stored at the end.
                log.warning("cannot show the log: %s", error)
            return None

        return watch

    def _reporter(self, claim: claims.Claim, keeper: LeaseKeeper) -> Callable[[str, float | None], None]:
        last_s = 0.0

        def report(message: str, fraction: float | None) -> None:
            nonlocal last_s
            if time.monotonic() - last_s < _PROGRESS_S or keeper.is_lost:
                return
            last_s = time.monotonic()
            try:
                claims.report_progress(self._database, claim, message, fraction)
            except _LEDGER_AWAY as error:
                # The keeper judges how long the step may go on without the ledger.
                log.warning("cannot report progress: %s", error)

        return report

    def _measure(self, result: ChildResult) -> results.Usage:
        if result.error is not None:
            # Half an output is of no use, and its log may find the disk full because of it.
            shutil.rmtree(result.output_dir, ignore_errors=True)
        return results.Usage(
            duration_s=result.duration_s,
            peak_rss_bytes=result.peak_rss_bytes,
            peak_anon_bytes=result.peak_anon_bytes,
            isolation=result.isolation,
        )

    def _add_log(self, usage: results.Usage, result: ChildResult, transfer: Transfer) -> results.Usage:
        """Store the child's log; one that cannot be stored is missed, but changes nothing of how the step ended."""
        try:
            if not result.log_path.exists() or result.log_path.stat().st_size == 0:
                return usage
            return replace(usage, log=transfer.store_file(result.log_path, "log.txt"))
        except (EdgeKilnError, OSError) as error:
            log.warning("cannot store the log %s: %s", result.log_path, error)
            return usage

    def _end_stopped(
        self, claim: claims.Claim, reason: StopReason, result: ChildResult, usage: results.Usage, transfer: Transfer
    ) -> Outcome:
        """Deal with a child that this worker stopped."""
        outcome: Outcome = "stopped"
        if reason is StopReason.SHUTDOWN:
            outcome = self._give_back(claim)
        else:
            log.info("stopped: cancelled or taken over")
        results.record_usage(self._database, claim, self._add_log(usage, result, transfer))
        return outcome

    def _give_back(self, claim: claims.Claim) -> Outcome:
        claims.release_step(self._database, claim)
        log.info("gave back")
        return "given_back"

    def _finish(
        self, claim: claims.Claim, success: results.Success, output_dir: Path, transfer: Transfer, keeper: LeaseKeeper
    ) -> None:
        """Commit what a step yields, once the ledger is there, while the lease holds.

        Outputs are uploaded again where the sweep was about to delete them.
        """

        def commit(reprieves: Reprieves) -> None:
            armed = replace(success, reprieves=reprieves)
            results.finish_step(self._database, claim, armed, self._toolchain, self._benchmark)

        while True:
            keeper.check()
            try:
                again = partial(transfer.store_again, output_dir, success.outputs)
                return commit_uploaded(self._database, commit, again)
            except _LEDGER_AWAY as error:
                if self._shutdown.is_set():
                    raise
                log.warning("cannot reach the ledger to finish yet: %s", error)
            self._shutdown.wait(_LEDGER_PAUSE_S)

    def _end_badly(self, claim: claims.Claim, error: Exception, usage: results.Usage, step_dir: Path) -> Outcome:
        """Record a failure; what may be due to this worker's shutdown gives the step back instead."""
        failure = _name_failure(error)
        if isinstance(failure, RemoteError) and failure is not error:
            log.exception("bug")
        if self._shutdown.is_set() and (failure is not error or failure.to_json()["retryable"]):
            return self._give_back(claim)
        return self._fail(claim, failure, usage, step_dir)

    def _fail(self, claim: claims.Claim, error: EdgeKilnError, usage: results.Usage, step_dir: Path) -> Outcome:
        # The ledger may be on the disk that the step has filled: what the step holds goes before its failure is told.
        shutil.rmtree(step_dir, ignore_errors=True)
        document = error.to_json()
        log.warning("failed: %s: %s", document["code"], document["message"])
        if not results.fail_step(self._database, claim, error, usage, self.policy):
            return "failed"
        log.info("will be tried again")
        return "retried"


def _name_failure(error: Exception) -> EdgeKilnError:
    """Return what ended a step as an error of ours."""
    if isinstance(error, EdgeKilnError):
        return error
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        place = error.filename or "the worker's folder"
        return DiskFull(f"No space left for {place}. Free some there; the step is tried again.", path=str(place))
    return RemoteError(describe_bug(error))
