"""A checkpoint's tensors read from mapped files, a block at a time, in the order in which a graph holds them.

Owns the widening to float32 and the reading of a tensor with its axes in another order. Needs neither torch nor the
memory of a whole tensor. Called by `workers.convert.template_map` and `template_write`.
"""

from __future__ import annotations

import itertools
import math
import mmap
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from workers.fetch.safetensors_header import TensorEntry
from workers.fetch.weight_files import read_headers

Values = npt.NDArray[np.float32]
#: The order of a tensor's axes in the graph, as `numpy.transpose` takes it.
Axes = tuple[int, ...]

#: Values that are held at a time: 16 MiB as float32.
BLOCK_VALUES = 1 << 22

#: bfloat16 is the upper half of a float32.
_STORED = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}


class MappedTensors(Mapping[str, "MappedTensor"]):
    """The named tensors of a checkpoint folder; a context manager that holds its files mapped.

    Raises `CheckpointInvalid` for files whose headers do not agree with their bytes or their index.
    """

    def __init__(self, checkpoint_dir: Path) -> None:
        self._dir = checkpoint_dir
        self._stack = ExitStack()
        self._tensors: dict[str, MappedTensor] = {}

    def __enter__(self) -> MappedTensors:
        try:
            for header in read_headers(self._dir):
                stream = self._stack.enter_context(header.path.open("rb"))
                content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
                self._tensors |= {entry.name: MappedTensor(entry, content) for entry in header.tensors}
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # The maps end with the arrays that look into them.
        self._tensors = {}
        self._stack.close()

    def __getitem__(self, name: str) -> MappedTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class MappedTensor:
    """One tensor as it is stored."""

    def __init__(self, entry: TensorEntry, content: Any) -> None:
        self.name = entry.name
        self.extents = entry.shape
        self.values = math.prod(entry.shape)
        flat = np.frombuffer(content, _STORED[entry.dtype], self.values, entry.begin_byte)
        self._stored: npt.NDArray[Any] = flat.reshape(entry.shape)

    def read(self, axes: Axes, first: int, count: int) -> Values:
        """Return `count` values from the `first` on, in the order that the tensor has with its axes as `axes` says."""
        if axes == tuple(range(len(axes))):
            return _widen(self._stored.reshape(-1)[first : first + count])
        ordered = self._stored.transpose(axes)
        row_values = math.prod(ordered.shape[1:])
        begin, end = first // row_values, -(-(first + count) // row_values)
        block = np.ascontiguousarray(ordered[begin:end]).reshape(-1)
        skipped = first - begin * row_values
        return _widen(block[skipped : skipped + count])

    def read_blocks(self, axes: Axes, first: int, count: int) -> Iterator[Values]:
        """Yield the same in blocks of bounded size."""
        for begin in range(first, first + count, BLOCK_VALUES):
            yield self.read(axes, begin, min(BLOCK_VALUES, first + count - begin))

    def read_row_begins(self, axes: Axes) -> tuple[npt.NDArray[np.int64], Values]:
        """Return where each row begins in that order, and its first two values: float32 [rows, 2].

        A vector counts as a row from each of its values on; rows of one value are left out.
        """
        ordered = self._stored.transpose(axes)
        if sum(extent != 1 for extent in self.extents) < 2:
            flat = ordered.reshape(-1)
            return np.arange(max(0, self.values - 1)), _widen(np.stack([flat[:-1], flat[1:]], axis=1))
        length = ordered.shape[-1]
        if length < 2:
            return np.zeros(0, np.int64), np.zeros((0, 2), np.float32)
        begins = np.arange(0, self.values, length)
        return begins, _widen(np.ascontiguousarray(ordered[..., :2]).reshape(-1, 2))

    def list_orders(self) -> Iterable[Axes]:
        """Return the orders of axes that differ in the order of values, the stored one first."""
        long = [axis for axis, extent in enumerate(self.extents) if extent != 1]
        for order in itertools.permutations(long):
            # Axes of one are put in front; where they stand makes no difference.
            short = tuple(axis for axis in range(len(self.extents)) if axis not in long)
            yield tuple(range(len(self.extents))) if list(order) == long else short + order


def _widen(stored: npt.NDArray[Any]) -> Values:
    if stored.dtype == np.uint16:
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32)
