"""The header of a safetensors file, checked before any library opens the file.

Owns the reading of names, dtypes, shapes and offsets, and the search for values that are not finite. Reads with
plain file calls in bounded memory and trusts nothing that the header claims. Called by `workers.fetch.checkpoint`.

Source: https://github.com/huggingface/safetensors, "Format".
"""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from service.errors import CheckpointInvalid
from service.strict_json import python_recursion_limit

MAX_HEADER_BYTES = 16 * 2**20
MAX_TENSORS = 200_000
MAX_DIMENSIONS = 8
MAX_NAME_CHARACTERS = 512
#: Shapes whose product exceeds this cannot be stored anywhere.
MAX_ELEMENTS = 2**48

#: Bytes per element of the dtypes that weights may have.
ELEMENT_BYTES: dict[str, int] = {"BF16": 2, "F16": 2, "F32": 4}

#: Why the format's other dtypes are refused.
REFUSED_DTYPES: dict[str, str] = {
    "F64": "save the weights as float32",
    **dict.fromkeys(
        ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F6_E2M3", "F6_E3M2", "F4"),
        "the checkpoint is quantized already; use the one in bfloat16",
    ),
    **dict.fromkeys(
        ("I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL", "C64"),
        "weights are floating point; drop the tensor, or use the checkpoint that is not quantized",
    ),
}

#: All exponent bits; they are all set exactly in infinities and NaN.
_EXPONENT_MASKS: dict[str, tuple[type[np.unsignedinteger[Any]], int]] = {
    "BF16": (np.uint16, 0x7F80),
    "F16": (np.uint16, 0x7C00),
    "F32": (np.uint32, 0x7F800000),
}

#: Fits the second-level cache with its masked copy, which makes the scan as fast as reading.
_SCAN_BYTES = 512 * 1024


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    #: Where its bytes begin, counted from the start of the file.
    begin_byte: int
    size_bytes: int

    @property
    def elements(self) -> int:
        """The number of values."""
        return self.size_bytes // ELEMENT_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """A header that agrees with its file."""

    path: Path
    tensors: tuple[TensorEntry, ...]


@dataclass(frozen=True, slots=True)
class NonFinite:
    """How many values of a tensor are NaN or infinite."""

    tensor: str
    count: int


def read_header(path: Path) -> SafetensorsHeader:
    """Read and check the header of a safetensors file; tensors come in the order of their bytes.

    Raises `CheckpointInvalid`, naming file, tensor and reason, for anything but a header whose tensors have known
    dtypes, sane shapes and ranges that cover the rest of the file exactly once.
    """
    file_bytes = path.stat().st_size
    with path.open("rb") as stream:
        prefix = stream.read(8)
        if len(prefix) < 8:
            raise _refuse(path, f"is truncated: {file_bytes} bytes cannot hold a safetensors header")
        (header_bytes,) = struct.unpack("<Q", prefix)
        if header_bytes > MAX_HEADER_BYTES:
            raise _refuse(path, f"claims a header of {header_bytes} bytes; at most {MAX_HEADER_BYTES} are read")
        if 8 + header_bytes > file_bytes:
            raise _refuse(path, f"is truncated: its header claims {header_bytes} bytes, the file has {file_bytes}")
        text = stream.read(header_bytes)
    if len(text) < header_bytes:
        raise _refuse(path, "became shorter while it was read")
    entries = _parse(path, text)
    tensors = [_read_entry(path, name, entry, 8 + header_bytes) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.begin_byte, tensor.size_bytes))
    _require_coverage(path, tensors, 8 + header_bytes, file_bytes)
    return SafetensorsHeader(path, tuple(tensors))


def scan_nonfinite(header: SafetensorsHeader, progress: Callable[[int], None]) -> list[NonFinite]:
    """Return the tensors that hold NaN or infinite values, reading the whole file once.

    `progress` is told the bytes of each tensor when it is done. Memory stays below 2 MiB whatever the sizes.
    """
    found: list[NonFinite] = []
    with header.path.open("rb", buffering=0) as stream:
        for tensor in header.tensors:
            stream.seek(tensor.begin_byte)
            kind, mask = _EXPONENT_MASKS[tensor.dtype]
            count = sum(_count_nonfinite(block, mask) for block in _read_blocks(stream, header.path, tensor, kind))
            if count:
                found.append(NonFinite(tensor.name, count))
            progress(tensor.size_bytes)
    return found


