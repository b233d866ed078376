"""The step `fetch`: bring the files of a pinned source.

Owns the step's parameters and figures, and the checkpoint's digest. Run by `workers.runner` in the child that
has the network; nothing here opens a checkpoint's files with anything but plain reads and writes.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from service.errors import InvalidRequest
from workers.fetch.sources import digest_checkpoint, open_source
from workers.steps import Progress, run_by_hand


def run(params: Mapping[str, Any], inputs: Mapping[str, Path], output_dir: Path, progress: Progress) -> dict[str, Any]:
    """Write the checkpoint's files into `output_dir` and return their digests.

    `params`: `source` (pinned, from `resolve`), `access` and `credential` as there, and `cache_dir` (optional
    host-local folder of this pinned source, where partial downloads outlive an attempt). Figures: `checkpoint_digest`,
    `files` (`path`, `size_bytes`, `sha256`), `size_bytes`. Raises `SourceChanged`, `DiskFull` (retryable),
    `SourceNotFound`, `SourceForbidden`, `SourceNotAllowed`, `SourceUnavailable` (retryable).
    """
    source = params["source"]
    if source.get("revision") is None:
        raise InvalidRequest("The source has no revision; the resolve step must pin it before it is fetched.")
    cache_dir = None if params.get("cache_dir") is None else Path(params["cache_dir"])
    files = open_source(source, params.get("credential"), cache_dir, params.get("access")).bring(output_dir, progress)
    return {
        "checkpoint_digest": digest_checkpoint(files),
        "files": [file.to_json() for file in files],
        "size_bytes": sum(file.size_bytes for file in files),
    }


if __name__ == "__main__":
    sys.exit(run_by_hand(run, "Bring the files of a pinned source."))
