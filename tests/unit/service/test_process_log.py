"""The processes' own logs: lines for people and for programs, bound to the step in work."""

from __future__ import annotations

import datetime as dt
import json
import os
import subprocess
import sys

_SAY = """
import logging, threading
from service.process_log import begin_log, bound
begin_log("{form}")
log = logging.getLogger("workers.runner")
log.info("before")
with bound(step="step_1", attempt=2, job=None):
    log.warning("half of %d", 4)
    thread = threading.Thread(target=lambda: log.info("elsewhere"))
    thread.start(); thread.join()
    try:
        raise OSError("no")
    except OSError:
        log.exception("it went wrong")
log.info("after")
"""


def say(form: str) -> list[str]:
    environment = {**os.environ, "TZ": "Asia/Tokyo"}
    command = [sys.executable, "-c", _SAY.format(form=form)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return done.stderr.splitlines()


def test_json_carries_what_is_bound() -> None:
    started_at = dt.datetime.now(dt.UTC).replace(microsecond=0)
    before, warning, elsewhere, failure, after = map(json.loads, say("json"))
    assert (before["message"], before["level"], before["logger"]) == ("before", "INFO", "workers.runner")
    assert warning["message"] == "half of 4"
    assert (warning["step"], warning["attempt"]) == ("step_1", 2)
    assert "step" not in before
    assert "step" not in elsewhere, "another thread does other work"
    assert "job" not in warning
    assert "OSError: no" in failure["exc_info"]
    assert "step" not in after
    assert started_at <= dt.datetime.fromisoformat(warning["time"]) <= dt.datetime.now(dt.UTC)


def test_text_ends_with_it() -> None:
    lines = say("text")
    assert lines[0].endswith("INFO workers.runner: before")
    assert lines[-1].endswith("INFO workers.runner: after")
    assert lines[1].endswith("WARNING workers.runner: half of 4 step=step_1 attempt=2")
