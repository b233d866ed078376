"""The step `bundle`: graph, tokenizer and metadata in one file that LiteRT-LM opens; also runs by hand.

Owns the writing of `.litertlm` and `.task`, byte for byte the same for the same inputs. Never changes the graph.
Called by `workers.sandbox` and `python -m workers.convert.bundle`.
"""

from __future__ import annotations

import hashlib
import shutil
import uuid
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import flatbuffers
from litert_lm_builder import litertlm_core
from litert_lm_builder import litertlm_header_schema_py_generated as schema
from litert_lm_builder.litertlm_builder import TfLiteModelType

from service.recipes import require_known
from workers.convert import tokenizer as tokenizers
from workers.convert.bundle_reader import TASK_GRAPH, TASK_METADATA, TASK_TOKENIZER
from workers.convert.metadata import build_metadata, read_token_settings
from workers.convert.tokenizer import CarriedTokenizer
from workers.steps import Progress, run_by_hand

#: Formats that are bundles; `tflite` is the graph alone.
BUNDLE_FORMATS = ("litertlm", "task")

GRAPH_FILE = "model.tflite"

#: The earliest date a zip can hold; no artifact says when it was made.
_ZIP_DATE = (1980, 1, 1, 0, 0, 0)
_CREATION_TIME = "1970-01-01T00:00:00+00:00"

#: The graph begins at a page, so that the runtime maps it without copying.
_ALIGNMENT_BYTES = 4096
#: The extra field by which Android's zipalign pads.
_ALIGNMENT_FIELD = 0xD935

#: What Python's zipfile adds to the header of an entry whose size needs 64 bits.
_LONG_SIZES_BYTES = 20

_CHUNK_BYTES = 1 << 20

_SECTION = schema.AnySectionDataType
_LITERTLM_VERSION = (
    litertlm_core.LITERTLM_MAJOR_VERSION,
    litertlm_core.LITERTLM_MINOR_VERSION,
    litertlm_core.LITERTLM_PATCH_VERSION,
)


def run(params: Mapping[str, Any], inputs: Mapping[str, Path], output_dir: Path, progress: Progress) -> dict[str, Any]:
    """Write `model.<format>` from the graph of `inputs["quantize"]` and the files of `inputs["checkpoint"]`.

    Raises `UnknownName` for another format, `TokenizerUnsupported` and `BundleFailed`; see `workers.steps`.
    """
    bundle_format = require_known("bundle format", params["format"], BUNDLE_FORMATS)
    graph, checkpoint_dir = inputs["quantize"] / GRAPH_FILE, inputs["checkpoint"]
    progress("Reading tokenizer and chat template", 0.0)
    settings = read_token_settings(checkpoint_dir)
    metadata = build_metadata(settings, int(params["context_length"]), must_name_start=bundle_format == "task")
    target = output_dir / f"model.{bundle_format}"
    if bundle_format == "task":
        carried = tokenizers.carry_as_sentencepiece(checkpoint_dir)
        progress("Writing the bundle", 0.3)
        write_task(target, graph, carried, metadata)
    else:
        carried = tokenizers.carry_as_is(checkpoint_dir)
        progress("Writing the bundle", 0.3)
        write_litertlm(target, graph, carried, metadata)
    progress("Bundled", 1.0)
    return {"size_bytes": target.stat().st_size, "tokenizer": carried.to_figures()}


def write_task(target: Path, graph: Path, carried: CarriedTokenizer, metadata: bytes) -> None:
    """Write a zip of stored entries, the graph first and page-aligned.

    From 2 GiB on the graph's sizes are those of the 64-bit zip, which LiteRT-LM 0.18 reads.
    """
    is_long = graph.stat().st_size > zipfile.ZIP64_LIMIT
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        entry = _describe_entry(TASK_GRAPH)
        entry.extra = _pad(len(entry.filename.encode()) + (_LONG_SIZES_BYTES if is_long else 0))
        with graph.open("rb") as source, archive.open(entry, "w", force_zip64=is_long) as sink:
            shutil.copyfileobj(source, sink, _CHUNK_BYTES)
        archive.writestr(_describe_entry(TASK_TOKENIZER), carried.content)
        archive.writestr(_describe_entry(TASK_METADATA), metadata)


def _describe_entry(name: str) -> zipfile.ZipInfo:
    """Return an entry without anything of this machine or moment."""
    entry = zipfile.ZipInfo(name, date_time=_ZIP_DATE)
    entry.compress_type = zipfile.ZIP_STORED
    entry.create_system = 3
    entry.external_attr = 0o644 << 16
    return entry


