"""Workarounds for the conversion tools, each with the upstream problem it names; nothing else.

Called by the engines, before they import the tool in question.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager

from ai_edge_litert import schema_py_generated

#: The one module of TensorFlow that litert-torch imports without declaring TensorFlow.
_SCHEMA_PARENT = "tensorflow.lite.python"


@contextmanager
def schema_without_tensorflow() -> Iterator[None]:
    """Let litert-torch be imported where TensorFlow is not installed, or not wanted.

    Upstream: litert-torch 0.10.0 (`generative/layers/lora.py` and
    `generative/export_hf/model_ext/bonsai_flux2/bonsai_flux2.py`) does
    `from tensorflow.lite.python import schema_py_generated` for LoRA and image models, without naming
    TensorFlow (2 GB on disk, 700 MB resident, 7 s) among its requirements. ai-edge-litert ships the same
    generated module. Only the entry that this import statement looks up is provided, and only while the
    importing modules load: `tensorflow` itself stays absent, so that nobody mistakes it for installed.
    """
    before = sys.modules.get(_SCHEMA_PARENT)
    stand_in = types.ModuleType(_SCHEMA_PARENT)
    stand_in.schema_py_generated = schema_py_generated  # type: ignore[attr-defined]
    sys.modules[_SCHEMA_PARENT] = stand_in
    try:
        yield
    finally:
        if before is None:
            sys.modules.pop(_SCHEMA_PARENT, None)
        else:
            sys.modules[_SCHEMA_PARENT] = before
