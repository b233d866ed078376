"""The embedded profile's processes: they start, are kept, and never outlive their supervisor.

Most tests supervise stand-ins that start at once; one has the real API with a worker that only tells the ledger that
it lives.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from service.children import Command
from service.client import Client
from service.data_dir import read_server
from service.errors import DataDirBusy, InvalidSettings, ServiceUnavailable
from service.settings import Settings, load_settings
from service.supervisor import Supervisor, default_commands

#: Answers /readyz on the listening socket it inherits, as argument 2 says.
API = """
import http.server, json, socket, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        checks = {"workers": {"ok": sys.argv[2] == "ready", "message": "No worker has been heard of."}}
        body = json.dumps({"ready": sys.argv[2] == "ready", "checks": checks}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
server = http.server.HTTPServer(("127.0.0.1", 0), Handler, bind_and_activate=False)
server.socket.close()
server.socket = socket.socket(fileno=int(sys.argv[1]))
server.serve_forever()
"""
#: Starts a child of its own, and ignores SIGTERM.
WORKER = """
import signal, subprocess, threading
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("grandchild", subprocess.Popen(["sleep", "1000"]).pid, flush=True)
threading.Event().wait()
"""
#: Tells the ledger that it lives.
REGISTRANT = """
import threading
from service.ledger import fleet
from service.ledger.database import Database
from service.ledger.keys import Toolchain
from service.settings import load_settings
database = Database(load_settings().ledger_url)
facts = {"cores": 1, "memory_bytes": 1, "memory_limit_bytes": 1, "slots": {}, "isolation": {}}
fleet.register_worker(database, "host", toolchain=Toolchain({}, {}), **facts)
threading.Event().wait()
"""
#: A program that supervises the stand-ins until it is told to end, as `edgekiln up` does.
PROGRAM = """
import json, signal, sys, threading
from pathlib import Path
from service.commands.interrupts import orderly_end
from service import supervisor
from service.settings import load_settings
from service.supervisor import Supervisor
from tests.integration.test_supervisor import stand_ins
supervisor._GRACE_S = 0.5
with orderly_end(), Supervisor(load_settings({"data_dir": Path(sys.argv[1]), "port": 0}), commands=stand_ins) as made:
    print(json.dumps({"url": made.url, "pids": made.pids}), flush=True)
    threading.Event().wait()
"""
_PATIENCE_S = 20.0


def run_python(name: str, program: str, *arguments: object, pass_fds: tuple[int, ...] = ()) -> Command:
    return Command(name, [sys.executable, "-c", program, *map(str, arguments)], pass_fds)


def stand_ins(_settings: Settings, listener: int) -> list[Command]:
    return [run_python("api", API, listener, "ready", pass_fds=(listener,)), run_python("worker", WORKER)]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition: Callable[[], Any]) -> Any:
    give_up_at = time.monotonic() + _PATIENCE_S
    while not (found := condition()):
        assert time.monotonic() < give_up_at, "it never came true"
        time.sleep(0.02)
    return found


def grandchild_of(data_dir: Path) -> int:
    log = data_dir / "logs" / "worker.log"
    wait_until(lambda: "grandchild" in log.read_text())
    return int(log.read_text().split("grandchild ")[-1].split()[0])


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load_settings({"data_dir": tmp_path / "data", "port": 0})


@pytest.fixture(autouse=True)
def _short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.supervisor._GRACE_S", 0.5)
    monkeypatch.setattr("service.children._FIRST_PAUSE_S", 0.05)


@pytest.fixture
def program(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """Yield a supervising process and what it said of itself."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "data")],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None
    try:
        yield process, json.loads(process.stdout.readline())
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_it_is_ready_when_start_returns_and_gone_when_stop_returns(settings: Settings) -> None:
    reports: list[str] = []
    with Supervisor(settings, report=reports.append, commands=stand_ins) as supervisor:
        with Client(supervisor.url) as client:
            assert client.readiness()["ready"] is True
        assert read_server(settings.data_dir) == {"pid": os.getpid(), "url": supervisor.url}
        children, grandchild = list(supervisor.pids.values()), grandchild_of(settings.data_dir)
        assert all(map(is_alive, [*children, grandchild]))
    assert not any(map(is_alive, children))
    # Killed too, but nobody here can wait for the child of a child.
    wait_until(lambda: not is_alive(grandchild))
    assert read_server(settings.data_dir) == {}
    assert reports == ["Starting API, worker and beat."]
    with Supervisor(settings, commands=stand_ins) as again:
        assert again.pids.keys() == {"api", "worker"}


def test_the_real_api_is_ready_when_a_worker_has_registered(settings: Settings) -> None:
    def commands(settings: Settings, listener: int) -> list[Command]:
        return [default_commands(settings, listener)[0], run_python("worker", REGISTRANT)]

    with Supervisor(settings, commands=commands) as supervisor, Client(supervisor.url) as client:
        assert client.readiness()["checks"]["workers"]["ok"] is True
        assert list(client.list()) == []
        os.kill(supervisor.pids["api"], signal.SIGKILL)
        # The listening socket never closes: a request meets the next API, whenever that is ready.
        wait_until(lambda: answers(client))


def answers(client: Client) -> Any:
    try:
        return list(client.list()) or True
    except ServiceUnavailable:
        return None


def test_only_the_worker_gets_the_hubs_token(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    settings = load_settings({**settings.model_dump(), "hub_token": "hf_secret"})

    def commands(settings: Settings, listener: int) -> list[Command]:
        programs = {command.name: command for command in stand_ins(settings, listener)}
        programs["beat"] = run_python("beat", WORKER)
        # What starts at once, in the places of the real commands.
        return [replace(real, argv=programs[real.name].argv) for real in default_commands(settings, listener)]

    with Supervisor(settings, commands=commands) as supervisor:
        seen = {name: Path(f"/proc/{pid}/environ").read_text() for name, pid in supervisor.pids.items()}
    assert {name for name, environment in seen.items() if "hf_secret" in environment} == {"worker"}
    assert all("EDGEKILN_PORT" in environment for environment in seen.values()), "control: the rest they get"


def test_a_dead_child_is_reported_and_started_again(settings: Settings) -> None:
    reports: list[str] = []
    with Supervisor(settings, report=reports.append, commands=stand_ins) as supervisor:
        first, grandchild = dict(supervisor.pids), grandchild_of(settings.data_dir)
        for pid in first.values():
            os.kill(pid, signal.SIGKILL)
        wait_until(
            lambda: supervisor.pids.keys() == first.keys() and not set(supervisor.pids.values()) & set(first.values())
        )
        # The listening socket never closed: this request waits for the new API.
        with Client(supervisor.url) as client:
            assert client.readiness()["ready"] is True
        wait_until(lambda: not is_alive(grandchild))
    assert any("api ended unexpectedly (signal SIGKILL" in line for line in reports)
    assert "worker was started again." in reports


def test_a_second_one_on_the_same_directory_says_who_holds_it(settings: Settings) -> None:
    with Supervisor(settings, commands=stand_ins) as first:
        with pytest.raises(DataDirBusy) as caught:
            Supervisor(settings, commands=stand_ins).start()
        assert caught.value.details["url"] == first.url
        assert str(os.getpid()) in caught.value.message
        with Client(first.url) as client:
            assert client.readiness()["ready"] is True


def test_a_port_in_use_is_said_to_be(settings: Settings) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(InvalidSettings, match=f"Port {port} of 127.0.0.1 is in use"):
            Supervisor(settings.model_copy(update={"port": port}), commands=stand_ins).start()
    # Nothing is left behind: the directory is free again.
    Supervisor(settings, commands=stand_ins)._lock.acquire()


@pytest.mark.parametrize("host", ["203.0.113.7", "no-such-host.invalid"])
def test_an_address_of_another_machine_is_refused(settings: Settings, host: str) -> None:
    with pytest.raises(InvalidSettings, match="Choose another --host"):
        Supervisor(settings.model_copy(update={"host": host}), commands=stand_ins).start()


def test_a_directory_that_cannot_be_used_is_refused(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidSettings, match="--data-dir"):
        Supervisor(settings.model_copy(update={"data_dir": tmp_path / "file" / "data"}), commands=stand_ins).start()


def test_a_child_that_cannot_start_ends_the_start_with_its_last_words(settings: Settings) -> None:
    def broken(_settings: Settings, listener: int) -> list[Command]:
        return [
            run_python("api", API, listener, "lonely", pass_fds=(listener,)),
            run_python("worker", "raise SystemExit('no wheels')"),
        ]

    supervisor = Supervisor(settings, report=lambda _: None, commands=broken)
    with pytest.raises(ServiceUnavailable, match="no wheels"):
        supervisor.start()
    assert supervisor.pids == {}
    assert not supervisor.is_running


def test_what_is_never_ready_is_given_up_with_the_reason(settings: Settings) -> None:
    def lonely(_settings: Settings, listener: int) -> list[Command]:
        return [run_python("api", API, listener, "lonely", pass_fds=(listener,))]

    with pytest.raises(ServiceUnavailable, match="No worker has been heard of"):
        Supervisor(settings, commands=lonely, ready_timeout_s=1.0).start()


def test_children_import_this_installation_wherever_the_user_stands(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "service").mkdir()
    (tmp_path / "service" / "__init__.py").write_text("raise SystemExit('the wrong service')")
    monkeypatch.chdir(tmp_path)
    with Supervisor(settings, commands=stand_ins) as supervisor:
        assert supervisor.is_running


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_to_the_supervisor_ends_everything(
    program: tuple[subprocess.Popen[str], dict[str, Any]], tmp_path: Path, number: signal.Signals, code: int
) -> None:
    process, said = program
    children, grandchild = said["pids"].values(), grandchild_of(tmp_path / "data")
    process.send_signal(number)
    assert process.wait(_PATIENCE_S) == code
    assert not any(map(is_alive, children))
    wait_until(lambda: not is_alive(grandchild))


def test_children_die_with_a_supervisor_that_is_killed(
    program: tuple[subprocess.Popen[str], dict[str, Any]], tmp_path: Path
) -> None:
    process, said = program
    pids = said["pids"].values()
    assert all(is_alive(pid) for pid in pids)
    process.kill()
    process.wait()
    wait_until(lambda: not any(is_alive(pid) for pid in pids))
    os.kill(grandchild_of(tmp_path / "data"), signal.SIGKILL)
    with Supervisor(load_settings({"data_dir": tmp_path / "data", "port": 0}), commands=stand_ins) as supervisor:
        assert supervisor.is_running


def test_a_log_that_has_grown_is_set_aside_at_the_start(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.children._LOG_START_BYTES", 10)
    log = settings.data_dir / "logs" / "api.log"
    log.parent.mkdir(parents=True)
    log.write_text("an earlier life\n")
    with Supervisor(settings, commands=stand_ins):
        assert log.with_name("api.log.1").read_text() == "an earlier life\n"
        assert "an earlier life" not in log.read_text()
