"""Which folders a REST request may name: those that resolve below the operator's roots.

Called by `service.api` when a job is submitted or scheduled, and by `workers.process` when a schedule's tick comes.
"""

from __future__ import annotations

from pathlib import Path

from service.errors import FolderNotAllowed, SourceNotFound
from service.requests import FolderSource, JobRequest
from service.settings import Settings


def admit_source(request: JobRequest, settings: Settings) -> JobRequest:
    """Return the request with its folder resolved; a Hub source passes as it is.

    The resolved path is what is stored, so that a symlink changed later leads nowhere else. Raises
    `FolderNotAllowed` before it looks whether a folder outside the roots exists, and `SourceNotFound`.
    """
    if not isinstance(request.source, FolderSource):
        return request
    asked = request.source.path
    try:
        folder = Path(asked).resolve()
    except (OSError, RuntimeError) as error:  # a loop of symlinks, a name too long
        raise SourceNotFound(f"{asked} cannot be resolved to a folder: {error}.", path=asked) from error
    roots = settings.source_roots
    if not any(folder.is_relative_to(root) for root in roots):
        named = ", ".join(str(root) for root in roots) or "none so far"
        raise FolderNotAllowed(
            f"{asked} is not below a folder that this server may read (now: {named}). The operator allows more with "
            f"`edgekiln up --source-root {folder}`.",
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
    return request.model_copy(update={"source": FolderSource(path=str(folder))})
