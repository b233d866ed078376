"""The embedded profile: API, worker and beat as supervised subprocesses of one command.

Owns their starts, restarts and ends, the listening socket and the lock on the data directory. Knows no job: what the
children do is told by their command lines and `Settings.to_environment`. Called by `edgekiln up` and
`edgekiln convert`.

One thread starts every child and lives as long as they do, because the kernel's parent-death signal is tied to the
thread that started a process, not to its program.
"""

from __future__ import annotations

import errno
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from service.children import Child, Command
from service.client import Client
from service.data_dir import DataDirLock
from service.errors import EdgeKilnError, InvalidSettings, ServiceUnavailable
from service.settings import Settings

Report = Callable[[str], None]
#: Makes the children's commands from the settings and the listening socket's descriptor.
CommandFactory = Callable[[Settings, int], Sequence[Command]]

_WATCH_S = 0.1
_TRIM_S = 10.0
#: From SIGTERM to SIGKILL; the worker gives its steps back within this.
_GRACE_S = 6.0
#: The worker imports the converters before it is ready.
_READY_S = 300.0
#: A child that ends this often before everything is ready will not get better.
_START_FAILURES = 3
#: The hub's token: only the worker, whose fetches need it, gets it.
_HUB_SECRETS = ("EDGEKILN_HUB_TOKEN", "HF_TOKEN")
#: The keys that tenants' tokens are sealed with: the API seals, the worker opens.
_SEALING_KEYS = ("EDGEKILN_TOKEN_KEYS",)
_WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}


def default_commands(settings: Settings, listener: int) -> list[Command]:
    """Return the command lines of API, worker and beat."""
    celery = [sys.executable, "-m", "celery", "-A", "workers.app"]
    worker = [
        *celery,
        "worker",
        "--pool=threads",
        f"--concurrency={max(1, sum(settings.slots().values()))}",
        "-Q",
        "fetch,convert,light,device",
        "-n",
        f"edgekiln-{os.getpid()}-{secrets.token_hex(3)}@%h",
        "--loglevel=INFO",
        "--without-gossip",
        "--without-mingle",
        "--without-heartbeat",
    ]
    beat = [*celery, "beat", "-s", str(settings.data_dir / "beat-schedule"), "--pidfile=", "--loglevel=WARNING"]
    api = [sys.executable, "-m", "service.api", "--fd", str(listener)]
    return [
        Command("api", api, pass_fds=(listener,), withheld=_HUB_SECRETS),
        Command("worker", worker),
        Command("beat", beat, withheld=_HUB_SECRETS + _SEALING_KEYS),
    ]


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


