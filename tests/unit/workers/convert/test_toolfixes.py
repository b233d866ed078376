"""The workarounds do what they say and leave nothing behind."""

from __future__ import annotations

import importlib
import sys
import warnings

import pytest
import torch
from ai_edge_litert import schema_py_generated

from workers.convert import toolfixes


def test_the_schema_is_found_where_litert_torch_looks_for_it() -> None:
    with toolfixes.schema_without_tensorflow():
        found = importlib.import_module("tensorflow.lite.python").schema_py_generated
        assert found is schema_py_generated
        assert "tensorflow" not in sys.modules
    assert "tensorflow.lite.python" not in sys.modules


def test_a_real_tensorflow_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    real = type(sys)("tensorflow.lite.python")
    monkeypatch.setitem(sys.modules, "tensorflow.lite.python", real)
    with toolfixes.schema_without_tensorflow():
        assert sys.modules["tensorflow.lite.python"] is not real
    assert sys.modules["tensorflow.lite.python"] is real


def test_only_the_known_warnings_are_silent() -> None:
    with toolfixes.known_warnings_ignored():
        warnings.warn("`isinstance(treespec, LeafSpec)` is deprecated, use another", FutureWarning, stacklevel=1)
        with pytest.warns(FutureWarning, match="anything else"):
            warnings.warn("anything else", FutureWarning, stacklevel=1)


def test_a_graphs_code_is_generated_when_it_is_called_or_read(monkeypatch: pytest.MonkeyPatch) -> None:
    generated = []
    generate = torch.fx.GraphModule.recompile

    def count(module: torch.fx.GraphModule) -> object:
        generated.append(module)
        return generate(module)

    monkeypatch.setattr(torch.fx.GraphModule, "recompile", count)
    with toolfixes.generated_code_deferred():
        traced = torch.fx.symbolic_trace(lambda x: torch.relu(x) + 1)
        (relu,) = traced.graph.find_nodes(op="call_function", target=torch.relu)
        relu.target = torch.neg
        traced.recompile()
        assert generated == []
        assert "torch.neg" in traced.code
        relu.target = torch.abs
        traced.recompile()
        assert traced(torch.tensor([-2.0])).tolist() == [3.0]
        assert generated == [traced, traced]
    relu.target = torch.relu
    traced.recompile()
    assert len(generated) == 3
    assert traced(torch.tensor([-2.0])).tolist() == [1.0]
