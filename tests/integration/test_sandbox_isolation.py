"""Each measure of confinement works by itself, also where others are refused."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from workers.sandbox import Isolation, kernel, probe_isolation
from workers.sandbox.isolation import isolate

NOBODY = 65534


def in_child(work: Callable[[], Any]) -> Any:
    """Return what `work` returns in a forked process, whose confinement dies with it."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            answer = work()
        except BaseException:
            answer = traceback.format_exc()
        os.write(writing, json.dumps(answer).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        answer = pipe.read()
    os.waitpid(pid, 0)
    return json.loads(answer)


def attempt(action: Callable[[], object]) -> str:
    try:
        action()
    except OSError as error:
        return type(error).__name__
    return "allowed"


def needs_landlock() -> None:
    if probe_isolation()["files"] != "landlock":
        pytest.skip("this kernel offers no Landlock")


def test_probe_agrees_with_a_real_confinement(tmp_path: Path) -> None:
    def confine() -> Any:
        return isolate(network=False, readable=[], writable=[tmp_path]).to_json()

    assert in_child(confine) == probe_isolation()


def test_filter_refuses_network_sockets_only() -> None:
    if platform.machine() not in ("x86_64", "aarch64"):
        pytest.skip("no filter is written for this machine")

    def confine() -> Any:
        kernel.renounce_privileges()
        kernel.refuse_network_sockets()
        families = (socket.AF_INET, socket.AF_INET6, socket.AF_PACKET, socket.AF_UNIX)
        seen = [attempt(lambda family=family: socket.socket(family, socket.SOCK_DGRAM)) for family in families]  # type: ignore[misc]
        return [*seen, attempt(socket.socketpair)]

    assert in_child(confine) == ["PermissionError"] * 3 + ["allowed"] * 2


def test_refused_namespace_falls_back_to_the_filter(tmp_path: Path) -> None:
    def confine() -> Any:
        def refuse(flags: int) -> None:
            raise PermissionError("refused")

        kernel.unshare = refuse
        isolation = isolate(network=False, readable=[], writable=[tmp_path])
        return [isolation.network, attempt(socket.socket)]

    assert in_child(confine) == ["filter", "PermissionError"]


def test_files_are_confined_to_what_is_granted(tmp_path: Path) -> None:
    needs_landlock()
    for name in ("readable", "writable", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("text")

    def confine() -> Any:
        isolate(network=False, readable=[tmp_path / "readable"], writable=[tmp_path / "writable"])
        seen = {}
        for name in ("readable", "writable", "other"):
            seen[name] = [
                attempt((tmp_path / name / "file").read_text),
                attempt(lambda name=name: (tmp_path / name / "new").write_text("x")),  # type: ignore[misc]
                attempt(lambda name=name: list((tmp_path / name).iterdir())),  # type: ignore[misc]
            ]
        seen["move_in"] = [attempt(lambda: (tmp_path / "readable/file").rename(tmp_path / "writable/moved"))]
        seen["devices"] = [attempt(lambda: Path("/dev/null").write_text("x"))]
        return seen

    assert in_child(confine) == {
        "readable": ["allowed", "PermissionError", "allowed"],
        "writable": ["allowed", "allowed", "allowed"],
        "other": ["PermissionError"] * 3,
        "move_in": ["PermissionError"],
        "devices": ["allowed"],
    }


def test_other_processes_are_out_of_reach(tmp_path: Path) -> None:
    needs_landlock()
    parent_pid = os.getpid()

    def confine() -> Any:
        before = attempt(lambda: Path(f"/proc/{parent_pid}/environ").read_bytes())
        isolate(network=True, readable=[], writable=[tmp_path])
        return [before, attempt(lambda: Path(f"/proc/{parent_pid}/environ").read_bytes())]

    assert in_child(confine) == ["allowed", "PermissionError"]


def test_root_keeps_only_the_capabilities_to_read_its_files(tmp_path: Path) -> None:
    def confine() -> Any:
        isolate(network=False, readable=[], writable=[tmp_path])
        status = Path("/proc/self/status").read_text()
        return next(line.split()[1] for line in status.splitlines() if line.startswith("CapEff:"))

    assert int(in_child(confine), 16) & ~0b1111 == 0


def test_ordinary_user_is_confined_too(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("an ordinary user runs all the other tests already")
    folder = tmp_path / "writable"
    folder.mkdir()
    os.chown(folder, NOBODY, NOBODY)
    for parent in [folder.parent, *folder.parent.parents[:2]]:
        parent.chmod(0o755)

    def confine() -> Any:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        # Changing users hides a process from itself, PR_SET_DUMPABLE shows it again; a worker never does that.
        ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)
        isolation = isolate(network=False, readable=[], writable=[folder])
        (folder / "file").write_text("x")
        return [isolation.network, os.geteuid(), attempt(lambda: socket.socket().connect(("127.0.0.1", port)))]

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        network, user_id, connection = in_child(confine)
    # Hosts that forbid user namespaces fall back to the filter.
    assert (network, connection) in {("namespace", "OSError"), ("filter", "PermissionError")}
    assert user_id == NOBODY
    assert (folder / "file").stat().st_uid == NOBODY


@pytest.mark.parametrize(
    ("network", "files", "level"),
    [
        ("namespace", "landlock", "strong"),
        ("filter", "landlock", "strong"),
        ("granted", "landlock", "strong"),
        ("open", "landlock", "weak"),
        ("namespace", "open", "weak"),
    ],
)
def test_level_needs_every_measure(network: str, files: str, level: str) -> None:
    assert Isolation(network, files).level == level
