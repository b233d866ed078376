"""The whole exception tree.

Owns every failure that crosses a room's border: a stable `code` (wire format: add, never rename), a
sentence that says what was wrong, where, and what to do, and whether trying again unchanged may help.
Raised everywhere; turned into `application/problem+json` by `service.api`, into attempt rows by
`workers.runner`, into exit codes by `service.cli`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

_GIB = 1024**3


class EdgeKilnError(Exception):
    """Base of every expected failure.

    `message` is one or more full sentences for a person. `details` holds JSON values that name the
    place (file, tensor, figure, threshold) for a program.
    """

    #: Stable identifier; part of the wire format.
    code: ClassVar[str] = "internal_error"
    #: Whether the same work, unchanged, may succeed later.
    retryable: ClassVar[bool] = False
    #: HTTP status when the error reaches a REST client.
    http_status: ClassVar[int] = 500

    def __init__(self, message: str, /, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.details: dict[str, Any] = details

    def to_json(self) -> dict[str, Any]:
        """Return the wire form: `code`, `message`, `retryable`, `details`."""
        return {
            "code": self.code,
            "message": self.message,
            "retryable": self.retryable,
            "details": self.details,
        }

    def to_problem(self) -> dict[str, Any]:
        """Return the error as a problem document (RFC 9457), without an HTTP status."""
        document = self.to_json()
        code = str(document["code"])
        return {
            "type": f"urn:edgekiln:error:{code}",
            "title": code.replace("_", " ").capitalize(),
            "detail": document["message"],
            "code": code,
            "retryable": document["retryable"],
            "details": document["details"],
        }


class RemoteError(EdgeKilnError):
    """A failure that arrived as JSON (from a child process or the API) and keeps its original code."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        super().__init__(str(document.get("message", "no message")), **document.get("details", {}))
        self.document = dict(document)

    def to_json(self) -> dict[str, Any]:
        """Return the document as it arrived."""
        return self.document

    @property
    def remote_code(self) -> str:
        """The code the failure had where it was raised."""
        return str(self.document.get("code", "internal_error"))


# --- what users ask for -------------------------------------------------------------------------


class InvalidRequest(EdgeKilnError):
    """The request can never work as written."""

    code = "invalid_request"
    http_status = 422


class UnknownName(InvalidRequest):
    """A recipe, format, engine or device that does not exist; the message names the nearest one."""

    code = "unknown_name"


class RecipeInvalid(InvalidRequest):
    """A user's own recipe has no usable name, or settings that the quantizer does not take."""

    code = "recipe_invalid"


class RecipeUnfit(InvalidRequest):
    """A recipe that an engine, a format or the checkpoint cannot run; refused before anything is converted."""

    code = "recipe_unfit"


class NotComparable(InvalidRequest):
    """Two measurements cannot be held against each other: unstable, of several kinds of device, or of other work."""

    code = "not_comparable"


class UploadNotFound(InvalidRequest):
    """A request names a digest that its tenant did not upload, or that was swept since."""

    code = "upload_not_found"


class FolderNotAllowed(InvalidRequest):
    """A REST request named a folder outside the operator's source roots."""

    code = "folder_not_allowed"
    http_status = 403


class SourceNotAllowed(InvalidRequest):
    """A host, an address or a bucket that the operator lets nobody read checkpoints from."""

    code = "source_not_allowed"
    http_status = 403


class NotFound(EdgeKilnError):
    """No such thing, or not this tenant's."""

    code = "not_found"
    http_status = 404


class Conflict(EdgeKilnError):
    """The thing exists but its state forbids the action."""

    code = "conflict"
    http_status = 409


class QuotaExceeded(EdgeKilnError):
    """The tenant has as much as it may have; `details` holds quota, use and limit."""

    code = "quota_exceeded"
    retryable = True
    http_status = 429


class RateLimited(EdgeKilnError):
    """Too many requests in a minute; `details` says when to come again (`retry_after_s`)."""

    code = "rate_limited"
    retryable = True
    http_status = 429


class IdempotencyMismatch(Conflict):
    """An `Idempotency-Key` was used again with another body."""

    code = "idempotency_mismatch"


class Unauthorized(EdgeKilnError):
    """No API key, or not a valid one."""

    code = "unauthorized"
    http_status = 401


class OperatorRequired(EdgeKilnError):
    """The key is valid, but not an operator's."""

    code = "operator_required"
    http_status = 403


class ScopeRequired(EdgeKilnError):
    """The key is valid, but may not do this."""

    code = "scope_required"
    http_status = 403


class HostNotAllowed(EdgeKilnError):
    """The Host header names a server that this is not."""

    code = "host_not_allowed"
    http_status = 421


