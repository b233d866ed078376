"""Files over HTTP: resumed, bounded and checked.

Owns the transfer of a list of files whose sizes (and digests, where stated) are known beforehand. A body longer
than stated is cut off; a redirect may leave the hub's host only over https towards a public address, and without
the token. Partial files live in the cache folder, if there is one, and are resumed by the next attempt.
Called by `workers.fetch.hub`; raises the HTTP library's errors, which the caller describes.
"""

from __future__ import annotations

import fcntl
import hashlib
import ipaddress
import os
import re
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import httpx2
from huggingface_hub import get_session, hf_raise_for_status

from service.errors import SourceUnavailable
from workers.fetch.needed_files import SourceFile
from workers.fetch.sources import CHUNK_BYTES, ByteProgress, FetchedFile, report_full_disk

#: Seconds without a byte after which a connection counts as broken.
TIMEOUT_S = 30.0
#: Connections for one file in one attempt of the step; the second in a row that brings no byte ends it.
MAX_CONNECTIONS = 50
MAX_STALLS = 2
MAX_REDIRECTS = 5

_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")


@dataclass(frozen=True)
class Download:
    """A file and its address."""

    file: SourceFile
    address: str


def download_all(
    downloads: list[Download],
    headers: Mapping[str, str],
    cache_dir: Path | None,
    output_dir: Path,
    count: ByteProgress,
) -> list[FetchedFile]:
    """Download every file into `output_dir`, smallest first, and return them with their digests, sorted by name.

    With `cache_dir`, which belongs to this one source, the files are completed there and moved at the end, so that a
    failure keeps what arrived; it is removed when all did.
    """
    fetched: list[FetchedFile] = []
    with report_full_disk(output_dir), _claim_folder(cache_dir) as working_dir:
        parts_dir = working_dir or output_dir
        for download in sorted(downloads, key=lambda each: each.file.size_bytes):
            part = parts_dir / download.file.path
            _complete(download, part, headers, count)
            fetched.append(_check(download.file, part))
        if working_dir is not None:
            for each in fetched:
                shutil.move(working_dir / each.path, output_dir / each.path)
            shutil.rmtree(working_dir, ignore_errors=True)
    return sorted(fetched, key=lambda each: each.path)