def _read_blocks(
    stream: Any, path: Path, tensor: TensorEntry, kind: type[np.unsignedinteger[Any]]
) -> Iterator[npt.NDArray[Any]]:
    """Yield a tensor's values as unsigned integers, block by block, in one reused buffer."""
    buffer = bytearray(_SCAN_BYTES)
    left = tensor.size_bytes
    while left:
        wanted = min(left, _SCAN_BYTES)
        filled = 0
        while filled < wanted:
            read = stream.readinto(memoryview(buffer)[filled:wanted])
            if not read:
                raise _refuse(path, "became shorter while it was read", tensor.name)
            filled += read
        left -= wanted
        yield np.frombuffer(buffer, dtype=kind, count=wanted // ELEMENT_BYTES[tensor.dtype])


def _count_nonfinite(block: npt.NDArray[Any], mask: int) -> int:
    masked = block & block.dtype.type(mask)
    # The maximum alone decides nearly every block and is faster than counting.
    if int(masked.max()) < mask:
        return 0
    return int(np.count_nonzero(masked == mask))


def _refuse(path: Path, reason: str, tensor: str | None = None) -> CheckpointInvalid:
    if tensor is None:
        return CheckpointInvalid(f"{path.name} {reason}.", file=path.name)
    shown = tensor if len(tensor) <= 200 else tensor[:200] + "..."
    return CheckpointInvalid(f"{path.name}: tensor {shown!r} {reason}.", file=path.name, tensor=shown)


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    """Return the header's entries without `__metadata__`."""
    # Each tensor takes one brace and two brackets, so that hostile nesting is refused before it is built.
    if text.count(b"{") > MAX_TENSORS + 1_000 or text.count(b"[") > 2 * (MAX_TENSORS + 1_000):
        raise _refuse(path, f"has a header of more than {MAX_TENSORS} tensors")
    if not text.startswith(b"{"):
        raise _refuse(path, "is not a safetensors file: its header does not begin with '{'")

    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        built = dict(pairs)
        if len(built) != len(pairs):
            twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
            raise _refuse(path, "stands in the header twice", twice)
        return built

    try:
        with python_recursion_limit():
            document = json.loads(text.decode("utf-8"), object_pairs_hook=build)
    except (ValueError, RecursionError) as error:
        raise _refuse(path, f"has a header that is not JSON ({type(error).__name__})") from None
    if not isinstance(document, dict):
        raise _refuse(path, "has a header that is not a JSON object")
    metadata = document.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _refuse(path, "has a __metadata__ that is not a map of texts")
    if len(document) > MAX_TENSORS:
        raise _refuse(path, f"has a header of {len(document)} tensors; at most {MAX_TENSORS} are read")
    if not document:
        raise _refuse(path, "holds no tensors")
    return document


def _read_entry(path: Path, name: str, entry: Any, data_begin: int) -> TensorEntry:
    """Check one entry by itself: name, fields, dtype, shape, and a range of the size that these demand."""
    if not name or len(name) > MAX_NAME_CHARACTERS or not name.isprintable():
        raise _refuse(path, f"has a name that is empty, longer than {MAX_NAME_CHARACTERS} or not printable", name)
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _refuse(path, "must have exactly the fields dtype, shape and data_offsets", name)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ELEMENT_BYTES:
        reason = REFUSED_DTYPES.get(dtype, "no such dtype is known") if isinstance(dtype, str) else "it is not a text"
        allowed = ", ".join(ELEMENT_BYTES)
        raise _refuse(path, f"has dtype {str(dtype)[:20]!r} ({reason}); taken are {allowed}", name)
    if not _is_counts(shape) or len(shape) > MAX_DIMENSIONS:
        raise _refuse(path, f"has a shape that is not at most {MAX_DIMENSIONS} non-negative integers", name)
    elements = 1
    for dimension in shape:
        elements *= dimension
        if dimension > MAX_ELEMENTS or elements > MAX_ELEMENTS:
            raise _refuse(path, f"claims more than {MAX_ELEMENTS} values", name)
    if not _is_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _refuse(path, "has data_offsets that are not a begin and an end", name)
    size_bytes = elements * ELEMENT_BYTES[dtype]
    if offsets[1] - offsets[0] != size_bytes:
        found = offsets[1] - offsets[0]
        raise _refuse(path, f"needs {size_bytes} bytes for {dtype} {shape} but its offsets span {found}", name)
    return TensorEntry(name, dtype, tuple(shape), data_begin + offsets[0], size_bytes)


def _is_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(each) is int and each >= 0 for each in value)


def _require_coverage(path: Path, tensors: list[TensorEntry], data_begin: int, file_bytes: int) -> None:
    """Raise unless the tensors, sorted by offset, cover the rest of the file without gap or overlap."""
    position = data_begin
    previous = ""
    for tensor in tensors:
        if tensor.begin_byte < position:
            raise _refuse(path, f"overlaps tensor {previous[:200]!r}", tensor.name)
        if tensor.begin_byte > position:
            raise _refuse(path, f"leaves a gap of {tensor.begin_byte - position} bytes before it", tensor.name)
        position = tensor.begin_byte + tensor.size_bytes
        previous = tensor.name
        if position > file_bytes:
            raise _refuse(path, f"ends at byte {position}, but the file has {file_bytes}; it is truncated", tensor.name)
    if position != file_bytes:
        raise _refuse(path, f"has {file_bytes - position} bytes after its last tensor")