class OriginNotAllowed(EdgeKilnError):
    """A web page of another origin asked for a change."""

    code = "origin_not_allowed"
    http_status = 403


class MethodNotAllowed(EdgeKilnError):
    """The path exists, but not for this method."""

    code = "method_not_allowed"
    http_status = 405


class RangeNotSatisfiable(EdgeKilnError):
    """The byte range lies outside the artifact."""

    code = "range_not_satisfiable"
    http_status = 416


class PayloadTooLarge(EdgeKilnError):
    """The request body exceeds the limit."""

    code = "payload_too_large"
    http_status = 413


class DataDirBusy(Conflict):
    """Another process serves this data directory; `details` says which, and at what URL."""

    code = "data_dir_busy"


class NotEmpty(Conflict):
    """A backup or a restore would write where something is."""

    code = "not_empty"


class BackupInvalid(EdgeKilnError):
    """A backup is damaged, unfinished, or of a version that this one does not know."""

    code = "backup_invalid"


class BackupIncomplete(EdgeKilnError):
    """The store lacks or has damaged what the ledger counts on; the backup holds everything else."""

    code = "backup_incomplete"


class InvalidSettings(EdgeKilnError):
    """A setting is missing, malformed or contradicts another."""

    code = "invalid_settings"


class LedgerBusy(EdgeKilnError):
    """The ledger had no connection to spare, or others changed the same rows too often; nothing was written."""

    code = "ledger_busy"
    retryable = True
    http_status = 503


class ServiceUnavailable(EdgeKilnError):
    """The server cannot be reached or is not ready."""

    code = "service_unavailable"
    retryable = True
    http_status = 503


# --- sources and checkpoints --------------------------------------------------------------------


class SourceNotFound(EdgeKilnError):
    """No such folder, repository or revision."""

    code = "source_not_found"
    http_status = 422


class SourceUnavailable(EdgeKilnError):
    """The source exists but could not be read now (network, server error)."""

    code = "source_unavailable"
    retryable = True


class SourceForbidden(EdgeKilnError):
    """The source demands a credential that was not given or does not suffice."""

    code = "source_forbidden"


class SourceChanged(EdgeKilnError):
    """The source's files are no longer those the job was pinned to."""

    code = "source_changed"


class CheckpointInvalid(EdgeKilnError):
    """A checkpoint file is missing, damaged, contradictory or dangerous; the message names the file."""

    code = "checkpoint_invalid"
    http_status = 422


class CheckpointUnsafe(CheckpointInvalid):
    """The checkpoint asks to run code or to read paths of its choosing."""

    code = "checkpoint_unsafe"


class ArchitectureUnsupported(EdgeKilnError):
    """No engine takes this architecture; the message lists those that are supported."""

    code = "architecture_unsupported"


class RequestUnfit(EdgeKilnError):
    """The checkpoint is fine, but it cannot do what the job asks (context too long, ...)."""

    code = "request_unfit"


class TokenizerUnsupported(EdgeKilnError):
    """The tokenizer cannot be carried into the requested format."""

    code = "tokenizer_unsupported"


class ChatTemplateInvalid(CheckpointInvalid):
    """The chat template does not parse, does not end, or grows without bound."""

    code = "chat_template_invalid"


# --- conversion and proof -----------------------------------------------------------------------


class ConversionFailed(EdgeKilnError):
    """The converter refused the model."""

    code = "conversion_failed"


class TemplateUnfit(EdgeKilnError):
    """A graph cannot serve as a template, or a template not for this checkpoint; a full conversion is the way."""

    code = "template_unfit"


class QuantizationFailed(EdgeKilnError):
    """The quantizer refused the model or produced nothing."""

    code = "quantization_failed"


class CalibrationInvalid(EdgeKilnError):
    """The calibration data are not what their kind says: no text, no prompts, or no chat template to render them."""

    code = "calibration_invalid"
    http_status = 422


class EvaluationInvalid(EdgeKilnError):
    """An uploaded evaluation or text for perplexity is not what it should be; the message names the line."""

    code = "evaluation_invalid"
    http_status = 422


class BundleFailed(EdgeKilnError):
    """The bundle could not be written."""

    code = "bundle_failed"


class VerificationFailed(EdgeKilnError):
    """The artifact does not run, or is not what it claims to hold."""

    code = "verification_failed"


class BenchmarkFailed(EdgeKilnError):
    """The benchmark produced no trustworthy figure (0 tokens/s among them)."""

    code = "benchmark_failed"


class AdbUnavailable(EdgeKilnError):
    """The adb server that phones are reached through does not answer."""

    code = "adb_unavailable"
    retryable = True


