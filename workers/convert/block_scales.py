"""Scales of blocks that hold nothing but zeros.

ai-edge-quantizer 0.10.0 (`transformations/quantize_tensor.py`, `_perform_blockwise_quantization`) rounds them to a
float16 of zero, at which XNNPACK refuses the whole graph. Zeros stay zeros under any scale. Called by
`workers.convert.quantize`.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from ai_edge_litert import schema_py_generated as schema


def fill_empty_scales(path: Path) -> int:
    """Give every such block the smallest normal scale, in place; returns how many there were."""
    filled = 0
    with path.open("r+b") as stream, mmap.mmap(stream.fileno(), 0) as content:
        for scales in _list_scales(content):
            empty = scales == 0
            filled += int(empty.sum())
            scales[empty] = np.finfo(np.float16).smallest_normal
            # The file cannot be closed while an array looks at it.
            del scales
    return filled


def _list_scales(content: mmap.mmap) -> Iterator[npt.NDArray[np.float16]]:
    """Yield the scales of each tensor that is stored in blocks, as they lie in `content`; shared ones once."""
    model = schema.Model.GetRootAs(content)
    seen: set[int] = set()
    for graph in (model.Subgraphs(index) for index in range(model.SubgraphsLength())):
        for tensor in (graph.Tensors(index) for index in range(graph.TensorsLength())):
            quantization = tensor.Quantization()
            if quantization is None or quantization.DetailsType() != schema.QuantizationDetails.BlockwiseQuantization:
                continue
            details, table = schema.BlockwiseQuantization(), quantization.Details()
            details.Init(table.Bytes, table.Pos)
            place = graph.Tensors(details.Scales()).Buffer()
            if place not in seen:
                seen.add(place)
                yield _read_buffer(content, model.Buffers(place))


def _read_buffer(content: mmap.mmap, buffer: Any) -> npt.NDArray[np.float16]:
    if buffer.Offset() > 1:
        # Large buffers stand behind the flatbuffer.
        return np.frombuffer(content, np.float16, buffer.Size() // 2, buffer.Offset())
    inline: npt.NDArray[np.float16] = buffer.DataAsNumpy().view(np.float16)
    return inline
