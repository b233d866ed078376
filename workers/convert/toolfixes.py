"""Workarounds for the conversion tools, each with the upstream problem it names; nothing else.

Called by the engines, before they import the tool in question.
"""

from __future__ import annotations

import re
import statistics
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

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


@contextmanager
def known_warnings_ignored() -> Iterator[None]:
    """Silence what the tools warn about themselves during a conversion; everything else stays loud.

    Upstream: torch 2.13.0 deprecates `isinstance(treespec, LeafSpec)` and still does it in its own `copyreg`
    path (`torch.utils._pytree`) whenever a program is exported.
    """
    with warnings.catch_warnings():
        for category, message in _KNOWN_WARNINGS:
            warnings.filterwarnings("ignore", category=category, message=message)
        yield


_KNOWN_WARNINGS: tuple[tuple[type[Warning], str], ...] = (
    (FutureWarning, r"`isinstance\(treespec, LeafSpec\)` is deprecated"),
    (FutureWarning, r"`treespec\.children_specs` is deprecated"),
)


@contextmanager
def sparse_activations_kept() -> Iterator[None]:
    """Let Gemma 3n's first layers cut off what they cut off in transformers.

    Upstream: litert-torch 0.10.0 (`generative/export_hf/model_ext/gemma3n/patch.py`) computes the cut into a buffer
    that is not stored, when the model is made; transformers 5 makes models without memory and loads what is stored, so
    that the buffer holds anything. Logits were off by a quarter of their range.
    """
    # Not at the top: light modules read this file too.
    from litert_torch.generative.export_hf.model_ext.gemma3n import patch
    from torch.nn import functional

    def cut(self: Any, inputs: Any) -> Any:
        deviations = statistics.NormalDist().inv_cdf(self.activation_sparsity)
        spread = inputs.std(dim=-1, keepdim=True, unbiased=False)
        return functional.relu(inputs - (inputs.mean(dim=-1, keepdim=True) + spread * deviations))

    with mock.patch.object(patch.Gemma3nTextMLP, "_gaussian_topk", cut):
        yield


def accept_experts_of_gemma4() -> None:
    """Let transformers (5.23) accept the exporter's subclass of Gemma 4's text model.

    Whether a class lets its experts be chosen is read from the source of the module that defines it, and the exporter
    defines the subclass elsewhere: it is refused what the whole model has chosen. The answer is kept on the class that
    was asked, and inherited.
    """
    from transformers.models.gemma4 import modeling_gemma4

    modeling_gemma4.Gemma4TextModel._can_set_experts_implementation()


@contextmanager
def convolutions_begun_anew() -> Iterator[None]:
    """Let LFM2's convolutions forget an earlier text when a new one begins.

    Upstream: LiteRT-LM 0.18.1 hands the states of convolutions that one session left to the next session of the same
    engine. It masks keys and values by position, but nothing masks a state: the first tokens of every later text saw
    the end of another. The graph clears the states at position 0 (litert-torch 0.10.0,
    `generative/export_hf/model_ext/lfm2/short_conv.py`).
    """
    # Not at the top: light modules read this file too.
    from litert_torch.generative.export_hf.model_ext.lfm2 import short_conv

    original = short_conv.Lfm2ShortConv.forward

    def forward(self: Any, hidden_states: Any, past_key_values: Any, cache_position: Any, **others: Any) -> Any:
        layer = past_key_values.layers[self.layer_idx]
        layer.conv_states = layer.conv_states * (cache_position[:1] > 0).to(layer.conv_states.dtype)
        return original(self, hidden_states, past_key_values, cache_position, **others)

    with mock.patch.object(short_conv.Lfm2ShortConv, "forward", forward):
        yield


@contextmanager
def weights_taken_in_place() -> Iterator[None]:
    """Let the converter read large weights where they lie, instead of copying them up to three times.

    Upstream: litert-torch 0.10.0 (`generative/utilities/converter.py`) does not pass `lightweight_conversion` on. With
    it a weight of 1 MiB or more is an MLIR resource and not an attribute of the MLIR context. The graph has the same
    operators and bytes, as long as no such weight is to be folded into another constant; only the weights' tensors lose
    their names. The model must outlive the conversion.
    """
    # Not at the top: light modules read this file too.
    from litert_torch._convert import core

    convert = core.convert_signatures

    def convert_in_place(signatures: Any, **options: Any) -> Any:
        in_place = {"lightweight_conversion": True, "runtime_constant_folding": False}
        return convert(signatures, **{**options, **in_place})

    with mock.patch.object(core, "convert_signatures", convert_in_place):
        yield


@contextmanager
def generated_code_deferred() -> Iterator[None]:
    """Let a graph's Python code be generated when it is called or read, not whenever the graph has changed.

    Upstream: torch 2.13.0 (`torch/fx/graph_module.py`, `GraphModule.recompile`) generates and compiles the source of a
    whole graph at each change; exporting and decomposing change a graph dozens of times and interpret it instead of
    calling it. A sixth of a conversion went there. `torch.fx._lazy_graph_module` does the same for some of the graphs.
    """
    # Not at the top: light modules read this file too.
    from torch.fx import GraphModule
    from torch.fx.graph import _PyTreeCodeGen

    generate = GraphModule.recompile
    code: Any = GraphModule.code

    def defer(self: Any) -> None:
        codegen = self._graph._codegen
        if isinstance(codegen, _PyTreeCodeGen):
            self._in_spec = codegen.pytree_info.in_spec
            self._out_spec = codegen.pytree_info.out_spec
        self._code = None
        type(self).forward = generate_and_call

    def generate_and_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        generate(self)
        return self.forward(*args, **kwargs)

    def read_code(self: Any) -> str:
        if self._code is None:
            generate(self)
        return str(code.fget(self))

    with (
        mock.patch.object(GraphModule, "recompile", defer),
        mock.patch.object(GraphModule, "code", property(read_code)),
    ):
        yield


_MARKUP = re.compile(r"\[/?[a-z ]+\]")
_STARTED = "[START]"

#: The tool's tasks worth a line; those inside them only repeat.
_REPORTED_TASKS = (
    "Torch Export",
    "Run FX Passes",
    "Lower to MLIR",
    "Merge MLIR Modules",
    "Run LiteRT Converter Passes",
    "Write Model",
)


@contextmanager
def tool_tasks_reported(listen: Callable[[str], None]) -> Iterator[None]:
    """Call `listen` with the name of each task that litert-torch starts, instead of letting it print.

    Upstream: litert-torch 0.10.0 (`progress.py`) has no hook; it prints to one module-level rich console.
    """
    # Not at the top: light modules read this file too.
    from litert_torch import progress

    with mock.patch.object(progress, "console", _TaskListener(listen)):
        yield


class _TaskListener:
    """Stands where litert-torch expects its console."""

    def __init__(self, listen: Callable[[str], None]) -> None:
        self._listen = listen

    def print(self, message: str, *_: Any) -> None:
        """Pass on the innermost task of a start line, if it is one worth a line."""
        text = _MARKUP.sub("", message)
        if _STARTED in text:
            task = text.split(_STARTED, 1)[1].rsplit(" > ", 1)[-1].strip()
            if task.startswith(_REPORTED_TASKS):
                self._listen(task.split(" to /", 1)[0])