class DeviceLost(EdgeKilnError):
    """A phone went away, rebooted, or answered with less than a whole answer."""

    code = "device_lost"
    retryable = True


class DeviceHung(EdgeKilnError):
    """A phone is attached and does not answer in time."""

    code = "device_hung"
    retryable = True


class DeviceUnauthorized(EdgeKilnError):
    """A phone does not trust the host's adb key."""

    code = "device_unauthorized"
    retryable = True


class DeviceFull(EdgeKilnError):
    """A phone has no room for the model."""

    code = "device_full"
    retryable = True


class DeviceHot(EdgeKilnError):
    """A phone did not cool down in time."""

    code = "device_hot"
    retryable = True


class ToolMissing(EdgeKilnError):
    """No tool is registered that runs the format on a phone of this kind."""

    code = "tool_missing"


class ToolReportInvalid(BenchmarkFailed):
    """A tool did not print what it prints when it has measured."""

    code = "tool_report_invalid"


class GateRefused(EdgeKilnError):
    """A figure of the artifact misses a gate; `details` holds gate, figure and threshold."""

    code = "gate_refused"


class SignatureInvalid(EdgeKilnError):
    """An artifact has no signature, or not one of the key that was given."""

    code = "signature_invalid"


# --- children, workers, ledger and store --------------------------------------------------------


class ChildCrashed(EdgeKilnError):
    """The child process died of a signal or without an answer; its worker lives."""

    code = "child_crashed"
    retryable = True


class MemoryLimitExceeded(EdgeKilnError):
    """The child used more memory than its limit, or the kernel's out-of-memory killer took it."""

    code = "memory_limit_exceeded"


class MemoryInsufficient(EdgeKilnError):
    """No live worker may use as much memory as a step is predicted to need."""

    code = "memory_insufficient"

    @classmethod
    def from_prediction(cls, step: str, predicted_bytes: int, largest_bytes: int) -> MemoryInsufficient:
        """Word the refusal of a step, named as in the job's graph."""
        return cls(
            f"The step {step} is predicted to need {predicted_bytes / _GIB:.1f} GiB of memory, and the largest live "
            f"worker may use {largest_bytes / _GIB:.1f} GiB. Start a worker on a larger host (or raise "
            "EDGEKILN_STEP_MEMORY_BYTES, if its host has more), or ask for a smaller checkpoint or a shorter context.",
            step=step,
            predicted_peak_anon_bytes=predicted_bytes,
            largest_memory_bytes=largest_bytes,
        )


class DeadlineExceeded(EdgeKilnError):
    """The child ran longer than its deadline."""

    code = "deadline_exceeded"


class DiskFull(EdgeKilnError):
    """No space left where the step writes."""

    code = "disk_full"
    retryable = True


class StepCancelled(EdgeKilnError):
    """The step was cancelled while it ran."""

    code = "cancelled"


class StepLost(EdgeKilnError):
    """The worker vanished while a step that must not be repeated was running."""

    code = "lost"


class InputFailed(EdgeKilnError):
    """A step that this one needs did not succeed."""

    code = "input_failed"


class Parked(EdgeKilnError):
    """The step was given up after too many crashes or lost workers."""

    code = "parked"


class LeaseLost(EdgeKilnError):
    """The holder's token is no longer the step's: another worker owns it now. Write nothing."""

    code = "lease_lost"


class BlobCondemned(EdgeKilnError):
    """A commit named a blob that is about to be deleted; upload it again."""

    code = "blob_condemned"
    retryable = True


class BlobMissing(EdgeKilnError):
    """The store has no such object."""

    code = "blob_missing"


class BlobCorrupt(EdgeKilnError):
    """Bytes read do not have the digest they are stored under."""

    code = "blob_corrupt"
    retryable = True


class StoreUnavailable(EdgeKilnError):
    """The object store did not answer, or answered with a server error."""

    code = "store_unavailable"
    retryable = True


class ToolchainChanged(EdgeKilnError):
    """The step was planned for other tool versions or step code than this worker has."""

    code = "toolchain_changed"


def describe_bug(error: BaseException) -> dict[str, Any]:
    """Return the wire form of an unexpected exception: code `internal_error`, type and text."""
    # A database error's text holds the statement and what other tenants may have put into it: the driver's first line
    # is enough for a report, and the log has the rest.
    cause = getattr(error, "orig", None)
    text = str(cause).partition("\n")[0] if isinstance(cause, BaseException) else str(error)
    return {
        "code": "internal_error",
        "message": f"Unexpected {type(error).__name__}: {text}",
        "retryable": False,
        "details": {},
    }
