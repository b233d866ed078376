"""Small `.tflite` graphs written by hand, for what needs a graph and no model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from ai_edge_litert.tools import flatbuffer_utils

_SCHEMA = flatbuffer_utils.schema_fb


def write_linear_graph(path: Path, weights: Mapping[str, npt.NDArray[np.float32]]) -> Path:
    """Write a graph of matrix products that follow one another; each of `weights` is float32 [outputs, inputs]."""
    model = _SCHEMA.ModelT()
    model.version = 3
    code = _SCHEMA.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = _SCHEMA.BuiltinOperator.FULLY_CONNECTED
    model.operatorCodes = [code]
    model.buffers = [_SCHEMA.BufferT()]
    graph = _SCHEMA.SubGraphT()
    graph.name = b"main"
    first = next(iter(weights.values()))
    graph.tensors = [_make_tensor("input", (1, first.shape[1]), 0)]
    graph.operators = []
    for name, weight in weights.items():
        buffer = _SCHEMA.BufferT()
        buffer.data = np.frombuffer(weight.tobytes(), dtype=np.uint8)
        model.buffers.append(buffer)
        source = len(graph.tensors) - 1
        graph.tensors.append(_make_tensor(f"{name}.weight", weight.shape, len(model.buffers) - 1))
        graph.tensors.append(_make_tensor(name, (1, weight.shape[0]), 0))
        operator = _SCHEMA.OperatorT()
        operator.inputs, operator.outputs = [source, len(graph.tensors) - 2, -1], [len(graph.tensors) - 1]
        operator.builtinOptionsType = _SCHEMA.BuiltinOptions.FullyConnectedOptions
        operator.builtinOptions = _SCHEMA.FullyConnectedOptionsT()
        graph.operators.append(operator)
    graph.inputs, graph.outputs = [0], [len(graph.tensors) - 1]
    model.subgraphs = [graph]
    model.signatureDefs = [_make_signature(graph)]
    path.write_bytes(bytes(flatbuffer_utils.convert_object_to_bytearray(model)))
    return path


def _make_tensor(name: str, shape: tuple[int, ...], buffer: int) -> _SCHEMA.TensorT:
    tensor = _SCHEMA.TensorT()
    tensor.name, tensor.shape, tensor.buffer = name.encode(), list(shape), buffer
    tensor.type = _SCHEMA.TensorType.FLOAT32
    return tensor


def _make_signature(graph: _SCHEMA.SubGraphT) -> _SCHEMA.SignatureDefT:
    signature = _SCHEMA.SignatureDefT()
    signature.signatureKey, signature.subgraphIndex = b"serving_default", 0
    ends = []
    for name, index in (("input", graph.inputs[0]), ("output", graph.outputs[0])):
        end = _SCHEMA.TensorMapT()
        end.name, end.tensorIndex = name.encode(), index
        ends.append(end)
    signature.inputs, signature.outputs = ends[:1], ends[1:]
    return signature
