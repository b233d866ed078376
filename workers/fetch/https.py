"""A checkpoint in a folder of a web server.

Owns how the files of such a folder are found (by the few names that a checkpoint's files can have), pinned (by the
SHA-256 that the folder's `SHA256SUMS` states, else by size, `ETag` and `Last-Modified`) and downloaded. Listings for
people are never read. Called through `workers.fetch.sources.open_source`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx2

from service.checkpoint_files import (
    INDEX_FILE,
    MAX_INDEX_BYTES,
    NEEDED_NAMES,
    SHARD_NAME,
    SourceFile,
    choose_needed,
    is_needed,
)
from service.errors import (
    CheckpointInvalid,
    CheckpointUnsafe,
    InvalidRequest,
    SourceChanged,
    SourceForbidden,
    SourceNotFound,
    SourceUnavailable,
)
from service.web_addresses import HostRules, normalise_folder_url
from workers.fetch.download import Body, download_all
from workers.fetch.http_body import interruptible, read_body, refuse_encoding, write_range
from workers.fetch.sources import ByteProgress, FetchedFile, Pinned, digest_pins
from workers.fetch.strict_json import parse_json
from workers.fetch.web_client import WebClient, require_success
from workers.steps import Progress

SUMS_FILE = "SHA256SUMS"
MAX_SUMS_BYTES = 2**20
#: Requests at once to one server: for what is known of files, and for the ranges of a large one.
CONNECTIONS = 4

_SUM = re.compile(r"([0-9a-f]{64}) [ *](?:\./)?(.+)")
#: Longer or stranger ones are not kept.
_VALIDATOR = re.compile(r"[\x20-\x7e]{1,256}")


class HttpsSource:
    """A folder of a web server; its revision is a digest of what its files are pinned by.

    `files`: names to take, or the pinned files; without any, the names are tried that a checkpoint's files can have.
    """

    def __init__(
        self,
        url: str,
        files: Sequence[str | SourceFile] | None = None,
        revision: str | None = None,
        rules: HostRules | None = None,
        cache_dir: Path | None = None,
    ) -> None:
        try:
            self._url = normalise_folder_url(url)
        except ValueError as error:
            raise InvalidRequest(f"The source cannot be used: {error}.") from None
        self._names = None if files is None else [each for each in files if isinstance(each, str)]
        self._pinned = [each for each in files or () if isinstance(each, SourceFile)]
        self._revision = revision
        self._web = WebClient(rules or HostRules())
        self._cache_dir = cache_dir

    def pin(self, progress: Progress) -> Pinned:
        """Ask the server for what it has, and keep what tells these files from later ones."""
        progress(f"asking {self._url} for its files")
        with self._web:
            files = choose_needed(self._find_all(), f"The folder {self._url}")
        pins = [file.to_pin() for file in files]
        return Pinned({"kind": "https", "url": self._url, "revision": digest_pins(files), "files": pins}, files)

    def bring(self, output_dir: Path, progress: Progress) -> list[FetchedFile]:
        """Download the pinned files; raises `SourceChanged` for one that the server has replaced."""
        files = choose_needed(self._pinned, f"The folder {self._url}")
        if self._revision is None or digest_pins(files) != self._revision:
            raise InvalidRequest("A web folder must be pinned by the resolve step before it is fetched.")
        count = ByteProgress(progress, "downloading", sum(file.size_bytes for file in files))
        try:
            with self._web:
                return download_all(
                    files, self._open_range, self._cache_dir, output_dir, count, connections=CONNECTIONS
                )
        except SourceUnavailable as error:
            if "found_sha256" not in error.details:
                raise
            # TLS brings what was sent: the bytes, or the sum, are others than before.
            raise SourceChanged(
                f"{error.details['file']} is not, or no longer, what {self._url}{SUMS_FILE} states (its SHA-256 is "
                f"{error.details['found_sha256']}); correct the one or the other, then submit the job again.",
                **error.details,
            ) from None

    def _find_all(self) -> list[SourceFile]:
        sums = self._read_sums()
        with ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="ask") as pool:
            if self._names is not None:
                return list(pool.map(lambda name: self._require(name, sums), self._names))
            found = [file for file in pool.map(lambda name: self._find(name, sums), NEEDED_NAMES) if file]
            if not found:
                raise SourceNotFound(f"{self._url} has none of a checkpoint's files; name the folder that does.")
            listed = {*filter(is_needed, sums), *self._list_shards(found)} - NEEDED_NAMES
            return found + list(pool.map(lambda name: self._require(name, sums), sorted(listed)))

    @contextmanager
    def _open_range(self, file: SourceFile, start: int, end: int | None) -> Iterator[Body]:
        headers = write_range(start, end)
        if headers and file.etag is not None and not file.etag.startswith("W/"):
            headers["If-Range"] = file.etag
        elif headers and file.etag is None and file.modified is not None:
            headers["If-Range"] = file.modified
        url = self._url + file.path
        with interruptible(), self._web.open("GET", url, headers) as response:
            require_success(response, url)
            self._require_same(file, response, has_condition="If-Range" in headers)
            yield read_body(response, file, start)

    def _require_same(self, file: SourceFile, response: httpx2.Response, *, has_condition: bool) -> None:
        """Raise `SourceChanged` unless the answer is from the pinned file; a stated SHA-256 is compared at the end."""
        stated = [
            (found, pinned)
            for found, pinned in zip(_read_validators(response), (file.etag, file.modified), strict=True)
            if found is not None
        ]
        is_part = response.status_code == httpx2.codes.PARTIAL_CONTENT
        is_same = all(found == pinned for found, pinned in stated) and (bool(stated) or (is_part and has_condition))
        size = None if is_part else response.headers.get("Content-Length")
        if (file.sha256 is None and not is_same) or size not in (None, str(file.size_bytes)):
            raise SourceChanged(
                f"{self._url}{file.path} is no longer the file that the job was pinned to; submit the job again.",
                file=file.path,
            )

    def _read_sums(self) -> dict[str, str]:
        """Return name -> SHA-256 of the folder's `SHA256SUMS`; nothing where there is none that may be read."""
        try:
            data = self._web.read_small(self._url + SUMS_FILE, MAX_SUMS_BYTES)
        except SourceForbidden:
            return {}
        sums: dict[str, str] = {}
        for number, line in enumerate((data or b"").decode("utf-8", "replace").splitlines(), start=1):
            match = _SUM.fullmatch(line.rstrip())
            if match is None:
                raise CheckpointInvalid(
                    f"{self._url}{SUMS_FILE}, line {number}: not a SHA-256, two blanks and a name; write it with "
                    "`sha256sum`.",
                    file=SUMS_FILE,
                )
            if sums.setdefault(match[2], match[1]) != match[1]:
                raise CheckpointInvalid(f"{self._url}{SUMS_FILE} names {match[2][:200]} twice.", file=SUMS_FILE)
        return sums

    def _list_shards(self, found: Iterable[SourceFile]) -> set[str]:
        """Return the files that the index of shards names, if there is one."""
        if not any(file.path == INDEX_FILE for file in found):
            return set()
        document = parse_json(self._web.read_small(self._url + INDEX_FILE, MAX_INDEX_BYTES) or b"", INDEX_FILE)
        placed = document.get("weight_map") if isinstance(document, dict) else None
        if not isinstance(placed, dict):
            raise CheckpointInvalid(f"{INDEX_FILE} has no weight_map.", file=INDEX_FILE)
        for name in placed.values():
            if not isinstance(name, str) or not is_needed(name):
                raise CheckpointUnsafe(
                    f"{INDEX_FILE} places a tensor in {str(name)[:100]!r}, not a shard's name.", file=INDEX_FILE
                )
        return {name for name in placed.values() if SHARD_NAME.fullmatch(name)}

    def _require(self, name: str, sums: Mapping[str, str]) -> SourceFile:
        found = self._find(name, sums)
        if found is None:
            raise CheckpointInvalid(
                f"The folder {self._url} has no {name}, which was asked for or is listed.", file=name
            )
        return found

    def _find(self, name: str, sums: Mapping[str, str]) -> SourceFile | None:
        """Return what the server says of a file, or None where it has none."""
        answer = self._web.ask(self._url + name)
        if answer is None:
            return None
        size_bytes, response = answer
        refuse_encoding(response)
        if name in sums:
            return SourceFile(name, size_bytes, sha256=sums[name])
        etag, modified = _read_validators(response)
        if etag is None and modified is None:
            raise CheckpointInvalid(
                f"The server states neither ETag nor Last-Modified of {self._url}{name}, so that a change would go "
                f"unseen; put a {SUMS_FILE} beside it (`sha256sum * > {SUMS_FILE}`).",
                file=name,
            )
        return SourceFile(name, size_bytes, etag=etag, modified=modified)


def _read_validators(response: httpx2.Response) -> tuple[str | None, str | None]:
    """Return `ETag` and `Last-Modified`, where they are fit to be kept."""
    etag, modified = (response.headers.get(name) for name in ("ETag", "Last-Modified"))
    return (
        etag if etag is not None and _VALIDATOR.fullmatch(etag) else None,
        modified if modified is not None and _VALIDATOR.fullmatch(modified) else None,
    )
