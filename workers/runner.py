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
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from service.errors import (
    DiskFull,
    EdgeKilnError,
    LeaseLost,
    MemoryInsufficient,
    RemoteError,
    ToolchainChanged,
    describe_bug,
)
from service.host_cache import download_folder, make_download_folder
from service.ledger import claims, fleet, results
from service.ledger.blobs import Reprieves, commit_uploaded
from service.ledger.database import LEDGER_AWAY, Database
from service.ledger.graph import ReusedStep
from service.ledger.history import find_regressions
from service.ledger.keys import Toolchain, digest_json
from service.process_log import bound
from service.settings import Settings
from service.signing import Signer
from service.storage import ObjectStore
from service.tracing import Span, attempt_span, span
from workers.blob_cache import BlobCache
from workers.catalog import CATALOG, StepCode
from workers.keeper import LeaseKeeper
from workers.live_log import LiveLog
from workers.metrics import Outcome, record_attempt, record_memory, record_reuse
from workers.publish import publish
from workers.sandbox import ChildResult, Limits, Sandbox, StopReason
from workers.source_access import describe_access, find_credential
from workers.transfer import Transfer
from workers.uploads import adopt_uploads, is_uploaded

log = logging.getLogger(__name__)

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
        self._blobs = BlobCache(settings.cache_dir, store, settings.max_cache_bytes)
        self._sandbox = sandbox
        self._worker_id = worker_id
        self._toolchain = toolchain
        self._work_dir = work_dir
        self._inputs_are_read_only = inputs_are_read_only
        # The host that measures chooses the threads: it may have more or fewer cores than this one.
        self._benchmark = {"processes": settings.benchmark_processes}
        self._signer = Signer(Path(settings.signing_key_file)) if settings.signing_key_file else None
        self._shutdown = threading.Event()
        self._slots = settings.slots()
        #: How many steps of a class run here now.
        self._running: Counter[str] = Counter()
        self._count_lock = threading.Lock()
        #: One claim at a time: a host's claims wait for each other in the ledger, each with a connection.
        self._claim_lock = threading.Lock()
        #: Class -> when the last claim began that found nothing.
        self._empty_at: dict[str, float] = {}
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
        claim = self._claim(resource_class, time.monotonic())
        if claim is None:
            return False
        self._perform(claim)
        return True

    def _perform(self, claim: claims.Claim) -> Outcome:
        """Run a claimed step to its end, whatever that is; return how its attempt ended."""
        started = time.monotonic()
        outcome: Outcome = "lost"
        try:
            with (
                bound(step=claim.step_id, kind=claim.kind, attempt=claim.token, job=claim.job_id),
                attempt_span(f"step {claim.kind}", claim.traceparents.items(), **_describe(claim)) as attempt,
            ):
                log.info("running")
                outcome = self._run(claim, attempt)
                attempt.note(outcome=outcome)
                if outcome in ("failed", "retried", "lost"):
                    attempt.fail(outcome)
        finally:
            record_attempt(claim.kind, outcome, time.monotonic() - started)
            self._count(claim.resource_class, -1)
            self._wake_others()
        return outcome

    def _claim(self, resource_class: str, woken_at: float) -> claims.Claim | None:
        """Claim a step, unless it is known here that there is none for this message, or no slot for it."""
        with self._claim_lock:
            # What becomes due while all slots are taken is poked when one of them is free again.
            is_full = self._running[resource_class] >= self._slots.get(resource_class, 0)
            # Of several messages that came together, one finds that nothing is left.
            is_empty = self._empty_at.get(resource_class, woken_at) > woken_at
            if is_full or is_empty or self._shutdown.is_set():
                return None
            begun = time.monotonic()
            try:
                claim = claims.claim_next(self._database, self._worker_id, resource_class, self.policy)
            except LEDGER_AWAY as error:
                log.warning("cannot reach the ledger to claim a step (the sweep will wake us): %s", error)
                return None
            if claim is None:
                self._empty_at[resource_class] = begun
            else:
                self._count(resource_class, 1)
            return claim

    def _wake_others(self) -> None:
        """Wake whoever found a slot, or the whole host, taken: it is free again."""
        try:
            self._database.poke(claims.due_classes(self._database))
        except LEDGER_AWAY as error:
            log.warning("cannot reach the ledger to wake others (the sweep will): %s", error)

    def _count(self, resource_class: str, change: int) -> None:
        with self._count_lock:
            self._running[resource_class] += change

    def _run(self, claim: claims.Claim, attempt: Span) -> Outcome:
        """Perform a claimed step; return how the attempt ended."""
        step_dir = self._work_dir / f"{claim.step_id}-{claim.token}"
        usage = results.Usage()
        output_dir = step_dir
        try:
            with LeaseKeeper(self._settings, self._database, claim) as keeper:
                transfer = Transfer(
                    self._database,
                    self._store,
                    self._blobs,
                    claim,
                    keeper,
                    self._shutdown,
                    inputs_are_read_only=self._inputs_are_read_only,
                )
                try:
                    self._check_toolchain(claim)
                    self._check_memory(claim)
                    if claim.kind == "publish":
                        with span("publish"):
                            figures = publish(self._database, self._store, claim, self._toolchain, self._signer)
                        success = results.Success(figures)
                    elif is_uploaded(claim):
                        success = adopt_uploads(self._database, self._store, claim)
                    else:
                        result = self._run_child(claim, step_dir, transfer, keeper)
                        usage = self._measure(result)
                        attempt.note(peak_anon_bytes=usage.peak_anon_bytes, peak_rss_bytes=usage.peak_rss_bytes)
                        if result.stopped is not None:
                            return self._end_stopped(claim, result.stopped, result, usage, transfer)
                        if result.error is not None:
                            usage = self._add_log(usage, result, transfer)
                            raise result.error
                        record_memory(claim.kind, claim.predicted_peak_anon_bytes, usage.peak_anon_bytes)
                        output_dir = result.output_dir
                        with span("upload outputs") as uploading:
                            outputs = transfer.store_outputs(output_dir)
                            usage = self._add_log(usage, result, transfer)
                            uploading.note(bytes=transfer.written_bytes)
                        attempt.note(read_bytes=transfer.read_bytes, written_bytes=transfer.written_bytes)
                        found = result.figures or {}
                        regressions = self._find_regressions(claim, found)
                        success = results.Success(found, outputs, usage, regressions=regressions)
                    with span("commit"):
                        reused = self._finish(claim, success, output_dir, transfer, keeper)
                    for step in reused:
                        record_reuse(step.kind)
                        with span(f"step {step.kind}", step_id=step.id, step_key=step.key, reused=True):
                            pass
                    log.info("finished")
                    if claim.kind == "fetch":
                        shutil.rmtree(self._download_dir(claim), ignore_errors=True)
                    return "succeeded"
                except (LeaseLost, *LEDGER_AWAY):
                    raise
                except Exception as error:
                    return self._end_badly(claim, error, usage, step_dir)
        except LeaseLost:
            log.warning("lost; nothing was written")
        except LEDGER_AWAY as error:
            # No fault of the step: when its lease has run out it is taken up again.
            log.warning("cannot reach the ledger to end the step: %s", error)
        finally:
            shutil.rmtree(step_dir, ignore_errors=True)
        return "lost"

    def _find_regressions(self, claim: claims.Claim, figures: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
        """Compare a measurement with the one before it; a measurement that was made is never lost for it."""
        try:
            return find_regressions(self._database, claim, figures, self._settings.regression_share)
        except Exception:
            log.exception("a benchmark cannot be compared with the one before it")
            return ()

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
        with span("fetch inputs") as fetching:
            inputs = transfer.place_inputs(step_dir / "inputs")
            fetching.note(bytes=transfer.read_bytes)
        if claim.kind in ("resolve", "fetch") and self._settings.convert_slots:
            # A checkpoint will be converted, perhaps here: import the converter meanwhile.
            self._sandbox.warm("convert")
        if CATALOG[claim.kind].is_pinned:
            claims.pin_attempt(self._database, claim)
        return self._start_child(claim, CATALOG[claim.kind], self._params(claim), inputs, step_dir, keeper)

    def _start_child(
        self,
        claim: claims.Claim,
        code: StepCode,
        params: dict[str, Any],
        inputs: dict[str, Path],
        step_dir: Path,
        keeper: LeaseKeeper,
    ) -> ChildResult:
        """Run a step's code in a child until all its processes are gone."""
        show = partial(claims.report_log, self._database, claim)
        with span("child", pool=code.pool) as running, LiveLog(step_dir / "log.txt", show):
            result = self._sandbox.run(
                code.target,
                params,
                inputs,
                step_dir,
                pool=code.pool,
                network=code.network,
                limits=Limits(
                    # The arms of a benchmark take turns: each has the time of one.
                    deadline_s=self._settings.deadline_s(claim.resource_class) * len(claim.params.get("arms") or [{}]),
                    memory_bytes=self._settings.memory_limit_bytes,
                ),
                on_progress=self._reporter(claim, keeper),
                should_stop=self._watcher(keeper),
                credential=find_credential(self._settings, self._database, claim) if code.gets_credential else None,
                writable=[self._download_dir(claim)] if claim.kind == "fetch" else (),
                niceness=code.niceness,
                poll_s=self._settings.cancel_poll_s / 2,
            )
            running.note(
                peak_rss_bytes=result.peak_rss_bytes, peak_anon_bytes=result.peak_anon_bytes, isolation=result.isolation
            )
            if result.error is not None:
                running.fail(result.error.code)
        return result

    def _params(self, claim: claims.Claim) -> dict[str, Any]:
        """The step's parameters, and what only this host knows; the latter never enters a key."""
        params = dict(claim.params)
        if claim.kind == "fetch":
            params["cache_dir"] = str(make_download_folder(self._settings.cache_dir, _download_key(claim)))
        if CATALOG[claim.kind].network:
            params |= describe_access(self._settings, params["source"])
        return params

    def _download_dir(self, claim: claims.Claim) -> Path:
        return download_folder(self._settings.cache_dir, _download_key(claim))

    def _watcher(self, keeper: LeaseKeeper) -> Callable[[], StopReason | None]:
        """Return what says whether the run must stop; it never waits."""

        def watch() -> StopReason | None:
            if keeper.is_lost:
                return StopReason.LEASE_LOST
            return StopReason.SHUTDOWN if self._shutdown.is_set() else None

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
            except LEDGER_AWAY as error:
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
    ) -> Sequence[ReusedStep]:
        """Commit what a step yields, once the ledger is there, while the lease holds; return what it found done.

        Outputs are uploaded again where the sweep was about to delete them.
        """

        def commit(reprieves: Reprieves) -> Sequence[ReusedStep]:
            armed = replace(success, reprieves=reprieves)
            return results.finish_step(self._database, claim, armed, self._toolchain, self._benchmark)

        while True:
            keeper.check()
            try:
                again = partial(transfer.store_again, output_dir, success.outputs)
                return commit_uploaded(self._database, commit, again)
            except LEDGER_AWAY as error:
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


def _download_key(claim: claims.Claim) -> str:
    """Name the folder of a fetch's partial downloads; no two tenants share one, though their keys may be equal."""
    return digest_json([claim.tenant_id, claim.key])


def _describe(claim: claims.Claim) -> dict[str, Any]:
    """Return what a trace says of an attempt; parameters and errors' words are the tenant's and stay here."""
    return {
        "step_id": claim.step_id,
        "step_kind": claim.kind,
        "step_key": claim.key,
        "attempt": claim.token,
        "job_id": claim.job_id or next(iter(claim.traceparents), None),
        "resource_class": claim.resource_class,
        "worker_id": claim.worker_id,
        "reused": False,
        "predicted_peak_anon_bytes": claim.predicted_peak_anon_bytes,
    }


def _name_failure(error: Exception) -> EdgeKilnError:
    """Return what ended a step as an error of ours."""
    if isinstance(error, EdgeKilnError):
        return error
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        place = error.filename or "the worker's folder"
        return DiskFull(f"No space left for {place}. Free some there; the step is tried again.", path=str(place))
    return RemoteError(describe_bug(error))
