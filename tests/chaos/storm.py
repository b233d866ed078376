"""A storm: several real workers bring jobs to their end while they, PostgreSQL and Redis are killed again and again.

Owns the worker processes and the faults; `tests.chaos.census` counts what is left. The steps are light, everything else
is what a deployment has: Celery on Redis, the ledger in PostgreSQL, an S3 server, children in the sandbox. Who is hit,
when and how is drawn from the seed. Run by `test_storm`.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.exc import DBAPIError

from service.errors import LedgerBusy
from service.ledger import jobs
from service.ledger.database import Database, migrate
from service.ledger.states import FINAL_JOB_STATES
from service.ledger.tables import Job
from service.queue import Poker, make_app
from service.settings import load_settings
from service.storage import S3Options, open_store
from tests.chaos.nursery import ForkedWorker, Nursery
from tests.chaos.orders import TENANT, Order
from tests.chaos.servers import BUCKET, Postgres, Redis
from tests.kiln import clean_environment, find_children, find_processes, kill_all

#: Recovery in seconds; every one of these is an operator's setting.
_SETTINGS = {
    "lease_s": 6,
    "heartbeat_s": 2,
    "sweep_s": 2,
    "cancel_poll_s": 1,
    "retry_pause_s": 0.1,
    "light_slots": 3,
    "fetch_slots": 2,
    "convert_slots": 2,
    "s3_region": "us-east-1",
}


#: A worker that is stopped in the middle of a transaction holds its locks until then: as the default, and sooner.
_SESSION = "-c lock_timeout=10s -c statement_timeout=60s -c idle_in_transaction_session_timeout=3s"
#: Claims of one host wait for each other; a fleet has several.
_HOSTS = 3
#: What a storm does; the last is done once.
_HITS = {"workers killed", "workers stopped", "Redis killed", "PostgreSQL killed", "messages flushed"}


class Fleet:
    """Workers of one installation, below `folder`; whoever dies is replaced."""

    def __init__(
        self,
        folder: Path,
        postgres: Postgres,
        broker: Redis,
        store: dict[str, str],
        *,
        sweeps: bool = True,
        **settings: Any,
    ) -> None:
        """`sweeps`: whether workers repair what is lost; without, they are the control."""
        self.folder = folder
        self.postgres, self.broker = postgres, broker
        database_url = postgres.make_database()
        values: dict[str, Any] = {
            **_SETTINGS,
            "data_dir": folder / "data",
            "database_url": f"{database_url}?options={_SESSION}",
            "broker_url": broker.url,
            "store_url": f"s3://{BUCKET}/{folder.name}",
            "s3_endpoint_url": store["endpoint_url"],
            **settings,
        }
        self.settings = load_settings(values)
        self._environment = {
            **clean_environment(folder, values),
            "AWS_ACCESS_KEY_ID": store["access_key_id"],
            "AWS_SECRET_ACCESS_KEY": store["secret_access_key"],
            "CHAOS_SWEEPS": str(sweeps),
        }
        self._nursery = Nursery(self._environment, folder)
        self.processes: list[ForkedWorker] = []
        self._started = 0
        migrate(database_url)
        self.database = Database(database_url, Poker(make_app(self.settings)))
        options = S3Options(**store, addressing="path")
        self.store = open_store(self.settings.object_store_url, options)

    def start_worker(self) -> None:
        """Start one more worker, as the command that an operator uses does; two are a host."""
        self._started += 1
        arguments = ["-A", "tests.chaos.light_app", "worker", "--pool=threads", "--concurrency=8"]
        arguments += ["-Q", "fetch,convert,light,device", "-n", f"w{self._started}@%h"]
        arguments += ["--loglevel=WARNING", "--without-gossip", "--without-mingle", "--without-heartbeat"]
        host_name = f"host-{self._started // 2 % _HOSTS}"
        self.processes.append(self._nursery.fork(arguments, {"EDGEKILN_HOST_NAME": host_name}))

    def start(self, module: str, *arguments: str) -> subprocess.Popen[bytes]:
        """Start a process of this installation."""
        command = [sys.executable, "-W", "ignore", "-m", module, *arguments]
        with (self.folder / f"{module}.log").open("ab") as log:
            # The fleet's folder is in its environment, by which it and its children are found and ended.
            return subprocess.Popen(command, env=self._environment, cwd=self.folder, stdout=log, stderr=log)

    def replace_dead(self) -> None:
        """Start a worker for each that has ended, as a supervisor does."""
        dead = [process for process in self.processes if not process.is_alive()]
        for process in dead:
            self.processes.remove(process)
            self.start_worker()

    def submit(self, order: Order) -> str:
        """Submit a job as a client does: again with the same key, as long as nobody answers."""
        while True:
            with suppress(DBAPIError, LedgerBusy):
                return jobs.submit_job(
                    self.database, TENANT, order.request, max_variants=1, idempotency_key=order.key
                ).job_id
            time.sleep(0.2)

    def count_live(self) -> int | None:
        """How many jobs have not ended; None while the ledger is away."""
        statement = select(func.count()).select_from(Job).where(Job.state.not_in(FINAL_JOB_STATES))
        with suppress(DBAPIError, LedgerBusy):
            return self.database.read(lambda connection: connection.execute(statement).scalar_one())
        return None

    def close(self) -> None:
        """Leave nothing behind."""
        kill_all(self.folder)
        for process in self.processes:
            process.wait()
        self.processes.clear()
        self._nursery.close()
        self.database.close()
        assert find_processes(self.folder) == {}


def is_at_work(pid: int) -> bool:
    """Whether a worker has run a step: it keeps the zygote that steps' children are forked from."""
    for child in find_children(pid):
        with suppress(OSError):
            if b"workers.sandbox.zygote" in Path(f"/proc/{child}/cmdline").read_bytes():
                return True
    return False


