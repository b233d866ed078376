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


@pytest.mark.parametrize("allowed", [(), (socket.AF_INET,), (socket.AF_UNIX, socket.AF_INET6)])
def test_filter_refuses_sockets_but_of_some_families(allowed: tuple[int, ...]) -> None:
    if platform.machine() not in ("x86_64", "aarch64"):
        pytest.skip("no filter is written for this machine")

    families = (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX)

    def confine() -> Any:
        kernel.renounce_privileges()
        kernel.refuse_sockets(allowed)
        seen = [attempt(lambda family=family: socket.socket(family, socket.SOCK_DGRAM)) for family in families]  # type: ignore[misc]
        return [*seen, attempt(socket.socketpair)]

    expected = ["allowed" if family in allowed else "PermissionError" for family in families]
    assert in_child(confine) == [*expected, "allowed"], "pairs lead nowhere"


def connect_to(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


@pytest.mark.parametrize("network", [False, True])
def test_services_of_the_host_are_out_of_reach(tmp_path: Path, network: bool) -> None:
    """A database, a container engine, an agent with keys: their sockets stand in the file system."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "engine.sock"))
        server.listen()

        def confine() -> Any:
            before = attempt(lambda: connect_to(tmp_path / "engine.sock"))
            isolation = isolate(network=network, readable=[tmp_path], writable=[tmp_path])
            return [before, isolation.sockets, attempt(lambda: connect_to(tmp_path / "engine.sock"))]

        assert in_child(confine) in (["allowed", "filter", "PermissionError"], ["allowed", "open", "allowed"])


def call(name: str, *arguments: Any) -> None:
    """Call a function of libc; raises `OSError`."""
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def test_every_way_out_is_closed(tmp_path: Path) -> None:
    needs_landlock()
    worker = os.getpid()
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for folder in (inside, outside):
        folder.mkdir()
    (outside / "secret").write_text("secret")
    ways: dict[str, Callable[[], object]] = {
        "a link to a file outside": lambda: (inside / "soft").read_text(),
        "a second name of a file outside": lambda: os.link(outside / "secret", inside / "hard"),
        "the root of another process": lambda: Path(f"/proc/{worker}/root{outside}/secret").read_text(),
        "the memory of another process": lambda: os.open(f"/proc/{worker}/mem", os.O_RDONLY),
        "the open files of another process": lambda: Path(f"/proc/{worker}/fd/0").readlink(),
        "the command of a debugger": lambda: call("ptrace", 16, worker, None, None),
        "the network of another process": lambda: os.open(f"/proc/{worker}/ns/net", os.O_RDONLY),
        "a file system of its own": lambda: call("mount", b"none", str(inside).encode(), b"tmpfs", 0, None),
        "another root": lambda: os.chroot(inside),
        "a device": lambda: os.mknod(inside / "disk", 0o60600, os.makedev(8, 0)),
        "calls queued for the kernel": lambda: call("syscall", 425, 1, ctypes.create_string_buffer(256)),
        "a file of the system": lambda: os.open("/etc/passwd", os.O_WRONLY),
    }

    def confine() -> Any:
        (inside / "soft").symlink_to(outside / "secret")
        isolate(network=False, readable=[], writable=[inside])
        return {way: attempt(action) for way, action in ways.items()}

    assert {way: found for way, found in in_child(confine).items() if found == "allowed"} == {}


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
    assert network in ("namespace", "filter")
    assert connection == "PermissionError"
    assert user_id == NOBODY
    assert (folder / "file").stat().st_uid == NOBODY


@pytest.mark.parametrize(
    ("network", "files", "sockets", "level"),
    [
        ("namespace", "landlock", "filter", "strong"),
        ("filter", "landlock", "filter", "strong"),
        ("granted", "landlock", "filter", "strong"),
        ("open", "landlock", "open", "weak"),
        ("namespace", "open", "filter", "weak"),
        ("namespace", "landlock", "open", "weak"),
    ],
)
def test_level_needs_every_measure(network: str, files: str, sockets: str, level: str) -> None:
    assert Isolation(network, files, sockets).level == level