@contextmanager
def _claim_folder(cache_dir: Path | None) -> Iterator[Path | None]:
    """Hold the cache folder of one source alone; a second fetch of it on this host is told to come back."""
    if cache_dir is None:
        yield None
        return
    cache_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor = os.open(cache_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SourceUnavailable("The same source is being fetched on this host already; retry later.") from None
        if not cache_dir.is_dir() or cache_dir.stat().st_ino != os.fstat(descriptor).st_ino:
            raise SourceUnavailable("The same source was just fetched on this host; retry.")
        os.utime(cache_dir)
        yield cache_dir
    finally:
        os.close(descriptor)


def _complete(download: Download, part: Path, headers: Mapping[str, str], count: ByteProgress) -> None:
    """Append to `part` until it has the stated size, over as many connections as bring progress."""
    file = download.file
    part.touch(mode=0o600)
    if part.stat().st_size > file.size_bytes:
        os.truncate(part, 0)
    count.add(part.stat().st_size, file.path)
    stalled = 0
    for _ in range(MAX_CONNECTIONS):
        before = part.stat().st_size
        if before == file.size_bytes:
            return
        # A broken connection is resumed at once; what keeps breaking waits for the step's next attempt.
        with suppress(httpx2.TransportError):
            _append(download, part, headers, count)
        stalled = 0 if part.stat().st_size > before else stalled + 1
        if stalled == MAX_STALLS:
            break
    done = part.stat().st_size
    if done != file.size_bytes:
        raise SourceUnavailable(
            f"The download of {file.path} broke off after {done} of {file.size_bytes} bytes; retry later.",
            file=file.path,
        )


def _append(download: Download, part: Path, headers: Mapping[str, str], count: ByteProgress) -> None:
    """Open one connection and append what it brings; never beyond the stated size."""
    file = download.file
    done = part.stat().st_size
    wanted = dict(headers) if done == 0 else {**headers, "Range": f"bytes={done}-"}
    with _open(download.address, wanted) as response, part.open("r+b") as stream:
        if response.status_code == 206:
            _require_range(response, file, done)
        elif done:
            # The server ignores ranges: begin again.
            count.add(-done, file.path)
            stream.truncate(0)
            done = 0
        stream.seek(done)
        # Without a chunk size: a connection that breaks would take the unfinished chunk with it.
        for chunk in response.iter_raw():
            done += len(chunk)
            if done > file.size_bytes:
                raise SourceUnavailable(
                    f"The hub sends more bytes of {file.path} than the {file.size_bytes} it states; retry later.",
                    file=file.path,
                )
            stream.write(chunk)
            count.add(len(chunk), file.path)


def _require_range(response: httpx2.Response, file: SourceFile, done: int) -> None:
    match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if match is None or int(match[1]) != done or match[2] not in ("*", str(file.size_bytes)):
        raise SourceUnavailable(
            f"The hub answers another range of {file.path} than the one asked for; retry later.", file=file.path
        )


@contextmanager
def _open(address: str, headers: Mapping[str, str]) -> Iterator[httpx2.Response]:
    """Open a GET, following redirects that `_check_redirect` allows; raises the hub library's errors for refusals."""
    first = address
    for _ in range(MAX_REDIRECTS + 1):
        with get_session().stream(
            "GET", address, headers=headers, timeout=TIMEOUT_S, follow_redirects=False
        ) as response:
            if not response.is_redirect:
                hf_raise_for_status(response)
                if response.headers.get("Content-Encoding", "identity") != "identity":
                    raise SourceUnavailable(
                        "The hub compresses a file although it was asked not to; check the endpoint."
                    )
                yield response
                return
            address = urljoin(address, response.headers["Location"])
        headers = _check_redirect(first, address, headers)
    raise SourceUnavailable(f"The hub redirects more than {MAX_REDIRECTS} times; check the endpoint.")


def _check_redirect(first: str, address: str, headers: Mapping[str, str]) -> dict[str, str]:
    """Return the headers for a redirect's target; refuse targets inside the worker's own network."""
    home, target = urlsplit(first), urlsplit(address)
    if (home.scheme, home.netloc) == (target.scheme, target.netloc):
        return dict(headers)
    if target.scheme != "https" or not target.hostname or not _is_public(target.hostname, target.port or 443):
        raise SourceUnavailable(
            f"The hub redirects a file to {target.hostname}, which is not a public https address; check the endpoint."
        )
    return {name: value for name, value in headers.items() if name.lower() != "authorization"}


def _is_public(host: str, port: int) -> bool:
    """Tell whether every address of `host` is public; a name only a proxy can resolve is left to the proxy."""
    try:
        found = {entry[4][0] for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except OSError:
        return True
    return all(ipaddress.ip_address(str(each).partition("%")[0]).is_global for each in found)


def _check(file: SourceFile, part: Path) -> FetchedFile:
    """Hash a complete file and compare it with what the hub states; a damaged one is deleted."""
    sha256 = hashlib.sha256()
    git_blob = hashlib.sha1(b"blob %d\x00" % file.size_bytes, usedforsecurity=False)
    with part.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            sha256.update(chunk)
            if file.git_blob is not None:
                git_blob.update(chunk)
    found = sha256.hexdigest()
    is_other = file.sha256 is not None and file.sha256 != found
    is_other = is_other or (file.git_blob is not None and file.git_blob != git_blob.hexdigest())
    if is_other:
        part.unlink()
        raise SourceUnavailable(
            f"{file.path} arrived with other bytes than the hub states (SHA-256 {found}); retry later.",
            file=file.path,
            found_sha256=found,
        )
    return FetchedFile(file.path, file.size_bytes, found)
