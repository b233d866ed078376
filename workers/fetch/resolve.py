"""The step `resolve`: pin a source to an immutable revision.

Owns the step's parameters and figures only. Run by `workers.runner` in the child that has the network.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workers.fetch.sources import open_source
from workers.steps import Progress, run_by_hand


def run(params: Mapping[str, Any], inputs: Mapping[str, Path], output_dir: Path, progress: Progress) -> dict[str, Any]:
    """Return the pinned source and its needed files.

    `params`: `source` as requested, `access` (what the operator allows; in no key) and `credential` (of the kind of
    source, or null; never written anywhere). Figures: `source` (pinned), `files` (`path`, `size_bytes`), `size_bytes`.
    Writes no output. Raises `SourceNotFound`, `SourceForbidden`, `SourceNotAllowed`, `SourceUnavailable` (retryable),
    `CheckpointInvalid`, `CheckpointUnsafe`.
    """
    pinned = open_source(params["source"], params.get("credential"), access=params.get("access")).pin(progress)
    return {
        "source": pinned.source,
        "files": [file.to_json() for file in pinned.files],
        "size_bytes": sum(file.size_bytes for file in pinned.files),
    }


if __name__ == "__main__":
    sys.exit(run_by_hand(run, "Pin a source to an immutable revision."))
