"""Stands in for the process that is measured: answers what a test planned, one entry a process.

The plan is a JSON list in the file that EDGEKILN_TEST_PLAN names; an entry is an answer, "hang", "crash" or "silent".
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path


def main(request_path: str, answer_path: str) -> None:
    plan_path = Path(os.environ["EDGEKILN_TEST_PLAN"])
    first, *rest = json.loads(plan_path.read_text())
    plan_path.write_text(json.dumps(rest))
    if first == "hang":
        signal.pause()
    elif first == "crash":
        print("E0000 00:00:1.0 1 engine.cc:1] the graph is broken", flush=True)
        os.abort()
    elif first != "silent":
        request = json.loads(Path(request_path).read_text())
        Path(answer_path).write_text(json.dumps({**first, "seen_request": request}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
