"""What stands inside a bundle: its graph, its metadata and its tokenizer, without unpacking.

Owns the reading of `.litertlm` and `.task`; never writes. Called by `workers.verify`, which proves that the graph
in a bundle is the one it verified, and by `workers.convert.bundle`.
"""

from __future__ import annotations

import mmap
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from litert_lm_builder import litertlm_core
from litert_lm_builder import litertlm_header_schema_py_generated as schema

from service.errors import BundleFailed

#: Names inside a `.task`.
TASK_GRAPH, TASK_TOKENIZER, TASK_METADATA = "TF_LITE_PREFILL_DECODE", "TOKENIZER_MODEL", "METADATA"

_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_SECTION = schema.AnySectionDataType


def extract_graph(path: Path, bundle_format: str) -> memoryview:
    """Return the bytes of the only graph in a bundle, mapped from the file, not copied.

    Raises `BundleFailed` when the file is not such a bundle or does not hold exactly one graph.
    """
    if bundle_format == "task":
        return _find_task_entry(path, TASK_GRAPH)
    return _find_section(path, (_SECTION.TFLiteModel,))


def extract_metadata(path: Path, bundle_format: str) -> bytes:
    """Return the serialized `LlmMetadata` of a bundle; raises as `extract_graph` does."""
    if bundle_format == "task":
        return bytes(_find_task_entry(path, TASK_METADATA))
    return bytes(_find_section(path, (_SECTION.LlmMetadataProto,)))


def extract_tokenizer(path: Path, bundle_format: str) -> bytes:
    """Return the tokenizer of a bundle: a SentencePiece model, or the text of a tokenizer.json."""
    if bundle_format == "task":
        return bytes(_find_task_entry(path, TASK_TOKENIZER))
    content = bytes(_find_section(path, (_SECTION.SP_Tokenizer, _SECTION.HF_Tokenizer_Zlib)))
    if any(section.kind == _SECTION.HF_Tokenizer_Zlib for section in list_sections(path)):
        # Eight bytes of size stand before the compressed text.
        return zlib.decompress(content[8:])
    return content


@dataclass(frozen=True)
class Section:
    """One part of a `.litertlm`: its `AnySectionDataType` and its bytes `[begin, end)` in the file."""

    kind: int
    begin: int
    end: int


def list_sections(path: Path) -> list[Section]:
    """Return the sections of a `.litertlm` in file order; raises `BundleFailed` when it is none."""
    with path.open("rb") as stream:
        start = stream.read(litertlm_core.HEADER_BEGIN_BYTE_OFFSET)
        magic = litertlm_core.HEADER_MAGIC_BYTES
        if len(start) < litertlm_core.HEADER_BEGIN_BYTE_OFFSET or not start.startswith(magic):
            raise BundleFailed(f"{path.name} is not a .litertlm file: it does not begin with {magic!r}.")
        end = int.from_bytes(start[litertlm_core.HEADER_END_LOCATION_BYTE_OFFSET :], "little")
        header = schema.LiteRTLMMetaData.GetRootAs(stream.read(end - len(start)), 0).SectionMetadata()
    objects = [header.Objects(index) for index in range(header.ObjectsLength())]
    return [Section(item.DataType(), item.BeginOffset(), item.EndOffset()) for item in objects]


def _find_section(path: Path, kinds: tuple[int, ...]) -> memoryview:
    sections = [section for section in list_sections(path) if section.kind in kinds]
    if len(sections) != 1:
        raise BundleFailed(f"{path.name} holds {len(sections)} sections of a kind that must stand there once.")
    return _map(path)[sections[0].begin : sections[0].end]


def _find_task_entry(path: Path, name: str) -> memoryview:
    try:
        with zipfile.ZipFile(path) as archive:
            entry = archive.getinfo(name)
    except (zipfile.BadZipFile, KeyError) as error:
        raise BundleFailed(f"{path.name} is not a .task file with an entry {name!r}.") from error
    if entry.compress_type != zipfile.ZIP_STORED:
        raise BundleFailed(f"{path.name}: the entry {name!r} is compressed; the runtime maps stored entries only.")
    content = _map(path)
    header = _LOCAL_HEADER.unpack_from(content, entry.header_offset)
    begin = entry.header_offset + _LOCAL_HEADER.size + header[-2] + header[-1]
    return content[begin : begin + entry.file_size]


def _map(path: Path) -> memoryview:
    """Return a file's content as a read-only mapping that lives as long as a view of it."""
    with path.open("rb") as stream:
        return memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
