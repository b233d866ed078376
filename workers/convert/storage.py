"""What a graph really holds: weights by the type they are stored in, operations by the types they compute with.

A recipe that silently skips an operation is visible here. Reads a `.tflite` of any size, mapped. Called by
`workers.convert.quantize`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ai_edge_litert.tools import flatbuffer_utils

#: Constants below this are shapes and scalars, not weights.
_MIN_WEIGHT_BYTES = 1024
#: Operations that multiply by weights, and which of their inputs these are.
_WEIGHT_INPUT = {
    "FULLY_CONNECTED": 1,
    "EMBEDDING_LOOKUP": 1,
    "CONV_2D": 1,
    "DEPTHWISE_CONV_2D": 1,
    "TRANSPOSE_CONV": 1,
}
_ACTIVATION_INPUT = 0

_TYPE_NAMES = {
    code: name.lower() for name, code in vars(flatbuffer_utils.schema_fb.TensorType).items() if isinstance(code, int)
}


def describe_storage(path: Path) -> dict[str, Any]:
    """Return `weights` (per type: tensors, bytes) and `operations` (operation, types of weights and input, count).

    Weights that are widened before use count by the type they are stored in; tensors that share bytes count once.
    """
    model = flatbuffer_utils.read_model(str(path))
    weights: dict[str, Counter[str]] = defaultdict(Counter)
    operations: Counter[tuple[str, str, str]] = Counter()
    seen: set[int] = set()
    for subgraph in model.subgraphs:
        for tensor in subgraph.tensors:
            data = model.buffers[tensor.buffer].data
            if data is not None and len(data) >= _MIN_WEIGHT_BYTES and tensor.buffer not in seen:
                seen.add(tensor.buffer)
                weights[_TYPE_NAMES[tensor.type]].update(tensors=1, bytes=len(data))
        operations.update(_list_operations(model, subgraph))
    return {
        "weights": {name: dict(counts) for name, counts in sorted(weights.items())},
        "operations": [
            {"operation": operation, "weights": stored, "input": computed, "count": count}
            for (operation, stored, computed), count in sorted(operations.items())
        ],
    }


def _list_operations(model: Any, subgraph: Any) -> Iterator[tuple[str, str, str]]:
    """Yield operation, type of its weights and type of its input."""
    widened: dict[int, int] = {}
    for operator in subgraph.operators:
        name = flatbuffer_utils.opcode_to_name(model, operator.opcodeIndex)
        if name == "DEQUANTIZE":
            widened[operator.outputs[0]] = operator.inputs[0]
        elif name in _WEIGHT_INPUT:
            stored = operator.inputs[_WEIGHT_INPUT[name]]
            tensors = subgraph.tensors
            yield (
                name,
                _TYPE_NAMES[tensors[widened.get(stored, stored)].type],
                _TYPE_NAMES[tensors[operator.inputs[_ACTIVATION_INPUT]].type],
            )
