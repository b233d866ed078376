"""A file sent in pieces, from the sender's side.

Owns how an upload goes on: after a broken connection, a server that was away, or in another process. Speaks the
resumable uploads of the REST API through what `service.client` gives it.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar

from service.errors import (
    BlobCorrupt,
    Conflict,
    EdgeKilnError,
    LedgerBusy,
    NotFound,
    RemoteError,
    ServiceUnavailable,
    StoreUnavailable,
)

T = TypeVar("T")
#: Sees name, bytes so far and size.
OnBytes = Callable[[str, int, int], None]

_PATH = "/v1/uploads/resumable"
_TUS = {"Tus-Resumable": "1.0.0"}
#: What one request carries: proxies bound its size and its time.
_PIECE_BYTES = 64 << 20
_CHUNK_BYTES = 256 << 10
_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 2.0
_MAX_NAME = 200
#: How often a server may fail to put the pieces together before its being at it counts for nothing.
_MOST_FAILED_TRIES = 3
#: What goes by.
_PASSING = (ServiceUnavailable, StoreUnavailable, LedgerBusy)


class Reply(Protocol):
    """The part of an HTTP response that an upload needs."""

    @property
    def headers(self) -> Mapping[str, str]:
        """The response's headers."""

    def json(self) -> Any:
        """Return the body as JSON."""


class Send(Protocol):
    """Sends one request; raises the error that the server names, and `ServiceUnavailable`."""

    def __call__(
        self, method: str, path: str, headers: Mapping[str, str], content: Iterable[bytes] | None = None
    ) -> Reply:
        """Return the answer to a request that went well."""


@dataclass(frozen=True)
class LargeFile:
    """A file that is sent."""

    path: Path
    sha256: str
    size_bytes: int


def name_upload(path: Path) -> str:
    """Return what a file is called on the server: its name, without characters that cannot be shown."""
    return "".join(each if each.isprintable() else "\ufffd" for each in path.name[:_MAX_NAME])


def send_file(send: Send, file: LargeFile, patience_s: float, on_bytes: OnBytes | None = None) -> dict[str, Any]:
    """Upload a file and return its upload, as `POST /v1/uploads` does.

    Goes on with what an earlier call left unfinished. Tries again for `patience_s` seconds after the last byte that
    arrived, or the last sign that the server puts the pieces together; then raises `ServiceUnavailable`. Raises
    `BlobCorrupt` when the file changed meanwhile.
    """
    return _Sender(send, file, patience_s, on_bytes).run()


class _Sender:
    def __init__(self, send: Send, file: LargeFile, patience_s: float, on_bytes: OnBytes | None) -> None:
        self._send = send
        self._file = file
        self._patience_s = patience_s
        self._on_bytes = on_bytes
        self._heard_at = time.monotonic()
        self._pause_s = _PAUSE_S
        self._path = ""

    def run(self) -> dict[str, Any]:
        document = self._patiently(self._open)
        self._path = f"{_PATH}/{document['id']}"
        with self._file.path.open("rb") as stream:
            while document["state"] == "receiving":
                before_bytes = document["offset_bytes"]
                try:
                    self._append(stream, before_bytes)
                except (*_PASSING, Conflict) as error:
                    self._pause(error)
                document = self._patiently(self._read)
                if document["offset_bytes"] > before_bytes:
                    self._go_on()
        document = self._await_whole(document)
        if document["upload"] is None:
            raise _name_failure(document["error"])
        return dict(document["upload"])

    def _await_whole(self, document: dict[str, Any]) -> dict[str, Any]:
        """Wait until the server has put the pieces together, for as long as it shows that it is at it."""
        self._go_on()
        most_failures = document.get("failed_tries", 0) + _MOST_FAILED_TRIES
        while document["state"] == "assembling":
            self._pause(
                ServiceUnavailable(
                    f"The server has every byte of {self._file.path}, but has not put them together for "
                    f"{self._patience_s:.0f} s. Upload the file again: nothing is sent twice."
                )
            )
            held_until = document.get("assembled_until")
            document = self._patiently(self._read)
            # A server that does not say, an older one, is taken to be at it.
            shows_life = document.get("assembled_until", ...) != held_until
            if shows_life and document.get("failed_tries", 0) < most_failures:
                self._go_on()
        return document

    def _open(self) -> dict[str, Any]:
        """Return an unfinished upload of the same file, or a new one."""
        for document in self._send("GET", _PATH, {}).json()["uploads"]:
            if (document["sha256"], document["size_bytes"]) == (self._file.sha256, self._file.size_bytes):
                return dict(document)
        metadata = {"filename": name_upload(self._file.path), "sha256": self._file.sha256}
        pairs = (f"{name} {base64.b64encode(value.encode()).decode()}" for name, value in metadata.items())
        headers = {**_TUS, "Upload-Length": str(self._file.size_bytes), "Upload-Metadata": ",".join(pairs)}
        location = self._send("POST", _PATH, headers).headers["Location"]
        return dict(self._send("GET", location, {}).json())

    def _read(self) -> dict[str, Any]:
        return dict(self._send("GET", self._path, {}).json())

    def _append(self, stream: IO[bytes], offset: int) -> None:
        end = min(offset + _PIECE_BYTES, self._file.size_bytes)
        headers = {
            **_TUS,
            "Upload-Offset": str(offset),
            "Content-Type": "application/offset+octet-stream",
            "Content-Length": str(end - offset),
        }
        self._send("PATCH", self._path, headers, _Piece(stream, self._file, offset, end, self._on_bytes))

    def _patiently(self, call: Callable[[], T]) -> T:
        while True:
            try:
                return call()
            except _PASSING as error:
                self._pause(error)

    def _pause(self, error: EdgeKilnError) -> None:
        """Wait before another try; raises `error` when nothing has gone on for too long."""
        if time.monotonic() - self._heard_at > self._patience_s:
            raise error
        time.sleep(self._pause_s)
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)

    def _go_on(self) -> None:
        self._heard_at, self._pause_s = time.monotonic(), _PAUSE_S


@dataclass(frozen=True)
class _Piece:
    """A piece of a file as a request's body, from its start each time that it is sent."""

    stream: IO[bytes]
    file: LargeFile
    offset: int
    end: int
    on_bytes: OnBytes | None

    def __iter__(self) -> Iterator[bytes]:
        self.stream.seek(self.offset)
        offset = self.offset
        while offset < self.end:
            chunk = self.stream.read(min(_CHUNK_BYTES, self.end - offset))
            if not chunk:
                raise BlobCorrupt(f"{self.file.path} became shorter while it was uploaded.", path=str(self.file.path))
            yield chunk
            offset += len(chunk)
            if self.on_bytes is not None:
                self.on_bytes(self.file.path.name, offset, self.file.size_bytes)


def _name_failure(error: Mapping[str, Any] | None) -> EdgeKilnError:
    if error is None:
        return NotFound("The upload was forgotten as soon as it was stored. Upload the file again.")
    if error["code"] == BlobCorrupt.code:
        return BlobCorrupt(error["message"], **error["details"])
    return RemoteError(error)
