"""What lies inside a bundle: where its graph starts and ends, and whether it is the graph that was verified.

Owns reading the two container formats, independently of the code that wrote them. Must not write or run anything.
Called by `workers.verify.verify`.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from litert_lm_builder import litertlm_core
from litert_lm_builder import litertlm_header_schema_py_generated as schema

from service.errors import VerificationFailed

#: The graph's entry in a `.task`.
TASK_GRAPH_ENTRY = "TF_LITE_PREFILL_DECODE"
_BLOCK_BYTES = 1 << 20


def require_same_graph(bundle: Path, graph: Path) -> None:
    """Raise `VerificationFailed` unless the graph inside `bundle` is byte-identical with the file `graph`."""
    with open_graph(bundle) as (inside, size_bytes), graph.open("rb") as outside:
        if size_bytes != graph.stat().st_size:
            raise VerificationFailed(
                f"The graph inside {bundle.name} has {size_bytes} bytes, the verified one {graph.stat().st_size}.",
                file=bundle.name,
            )
        offset = 0
        while offset < size_bytes:
            expected = outside.read(_BLOCK_BYTES)
            if inside.read(len(expected)) != expected:
                raise VerificationFailed(
                    f"The graph inside {bundle.name} differs from the verified one near byte {offset}.",
                    file=bundle.name,
                    offset_bytes=offset,
                )
            offset += len(expected)


@contextmanager
def open_graph(bundle: Path) -> Iterator[tuple[IO[bytes], int]]:
    """Open the graph inside a `.task` or `.litertlm` for reading; yields the stream and its size in bytes.

    Raises `VerificationFailed` when the container cannot be read or holds no graph, or more than one.
    """
    if bundle.suffix == ".task":
        with _open_archive(bundle) as archive:
            if TASK_GRAPH_ENTRY not in archive.namelist():
                raise VerificationFailed(f"{bundle.name} holds no {TASK_GRAPH_ENTRY}.", file=bundle.name)
            with archive.open(TASK_GRAPH_ENTRY) as stream:
                yield stream, archive.getinfo(TASK_GRAPH_ENTRY).file_size
        return
    begin, end = _find_section(bundle)
    with bundle.open("rb") as stream:
        stream.seek(begin)
        yield stream, end - begin


def _open_archive(bundle: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(bundle)
    except zipfile.BadZipFile as error:
        raise VerificationFailed(f"{bundle.name} is not a zip archive: {error}.", file=bundle.name) from error


def _find_section(bundle: Path) -> tuple[int, int]:
    """Return begin and end, in bytes, of the only TFLite section of a `.litertlm`."""
    sections = [
        (begin, end) for kind, begin, end in _list_sections(bundle) if kind == schema.AnySectionDataType.TFLiteModel
    ]
    if len(sections) != 1:
        raise VerificationFailed(
            f"{bundle.name} holds {len(sections)} graphs; exactly one can be verified.", file=bundle.name
        )
    begin, end = sections[0]
    if not 0 < begin < end <= bundle.stat().st_size:
        raise VerificationFailed(f"The graph of {bundle.name} ends at byte {end}, outside the file.", file=bundle.name)
    return begin, end


def _list_sections(bundle: Path) -> list[tuple[int, int, int]]:
    """Return (data type, begin, end) of every section a `.litertlm` declares."""
    with bundle.open("rb") as stream:
        start = stream.read(litertlm_core.HEADER_BEGIN_BYTE_OFFSET)
        if len(start) < litertlm_core.HEADER_BEGIN_BYTE_OFFSET or not start.startswith(
            litertlm_core.HEADER_MAGIC_BYTES
        ):
            raise VerificationFailed(f"{bundle.name} is not a .litertlm file.", file=bundle.name)
        (header_end,) = struct.unpack_from("<Q", start, litertlm_core.HEADER_END_LOCATION_BYTE_OFFSET)
        header = stream.read(min(header_end, bundle.stat().st_size) - litertlm_core.HEADER_BEGIN_BYTE_OFFSET)
    try:
        metadata = schema.LiteRTLMMetaData.GetRootAs(header, 0).SectionMetadata()
        objects = [metadata.Objects(index) for index in range(metadata.ObjectsLength())]
        return [(item.DataType(), item.BeginOffset(), item.EndOffset()) for item in objects]
    except (AttributeError, struct.error, IndexError, TypeError) as error:
        raise VerificationFailed(f"The header of {bundle.name} cannot be read: {error}.", file=bundle.name) from error
