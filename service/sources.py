"""What a job may name as its source: what the operator allows.

Called by `service.api` when a job is submitted or scheduled, by `workers.process` when a schedule's tick comes, and by
`workers.runner` before a step reads a source.
"""

from __future__ import annotations

from pathlib import Path

from service.errors import FolderNotAllowed, SourceNotAllowed, SourceNotFound
from service.requests import FolderSource, JobRequest
from service.settings import Settings
from service.web_addresses import HostRules, read_place


def admit_source(request: JobRequest, settings: Settings) -> JobRequest:
    """Return the request with its folder resolved; another source passes as it is, if it may be read.

    The resolved path is what is stored, so that a symlink changed later leads nowhere else. Raises
    `FolderNotAllowed` before it looks whether a folder outside the roots exists, `SourceNotFound` and
    `SourceNotAllowed`.
    """
    source = request.source
    if isinstance(source, FolderSource):
        return request.model_copy(update={"source": _admit_folder(source.path, settings)})
    if source.kind == "https":
        # Its addresses are judged by the worker that connects to them.
        read_host_rules(settings).require_host(read_place(source.url))
    if source.kind == "s3":
        require_bucket(source.bucket, source.prefix, settings)
    return request


def read_host_rules(settings: Settings) -> HostRules:
    """Return the operator's word on hosts of web folders."""
    return HostRules(settings.source_hosts, settings.private_source_hosts)


def require_bucket(bucket: str, prefix: str, settings: Settings) -> None:
    """Raise `SourceNotAllowed` for what does not lie in one of the operator's buckets and prefixes."""
    asked = f"{bucket}/{prefix}".rstrip("/") + "/"
    allowed = settings.source_s3_buckets
    if not any(asked.startswith(each.rstrip("/") + "/") for each in allowed):
        raise SourceNotAllowed(
            f"s3://{asked} is not in a bucket that this server may read (now: {', '.join(allowed) or 'none so far'}). "
            f"The operator allows more with EDGEKILN_SOURCE_S3_BUCKETS.",
            bucket=bucket,
        )


def _admit_folder(asked: str, settings: Settings) -> FolderSource:
    try:
        folder = Path(asked).resolve()
    except (OSError, RuntimeError) as error:  # a loop of symlinks, a name too long
        raise SourceNotFound(f"{asked} cannot be resolved to a folder: {error}.", path=asked) from error
    roots = settings.source_roots
    if not any(folder.is_relative_to(root) for root in roots):
        named = ", ".join(str(root) for root in roots) or "none so far"
        raise FolderNotAllowed(
            f"{asked} is not below a folder that this server may read (now: {named}). The operator allows more with "
            f"`edgekiln up --source-root {folder}`; `edgekiln submit --upload` does without.",
            path=asked,
            source_roots=[str(root) for root in roots],
        )
    try:
        is_folder = folder.is_dir()
    except OSError:
        is_folder = False
    if not is_folder:
        raise SourceNotFound(
            f"There is no folder {asked} on the server. Name the folder that holds config.json.", path=asked
        )
    return FolderSource(path=str(folder))
