"""Files that arrive whole or not at all.

Owns how an artifact gets onto a disk: into `NAME.part`, resumed by range, its SHA-256 checked, then renamed. Called
by `service.client`.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from service.errors import BlobCorrupt, EdgeKilnError, InvalidRequest, ServiceUnavailable, SignatureInvalid
from service.signing import Verifier, manifest_name
from service.storage import digest_bytes, digest_file

#: Opens a path of the server with headers.
Opener = Callable[[str, Mapping[str, str]], AbstractContextManager["Answer"]]
#: Sees name, bytes so far and size.
OnBytes = Callable[[str, int, int], None]

#: Attempts in a row that bring not one byte.
_TRIES = 4
_PAUSE_S = 0.5
_PARTIAL = 206
_NAME = re.compile(r"[^/\\\x00-\x1f]{1,250}")


class Answer(Protocol):
    """The part of an HTTP response that a download needs."""

    @property
    def status_code(self) -> int:
        """The HTTP status."""

    def iter_bytes(self, chunk_size: int | None = None) -> Any:
        """Yield the body in pieces."""

    def read(self) -> bytes:
        """Return the body whole."""


def fetch_artifact(
    open_path: Opener, artifact: Mapping[str, Any], folder: Path, on_bytes: OnBytes | None = None
) -> Path:
    """Download an artifact into `folder` and return its path; a file with the right digest is kept.

    A partial file is resumed; when the whole then has another digest, it is fetched once more from the start. Raises
    `BlobCorrupt` when that is wrong too.
    """
    path = folder / check_name(str(artifact["name"]))
    digest = str(artifact["sha256"])
    if path.is_file() and digest_file(path)[0] == digest:
        return path
    partial = path.with_name(f"{path.name}.part")
    was_resumed = partial.exists()
    _complete(open_path, artifact, partial, on_bytes)
    found = digest_file(partial)[0]
    if found != digest and was_resumed:
        partial.unlink()
        _complete(open_path, artifact, partial, on_bytes)
        found = digest_file(partial)[0]
    if found != digest:
        partial.unlink()
        raise BlobCorrupt(
            f"{path.name} arrived with SHA-256 {found} instead of {digest} and was thrown away. Download it again.",
            expected=digest,
            found=found,
        )
    _flush(partial)
    partial.replace(path)
    return path


def fetch_manifest(open_path: Opener, artifact: Mapping[str, Any], folder: Path) -> Path:
    """Write an artifact's manifest to `NAME.manifest.json` and return its path; raises `BlobCorrupt`."""
    path = folder / manifest_name(check_name(str(artifact["name"])))
    what = f"The manifest of {artifact['name']}"
    return _fetch_document(open_path, str(artifact["manifest_url"]), str(artifact["manifest_sha256"]), what, path)


def fetch_measurement(open_path: Opener, measurement: Mapping[str, Any], folder: Path) -> Path:
    """Write a measurement's document under its name and return its path; raises `BlobCorrupt`."""
    path = folder / check_name(str(measurement["name"]))
    what = f"The measurement {measurement['name']}"
    return _fetch_document(open_path, str(measurement["url"]), str(measurement["sha256"]), what, path)


def _fetch_document(open_path: Opener, url: str, digest: str, what: str, path: Path) -> Path:
    with open_path(url, {}) as answer:
        data = answer.read()
    found = digest_bytes(data)
    if found != digest:
        raise BlobCorrupt(
            f"{what} arrived with SHA-256 {found} instead of {digest}. Download it again.",
            expected=digest,
            found=found,
        )
    _write(path, data)
    return path


def fetch_signature(
    open_path: Opener, artifact: Mapping[str, Any], folder: Path, verifier: Verifier | None = None
) -> None:
    """Write an artifact's signature, if it has one, to `NAME.manifest.json.sig`.

    With a verifier it must have one, over the very files that are to be downloaded; raises `SignatureInvalid`, and
    writes nothing then.
    """
    name = check_name(str(artifact["name"]))
    place = artifact.get("signature_url")
    if place is None:
        if verifier is not None:
            raise SignatureInvalid(f"{name} was published without a signature. Nothing was kept.", name=name)
        return
    with open_path(str(place), {}) as answer:
        data = answer.read()
    if verifier is not None:
        digests = {name: str(artifact["sha256"]), manifest_name(name): str(artifact["manifest_sha256"])}
        verifier.verify(name, data, digests)
    _write(folder / f"{manifest_name(name)}.sig", data)


def _write(path: Path, data: bytes) -> None:
    """Write a small file whole or not at all."""
    partial = path.with_name(f"{path.name}.part")
    partial.write_bytes(data)
    _flush(partial)
    partial.replace(path)


def check_name(name: str) -> str:
    """Return a server's file name if it can only mean a file in the folder; raises `InvalidRequest`."""
    if not _NAME.fullmatch(name) or name.startswith("."):
        raise InvalidRequest(f"The server calls an artifact {name[:80]!r}, which is not a plain file name.", name=name)
    return name


def _complete(open_path: Opener, artifact: Mapping[str, Any], partial: Path, on_bytes: OnBytes | None) -> None:
    """Fetch what is missing of a file; broken connections are taken up as long as bytes arrive."""
    size_bytes = int(artifact["size_bytes"])
    failures = 0
    while True:
        before_bytes = partial.stat().st_size if partial.exists() else 0
        if before_bytes > size_bytes:
            partial.unlink()
            before_bytes = 0
        if before_bytes == size_bytes and partial.exists():
            return
        failure: EdgeKilnError = ServiceUnavailable(f"The server sends no more of {artifact['name']}. Try again.")
        try:
            _append(open_path, artifact, partial, before_bytes, on_bytes)
        except EdgeKilnError as error:
            failure = error
        has_grown = partial.exists() and partial.stat().st_size > before_bytes
        failures = 0 if has_grown else failures + 1
        if not failure.retryable or (failures >= _TRIES):
            raise failure
        time.sleep(_PAUSE_S * failures)


def _append(
    open_path: Opener, artifact: Mapping[str, Any], partial: Path, start: int, on_bytes: OnBytes | None
) -> None:
    headers = {"Range": f"bytes={start}-", "If-Range": f'"{artifact["sha256"]}"'} if start else {}
    with open_path(str(artifact["url"]), headers) as answer:
        # A server that sends the whole instead of the rest is taken at its word.
        is_rest = answer.status_code == _PARTIAL
        done_bytes = start if is_rest else 0
        with partial.open("ab" if is_rest else "wb") as stream:
            for chunk in answer.iter_bytes():
                stream.write(chunk)
                done_bytes += len(chunk)
                if on_bytes is not None:
                    on_bytes(str(artifact["name"]), done_bytes, int(artifact["size_bytes"]))


def _flush(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