def _pad(other_bytes: int) -> bytes:
    """Return the extra field that moves the content of a first entry to the next page.

    `other_bytes`: what else stands between the header's fixed part and the content.
    """
    local_header_bytes, field_header_bytes = 30, 4
    padding = -(local_header_bytes + other_bytes + field_header_bytes) % _ALIGNMENT_BYTES
    return _ALIGNMENT_FIELD.to_bytes(2, "little") + padding.to_bytes(2, "little") + bytes(padding)


def write_litertlm(target: Path, graph: Path, carried: CarriedTokenizer, metadata: bytes) -> None:
    """Write metadata, tokenizer and graph as block-aligned sections behind a header that names them.

    Not through litert-lm-builder 0.18.1's `LitertLmFileBuilder`: it always writes a random id and the time.
    """
    is_hf = carried.kind == "hf_json"
    parts = [
        _Part(_SECTION.LlmMetadataProto, metadata),
        _Part(_SECTION.HF_Tokenizer_Zlib, _compress(carried.content))
        if is_hf
        else _Part(_SECTION.SP_Tokenizer, carried.content),
        _Part(_SECTION.TFLiteModel, graph, {"model_type": TfLiteModelType.PREFILL_DECODE.value}),
    ]
    identity = _identify(parts)
    # Offsets do not change the header's size, so a first packing tells where the sections may begin.
    header_bytes = len(_pack_header(parts, [(1, 1)] * len(parts), identity))
    end = litertlm_core.HEADER_BEGIN_BYTE_OFFSET + header_bytes
    places: list[tuple[int, int]] = []
    for part in parts:
        begin = -(-end // litertlm_core.BLOCK_SIZE) * litertlm_core.BLOCK_SIZE
        end = begin + part.count_bytes()
        places.append((begin, end))
    with target.open("wb") as stream:
        stream.write(litertlm_core.HEADER_MAGIC_BYTES)
        for number in _LITERTLM_VERSION:
            stream.write(number.to_bytes(4, "little"))
        stream.write(bytes(litertlm_core.HEADER_END_LOCATION_BYTE_OFFSET - stream.tell()))
        stream.write((litertlm_core.HEADER_BEGIN_BYTE_OFFSET + header_bytes).to_bytes(8, "little"))
        stream.write(_pack_header(parts, places, identity))
        for part, (begin, _) in zip(parts, places, strict=True):
            stream.write(bytes(begin - stream.tell()))
            for chunk in part.read_chunks():
                stream.write(chunk)


@dataclass(frozen=True)
class _Part:
    """A section to be written: its kind, its content and the notes the header keeps about it."""

    kind: int
    content: bytes | Path
    notes: Mapping[str, str] = field(default_factory=dict)

    def count_bytes(self) -> int:
        return self.content.stat().st_size if isinstance(self.content, Path) else len(self.content)

    def read_chunks(self) -> Iterator[bytes]:
        if isinstance(self.content, bytes):
            yield self.content
            return
        with self.content.open("rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                yield chunk


def _compress(content: bytes) -> bytes:
    """Return a tokenizer.json as the runtime wants it: its size in eight bytes, then zlib."""
    return len(content).to_bytes(8, "little") + zlib.compress(content)


def _identify(parts: list[_Part]) -> str:
    """Return a UUID that follows from the content."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.count_bytes().to_bytes(8, "little"))
        for chunk in part.read_chunks():
            digest.update(chunk)
    return str(uuid.UUID(bytes=digest.digest()[:16], version=5))


def _pack_header(parts: list[_Part], places: list[tuple[int, int]], identity: str) -> bytes:
    """Return the flatbuffer that names the sections."""
    objects = [
        schema.SectionObjectT(
            items=[_describe_note(key, value) for key, value in part.notes.items()],
            dataType=part.kind,
            beginOffset=begin,
            endOffset=end,
        )
        for part, (begin, end) in zip(parts, places, strict=True)
    ]
    about_file = [_describe_note("uuid", identity), _describe_note("creation_timestamp", _CREATION_TIME)]
    header = schema.LiteRTLMMetaDataT(
        systemMetadata=schema.SystemMetadataT(entries=about_file),
        sectionMetadata=schema.SectionMetadataT(objects=objects),
    )
    packer = flatbuffers.Builder(litertlm_core.BLOCK_SIZE)
    packer.Finish(header.Pack(packer))
    return bytes(packer.Output())


def _describe_note(key: str, value: str) -> schema.KeyValuePairT:
    return schema.KeyValuePairT(key=key, value=schema.StringValueT(value), valueType=schema.VData.StringValue)


if __name__ == "__main__":
    raise SystemExit(run_by_hand(run, "Bundle a graph with its tokenizer and metadata."))
