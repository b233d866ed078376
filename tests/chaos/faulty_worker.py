"""A worker process that stops dead at one seam of a publication.

`python -m tests.chaos.faulty_worker SEAM SIGNAL`, with the settings in the environment, runs whatever is due and
sends itself SIGNAL when a `publish` reaches SEAM: SIGKILL is a crash, SIGSTOP makes a zombie. A zombie that is
continued ends its step and exits. `--no-fence` takes the fence out of the ledger: the control. Called by the tests of
this folder as a subprocess; the patches never reach the process that tests.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from service.ledger import claims, moves, publications, results
from service.settings import load_settings
from service.storage.folder import FolderStore
from workers.process import WorkerProcess
from workers.runner import Runner

Strike = Callable[[], None]
_CLASSES = ("fetch", "convert", "light")


def _strike_before(owner: Any, name: str) -> Callable[[Strike], None]:
    def arm(strike: Strike) -> None:
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            strike()
            return original(*args, **kwargs)

        setattr(owner, name, call)

    return arm


def _strike_after(owner: Any, name: str) -> Callable[[Strike], None]:
    def arm(strike: Strike) -> None:
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            strike()
            return result

        setattr(owner, name, call)

    return arm


#: Every seam between two effects that others can see, in the order of time. `inside` is within a transaction or
#: between an upload's last byte and its rename.
PUBLISH_SEAMS: dict[str, Callable[[Strike], None]] = {
    "before_rows": _strike_before(publications, "record_publications"),
    "inside_rows": _strike_after(publications, "new_id"),
    "after_rows": _strike_after(publications, "record_publications"),
    "inside_manifest_upload": _strike_before(FolderStore, "_make_folder"),
    "after_first_manifest": _strike_after(FolderStore, "put_bytes"),
    "before_finish": _strike_before(results, "finish_step"),
    "inside_finish": _strike_before(results, "settle"),
    "after_finish": _strike_after(results, "finish_step"),
}


def remove_fence() -> None:
    """Let every holder's write through, whatever its token."""

    def move_step(tx: Any, step_id: str, event: Any, *, token: int | None = None, **values: Any) -> bool:
        return fenced(tx, step_id, event, **values)

    fenced = moves.move_step
    results.move_step = move_step  # type: ignore[attr-defined]


def main() -> None:
    """Run steps until the seam is reached, or was reached and the step has ended."""
    seam, number = sys.argv[1], signal.Signals[sys.argv[2]]
    if "--no-fence" in sys.argv:
        remove_fence()
    arm = PUBLISH_SEAMS[seam]
    struck = False

    def strike() -> None:
        nonlocal struck
        if not struck:
            struck = True
            os.kill(os.getpid(), number)

    run = Runner._run

    def run_armed(self: Runner, claim: claims.Claim, *arguments: Any) -> Any:
        if claim.kind == "publish":
            arm(strike)
        return run(self, claim, *arguments)

    Runner._run = run_armed  # type: ignore[method-assign]
    process = WorkerProcess(load_settings(), lambda _classes: None)
    while not struck:
        if not any(process.runner.run_next(name) for name in _CLASSES):
            time.sleep(0.02)
    process.close()


if __name__ == "__main__":
    main()
