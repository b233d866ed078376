"""Checkpoints in folders of web servers: real connections on the loopback, names that a test resolves."""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service.errors import (
    CheckpointInvalid,
    CheckpointUnsafe,
    EdgeKilnError,
    InvalidRequest,
    SourceChanged,
    SourceForbidden,
    SourceNotAllowed,
    SourceNotFound,
    SourceUnavailable,
)
from service.web_addresses import HostRules
from tests.web_server import Handler, Reply, WebServer, run_web_server
from workers.fetch import download, fetch, resolve, web_client

FOLDER = "/models/tiny/"
WEIGHTS = bytes(range(256)) * 4000
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": WEIGHTS,
    "tokenizer.json": b"{}",
    "modeling_evil.py": b"raise SystemExit",
    "pytorch_model.bin": b"pickle",
}
NEEDED = ["config.json", "model.safetensors", "tokenizer.json"]
SUMS = "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in FILES.items()).encode()


def ignore_progress(message: str, fraction: float | None = None) -> None:
    """Take progress and drop it."""


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebServer]:
    with run_web_server(tmp_path_factory.mktemp("certificates")) as server:
        yield server


class World:
    """The server, what names resolve to, and what the operator allows."""

    def __init__(self, server: WebServer) -> None:
        self.site, self.port = server.site, server.port
        self.site.__init__()  # type: ignore[misc]
        self.site.put(FILES)
        #: Name -> addresses of each look-up in turn; the last one stays.
        self.names = {"models.example": [["127.0.0.1"]]}
        self.lookups: list[str] = []
        self.rules = HostRules(private_hosts=(f"models.example:{self.port}",))

    def url(self, host: str = "models.example", folder: str = FOLDER) -> str:
        return f"https://{host}:{self.port}{folder}"

    def look_up(self, host: str, port: int, *_: Any, **__: Any) -> list[Any]:
        if host.replace(".", "").isdigit() or ":" in host:
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port))]
        self.lookups.append(host)
        turns = self.names.get(host, [])
        if not turns:
            raise socket.gaierror("no such name")
        addresses = turns.pop(0) if len(turns) > 1 else turns[0]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    def pin(self, url: str | None = None, files: list[str] | None = None) -> dict[str, Any]:
        source = {"kind": "https", "url": url or self.url(), "files": files}
        params = {"source": source, "access": self.rules.to_json()}
        return resolve.run(params, {}, Path("/nonexistent"), ignore_progress)

    def bring(self, source: dict[str, Any], output_dir: Path, **params: Any) -> dict[str, Any]:
        output_dir.mkdir()
        params = {"source": source, "access": self.rules.to_json(), **params}
        return fetch.run(params, {}, output_dir, ignore_progress)

    def asked(self, method: str) -> list[tuple[str, str | None]]:
        return [(path.removeprefix(FOLDER), part) for each, path, part, _ in self.site.requests if each == method]


@pytest.fixture
def world(running: WebServer, monkeypatch: pytest.MonkeyPatch) -> World:
    world = World(running)
    monkeypatch.setattr(socket, "getaddrinfo", world.look_up)
    monkeypatch.setenv("SSL_CERT_FILE", str(running.authority))
    return world


