"""The real Hub client against a hub on the loopback: pinning, fetching, resuming, refusing."""

from __future__ import annotations

import hashlib
import json
import socket
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import huggingface_hub.utils
import pytest

from service.errors import (
    CheckpointUnsafe,
    DiskFull,
    EdgeKilnError,
    InvalidRequest,
    InvalidSettings,
    SourceForbidden,
    SourceNotAllowed,
    SourceNotFound,
    SourceUnavailable,
)
from tests.hub_server import Faults, HubServer, run_hub
from workers.fetch import fetch, resolve

REPO = "kilns/tiny"
TOKEN = "hf_secretsecretsecret"
WEIGHTS = bytes(range(256)) * 4000
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": WEIGHTS,
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{}",
    "modeling_evil.py": b"raise SystemExit",
    "pytorch_model.bin": b"pickle",
    "original/model.safetensors": b"a second copy",
    "README.md": b"# Tiny",
}
NEEDED = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]


def ignore_progress(message: str, fraction: float | None = None) -> None:
    """Take progress and drop it."""


@pytest.fixture(scope="module")
def running_hub() -> Iterator[HubServer]:
    with run_hub() as hub:
        yield hub
    huggingface_hub.utils.close_session()


@pytest.fixture
def hub(running_hub: HubServer) -> HubServer:
    running_hub.repositories.clear()
    running_hub.requests.clear()
    running_hub.faults = Faults()
    return running_hub


def pin(hub: HubServer, repo: str = REPO, revision: str | None = None, **params: Any) -> dict[str, Any]:
    source = {"kind": "hub", "repo": repo, "revision": revision, "endpoint": hub.endpoint}
    return resolve.run({"source": source, **params}, {}, Path("/nonexistent"), ignore_progress)


def bring(source: dict[str, Any], output_dir: Path, **params: Any) -> dict[str, Any]:
    output_dir.mkdir()
    return fetch.run({"source": source, **params}, {}, output_dir, ignore_progress)


def test_resolve_pins_the_default_branch_to_its_commit_and_lists_needed_files(hub: HubServer) -> None:
    commit = hub.add_commit(REPO, FILES)
    figures = pin(hub)
    assert figures["source"] == {"kind": "hub", "repo": REPO, "revision": commit, "endpoint": hub.endpoint}
    assert [file["path"] for file in figures["files"]] == NEEDED
    assert figures["size_bytes"] == sum(len(FILES[name]) for name in NEEDED)


def test_resolve_takes_a_branch_and_a_commit(hub: HubServer) -> None:
    old = hub.add_commit(REPO, FILES)
    new = hub.add_commit(REPO, {**FILES, "config.json": b'{"model_type": "other"}'}, branch="next")
    assert pin(hub, revision="next")["source"]["revision"] == new
    assert pin(hub, revision=old)["source"]["revision"] == old


def test_endpoint_comes_from_the_environment_when_the_request_names_none(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.add_commit(REPO, FILES)
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint + "/")
    figures = resolve.run({"source": {"kind": "hub", "repo": REPO}}, {}, Path("/nonexistent"), ignore_progress)
    assert figures["source"] == {"kind": "hub", "repo": REPO, "revision": commit, "endpoint": hub.endpoint}


