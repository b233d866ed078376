"""The workarounds do what they say and leave nothing behind."""

from __future__ import annotations

import importlib
import sys
import warnings

import pytest
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
