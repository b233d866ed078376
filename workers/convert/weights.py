"""Streaming of safetensors into a torch module's parameters.

Owns reading tensors one at a time, from one file or from shards with an index, in bfloat16, float16 or
float32, as float32, and the file that parameters can lie in. Knows no architecture: which names a shape expects it is
told. Called by `workers.convert.reauthored`.
"""

from __future__ import annotations

import json
import mmap
import os
import re
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from service.errors import CheckpointInvalid

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class CheckpointTensors:
    """The named tensors of a checkpoint folder; a context manager that holds its files open (mapped, not read)."""

    def __init__(
        self, checkpoint_dir: Path, complete_names: Callable[[Iterable[str]], dict[str, str]] | None = None
    ) -> None:
        """`complete_names` returns the stored name of each tensor by the name that it is asked for with."""
        self._dir = checkpoint_dir
        self._complete_names = complete_names
        self._stack = ExitStack()
        self._file_of: dict[str, Any] = {}
        self._stored: dict[str, str] = {}
        self._unused: set[str] = set()

    def __enter__(self) -> CheckpointTensors:
        try:
            for name in self._list_files():
                self._open(name)
        except BaseException:
            self._stack.close()
            raise
        complete = self._complete_names or (lambda names: {name: name for name in names})
        self._stored = complete(self._file_of)
        self._unused = set(self._stored)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _list_files(self) -> list[str]:
        index = self._dir / _INDEX
        if not index.is_file():
            return [_SINGLE]
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return sorted(set(weight_map.values()))

    def _open(self, name: str) -> None:
        path = self._dir / name
        if not path.is_file():
            raise CheckpointInvalid(f"{name} is missing from the checkpoint.", file=name)
        try:
            handle = self._stack.enter_context(safe_open(path, framework="pt"))
        except SafetensorError as error:
            raise CheckpointInvalid(f"{name} is not a valid safetensors file: {error}.", file=name) from error
        for tensor in handle.keys():  # noqa: SIM118 - the handle is not a mapping
            if tensor in self._file_of:
                raise CheckpointInvalid(f"The tensor {tensor!r} stands in two files.", file=name, tensor=tensor)
            self._file_of[tensor] = handle

    def __contains__(self, name: object) -> bool:
        return name in self._stored

    def read(self, name: str, shape: Iterable[int]) -> torch.Tensor:
        """Return one tensor as float32 of exactly `shape`.

        Raises `CheckpointInvalid` when it is missing, has another shape, another dtype than bfloat16, float16 or
        float32, or holds NaN or infinity.
        """
        if name not in self._stored:
            raise CheckpointInvalid(f"The weights hold no tensor {name!r}, which config.json demands.", tensor=name)
        tensor: torch.Tensor = self._file_of[self._stored[name]].get_tensor(self._stored[name])
        expected = tuple(shape)
        if tuple(tensor.shape) != expected:
            raise CheckpointInvalid(
                f"The tensor {name!r} has shape {list(tensor.shape)}; config.json demands {list(expected)}.",
                tensor=name,
            )
        if tensor.dtype not in _DTYPES:
            raise CheckpointInvalid(
                f"The tensor {name!r} is {tensor.dtype}; weights must be bfloat16, float16 or float32.", tensor=name
            )
        values = tensor.to(torch.float32)
        if not bool(torch.isfinite(values).all()):
            raise CheckpointInvalid(f"The tensor {name!r} holds NaN or infinity.", tensor=name)
        self._unused.discard(name)
        return values

    def require_all_used(self, ignorable: re.Pattern[str]) -> None:
        """Raise `CheckpointInvalid` if a tensor was never read, unless its whole name is ignorable."""
        left = sorted(name for name in self._unused if not ignorable.fullmatch(name))
        if left:
            named = ", ".join(left[:5]) + (f" and {len(left) - 5} more" if len(left) > 5 else "")
            raise CheckpointInvalid(
                f"The weights hold {len(left)} tensors that config.json gives no place: {named}. Config and weights "
                "do not belong together.",
                tensors=left,
            )


def map_parameters(model: torch.nn.Module, path: Path) -> None:
    """Let every parameter of a float32 model lie in the new file `path`, at a page of its own; values are undefined.

    Raises `OSError` when the disk has no room: it is taken at once, for a write to a full disk would kill the process.
    """
    page_bytes = mmap.ALLOCATIONGRANULARITY
    sizes = [parameter.numel() * parameter.element_size() for parameter in model.parameters()]
    places = [-(-size // page_bytes) * page_bytes for size in sizes]
    with path.open("xb") as stream:
        os.posix_fallocate(stream.fileno(), 0, sum(places))
    begin = 0
    for parameter, place_bytes in zip(model.parameters(), places, strict=True):
        mapped = np.memmap(path, dtype=np.float32, mode="r+", offset=begin, shape=tuple(parameter.shape))
        parameter.data = torch.from_numpy(mapped)
        begin += place_bytes
