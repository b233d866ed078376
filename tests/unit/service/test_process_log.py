"""The processes' own logs: lines for people and for programs, bound to the step in work."""

from __future__ import annotations

import json
import subprocess
import sys
import threading

import pytest

from service.process_log import bound

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
"""


def say(form: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", _SAY.format(form=form)], capture_output=True, text=True, check=True)
    return done.stderr.splitlines()


def test_json_carries_what_is_bound() -> None:
    before, warning, elsewhere, failure = map(json.loads, say("json"))
    assert (before["message"], before["level"], before["logger"]) == ("before", "INFO", "workers.runner")
    assert warning["message"] == "half of 4"
    assert (warning["step"], warning["attempt"]) == ("step_1", 2)
    assert "step" not in before
    assert "step" not in elsewhere, "another thread does other work"
    assert "job" not in warning
    assert "OSError: no" in failure["exc_info"]
    assert warning["time"][10] == "T"


def test_text_ends_with_it() -> None:
    lines = say("text")
    assert lines[0].endswith("INFO workers.runner: before")
    assert lines[1].endswith("WARNING workers.runner: half of 4 step=step_1 attempt=2")


def test_bindings_end_with_their_block() -> None:
    assert threading.current_thread() is threading.main_thread()
    with bound(step="a"), pytest.raises(ValueError, match="x"), bound(attempt=1):
        raise ValueError("x")
