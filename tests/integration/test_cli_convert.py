"""`edgekiln convert` and `edgekiln up` as processes with the real worker: how they end, and that nothing stays."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from service.client import Client
from service.data_dir import read_server

_ROOT = Path(__file__).parents[2]
_PATIENCE_S = 60.0


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start `edgekiln` in a session of its own, far from the checkout."""
    started = []

    def begin(*arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "service.cli", *map(str, arguments), "--data-dir", str(tmp_path / "data")]
        environment = {**os.environ, "PYTHONPATH": str(_ROOT)}
        # Whoever runs the tests in the background may have had SIGINT ignored for all descendants.
        restore = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
        with (tmp_path / "stderr").open("w") as stderr:
            process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=environment,
                cwd=tmp_path,
                start_new_session=True,
                preexec_fn=restore,
            )
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def wait_until(condition: Callable[[], Any]) -> Any:
    give_up_at = time.monotonic() + _PATIENCE_S
    while not (found := condition()):
        assert time.monotonic() < give_up_at, "it never came true"
        time.sleep(0.05)
    return found


def descendants(pid: int) -> set[int]:
    """Return the ids of all processes that a process has brought about and that still have it as an ancestor."""
    found: set[int] = set()
    try:
        for thread in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (thread / "children").read_text().split()):
                found |= {child} | descendants(child)
    except (FileNotFoundError, ProcessLookupError):
        pass
    return found


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_bad_checkpoint_is_a_failed_job_with_a_sentence(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    process = start("convert", tmp_path / "empty", "-o", tmp_path / "out", "--json")
    output, _ = process.communicate(timeout=_PATIENCE_S)
    job = json.loads(output)
    shown = (tmp_path / "stderr").read_text()
    assert process.returncode == 1
    assert (job["state"], job["variants"][0]["artifacts"]) == ("failed", [])
    assert job["variants"][0]["error"]["code"] == "checkpoint_invalid"
    assert job["variants"][0]["error"]["message"] in shown
    assert "Traceback" not in shown
    assert list((tmp_path / "out").iterdir()) == []


def test_ctrl_c_cancels_the_job_and_leaves_no_process(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = start("convert", _ROOT / "examples" / "addition", "-o", tmp_path / "out")
    wait_until(lambda: "convert: started" in (tmp_path / "stderr").read_text() or process.poll() is not None)
    url = read_server(tmp_path / "data")["url"]
    with Client(url) as client:
        (job,) = client.list()
    pids = descendants(process.pid)
    assert len(pids) >= 4  # API, worker, beat, the step
    process.send_signal(signal.SIGINT)
    assert process.wait(_PATIENCE_S) == 130
    assert "Interrupted" in (tmp_path / "stderr").read_text()
    wait_until(lambda: not any(map(is_alive, pids)))
    server = start("up", "--port", "0")
    wait_until(lambda: "edgekiln serves" in (tmp_path / "stderr").read_text().lower() or server.poll() is not None)
    with Client(read_server(tmp_path / "data")["url"]) as client:
        assert client.get(job["id"])["state"] == "cancelled"
    pids = descendants(server.pid)
    server.send_signal(signal.SIGINT)
    assert server.wait(_PATIENCE_S) == 0
    wait_until(lambda: not any(map(is_alive, pids)))