class Supervisor:
    """Runs the embedded profile between `start` and `stop`, or inside a `with` block."""

    def __init__(
        self,
        settings: Settings,
        *,
        report: Report = _say,
        commands: CommandFactory = default_commands,
        ready_timeout_s: float = _READY_S,
    ) -> None:
        self.settings = settings
        self._report = report
        self._commands = commands
        self._ready_timeout_s = ready_timeout_s
        self._lock = DataDirLock(settings.data_dir)
        self._listener: socket.socket | None = None
        self._children: list[Child] = []
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._forced = threading.Event()
        self._hopeless = threading.Event()

    def __enter__(self) -> Supervisor:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """Where this machine reaches the API."""
        host = _WILDCARDS.get(self.settings.host, self.settings.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.settings.port}"

    @property
    def is_running(self) -> bool:
        """Whether children are being kept running."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def pids(self) -> dict[str, int]:
        """Child's name -> process id, of those that run now."""
        return {child.command.name: child.pid for child in self._children if child.pid is not None}

    def start(self) -> None:
        """Start everything and return when jobs can be taken.

        Raises `DataDirBusy`, `InvalidSettings` (address not usable), and `ServiceUnavailable` when a child does not
        come up; nothing is left running then.
        """
        try:
            self._lock.acquire()
            self._listener = _listen(self.settings.host, self.settings.port)
            self.settings = self.settings.model_copy(update={"port": self._listener.getsockname()[1]})
            self._report("Starting API, worker and beat.")
            self._migrate()
            self._start_children(self._listener.fileno())
            # Whoever finds the directory taken may come in as soon as the socket takes connections.
            self._lock.announce(self.url)
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End all children, at once when interrupted again, and let the data directory go. May be repeated."""
        self._stopping.set()
        while self._thread is not None and self._thread.is_alive():
            try:
                self._thread.join()
            except (KeyboardInterrupt, SystemExit):
                self._forced.set()
        self._thread = None
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        self._lock.release()

    def _migrate(self) -> None:
        # Takes half a second to import, and only a server needs it.
        from service.ledger.database import migrate

        migrate(self.settings.ledger_url)

    def _start_children(self, listener: int) -> None:
        log_dir = self.settings.data_dir / "logs"
        log_dir.mkdir(parents=True, exist_ok=True)
        environment = _environment(self.settings)
        self._children = [
            Child(command, log_dir / f"{command.name}.log", environment, self.settings.data_dir)
            for command in self._commands(self.settings, listener)
        ]
        self._thread = threading.Thread(target=self._watch, name="supervisor", daemon=True)
        self._thread.start()

    def _wait_until_ready(self) -> None:
        give_up_at = time.monotonic() + self._ready_timeout_s
        missing = "nothing has answered yet"
        with Client(self.url) as client:
            while time.monotonic() < give_up_at:
                if self._hopeless.wait(_WATCH_S):
                    raise self._start_error("A part of EdgeKiln ends as soon as it starts.")
                try:
                    readiness = client.readiness()
                except EdgeKilnError as error:
                    missing = error.message
                    continue
                if readiness["ready"]:
                    return
                checks = readiness["checks"].items()
                missing = "; ".join(check.get("message") or name for name, check in checks if not check["ok"])
        raise self._start_error(f"EdgeKiln was not ready within {self._ready_timeout_s:g} s: {missing}")

    def _start_error(self, sentence: str) -> ServiceUnavailable:
        suspects = [child for child in self._children if child.failures] or self._children
        worst = max(suspects, key=lambda child: child.failures)
        return ServiceUnavailable(
            f"{sentence} The end of {worst.log_path}:\n{worst.last_lines()}", log=str(worst.log_path)
        )

    # --- in the supervisor's own thread ----------------------------------------------------------

    def _watch(self) -> None:
        """Start the children, start them again when they end, and end them."""
        try:
            for child in self._children:
                child.start()
            trimmed_at = time.monotonic()
            while not self._stopping.wait(_WATCH_S):
                for child in self._children:
                    self._tend(child)
                if time.monotonic() - trimmed_at > _TRIM_S:
                    for child in self._children:
                        child.trim_log()
                    trimmed_at = time.monotonic()
        except Exception as error:  # a thread's exception reaches nobody else
            self._report(f"The supervisor failed: {type(error).__name__}: {error}. Everything is stopped.")
            self._hopeless.set()
        finally:
            self._end_children()

    def _tend(self, child: Child) -> None:
        if child.pid is None:
            if time.monotonic() >= child.due_at:
                child.start()
                self._report(f"{child.command.name} was started again.")
        elif child.has_ended():
            how = child.bury()
            self._report(f"{child.command.name} ended unexpectedly ({how}). Its log: {child.log_path}")
            if child.failures >= _START_FAILURES:
                self._hopeless.set()

    def _end_children(self) -> None:
        for child in self._children:
            child.send(signal.SIGTERM)
        give_up_at = time.monotonic() + _GRACE_S
        while time.monotonic() < give_up_at and not self._forced.wait(_WATCH_S):
            if all(child.has_ended() for child in self._children):
                break
        for child in self._children:
            if child.pid is not None:
                child.bury()


def _environment(settings: Settings) -> dict[str, str]:
    """Return a child's environment: this one's, the settings, and where the packages are."""
    packages = str(Path(__file__).resolve().parent.parent)
    inherited = [str(Path(path).absolute()) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return {
        **os.environ,
        **settings.to_environment(),
        # The children run in the data directory: a folder `workers` where the user stands must not be imported.
        "PYTHONPATH": os.pathsep.join(dict.fromkeys([packages, *inherited])),
        "PYTHONUNBUFFERED": "1",
    }


def _listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; the API takes it over, so that a restart of the API refuses nobody."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise InvalidSettings(f"{host!r} is not an address of this machine: {error}. Choose another --host.") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise InvalidSettings(
                f"Port {port} of {host} is in use by another program. Choose another with --port; 0 takes a free one.",
                host=host,
                port=port,
            ) from error
        raise InvalidSettings(
            f"{host}:{port} cannot be listened on: {error.strerror}. Choose another --host or --port.",
            host=host,
            port=port,
        ) from error
    return listener
