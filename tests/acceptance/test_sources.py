"""The example from every other kind of source, by a real server: the same checkpoint, so that nothing is made again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.acceptance.conftest import EXAMPLE, Conversion, Document
from tests.kiln import Kiln, fired_up
from tests.services import make_bucket, make_s3_client, s3_server
from tests.web_server import WebServer, run_web_server

#: What is asked for was made from the folder already.
ASKED = {"recipes": ["none"], "formats": ["tflite"]}
FILES = {path.name: path.read_bytes() for path in EXAMPLE.iterdir() if path.is_file()}
KINDS = ("https", "s3", "upload")


@pytest.fixture(scope="module")
def web() -> Iterator[WebServer]:
    with run_web_server(None) as server:
        server.site.put(FILES, "/models/addition/")
        yield server


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with s3_server(tmp_path_factory.mktemp("sources") / "server") as address:
        make_bucket(address, "models")
        client = make_s3_client(address)
        for name, data in FILES.items():
            client.put_object(Bucket="models", Key=f"addition/{name}", Body=data)
        yield address


@pytest.fixture(scope="module")
def kiln(conversion: Conversion, web: WebServer, s3: dict[str, str]) -> Iterator[Kiln]:
    settings = {
        "private_source_hosts": json.dumps([f"127.0.0.1:{web.port}"]),
        "source_s3_buckets": "models",
        **{f"source_s3_{name}": value for name, value in s3.items()},
    }
    with fired_up(conversion.folder, EXAMPLE, **settings) as kiln:
        yield kiln


@pytest.fixture(scope="module")
def done(kiln: Kiln, web: WebServer) -> dict[str, Document]:
    """Kind of source -> its ended job."""
    sources: dict[str, Document] = {
        "https": {"kind": "https", "url": f"http://127.0.0.1:{web.port}/models/addition/"},
        "s3": {"kind": "s3", "bucket": "models", "prefix": "addition"},
    }
    submitted = {kind: kiln.client.submit(source=source, **ASKED) for kind, source in sources.items()}
    submitted["upload"] = kiln.client.submit_folder(EXAMPLE, **ASKED)
    return {kind: kiln.client.wait(job["id"]) for kind, job in submitted.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_files_are_the_same_checkpoint(kind: str, done: dict[str, Document], conversion: Conversion) -> None:
    job = done[kind]
    assert job["state"] == "succeeded", job
    reused = {step["kind"] for step in job["steps"] if step["reused"]}
    assert reused == {"reference", "convert", "quantize", "verify"}
    (artifact,) = job["variants"][0]["artifacts"]
    first = next(variant for variant in conversion.job["variants"] if variant["name"] == "none")
    assert artifact["sha256"] in {each["sha256"] for each in first["artifacts"]}


@pytest.mark.parametrize("kind", KINDS)
def test_the_manifest_says_where_it_came_from(
    kind: str, done: dict[str, Document], kiln: Kiln, conversion: Conversion, tmp_path: Path
) -> None:
    (path,) = kiln.client.download(done[kind]["id"], tmp_path)
    assert path.name == "addition-none.tflite"
    manifest = json.loads((tmp_path / f"{path.name}.manifest.json").read_text(encoding="utf-8"))
    assert manifest["source"] == done[kind]["source"]
    assert manifest["source"]["kind"] == kind
    places = {"https": "/models/addition/", "s3": "s3://models/addition", "upload": '"kind":"upload"'}
    assert places[kind] in manifest["command"]
    # Of an upload no child opens anything; that weakens nothing.
    first = json.loads((conversion.folder / "out" / f"{path.name}.manifest.json").read_text(encoding="utf-8"))
    assert manifest["isolation"] == first["isolation"]


def test_the_key_of_the_bucket_is_found_nowhere(done: dict[str, Document], kiln: Kiln, s3: dict[str, str]) -> None:
    canary = s3["secret_access_key"].encode()
    found = {path: read_if_there(path) for path in kiln.folder.rglob("*") if path.is_file()}
    assert {"ledger.db", "worker.log"} <= {path.name for path in found}
    assert [path for path, content in found.items() if canary in content] == []


def read_if_there(path: Path) -> bytes:
    """Return a file's bytes; the server still works, and its messages come and go."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
