"""Where the constants of a `.tflite` stand in its file, of any size.

Owns the reading of buffers' places: inside the flatbuffer, or behind it where a graph exceeds 2 GiB. Called by
`workers.convert.template_map` and `template_proof`.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from ai_edge_litert import schema_py_generated as tflite

#: Of a buffer's vector in its table, as flatbuffers count: two for each field, after two of their own.
_DATA_FIELD = 4


@dataclass(frozen=True)
class Buffer:
    """The bytes of one constant."""

    index: int
    begin_byte: int
    size_bytes: int
    #: The first tensor that has it, for messages.
    tensor: str


@contextmanager
def mapped(path: Path) -> Iterator[Any]:
    """Yield a file's content, mapped for reading."""
    with path.open("rb") as stream:
        # Ends with the arrays that look into it.
        yield mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)


def list_buffers(content: Any) -> list[Buffer]:
    """Return every buffer of a graph that holds bytes, in the order of the file."""
    model = tflite.Model.GetRootAs(content, 0)
    names = _name_buffers(model)
    found = []
    for index in range(model.BuffersLength()):
        buffer = model.Buffers(index)
        begin, size = buffer.Offset(), buffer.Size()
        field = buffer._tab.Offset(_DATA_FIELD)
        if field:
            begin, size = buffer._tab.Vector(field), buffer._tab.VectorLen(field)
        if size and index in names:
            found.append(Buffer(index, begin, size, names[index]))
    return sorted(found, key=lambda each: each.begin_byte)


def read_words(content: Any, buffer: Buffer) -> npt.NDArray[np.uint32]:
    """Return a buffer as 32-bit words, mapped; bytes beyond the last whole word are left out."""
    return np.frombuffer(content, np.uint32, buffer.size_bytes // 4, buffer.begin_byte)


def _name_buffers(model: Any) -> dict[int, str]:
    """Return a tensor of each buffer; what only metadata refers to is not among them."""
    names: dict[int, str] = {}
    for number in range(model.SubgraphsLength()):
        graph = model.Subgraphs(number)
        for position in range(graph.TensorsLength()):
            tensor = graph.Tensors(position)
            names.setdefault(tensor.Buffer(), (tensor.Name() or b"").decode(errors="replace"))
    return names