@pytest.fixture
def segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are larger than a segment."""
    monkeypatch.setattr(download, "SEGMENT_BYTES", 100_000)


# --- what is found and pinned --------------------------------------------------------------------


def test_the_files_of_a_folder_are_found_pinned_and_brought(world: World, tmp_path: Path) -> None:
    figures = world.pin()
    assert [file["path"] for file in figures["files"]] == NEEDED
    source = figures["source"]
    assert source["url"] == world.url()
    assert source["files"][0] == {
        "path": "config.json",
        "size_bytes": len(FILES["config.json"]),
        "etag": f'"{hashlib.md5(FILES["config.json"]).hexdigest()}"',
        "modified": "Fri, 02 Jan 2026 03:04:05 GMT",
    }
    assert world.pin()["source"] == source
    brought = world.bring(source, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == NEEDED
    assert {file["path"]: file["sha256"] for file in brought["files"]} == {
        name: hashlib.sha256(FILES[name]).hexdigest() for name in NEEDED
    }
    assert not any("modeling_evil" in path for _, path, _, _ in world.site.requests)


def test_sums_pin_the_bytes_whatever_else_the_server_says(world: World, tmp_path: Path) -> None:
    world.site.put({"SHA256SUMS": SUMS})
    source = world.pin()["source"]
    world.site.has_etag = world.site.has_modified = False
    assert world.pin()["source"] == source
    assert source["files"][1]["sha256"] == hashlib.sha256(WEIGHTS).hexdigest()
    world.bring(source, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == WEIGHTS


def test_the_shards_that_an_index_names_are_found(world: World) -> None:
    shard = "model-00001-of-00001.safetensors"
    index = json.dumps({"weight_map": {"a": shard}}).encode()
    del world.site.files[FOLDER + "model.safetensors"]
    world.site.put({shard: WEIGHTS, "model.safetensors.index.json": index})
    assert shard in [file["path"] for file in world.pin()["files"]]
    world.site.put({"model.safetensors.index.json": json.dumps({"weight_map": {"a": "../../etc/passwd"}}).encode()})
    with pytest.raises(CheckpointUnsafe, match="not a shard's name"):
        world.pin()
    assert not any("passwd" in path for _, path, _, _ in world.site.requests)


def test_named_files_alone_are_asked_for(world: World) -> None:
    world.pin(files=NEEDED)
    assert {path for path, _ in world.asked("HEAD")} == set(NEEDED)
    with pytest.raises(CheckpointInvalid, match=r"has no merges\.txt"):
        world.pin(files=[*NEEDED, "merges.txt"])


def test_a_server_without_head_is_asked_for_a_byte(world: World) -> None:
    expected = world.pin()["source"]
    world.site.has_head = False
    assert world.pin()["source"] == expected


def test_what_is_not_there_or_not_told_has_its_own_sentence(world: World) -> None:
    with pytest.raises(SourceNotFound, match="none of a checkpoint's files"):
        world.pin(world.url(folder="/elsewhere/"))
    world.site.acts[FOLDER + "merges.txt"] = Reply(403)
    with pytest.raises(SourceForbidden, match="as the source's `files`"):
        world.pin()
    world.site.acts[FOLDER + "merges.txt"] = Reply(503)
    with pytest.raises(SourceUnavailable, match="HTTP 503"):
        world.pin()
    world.site.acts.clear()
    world.site.put({"SHA256SUMS": b"<!doctype html>"})
    with pytest.raises(CheckpointInvalid, match="SHA256SUMS, line 1"):
        world.pin()
    del world.site.files[FOLDER + "SHA256SUMS"]
    world.site.has_etag = world.site.has_modified = False
    with pytest.raises(CheckpointInvalid, match="neither ETag nor Last-Modified"):
        world.pin()


# --- a file that changes -------------------------------------------------------------------------


@pytest.mark.parametrize("has_etag", [True, False])
def test_a_file_that_changed_since_it_was_pinned_is_refused(world: World, tmp_path: Path, has_etag: bool) -> None:
    world.site.has_etag = has_etag
    source = world.pin()["source"]
    world.site.put({"tokenizer.json": b'{"a": 1}'})
    with pytest.raises(SourceChanged, match=r"tokenizer\.json is no longer"):
        world.bring(source, tmp_path / "out")


def test_other_bytes_than_the_sums_state_are_refused(world: World, tmp_path: Path) -> None:
    world.site.put({"SHA256SUMS": SUMS})
    source = world.pin()["source"]
    world.site.put({"model.safetensors": WEIGHTS[::-1]})
    with pytest.raises(SourceChanged, match="states"):
        world.bring(source, tmp_path / "out")


def test_a_change_in_the_middle_of_a_download_is_seen(world: World, tmp_path: Path, segments: None) -> None:
    source = world.pin()["source"]

    def change(handler: Handler) -> None:
        del world.site.acts[FOLDER + "model.safetensors"]
        handler.answer()
        world.site.put({"model.safetensors": WEIGHTS[::-1]})

    world.site.acts[FOLDER + "model.safetensors"] = change
    with pytest.raises(SourceChanged):
        world.bring(source, tmp_path / "out")


def test_a_source_that_nobody_pinned_is_not_fetched(world: World, tmp_path: Path) -> None:
    source = world.pin()["source"]
    source["files"][0]["etag"] = '"another"'
    with pytest.raises(InvalidRequest, match="must be pinned"):
        world.bring(source, tmp_path / "out")


# --- transfers -----------------------------------------------------------------------------------


def test_a_large_file_comes_in_ranges_over_several_connections(world: World, tmp_path: Path, segments: None) -> None:
    source = world.pin()["source"]
    world.site.requests.clear()
    world.bring(source, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == WEIGHTS
    ranges = [part for path, part in world.asked("GET") if path == "model.safetensors"]
    assert sorted(ranges) == sorted(
        f"bytes={start}-{min(start + 100_000, len(WEIGHTS)) - 1}" for start in range(0, len(WEIGHTS), 100_000)
    )
    conditions = {headers.get("If-Range") for _, _, part, headers in world.site.requests if part}
    assert conditions == {f'"{hashlib.md5(WEIGHTS).hexdigest()}"'}


@pytest.mark.parametrize("takes_ranges", [True, False])
def test_broken_connections_are_resumed(world: World, tmp_path: Path, segments: None, takes_ranges: bool) -> None:
    source = world.pin()["source"]
    world.site.takes_ranges = takes_ranges
    world.site.cut_after_bytes = 60_000 if takes_ranges else None
    world.bring(source, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == WEIGHTS


def test_the_next_attempt_goes_on_where_the_last_one_broke_off(world: World, tmp_path: Path) -> None:
    source = world.pin()["source"]
    path = FOLDER + "model.safetensors"
    head = {"Content-Length": str(len(WEIGHTS)), "ETag": f'"{hashlib.md5(WEIGHTS).hexdigest()}"'}

    def break_off(handler: Handler) -> None:
        world.site.acts[path] = Reply(500)
        handler.send_response(200)
        for name, value in head.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(WEIGHTS[:400_000])

    world.site.acts[path] = break_off
    with pytest.raises(SourceUnavailable, match="HTTP 500"):
        world.bring(source, tmp_path / "first", cache_dir=str(tmp_path / "cache"))
    world.site.acts.clear()
    world.site.requests.clear()
    world.bring(source, tmp_path / "second", cache_dir=str(tmp_path / "cache"))
    assert (tmp_path / "second" / "model.safetensors").read_bytes() == WEIGHTS
    assert world.asked("GET") == [("model.safetensors", "bytes=400000-")]


def send_for_ever(handler: Handler) -> None:
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(b"x" * 65536)


def test_endless_bodies_are_cut_off(world: World, tmp_path: Path) -> None:
    source = world.pin()["source"]
    world.site.acts[FOLDER + "SHA256SUMS"] = send_for_ever
    with pytest.raises(CheckpointInvalid, match="more than 1048576 bytes"):
        world.pin()
    world.site.has_etag = world.site.has_modified = False
    world.site.put({"SHA256SUMS": SUMS})
    world.site.acts = {}
    source = world.pin()["source"]
    world.site.acts[FOLDER + "config.json"] = send_for_ever
    with pytest.raises(SourceUnavailable, match="more bytes of"):
        world.bring(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("headers", "error", "sentence"),
    [
        ({"Content-Encoding": "gzip"}, SourceUnavailable, "compresses"),
        ({"Content-Length": "7"}, SourceChanged, "no longer"),
        ({"Content-Length": "99999999999"}, SourceChanged, "no longer"),
    ],
)
def test_bodies_that_are_not_what_they_should_be_are_refused(
    world: World, tmp_path: Path, headers: dict[str, str], error: type[EdgeKilnError], sentence: str
) -> None:
    source = world.pin()["source"]
    data = FILES["config.json"]
    etag = {"ETag": f'"{hashlib.md5(data).hexdigest()}"'}
    world.site.acts[FOLDER + "config.json"] = Reply(200, {**etag, **headers}, data)
    with pytest.raises(error, match=sentence):
        world.bring(source, tmp_path / "out")


def test_a_body_shorter_than_stated_is_not_taken(world: World, tmp_path: Path) -> None:
    source = world.pin()["source"]
    world.site.acts[FOLDER + "config.json"] = Reply(200, {"Content-Length": "23"}, b"short")

    def end_early(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(FILES["config.json"])))
        handler.send_header("ETag", f'"{hashlib.md5(FILES["config.json"]).hexdigest()}"')
        handler.end_headers()

    world.site.acts[FOLDER + "config.json"] = end_early
    with pytest.raises(SourceUnavailable, match="broke off after 0 of"):
        world.bring(source, tmp_path / "out")


def test_a_body_that_crawls_counts_as_broken(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = world.pin()["source"]
    monkeypatch.setattr(download, "SLOW_S", 0.0)
    with pytest.raises(SourceUnavailable, match="broke off"):
        world.bring(source, tmp_path / "out")
    monkeypatch.setattr(download, "SLOW_BYTES", 0)
    world.bring(source, tmp_path / "again")


def test_a_small_document_that_crawls_is_given_up(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.site.put({"SHA256SUMS": SUMS})
    monkeypatch.setattr(web_client, "SMALL_S", -1.0)
    with pytest.raises(SourceUnavailable, match="too slowly"):
        world.pin()


# --- requests that would reach into the worker's own network -------------------------------------


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.0.0.1", "169.254.169.254", "::1", "::ffff:127.0.0.1", "64:ff9b::a9fe:a9fe", "fd00::1", "0.0.0.0"],
)
def test_a_name_at_an_address_that_is_not_public_is_never_connected_to(world: World, address: str) -> None:
    world.rules = HostRules()
    # One bad address among good ones suffices.
    world.names["models.example"] = [["203.0.114.7", address]]
    with pytest.raises(SourceNotAllowed, match="no public address"):
        world.pin()
    assert world.site.requests == []


def test_a_name_is_resolved_once_for_a_whole_step(world: World, tmp_path: Path) -> None:
    # Vouched for, so that a second, rebound answer would be connected to if it were asked for.
    world.names["models.example"] = [["127.0.0.1"], ["127.0.0.99"]]
    world.pin()
    assert world.lookups == ["models.example"]


def test_a_name_that_turns_to_the_loopback_between_steps_is_refused(world: World, tmp_path: Path) -> None:
    source = world.pin()["source"]
    world.rules = HostRules()
    with pytest.raises(SourceNotAllowed):
        world.bring(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("target", "error"),
    [
        ("http://169.254.169.254/latest/meta-data/", SourceNotAllowed),
        ("https://169.254.169.254/latest/meta-data/", SourceNotAllowed),
        ("https://127.0.0.1:{port}/secret", SourceNotAllowed),
        ("https://[::ffff:127.0.0.1]:{port}/secret", SourceNotAllowed),
        ("https://inside.example:{port}/secret", SourceNotAllowed),
        ("https://2130706433:{port}/secret", SourceUnavailable),
        ("https://user:hush@models.example:{port}/models/tiny/config.json", SourceUnavailable),
        ("file:///etc/passwd", SourceUnavailable),
        ("gopher://models.example/", SourceUnavailable),
        ("//inside.example:{port}/secret", SourceNotAllowed),
    ],
)
def test_redirects_are_judged_like_first_addresses(world: World, target: str, error: type[EdgeKilnError]) -> None:
    world.names["inside.example"] = [["127.0.0.1"]]
    where = target.format(port=world.port)
    world.site.put({"secret": b"the inner network's"}, "/")
    world.site.acts[FOLDER + "config.json"] = Reply(302, {"Location": where})
    with pytest.raises(error) as caught:
        world.pin()
    assert "hush" not in json.dumps(caught.value.to_json())
    assert not any(path == "/secret" for _, path, _, _ in world.site.requests)


def test_a_redirect_to_an_allowed_place_is_followed_and_its_query_told_to_nobody(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    world.site.files["/elsewhere/model.safetensors?signature=hush"] = WEIGHTS
    target = world.url(folder="/elsewhere/model.safetensors?signature=hush")
    world.site.acts[FOLDER + "model.safetensors"] = Reply(307, {"Location": target})
    figures = world.pin()
    world.bring(figures["source"], tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == WEIGHTS
    assert "hush" not in json.dumps(figures)
    assert "hush" not in caplog.text


def test_redirects_end(world: World) -> None:
    world.site.acts[FOLDER + "config.json"] = Reply(302, {"Location": FOLDER + "config.json"})
    with pytest.raises(SourceUnavailable, match="redirects more than 5 times"):
        world.pin()


def test_the_operators_list_of_hosts_holds_for_redirects_too(world: World) -> None:
    world.names["other.example"] = [["203.0.114.7"]]
    world.rules = HostRules(hosts=("*.example.org", "models.example"), private_hosts=world.rules.private_hosts)
    world.site.acts[FOLDER + "config.json"] = Reply(302, {"Location": "https://other.example/config.json"})
    with pytest.raises(SourceNotAllowed, match=r"reads no checkpoints from other\.example"):
        world.pin()


@pytest.mark.parametrize(
    "url",
    [
        "https://user:hush@models.example/tiny/",
        "https://models.example/tiny/?token=hush",
        "https://models.example/tiny/\r\nX-Hush: hush",
        "https://2130706433/tiny/",
        "https://0x7f000001/tiny/",
        "https://127.1/tiny/",
        "https://models.example/../tiny/",
        "https://models.example/%2e%2e/tiny/",
        "file:///hush",
        "ftp://models.example/",
        "https://",
    ],
)
def test_addresses_that_hide_something_are_invalid(world: World, url: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        world.pin(url)
    assert "hush" not in caught.value.message
    assert world.lookups == []


def test_http_is_for_hosts_that_the_operator_vouches_for(world: World) -> None:
    with run_web_server(None) as plain:
        plain.site.put(FILES)
        world.names["plain.example"] = [["127.0.0.1"]]
        url = f"http://plain.example:{plain.port}{FOLDER}"
        with pytest.raises(SourceNotAllowed, match="use https"):
            world.pin(url)
        world.rules = HostRules(private_hosts=("plain.example",))
        assert [file["path"] for file in world.pin(url)["files"]] == NEEDED


def test_a_certificate_of_another_name_is_refused(world: World) -> None:
    world.names["impostor.example"] = [["127.0.0.1"]]
    world.rules = HostRules(private_hosts=("impostor.example",))
    with pytest.raises(SourceUnavailable, match="certificate"):
        world.pin(world.url("impostor.example"))
    assert world.site.requests == []


def test_nothing_of_this_machine_is_sent(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine models.example login me password hush\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    world.site.acts[FOLDER + "merges.txt"] = Reply(404, {"Set-Cookie": "hush=1"})
    world.pin()
    sent = json.dumps([headers for *_, headers in world.site.requests])
    assert not any(word in sent for word in ("hush", "Authorization", "Cookie"))


def test_an_address_that_does_not_answer_gives_way_to_the_next(world: World) -> None:
    world.names["models.example"] = [["127.0.0.2", "127.0.0.1"]]
    assert [file["path"] for file in world.pin()["files"]] == NEEDED
