"""Bodies of HTTP answers, as ranges of files.

Owns what an answer must say of its range and encoding, and how a broken connection is told. Called by
`workers.fetch.hub` and `https`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import httpx2

from service.checkpoint_files import SourceFile
from service.errors import SourceUnavailable
from workers.fetch.download import Body, Interrupted

_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")


def write_range(start: int, end: int | None) -> dict[str, str]:
    """Return the header that asks for bytes [start, end); none for the whole file."""
    if start == 0 and end is None:
        return {}
    return {"Range": f"bytes={start}-{'' if end is None else end - 1}"}


@contextmanager
def interruptible() -> Iterator[None]:
    """Turn a connection that fails into `Interrupted`."""
    try:
        yield
    except httpx2.TransportError:
        raise Interrupted from None


def read_body(response: httpx2.Response, file: SourceFile, start: int) -> Body:
    """Return the body of an answer to a request for bytes from `start`; raises `SourceUnavailable` for others."""
    refuse_encoding(response)
    if response.status_code == httpx2.codes.PARTIAL_CONTENT:
        match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if match is None or int(match[1]) != start or match[2] not in ("*", str(file.size_bytes)):
            raise SourceUnavailable(
                f"The source answers another range of {file.path} than the one asked for; retry later.", file=file.path
            )
    else:
        start = 0
    # Without a chunk size: a connection that breaks would take the unfinished chunk with it.
    return Body(start, response.iter_raw())


def refuse_encoding(response: httpx2.Response) -> None:
    """Raise `SourceUnavailable` for a body that is not the file's own bytes: a small one may unpack to any size."""
    if response.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise SourceUnavailable("The source compresses a file although it was asked not to; check its server.")
