"""The step `convert`: one engine turns a checkpoint into a float32 graph; also runs by hand.

Owns the choice of the engine's module, the checks that hold for every engine, and the reading of what came out.
Never quantizes. Called by `workers.sandbox` and `python -m workers.convert.convert`.
"""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ai_edge_litert import schema_py_generated as tflite

from service.errors import ConversionFailed, DiskFull, EdgeKilnError, RequestUnfit
from service.recipes import require_known
from workers.convert import architectures, reauthored, toolfixes, traced
from workers.convert.architectures import DecoderShape
from workers.steps import Progress, run_by_hand

MODEL_FILE = "model.tflite"

#: Engines that this step runs; `auto` was resolved before.
ENGINES = ("reauthored", "traced")


def run(params: Mapping[str, Any], inputs: Mapping[str, Path], output_dir: Path, progress: Progress) -> dict[str, Any]:
    """Write `model.tflite` from `inputs["checkpoint"]`; see `workers.steps`.

    `params` holds `engine`, `prefill_lengths` (tokens, any order) and `context_length` (tokens). Raises
    `RequestUnfit` for lengths that the checkpoint cannot do, `ArchitectureUnsupported` and `CheckpointInvalid` for
    what it holds, and `ConversionFailed` when the converter gives up.
    """
    engine = require_known("engine", params["engine"], ENGINES)
    checkpoint_dir = inputs["checkpoint"]
    shape = _read_shape(checkpoint_dir, engine)
    context_length = int(params["context_length"])
    prefill_lengths = sorted({int(length) for length in params["prefill_lengths"]})
    require_fit(shape, prefill_lengths, context_length)
    progress(f"Converting with the engine {engine}", 0.05)
    target = output_dir / MODEL_FILE
    with tempfile.TemporaryDirectory(dir=output_dir, prefix="convert-") as scratch:
        written = _run_engine(engine, checkpoint_dir, shape, prefill_lengths, context_length, Path(scratch), progress)
        progress("Checking the graph", 0.95)
        written.replace(target)
    signatures = read_signatures(target)
    _require_signatures(signatures, prefill_lengths)
    progress("Converted", 1.0)
    return {
        "engine": engine,
        "architecture": shape.architecture,
        "signatures": signatures,
        "prefill_lengths": prefill_lengths,
        "context_length": context_length,
        "kv_cache_layout": {"key": "batch, heads, context, head", "value": "batch, heads, head, context"},
        "mask": "input, float32 [1, 1, tokens, context]",
        "embedder": "inside the graph",
        "size_bytes": target.stat().st_size,
    }


def require_fit(shape: DecoderShape, prefill_lengths: list[int], context_length: int) -> None:
    """Raise `RequestUnfit` when the lengths contradict the checkpoint or each other."""
    if not prefill_lengths or prefill_lengths[0] < 1:
        raise RequestUnfit(
            f"Prefill lengths must be one or more whole numbers of at least 1, not {prefill_lengths}.",
            prefill_lengths=prefill_lengths,
        )
    if context_length > shape.context_length:
        raise RequestUnfit(
            f"The context length {context_length} exceeds the model's {shape.context_length}; ask for at most that.",
            context_length=context_length,
            model_context_length=shape.context_length,
        )
    if prefill_lengths[-1] > context_length:
        raise RequestUnfit(
            f"The prefill length {prefill_lengths[-1]} exceeds the context length {context_length}.",
            prefill_length=prefill_lengths[-1],
            context_length=context_length,
        )
    if shape.attention_window is not None and context_length > shape.attention_window:
        raise RequestUnfit(
            f"The model attends to a window of {shape.attention_window} tokens, which no engine reproduces; ask for a "
            f"context of at most {shape.attention_window} tokens, where the window makes no difference.",
            context_length=context_length,
            attention_window=shape.attention_window,
        )


def _read_shape(checkpoint_dir: Path, engine: str) -> DecoderShape:
    config = json.loads((checkpoint_dir / "config.json").read_text(encoding="utf-8"))
    family = architectures.find_family(config)
    if engine not in family.engines:
        raise RequestUnfit(
            f"The engine {engine!r} does not take {family.architecture}; ask for {' or '.join(family.engines)}.",
            engine=engine,
            architecture=family.architecture,
        )
    return family.read_shape(config)


def _run_engine(
    engine: str,
    checkpoint_dir: Path,
    shape: DecoderShape,
    prefill_lengths: list[int],
    context_length: int,
    scratch: Path,
    progress: Progress,
) -> Path:
    """Run one engine; its chatter goes to standard error, so that standard output stays the figures."""
    try:
        with (
            contextlib.redirect_stdout(sys.stderr),
            toolfixes.known_warnings_ignored(),
            toolfixes.generated_code_deferred(),
            toolfixes.tool_tasks_reported(_follow(progress, signatures=len(prefill_lengths) + 1)),
        ):
            if engine == "traced":
                return traced.convert(checkpoint_dir, prefill_lengths, context_length, scratch)
            return reauthored.convert(checkpoint_dir, shape, prefill_lengths, context_length, scratch)
    except EdgeKilnError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(f"No space left while the converter wrote the model: {error}.") from error
        # The converter raises whatever its layers raise; all of it means that this model was not converted.
        raise ConversionFailed(
            f"The engine {engine!r} did not convert the model: {type(error).__name__}: {error}",
            engine=engine,
            cause=type(error).__name__,
        ) from error


def _follow(progress: Progress, signatures: int) -> Callable[[str], None]:
    """Return a listener that turns the tool's tasks into progress; each signature is exported, then lowered."""
    expected, started = 2 * signatures + 4, 0

    def listen(task: str) -> None:
        nonlocal started
        started += 1
        progress(task, min(0.9, 0.05 + 0.85 * started / expected))

    return listen


def read_signatures(path: Path) -> list[str]:
    """Return the names of a graph's signatures, sorted."""
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        model = tflite.Model.GetRootAs(content, 0)
        names = [model.SignatureDefs(index).SignatureKey() for index in range(model.SignatureDefsLength())]
        return sorted(name.decode() for name in names)


def _require_signatures(found: list[str], prefill_lengths: list[int]) -> None:
    expected = sorted(["decode", *(f"prefill_{length}" for length in prefill_lengths)])
    if found != expected:
        raise ConversionFailed(
            f"The converted graph has the signatures {found}; expected were {expected}.", signatures=found
        )


if __name__ == "__main__":
    raise SystemExit(run_by_hand(run, "Convert a checkpoint into a float32 graph."))
