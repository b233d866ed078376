"""Tracing and lowering of a model's signatures side by side, each in a process of its own.

litert-torch 0.10.0 (`_convert/core.py`, `convert_signatures`) exports, decomposes and lowers one signature after the
other: Python, on one core, three quarters of a conversion. Here a process forked from the one that holds the weights
does this for each signature and hands the MLIR module back as bytecode. A weight does not travel: in its place stands a
call that names the shared tensor's storage, and the converting process puts its own tensor there before it merges the
modules and goes on as the tool does. The file is byte for byte the tool's.

Called by the engines, of which it knows nothing.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import pickle
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import torch

from service.errors import ChildCrashed
from workers.convert import toolfixes

with toolfixes.schema_without_tensorflow():
    from jax._src import xla_bridge
    from litert_converter.mlir import ir
    from litert_converter.mlir.dialects import stablehlo
    from litert_torch import backend, model, progress
    from litert_torch._convert import core, litert_converter
    from litert_torch.backend import inline_consts, lowerings

#: Callee that stands for a weight while a module is between processes.
_WEIGHT_CALL = "edgekiln.weight"

#: What one process must find free: interpreter and libraries are shared, graph and module are its own.
_MEMORY_EACH_BYTES = 2 << 30

_Storages = dict[int, torch.UntypedStorage]


@dataclass
class _Lowered:
    """What a process hands back of one signature; stands where the tool expects an exported program."""

    bytecode: bytes
    output_names: list[str]
    input_signature: list[backend.export.VariableSignature]
    output_signature: list[backend.export.VariableSignature]


@contextmanager
def signatures_side_by_side(processes: int | None = None) -> Iterator[None]:
    """Let a conversion in this context lower up to `processes` signatures at a time.

    By default as many as torch may use threads (`OMP_NUM_THREADS`, else the cores of this process), less where memory
    is short. One means as the tool does it; so does a process that has lowered before: JAX, by which the tool lowers
    some operators, waits in a fork for threads that did not come along.
    """
    allowed = min(torch.get_num_threads(), _read_free_bytes() // _MEMORY_EACH_BYTES) if processes is None else processes
    if xla_bridge.backends_are_initialized():
        allowed = 1
    convert_in_sequence = core.convert_signatures

    def convert(signatures: Sequence[Any], **options: Any) -> model.LiteRTModel:
        is_ours = not options.get("use_v2") and options.get("quant_config") is None
        if not is_ours or allowed < 2 or len(signatures) < 2:
            return convert_in_sequence(signatures, **options)
        core._warn_training_modules(signatures)
        storages = _list_storages(signatures)
        known = {name: options[name] for name in ("enable_x64", "lightweight_conversion", "runtime_constant_folding")}
        in_place = bool(options["lightweight_conversion"])
        lowered = _lower_all(signatures, storages, allowed, in_place=in_place)
        with _lowered_modules_taken(storages):
            return model.LiteRTModel(litert_converter.exported_programs_to_flatbuffer(lowered, signatures, **known))

    with mock.patch.object(core, "convert_signatures", convert):
        yield


def _read_free_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def _list_storages(signatures: Sequence[Any]) -> _Storages:
    """Return the storages that every forked process shares with this one, by address."""
    modules = [signature.module for signature in signatures]
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers()) if tensor.numel()]
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}


def _lower_all(signatures: Sequence[Any], storages: _Storages, processes: int, *, in_place: bool) -> list[_Lowered]:
    """Lower every signature in a process of its own, `processes` at a time; return them in order.

    `in_place` says whether large constants become MLIR resources, as the tool's `lightweight_conversion` does.
    """
    waiting, lowered = deque(signatures), {}
    running: dict[Any, _Process] = {}
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                process = _Process(waiting.popleft(), storages, in_place)
                running[process.answers] = process
            for answers in connection.wait(list(running)):
                answer = running[answers].receive()
                if isinstance(answer, str):
                    progress.console.print(answer)
                elif isinstance(answer, _Lowered):
                    process = running.pop(answers)
                    process.end()
                    lowered[process.name] = answer
                else:
                    raise answer
    finally:
        for process in running.values():
            process.end()
    return [lowered[signature.name] for signature in signatures]


class _Process:
    """One signature's process as the one that forked it sees it."""

    def __init__(self, signature: Any, storages: _Storages, in_place: bool) -> None:
        fork = multiprocessing.get_context("fork")
        self.name: str = signature.name
        self.answers, theirs = fork.Pipe(duplex=False)
        self._process = fork.Process(target=_run, args=(signature, storages, in_place, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def receive(self) -> _Lowered | str | BaseException:
        """Return what it says next: a line of the tool's progress, its result, or why there is none."""
        try:
            answer: _Lowered | str | BaseException = self.answers.recv()
        except EOFError:
            self._process.join()
            raise ChildCrashed(
                f"The process that lowered the signature {self.name!r} ended with exit code {self._process.exitcode} "
                "and gave no answer; the step is tried again.",
                signature=self.name,
                exit_code=self._process.exitcode,
            ) from None
        return answer

    def end(self) -> None:
        """Kill it, if it still lives, and reap it."""
        self._process.kill()
        self._process.join()
        self.answers.close()


def _run(signature: Any, storages: _Storages, in_place: bool, answers: Any) -> NoReturn:
    """Lower one signature in a forked process, answer, and end it."""
    # Nothing that was there before the fork is collected, so that its pages stay shared.
    gc.freeze()
    # The threads of OpenMP did not survive the fork.
    torch.set_num_threads(1)
    try:
        with mock.patch.object(progress, "console", _Forwarding(answers.send)):
            answers.send(_lower(signature, storages, in_place))
    except BaseException as error:
        traceback.print_exc()
        answers.send(_make_portable(error))
    finally:
        # Exit handlers of the libraries belong to the process that was forked.
        os._exit(0)


class _Forwarding:
    """Stands where litert-torch expects its console; passes on what it prints."""

    def __init__(self, send: Callable[[str], None]) -> None:
        self._send = send

    def print(self, message: str, *_: Any) -> None:
        self._send(message)


def _make_portable(error: BaseException) -> BaseException:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _lower(signature: Any, storages: _Storages, in_place: bool) -> _Lowered:
    """Do what `convert_signatures` does up to the MLIR module, with calls in place of shared weights."""
    with progress.task(f"Torch Export: {signature.name}"):
        program = core._run_convert_passes(core.export_torch_signature(signature))
    with progress.task(f"Lower to MLIR: {signature.name}"), _weights_named(storages):
        lowered = backend.export.exported_program_to_mlir(
            program,
            ir_context=backend.export_utils.create_ir_context(),
            lowering_context_plugins=[inline_consts.InlineConstsContext(enable_resource_constants=in_place)],
        )
    names = litert_converter._get_output_names(program, lowered)
    return _Lowered(lowered.module_bytecode, names, lowered.input_signature, lowered.output_signature)


@contextmanager
def _weights_named(storages: _Storages) -> Iterator[None]:
    """Lower a weight that the converting process holds, too, to a call that names it."""
    lower_constant = lowerings.lookup(inline_consts.tensor_lowering_placeholder)

    def lower(context: Any, tensor: torch.Tensor) -> ir.Value:
        address = tensor.untyped_storage().data_ptr()
        if address not in storages or not tensor.is_contiguous():
            return lower_constant(context, tensor)
        place = {"address": address, "offset": tensor.storage_offset(), "dtype": str(tensor.dtype).split(".")[1]}
        element = lowerings.utils.torch_dtype_to_ir_element_type(tensor.dtype)
        return stablehlo.custom_call(
            [ir.RankedTensorType.get(tensor.shape, element)],
            inputs=[],
            call_target_name=_WEIGHT_CALL,
            backend_config=ir.StringAttr.get(json.dumps(place)),
        )

    with mock.patch.dict(
        lowerings.registry.global_registry.registered_ops, {inline_consts.tensor_lowering_placeholder: lower}
    ):
        yield


@contextmanager
def _lowered_modules_taken(storages: _Storages) -> Iterator[None]:
    """Let the tool's merge take what came out of the processes where it would lower an exported program."""

    def take(lowered: _Lowered, *, ir_context: ir.Context, lowering_context_plugins: list[Any]) -> Any:
        with ir_context:
            module = ir.Module.parse(lowered.bytecode, ir_context)
            context = lowerings.context.LoweringContext(ir_context, module)
            for plugin in lowering_context_plugins:
                context.add_plugin(plugin)
            _put_weights(module, context, storages)
        return backend.export.MlirLowered(ir_context, module, {}, lowered.input_signature, lowered.output_signature)

    with (
        mock.patch.object(backend.export, "exported_program_to_mlir", take),
        mock.patch.object(litert_converter, "_get_output_names", lambda lowered, _: lowered.output_names),
    ):
        yield


def _put_weights(module: ir.Module, context: Any, storages: _Storages) -> None:
    """Replace each call that names a weight by the constant that the tool would have made of it."""
    lower_constant = lowerings.lookup(inline_consts.tensor_lowering_placeholder)
    for function in module.body.operations:
        for operation in list(function.regions[0].blocks[0].operations):
            if not isinstance(operation, stablehlo.CustomCallOp) or operation.call_target_name.value != _WEIGHT_CALL:
                continue
            place = json.loads(operation.attributes["backend_config"].value)
            storage = storages[place["address"]]
            shape = torch.Size(ir.RankedTensorType(operation.result.type).shape)
            weight = torch.empty(0, dtype=getattr(torch, place["dtype"]))
            weight = weight.set_(storage, place["offset"], shape, torch.empty(shape, device="meta").stride())
            with ir.InsertionPoint(operation), operation.location:
                operation.result.replace_all_uses_with(lower_constant(context, weight))
            operation.erase()