@contextmanager
def fleet(folder: Path, *arguments: Any, workers: int, **options: Any) -> Iterator[Fleet]:
    """Yield started workers; nothing of them is left."""
    made = Fleet(folder, *arguments, **options)
    try:
        for _ in range(workers):
            made.start_worker()
        yield made
    finally:
        made.close()


@dataclass(frozen=True)
class Weather:
    """When what is hit, in seconds."""

    worker_every_s: float = 1.0
    redis_every_s: float = 10.0
    postgres_every_s: float = 30.0
    flush_after_s: float = 15.0
    #: Share of the hits on workers that kill; the others stop one for a while.
    kill_share: float = 0.2
    #: Most stops are shorter than this, lest nobody works.
    short_stop_s: float = 1.0
    #: Share of the stops that outlast the lease by as much, and make a zombie.
    zombie_share: float = 0.15


@dataclass
class Storm:
    """Hits a fleet and its servers, in a thread, until it is told to end."""

    fleet: Fleet
    weather: Weather
    seed: int
    hits: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._chance = random.Random(self.seed)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._rage)
        self._error: BaseException | None = None
        #: Stopped worker -> when it goes on.
        self._stopped: dict[int, float] = {}

    @property
    def has_hit_all(self) -> bool:
        """Whether everything was hit at least once; a thread that has failed hits nothing more."""
        assert self._error is None, self._error
        return set(self.hits) >= _HITS

    @contextmanager
    def raging(self) -> Iterator[None]:
        """Hit as long as the context is open; leave every server and worker running."""
        self._thread.start()
        try:
            yield
        finally:
            self._over.set()
            self._thread.join()
        if self._error is not None:
            raise self._error

    def _rage(self) -> None:
        weather = self.weather
        begun = time.monotonic()
        plan: list[tuple[float, float | None, Callable[[], None]]] = [
            (begun + weather.worker_every_s, weather.worker_every_s, self._hit_worker),
            (begun + weather.redis_every_s, weather.redis_every_s, self._kill_redis),
            (begun + weather.postgres_every_s, weather.postgres_every_s, self._kill_postgres),
            (begun + weather.flush_after_s, None, self._flush),
        ]
        try:
            while not self._over.is_set():
                plan.sort(key=lambda entry: entry[0])
                at, every_s, strike = plan.pop(0)
                while time.monotonic() < at and not self._over.wait(0.1):
                    self._wake(time.monotonic())
                if self._over.is_set():
                    break
                strike()
                if every_s is not None:
                    # A machine that is busy is not hit twice for the time it lost.
                    plan.append((max(at + every_s, time.monotonic()), every_s, strike))
        except BaseException as error:
            self._error = error
        finally:
            self._wake(float("inf"))
            self.fleet.replace_dead()

    def _hit_worker(self) -> None:
        """Hit one that is at work; those that only start have nothing to lose, and would never get there."""
        self.fleet.replace_dead()
        standing = [
            process for process in self.fleet.processes if process.pid not in self._stopped and is_at_work(process.pid)
        ]
        # The numbers drawn are the same whoever stands.
        which, how, is_long, how_long = (self._chance.random() for _ in range(4))
        if not standing:
            return
        victim = standing[int(which * len(standing))]
        if how < self.weather.kill_share:
            victim.send_signal(signal.SIGKILL)
            self.hits["workers killed"] += 1
        else:
            victim.send_signal(signal.SIGSTOP)
            stop_s = 0.1 + how_long * self.weather.short_stop_s
            if is_long < self.weather.zombie_share:
                stop_s += self.fleet.settings.lease_s
            self._stopped[victim.pid] = time.monotonic() + stop_s
            self.hits["workers stopped"] += 1

    def _wake(self, now: float) -> None:
        for pid, until in list(self._stopped.items()):
            if until <= now:
                del self._stopped[pid]
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def _kill_redis(self) -> None:
        self.fleet.broker.kill()
        self._over.wait(self._chance.random())
        self.fleet.broker.start()
        self.hits["Redis killed"] += 1

    def _kill_postgres(self) -> None:
        self.fleet.postgres.kill()
        self._over.wait(self._chance.random())
        self.fleet.postgres.start()
        self.hits["PostgreSQL killed"] += 1

    def _flush(self) -> None:
        self.fleet.broker.flush()
        self.hits["messages flushed"] += 1
