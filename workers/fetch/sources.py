"""Where a checkpoint comes from.

Owns the protocol that every kind of source fulfils, the reading of a request's `source` object into one, and
the canonical digests of file lists. It must not touch files or sockets itself: `folder.py` and `hub.py` do.
Called by the steps `resolve` and `fetch`.
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from service.checkpoint_files import SourceFile
from service.errors import DiskFull, InvalidRequest
from service.web_addresses import HostRules
from workers.steps import Progress

#: How many bytes are read, hashed and written at a time.
CHUNK_BYTES = 4 * 2**20


@dataclass(frozen=True)
class Pinned:
    """A source at one immutable revision, and the files it has there."""

    #: The request's `source` with the revision filled in; holds no credential.
    source: dict[str, Any]
    files: list[SourceFile]


@dataclass(frozen=True)
class FetchedFile:
    """A file that was brought and whose bytes were hashed on the way."""

    path: str
    size_bytes: int
    sha256: str

    def to_json(self) -> dict[str, Any]:
        """Return the wire form."""
        return {"path": self.path, "size_bytes": self.size_bytes, "sha256": self.sha256}


class Source(Protocol):
    """One kind of place that holds checkpoints."""

    def pin(self, progress: Progress) -> Pinned:
        """Return the source's present revision; raises `SourceNotFound`, `SourceForbidden`, `SourceUnavailable`."""

    def bring(self, output_dir: Path, progress: Progress) -> list[FetchedFile]:
        """Write the files of the pinned revision into `output_dir`, hashing them on the way.

        Raises `SourceChanged` when the revision no longer has the pinned bytes, `DiskFull`, and what `pin` raises.
        """


class ByteProgress:
    """Turns bytes done into calls of a step's `progress`, at most one for each percent."""

    def __init__(self, progress: Progress, verb: str, total_bytes: int) -> None:
        self._progress = progress
        self._verb = verb
        self._total_bytes = total_bytes
        self._done_bytes = 0
        self._last_percent = -1

    def add(self, size_bytes: int, name: str) -> None:
        """Count `size_bytes` of the file `name` as done (negative when they must be done again)."""
        self._done_bytes += size_bytes
        fraction = min(1.0, self._done_bytes / self._total_bytes) if self._total_bytes else 1.0
        percent = int(fraction * 100)
        if percent != self._last_percent:
            self._last_percent = percent
            self._progress(f"{self._verb} {name}: {self._done_bytes} of {self._total_bytes} bytes", fraction)


def digest_canonical(document: Any) -> str:
    """Return the hex SHA-256 of the document's canonical JSON (sorted keys, no spaces, UTF-8)."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def digest_pins(files: Iterable[SourceFile]) -> str:
    """Return the revision of a source that has none of its own: SHA-256 over all that is known of its files."""
    return digest_canonical([file.to_pin() for file in files])


def digest_checkpoint(files: list[FetchedFile]) -> str:
    """Return a checkpoint's digest: SHA-256 over the canonical JSON list of [path, sha256], sorted by path."""
    return digest_canonical(sorted([file.path, file.sha256] for file in files))


@contextmanager
def report_full_disk(folder: Path) -> Iterator[None]:
    """Turn the operating system's "no space left" (or "quota exceeded") into `DiskFull`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(
                f"No space is left for the checkpoint's files in {folder}; free some and retry the job."
            ) from error
        raise


def open_source(
    source: Mapping[str, Any],
    credential: Any = None,
    cache_dir: Path | None = None,
    access: Mapping[str, Any] | None = None,
) -> Source:
    """Return the source that a request or a pinned source describes.

    `credential` is what the kind of source takes, such as a hub token; it stays in memory. `access` says what the
    operator allows of the network, and how it is reached. `cache_dir` is a host-local folder of this one pinned
    source, where partial downloads survive a failed attempt. Raises `InvalidRequest` for a kind or a field that
    does not exist.
    """
    # Imported here because these modules import this one.
    from workers.fetch.folder import FolderSource
    from workers.fetch.https import HttpsSource
    from workers.fetch.hub import HubSource

    kind = source.get("kind")
    if kind == "folder":
        _require_fields(source, {"kind", "path", "revision"})
        return FolderSource(_read_text(source, "path"), _read_optional_text(source, "revision"))
    if kind == "hub":
        _require_fields(source, {"kind", "repo", "revision", "endpoint"})
        return HubSource(
            repo=_read_text(source, "repo"),
            revision=_read_optional_text(source, "revision"),
            endpoint=_read_optional_text(source, "endpoint"),
            credential=credential,
            cache_dir=cache_dir,
            rules=HostRules.from_json(access or {}),
        )
    if kind == "https":
        _require_fields(source, {"kind", "url", "revision", "files"})
        return HttpsSource(
            _read_text(source, "url"),
            _read_files(source),
            _read_optional_text(source, "revision"),
            HostRules.from_json(access or {}),
            cache_dir,
        )
    if kind == "s3":
        # boto3 takes a while to import, and the other kinds do without it.
        from workers.fetch.s3 import S3Source

        _require_fields(source, {"kind", "bucket", "prefix", "revision", "files"})
        return S3Source(
            _read_text(source, "bucket"),
            source.get("prefix") or "",
            _read_files(source),
            _read_optional_text(source, "revision"),
            access,
            credential,
            cache_dir,
        )
    raise InvalidRequest(f"Unknown kind of source {kind!r}; known are folder, hub, https and s3.", kind=kind)


def _read_files(source: Mapping[str, Any]) -> list[str | SourceFile] | None:
    """Return the names that a request lists, or the files that a pinned source holds."""
    files = source.get("files")
    try:
        return None if files is None else [each if isinstance(each, str) else SourceFile(**each) for each in files]
    except TypeError:
        raise InvalidRequest("The source's files must be names, or files as the resolve step wrote them.") from None


def _require_fields(source: Mapping[str, Any], known: set[str]) -> None:
    unknown = sorted(set(source) - known)
    if unknown:
        raise InvalidRequest(
            f"A source of kind {source['kind']!r} has no field {unknown[0]!r}; known are {', '.join(sorted(known))}."
        )


def _read_text(source: Mapping[str, Any], field: str) -> str:
    value = source.get(field)
    if not isinstance(value, str) or not value or "\x00" in value:
        raise InvalidRequest(f"The source's field {field!r} must be a non-empty text.")
    return value


def _read_optional_text(source: Mapping[str, Any], field: str) -> str | None:
    return None if source.get(field) is None else _read_text(source, field)
