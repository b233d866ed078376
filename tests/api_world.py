"""A whole service without its workers: ledger, store, API; the test plays the workers."""

from __future__ import annotations

import atexit
import functools
import hashlib
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.testclient import TestClient

from service.api import make_app
from service.errors import EdgeKilnError
from service.ledger import claims, publications, results
from service.ledger.blobs import OutputFile, Reprieves, commit_uploaded
from service.ledger.database import Database, migrate
from service.ledger.keys import canonical_json
from service.settings import Settings, load_settings
from service.storage import ObjectStore, blob_key, open_store
from tests.ledger_play import BENCHMARK, POLICY, TOOLCHAIN, Play, figures_of, outputs_of

#: Larger than one chunk of the folder store, so that a download has a middle.
ARTIFACT_BYTES = (1 << 20) + 4096


class StoredPlay(Play):
    """Plays workers whose outputs, logs and publications really are in the store."""

    def __init__(self, database: Database, store: ObjectStore, tenant_id: str = "default") -> None:
        super().__init__(database, tenant_id)
        self.store = store

    def finish(self, claim: claims.Claim, outputs: Sequence[OutputFile] | None = None) -> None:
        made = [self.put(output.name, artifact_bytes(claim.key)) for output in outputs_of(claim)]
        if claim.kind == "publish":
            self.publish(claim)
        usage = results.Usage(1.5, 2000, 1000, "strong", self.put("log", f"{claim.kind} worked\n".encode() * 2000))
        files = outputs if outputs is not None else made

        def commit(reprieves: Reprieves) -> None:
            success = results.Success(self.find_figures(claim), files, usage, reprieves, self.find_regressions(claim))
            results.finish_step(self.database, claim, success, TOOLCHAIN, BENCHMARK)

        commit_uploaded(self.database, commit, lambda _: self.put("again", artifact_bytes(claim.key)))

    def find_figures(self, claim: claims.Claim) -> dict[str, Any]:
        return play_figures(claim)

    def find_regressions(self, claim: claims.Claim) -> Sequence[Mapping[str, Any]]:
        return ()

    def fail(self, claim: claims.Claim, error: EdgeKilnError) -> bool:
        usage = results.Usage(0.5, log=self.put("log", b"it went wrong\n"))
        return results.fail_step(self.database, claim, error, usage, POLICY)

    def put(self, name: str, data: bytes) -> OutputFile:
        digest = hashlib.sha256(data).hexdigest()
        self.store.put_bytes(blob_key(digest), data)
        return OutputFile(name, digest, len(data))

    def publish(self, claim: claims.Claim) -> None:
        drafts = []
        for kind in claim.params["formats"]:
            (output,) = claim.inputs[f"artifact_{kind}"].outputs
            name = f"tiny-{claim.params['recipe']}.{kind}"
            manifest = canonical_json({"artifact": {"name": name, "sha256": output.digest}}).decode()
            digest = hashlib.sha256(manifest.encode()).hexdigest()
            drafts.append(publications.Draft(kind, name, output.digest, output.size_bytes, digest, manifest))
        publications.record_publications(self.database, claim, drafts)


def artifact_bytes(key: str) -> bytes:
    """Bytes that differ from step to step and from place to place."""
    seed = hashlib.sha256(key.encode()).digest()
    block = b"".join(hashlib.sha256(seed + bytes([number])).digest() for number in range(128))
    return (block * (ARTIFACT_BYTES // len(block) + 1))[:ARTIFACT_BYTES]


def play_figures(claim: claims.Claim) -> dict[str, Any]:
    """What the table shows, where the real step measures it."""
    if claim.kind == "verify":
        quality = {"exact_match": 0.5, "source_exact_match": 1.0}
        return {
            "format": claim.params["format"],
            "size_bytes": ARTIFACT_BYTES,
            "parity": {"max_abs_error": 0.25, "kl_mean": 0.125},
            "quality": quality,
        }
    if claim.kind == "benchmark":
        speeds = {"prefill_tokens_per_s": {"median": 1234.0}, "decode_tokens_per_s": {"median": 321.0}}
        return {"device": {"name": "host"}, **speeds}
    return figures_of(claim)


@dataclass
class World:
    """One deployment below a temporary folder."""

    folder: Path
    settings: Settings
    database: Database
    store: ObjectStore
    #: Resource classes poked after commits.
    pokes: list[list[str]] = field(default_factory=list)

    @property
    def models(self) -> Path:
        """The one source root."""
        return self.folder / "models"

    @property
    def source(self) -> dict[str, str]:
        """A folder that may be asked for."""
        return {"kind": "folder", "path": str(self.models / "tiny")}

    def play(self, tenant_id: str = "default") -> StoredPlay:
        """Register a worker of a tenant's test."""
        return StoredPlay(self.database, self.store, tenant_id)

    def app(self, **overrides: Any) -> FastAPI:
        """Make an app, with some settings of its own."""
        return make_app(self.settings.model_copy(update=overrides), self.database, self.store)

    @contextmanager
    def http(self, base_url: str = "http://127.0.0.1:8711", **overrides: Any) -> Iterator[TestClient]:
        """Yield an in-process HTTP client; what the server raises unexpectedly is an answer, not an exception."""
        with TestClient(self.app(**overrides), base_url=base_url, raise_server_exceptions=False) as http:
            yield http

    @contextmanager
    def server(self, **overrides: Any) -> Iterator[str]:
        """Serve on a real socket; yield the URL."""
        listener = socket.create_server(("127.0.0.1", 0))
        app = self.app(**overrides)
        config = uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=2)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            app.state.context.stopping.set()
            server.should_exit = True
            thread.join()
            listener.close()


@functools.cache
def _empty_ledger() -> Path:
    """Migrate once; a test's own ledger is a copy."""
    path = Path(tempfile.mkdtemp(prefix="empty-ledger-")) / "ledger.db"
    migrate(f"sqlite:///{path}")
    atexit.register(shutil.rmtree, path.parent, ignore_errors=True)
    return path


@contextmanager
def make_world(folder: Path) -> Iterator[World]:
    """Yield a deployment with an empty ledger."""
    (folder / "models" / "tiny").mkdir(parents=True)
    settings = load_settings({"data_dir": folder / "data", "source_roots": (folder / "models",)})
    settings.data_dir.mkdir()
    shutil.copyfile(_empty_ledger(), settings.data_dir / "ledger.db")
    pokes: list[list[str]] = []
    database = Database(settings.ledger_url, lambda classes: pokes.append(list(classes)))
    try:
        yield World(folder, settings, database, open_store(settings.object_store_url), pokes)
    finally:
        database.close()