def test_fetch_brings_only_needed_files_and_their_digests(hub: HubServer, tmp_path: Path) -> None:
    hub.add_commit(REPO, FILES)
    figures = bring(pin(hub)["source"], tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == NEEDED
    assert all((tmp_path / "out" / name).read_bytes() == FILES[name] for name in NEEDED)
    digests = [[name, hashlib.sha256(FILES[name]).hexdigest()] for name in NEEDED]
    canonical = json.dumps(digests, separators=(",", ":")).encode()
    assert figures["checkpoint_digest"] == hashlib.sha256(canonical).hexdigest()
    assert [[file["path"], file["sha256"]] for file in figures["files"]] == digests


def test_fetch_brings_the_pinned_commit_after_the_branch_moved(hub: HubServer, tmp_path: Path) -> None:
    hub.add_commit(REPO, FILES)
    source = pin(hub)["source"]
    hub.add_commit(REPO, {**FILES, "config.json": b"changed"})
    bring(source, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_bytes() == FILES["config.json"]


def test_progress_reaches_the_end_in_bytes(hub: HubServer, tmp_path: Path) -> None:
    hub.add_commit(REPO, FILES)
    source = pin(hub)["source"]
    seen: list[tuple[str, float | None]] = []
    (tmp_path / "out").mkdir()
    figures = fetch.run(
        {"source": source}, {}, tmp_path / "out", lambda message, fraction=None: seen.append((message, fraction))
    )
    assert seen[-1][1] == 1.0
    assert f"{figures['size_bytes']} of {figures['size_bytes']} bytes" in seen[-1][0]


def test_a_connection_that_breaks_is_resumed_in_the_same_attempt(hub: HubServer, tmp_path: Path) -> None:
    hub.add_commit(REPO, FILES)
    source = pin(hub)["source"]
    hub.faults.cut_after_bytes = 300_000
    bring(source, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == WEIGHTS
    assert [request.range for request in hub.requests if "/store/" in request.path] == [
        None,
        "bytes=300000-",
        "bytes=600000-",
        "bytes=900000-",
    ]


def test_the_next_attempt_resumes_from_the_cache_folder(hub: HubServer, tmp_path: Path) -> None:
    hub.add_commit(REPO, FILES)
    source = pin(hub)["source"]
    hub.faults = Faults(cut_after_bytes=500_000)
    seen = len(hub.requests)

    def fail_after_first_body(message: str, fraction: float | None = None) -> None:
        if any("/store/" in request.path for request in hub.requests[seen:]):
            hub.faults.fail_count, hub.faults.fail_path = 100, "model.safetensors"

    (tmp_path / "first").mkdir()
    with pytest.raises(SourceUnavailable):
        fetch.run(
            {"source": source, "cache_dir": str(tmp_path / "cache")}, {}, tmp_path / "first", fail_after_first_body
        )
    assert list((tmp_path / "first").iterdir()) == []

    hub.faults = Faults()
    seen = len(hub.requests)
    bring(source, tmp_path / "second", cache_dir=str(tmp_path / "cache"))
    assert (tmp_path / "second" / "model.safetensors").read_bytes() == WEIGHTS
    downloads = [request for request in hub.requests[seen:] if "/resolve/" in request.path]
    assert [(request.path.rsplit("/", 1)[1], request.range) for request in downloads] == [
        ("model.safetensors", "bytes=500000-")
    ]
    assert not (tmp_path / "cache").exists()


def test_a_server_without_ranges_is_read_from_the_start(hub: HubServer, tmp_path: Path) -> None:
    hub.add_commit(REPO, FILES)
    source = pin(hub)["source"]
    key_dir = tmp_path / "cache"
    hub.faults = Faults(cut_after_bytes=500_000, ignores_ranges=True)
    with pytest.raises(SourceUnavailable, match="broke off"):
        bring(source, tmp_path / "first", cache_dir=str(key_dir))
    hub.faults = Faults(ignores_ranges=True)
    bring(source, tmp_path / "second", cache_dir=str(key_dir))
    assert (tmp_path / "second" / "model.safetensors").read_bytes() == WEIGHTS


def test_a_damaged_partial_file_is_found_and_dropped(hub: HubServer, tmp_path: Path) -> None:
    hub.add_commit(REPO, FILES)
    source = pin(hub)["source"]
    cache_dir = tmp_path / "cache"
    hub.faults = Faults(cut_after_bytes=500_000, ignores_ranges=True)
    with pytest.raises(SourceUnavailable):
        bring(source, tmp_path / "first", cache_dir=str(cache_dir))
    part = cache_dir / "model.safetensors"
    part.write_bytes(b"x" * part.stat().st_size)
    hub.faults = Faults()
    with pytest.raises(SourceUnavailable, match="other bytes"):
        bring(source, tmp_path / "second", cache_dir=str(cache_dir))
    bring(source, tmp_path / "third", cache_dir=str(cache_dir))
    assert (tmp_path / "third" / "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_bytes_other_than_the_hub_states_are_refused(hub: HubServer, tmp_path: Path, name: str) -> None:
    hub.add_commit(REPO, FILES)
    source = pin(hub)["source"]
    hub.faults.wrong_bytes = {name}
    with pytest.raises(SourceUnavailable, match=f"{name} arrived with other bytes") as caught:
        bring(source, tmp_path / "out")
    assert caught.value.retryable


def test_a_body_longer_than_stated_is_cut_off(hub: HubServer, tmp_path: Path) -> None:
    hub.add_commit(REPO, FILES)
    source = pin(hub)["source"]
    hub.faults.extra_bytes = 10
    with pytest.raises(SourceUnavailable, match="more bytes of"):
        bring(source, tmp_path / "out")


@pytest.mark.parametrize(
    "target",
    [
        *("http://127.0.0.1:9/store", "https://127.0.0.1:9/store", "http://example.com", "https://[::1]/store"),
        *("https://169.254.169.254/latest", "https://[::ffff:10.0.0.1]/store", "https://localhost/store"),
    ],
)
def test_a_redirect_into_the_workers_network_is_refused(hub: HubServer, tmp_path: Path, target: str) -> None:
    hub.add_commit(REPO, FILES)
    source = pin(hub)["source"]
    hub.faults.redirect_to = target
    with pytest.raises(SourceNotAllowed, match=r"over http|no public address"):
        bring(source, tmp_path / "out")


def test_a_redirect_is_opened_where_it_was_judged(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name turns to the loopback once it has been looked at: nothing asks for it again."""
    hub.add_commit(REPO, FILES, tokens={TOKEN})
    source = pin(hub, credential=TOKEN)["source"]
    resolve = socket.getaddrinfo
    answers = ["93.184.215.14", "127.0.0.1", "127.0.0.1"]
    asked: list[tuple[str, Any]] = []

    def resolve_once(host: str, *rest: Any, **options: Any) -> Any:
        return resolve(answers.pop(0) if host == "cdn.example.org" else host, *rest, **options)

    def send(client: httpx2.Client, request: httpx2.Request, **_: Any) -> httpx2.Response:
        if request.url.host in ("127.0.0.1", "localhost"):
            return send_really(client, request, **_)
        asked.append((request.url.host, request.headers.get("Authorization")))
        raise httpx2.ConnectError("nobody is there")

    send_really = httpx2.Client.send
    monkeypatch.setattr(socket, "getaddrinfo", resolve_once)
    monkeypatch.setattr(httpx2.Client, "send", send)
    hub.faults.redirect_to = "https://cdn.example.org/store"
    with pytest.raises(SourceUnavailable):
        bring(source, tmp_path / "out", credential=TOKEN)
    assert set(asked) == {("93.184.215.14", None)}
    assert len(answers) == 2


def test_a_server_error_is_retryable_and_the_next_attempt_succeeds(hub: HubServer, tmp_path: Path) -> None:
    hub.add_commit(REPO, FILES)
    hub.faults.fail_count = 1
    with pytest.raises(SourceUnavailable, match="HTTP 500") as caught:
        pin(hub)
    assert caught.value.retryable
    source = pin(hub)["source"]
    hub.faults = Faults(fail_count=1, fail_path="tokenizer.json", fail_status=503)
    with pytest.raises(SourceUnavailable, match="HTTP 503"):
        bring(source, tmp_path / "first")
    bring(source, tmp_path / "second")


def test_missing_repository_and_revision_are_not_found(hub: HubServer) -> None:
    with pytest.raises(SourceNotFound, match=r"kilns/tiny at .* does not exist"):
        pin(hub)
    hub.add_commit(REPO, FILES)
    with pytest.raises(SourceNotFound, match="no revision 'v2'"):
        pin(hub, revision="v2")


def test_a_private_repository_needs_its_token(hub: HubServer, tmp_path: Path) -> None:
    hub.add_commit(REPO, FILES, tokens={TOKEN})
    with pytest.raises(SourceForbidden, match="give a token"):
        pin(hub)
    with pytest.raises(SourceForbidden, match="does not suffice"):
        pin(hub, credential="hf_other")
    figures = pin(hub, credential=TOKEN)
    assert TOKEN not in json.dumps(figures)
    with pytest.raises(SourceForbidden):
        bring(figures["source"], tmp_path / "first")
    bring(figures["source"], tmp_path / "second", credential=TOKEN, cache_dir=str(tmp_path / "cache"))
    assert (tmp_path / "second" / "model.safetensors").read_bytes() == WEIGHTS


def test_a_gated_repository_is_forbidden(hub: HubServer) -> None:
    hub.add_commit(REPO, FILES, is_gated=True)
    with pytest.raises(SourceForbidden, match="gated"):
        pin(hub, credential=TOKEN)


def test_a_token_of_this_machine_is_never_sent(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add_commit(REPO, FILES)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    pin(hub)
    assert [request.authorization for request in hub.requests] == [None]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 429, 500])
def test_a_token_that_the_server_repeats_reaches_no_error(
    hub: HubServer, status: int, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    hub.add_commit(REPO, FILES, tokens={TOKEN})
    hub.faults = Faults(fail_count=1, fail_status=status, echoes_credentials=True)
    with pytest.raises(EdgeKilnError) as caught:
        pin(hub, credential=TOKEN)
    assert TOKEN not in json.dumps(caught.value.to_json())
    assert TOKEN not in "".join(traceback.format_exception(caught.value))
    assert TOKEN not in "".join(capfd.readouterr()) + caplog.text


def test_a_token_stays_out_of_every_file(hub: HubServer, tmp_path: Path) -> None:
    hub.add_commit(REPO, FILES, tokens={TOKEN})
    source = pin(hub, credential=TOKEN)["source"]
    hub.faults = Faults(cut_after_bytes=500_000, ignores_ranges=True)
    with pytest.raises(SourceUnavailable):
        bring(source, tmp_path / "out", credential=TOKEN, cache_dir=str(tmp_path / "cache"))
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert written
    assert not any(TOKEN.encode() in path.read_bytes() for path in written)


def test_an_unreachable_hub_is_retryable(tmp_path: Path) -> None:
    with run_hub() as gone:
        endpoint = gone.endpoint
    source = {"kind": "hub", "repo": REPO, "endpoint": endpoint}
    with pytest.raises(SourceUnavailable, match="could not be reached") as caught:
        resolve.run({"source": source}, {}, tmp_path, ignore_progress)
    assert caught.value.retryable


def test_something_that_is_no_hub_is_named(hub: HubServer) -> None:
    source = {"kind": "hub", "repo": REPO, "endpoint": hub.endpoint + "/elsewhere"}
    with pytest.raises(SourceNotFound):
        resolve.run({"source": source}, {}, Path("/nonexistent"), ignore_progress)


def test_only_pickled_weights_are_refused_before_anything_is_fetched(hub: HubServer) -> None:
    files = {name: data for name, data in FILES.items() if name != "model.safetensors"}
    hub.add_commit(REPO, files)
    with pytest.raises(
        CheckpointUnsafe, match=r"pytorch_model\.bin, a pickle .* convert the checkpoint to safetensors"
    ):
        pin(hub)
    assert not any("/resolve/" in request.path for request in hub.requests)


def test_two_fetches_of_one_source_on_one_host_do_not_share_a_partial_file(hub: HubServer, tmp_path: Path) -> None:
    hub.add_commit(REPO, FILES)
    source = pin(hub)["source"]
    refused: list[SourceUnavailable] = []

    def fetch_again(message: str, fraction: float | None = None) -> None:
        if not refused:
            with pytest.raises(SourceUnavailable, match="already") as caught:
                bring(source, tmp_path / "second", cache_dir=str(tmp_path / "cache"))
            refused.append(caught.value)

    (tmp_path / "first").mkdir()
    fetch.run({"source": source, "cache_dir": str(tmp_path / "cache")}, {}, tmp_path / "first", fetch_again)
    assert refused
    assert (tmp_path / "first" / "model.safetensors").read_bytes() == WEIGHTS


def test_a_full_disk_is_named(hub: HubServer, tmp_path: Path) -> None:
    hub.add_commit(REPO, FILES)
    source = pin(hub)["source"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").symlink_to("/dev/full")
    with pytest.raises(DiskFull, match="No space is left"):
        fetch.run({"source": source}, {}, tmp_path / "out", ignore_progress)


def test_a_token_is_not_sent_in_the_clear(tmp_path: Path) -> None:
    source = {"kind": "hub", "repo": REPO, "endpoint": "http://hub.example"}
    with pytest.raises(InvalidSettings, match="in the clear"):
        resolve.run({"source": source, "credential": TOKEN}, {}, tmp_path, ignore_progress)


@pytest.mark.parametrize(
    "fields",
    [
        {"repo": "../../etc"},
        {"repo": "a/b/c"},
        {"repo": "a/b?x=1"},
        {"revision": "main?x"},
        {"endpoint": "ftp://hub.example"},
        {"endpoint": "https://user:secret@hub.example"},
        {"endpoint": "https://hub.example/?x=1"},
    ],
)
def test_names_that_could_change_the_address_are_invalid(tmp_path: Path, fields: dict[str, str]) -> None:
    source = {"kind": "hub", "repo": REPO, "endpoint": "https://hub.example", **fields}
    with pytest.raises(InvalidRequest) as caught:
        resolve.run({"source": source}, {}, tmp_path, ignore_progress)
    assert "secret" not in caught.value.message
