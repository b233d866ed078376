"""An adb server of its own and virtual phones on it, for tests; ended by pid."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import adbutils

from tests.kiln import ROOT, wait_for
from tests.services import free_port, give_up
from tests.virtual_phone.phone import Phone

_PATIENCE_S = 30.0


class AttachedPhone:
    """A running virtual phone that an adb server knows."""

    def __init__(self, adb: AdbServer, root: Path, **properties: str) -> None:
        self._adb = adb
        self.root = root
        root.mkdir(parents=True, exist_ok=True)
        # Its serial number is what tells that two connections lead to one phone.
        given = {"ro.serialno": f"VP{root.name.upper()}", **properties}
        command = [sys.executable, "-m", "tests.virtual_phone", str(root)]
        command += [f"{name}={value}" for name, value in given.items()]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
        assert self.process.stdout is not None
        port = self.process.stdout.readline().strip()
        assert port, "the virtual phone has ended"
        self.serial = f"127.0.0.1:{port}"
        self.hardware_serial = given["ro.serialno"]

    def attach(self, state: str = "device") -> None:
        """Have the adb server connect, and wait until it says so."""

        def is_attached() -> bool:
            self._adb.command("connect", self.serial)
            return self._adb.states().get(self.serial) == state

        wait_for(is_attached, f"{self.serial} is {state}", _PATIENCE_S)

    def set_faults(self, **faults: Any) -> None:
        """Replace the faults in force."""
        fresh = self.root / "faults.json.new"
        fresh.write_text(json.dumps(faults))
        fresh.replace(self.root / "faults.json")

    def files(self) -> list[str]:
        """Return the files on the phone that users could fill, by their paths there."""
        # Folders that go meanwhile are passed over.
        found = os.walk(self.root / "data")
        return sorted(
            f"/{(Path(folder) / name).relative_to(self.root)}" for folder, _, names in found for name in names
        )

    def hold(self) -> None:
        """Let light tools (`tests.virtual_phone.lab`) run until `let_go`."""
        (self.root / "began").unlink(missing_ok=True)
        (self.root / "hold").touch()

    def has_begun(self) -> bool:
        """Whether a light tool has begun since."""
        return (self.root / "began").exists()

    def let_go(self) -> None:
        """Let light tools end."""
        (self.root / "hold").unlink(missing_ok=True)

    def boot_id(self) -> str:
        """Return what changes with every start of the phone."""
        return (self.root / "proc/sys/kernel/random/boot_id").read_text().strip()

    def remains(self) -> list[str]:
        """Return what runs have left on the phone: everything of ours but the tools, and a changed setting."""
        setting = (self.root / "settings" / "stay_on_while_plugged_in").read_text().strip()
        left = [path for path in self.files() if "/edgekiln/tools/" not in path]
        return left if setting == "0" else [*left, f"stay_on_while_plugged_in = {setting}"]

    def close(self) -> None:
        """Let the phone vanish, with all that runs on it."""
        self.process.kill()
        self.process.wait()
        if self.process.stdout:
            self.process.stdout.close()
        Phone.kill_all(_Remains(self.root))  # type: ignore[arg-type]


class _Remains:
    """What is left of a phone whose process is gone."""

    def __init__(self, root: Path) -> None:
        self.root = root


def find_adb() -> str:
    """Return the path of an adb program: the system's, else the one that adbutils brings along."""
    program = shutil.which("adb") or adbutils.adb_path()
    if not Path(program).is_file():
        give_up("no adb: install it (Debian: apt-get install adb)")
    return program


class AdbServer:
    """An adb server on a port of its own."""

    def __init__(self, folder: Path) -> None:
        program = find_adb()
        self._program = program
        self._folder = folder
        self.port = free_port()
        folder.mkdir(parents=True, exist_ok=True)
        self._environment = {**os.environ, "HOME": str(folder), "TMPDIR": str(folder), "ADB_MDNS": "0"}
        self._environment.pop("ANDROID_ADB_SERVER_PORT", None)
        self._log = (folder / "adb.log").open("wb")
        self._server = subprocess.Popen(
            [program, "-P", str(self.port), "nodaemon", "server"],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
        )
        wait_for(lambda: self.command("devices").returncode == 0, "the adb server answers", _PATIENCE_S)

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run the `adb` program against this server."""
        return subprocess.run(
            [self._program, "-P", str(self.port), *words],
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=_PATIENCE_S,
        )

    def states(self) -> dict[str, str]:
        """Return serial -> state, as `adb devices` prints them."""
        lines = self.command("devices").stdout.splitlines()[1:]
        return {words[0]: words[1] for line in lines if len(words := line.split("\t")) == 2}

    def close(self) -> None:
        """End the server."""
        self._server.send_signal(signal.SIGTERM)
        try:
            self._server.wait(5)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()
        self._log.close()


@contextlib.contextmanager
def adb_server(folder: Path) -> Iterator[AdbServer]:
    """Yield an adb server of the test's own."""
    server = AdbServer(folder)
    try:
        yield server
    finally:
        server.close()


@contextlib.contextmanager
def virtual_phone(adb: AdbServer, root: Path, **properties: str) -> Iterator[AttachedPhone]:
    """Yield an attached virtual phone that lives in `root`."""
    phone = AttachedPhone(adb, root, **properties)
    try:
        phone.attach()
        yield phone
    finally:
        phone.close()
