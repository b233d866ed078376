"""A small graph as a file of more than 2 GiB, laid out as the converter lays out large ones.

Owns that rewriting: the weights stand behind the flatbuffer, found by the offsets and sizes of its buffers. What lies
between is a hole that takes no disk. Called by tests of everything that such files pass through.
"""

from __future__ import annotations

from pathlib import Path

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

#: Where the weights begin: beyond what a signed 32-bit offset reaches.
WEIGHTS_BEGIN_BYTES = 2**31 + 2**20
_ALIGNMENT_BYTES = 16
_IDENTIFIER = b"TFL3"
#: Constants of shapes and the like stay inside, as the converter leaves them.
_SMALLEST_BYTES = 1024


def spread_graph(source: Path, target: Path) -> None:
    """Write the graph of `source` to `target` with its weights beyond 2 GiB."""
    model = schema.ModelT.InitFromPackedBuf(source.read_bytes(), 0)
    position = WEIGHTS_BEGIN_BYTES
    with target.open("wb") as stream:
        for buffer in model.buffers:
            if buffer.data is None or len(buffer.data) < _SMALLEST_BYTES:
                continue
            content = np.asarray(buffer.data, dtype=np.uint8).tobytes()
            stream.seek(position)
            stream.write(content)
            buffer.data, buffer.offset, buffer.size = None, position, len(content)
            position += -(-len(content) // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        builder = flatbuffers.Builder(1 << 20)
        builder.Finish(model.Pack(builder), file_identifier=_IDENTIFIER)
        stream.seek(0)
        stream.write(builder.Output())
        stream.truncate(position)
