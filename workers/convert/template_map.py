"""Finds, by content alone, where each tensor of a checkpoint stands in the graph that was made of it.

Owns the search: whole tensors, parts of them one after another, with their axes in another order, with one number
added or multiplied. Knows no family and no engine; the checkpoint's values must be random, so that nothing is found by
chance. Called by `workers.convert.template`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from service.errors import TemplateUnfit
from workers.convert.template_graph import Buffer, list_buffers, read_words
from workers.convert.template_tensors import BLOCK_VALUES, Axes, MappedTensor, Values

_WORD_BYTES = 4
#: Values that decide whether a longer comparison is worth it.
_PROBE_VALUES = 1024
#: What norms are stored as a difference from.
_NORM_OFFSET = 1.0


@dataclass(frozen=True)
class Piece:
    """A stretch of the graph's file that holds values of one tensor, as float32."""

    begin_byte: int
    #: The buffer that it is a part of.
    buffer: int
    tensor: str
    #: The order of the tensor's axes, the first of its values in that order, and how many there are.
    axes: Axes
    first: int
    values: int
    #: What each value is multiplied with, then what is added to it.
    scale: float = 1.0
    offset: float = 0.0

    def read_blocks(self, tensor: MappedTensor) -> Iterator[Values]:
        """Yield what stands in the graph, in blocks of bounded size."""
        for block in tensor.read_blocks(self.axes, self.first, self.values):
            yield self.change(block)

    def change(self, values: Values) -> Values:
        """Return values of the tensor as the graph holds them."""
        if self.scale != 1.0:
            values = values * np.float32(self.scale)
        if self.offset != 0.0:
            values = values + np.float32(self.offset)
        return values


@dataclass(frozen=True)
class Places:
    """What was found, in the order of the file."""

    pieces: tuple[Piece, ...]
    #: Tensors that stand nowhere in the graph.
    unplaced: tuple[str, ...]


def find_places(content: Any, tensors: Mapping[str, MappedTensor]) -> Places:
    """Return where the tensors' values stand in the graph `content`.

    Buffers in which no tensor is found count as constants of the graph. Raises `TemplateUnfit` for one that is partly
    explained: whatever else it holds would be lost.
    """
    index = _Index(tensors)
    pieces: list[Piece] = []
    unexplained: list[Buffer] = []
    for buffer in list_buffers(content):
        words = read_words(content, buffer)
        found = list(_cut(words, buffer, tensors, index))
        explained_bytes = sum(piece.values for piece in found) * _WORD_BYTES
        if found and explained_bytes != buffer.size_bytes:
            raise TemplateUnfit(
                f"Of the {buffer.size_bytes} bytes of the constant {buffer.tensor!r} only the first {explained_bytes} "
                f"are explained: they hold the tensor {found[0].tensor!r}.",
                constant=buffer.tensor,
                tensor=found[0].tensor,
            )
        pieces += found
        if not found:
            unexplained.append(buffer)
    unplaced = set(tensors) - {piece.tensor for piece in pieces}
    for buffer in unexplained:
        piece = _find_changed(read_words(content, buffer), buffer, [tensors[name] for name in sorted(unplaced)])
        if piece is not None:
            pieces.append(piece)
    placed = {piece.tensor for piece in pieces}
    return Places(
        tuple(sorted(pieces, key=lambda piece: piece.begin_byte)), tuple(name for name in tensors if name not in placed)
    )


def _cut(
    words: npt.NDArray[np.uint32], buffer: Buffer, tensors: Mapping[str, MappedTensor], index: _Index
) -> Iterator[Piece]:
    """Yield the pieces that a buffer consists of, from its begin to the first word that no tensor explains."""
    position = 0
    while position < len(words):
        best = None
        for name, axes, first in index.find(words[position : position + 2], is_whole=len(words) == 1):
            values = _count_equal(words[position:], tensors[name], axes, first)
            if best is None or values > best.values:
                best = Piece(buffer.begin_byte + position * _WORD_BYTES, buffer.index, name, axes, first, values)
        if best is None or best.values == 0:
            return
        yield best
        position += best.values


def _count_equal(words: npt.NDArray[np.uint32], tensor: MappedTensor, axes: Axes, first: int) -> int:
    """Return how many words on end are the tensor's values from `first` on."""
    limit = min(len(words), tensor.values - first)
    done, step = 0, _PROBE_VALUES
    while done < limit:
        count = min(step, limit - done)
        different = words[done : done + count] != tensor.read(axes, first + done, count).view(np.uint32)
        if different.any():
            return done + int(different.argmax())
        done, step = done + count, BLOCK_VALUES
    return done


def _find_changed(words: npt.NDArray[np.uint32], buffer: Buffer, tensors: list[MappedTensor]) -> Piece | None:
    """Return the piece of a buffer that holds one tensor with a number added or multiplied."""
    if buffer.size_bytes % _WORD_BYTES:
        return None
    held = words.view(np.float32)
    for tensor in tensors:
        if tensor.values != len(words):
            continue
        for axes in tensor.list_orders():
            for scale, offset in _guess_changes(held[0], tensor.read(axes, 0, 1)[0]):
                piece = Piece(buffer.begin_byte, buffer.index, tensor.name, axes, 0, len(words), scale, offset)
                if _is_held(words, tensor, piece):
                    return piece
    return None


def _guess_changes(held: np.float32, stored: np.float32) -> Iterator[tuple[float, float]]:
    yield 1.0, _NORM_OFFSET
    if np.isfinite(held) and held != 0:
        factor = held / stored
        for candidate in (factor, np.nextafter(factor, np.float32(0)), np.nextafter(factor, np.float32(np.inf))):
            yield float(candidate), 0.0


def _is_held(words: npt.NDArray[np.uint32], tensor: MappedTensor, piece: Piece) -> bool:
    probe = piece.change(tensor.read(piece.axes, 0, min(_PROBE_VALUES, piece.values)))
    if not np.array_equal(words[: len(probe)], probe.view(np.uint32)):
        return False
    position = 0
    for block in piece.read_blocks(tensor):
        if not np.array_equal(words[position : position + len(block)], block.view(np.uint32)):
            return False
        position += len(block)
    return True


class _Index:
    """Places in tensors by the two values that stand there: begins of tensors first, then begins of rows."""

    def __init__(self, tensors: Mapping[str, MappedTensor]) -> None:
        self._tensors = tensors
        self._begins: dict[bytes, list[tuple[str, Axes, int]]] = {}
        self._rows: _Rows | None = None
        for tensor in tensors.values():
            for axes in tensor.list_orders():
                key = tensor.read(axes, 0, min(2, tensor.values)).tobytes()
                self._begins.setdefault(key, []).append((tensor.name, axes, 0))

    def find(self, words: npt.NDArray[np.uint32], *, is_whole: bool) -> Iterator[tuple[str, Axes, int]]:
        """Yield name, order of axes and first value of each place that begins with these two words.

        Of tensors of one value only the whole is compared: one word says little.
        """
        if len(words) < 2:
            yield from self._begins.get(words.tobytes(), []) if is_whole else []
            return
        begins = self._begins.get(words.tobytes())
        yield from begins if begins is not None else self._find_rows(words)

    def _find_rows(self, words: npt.NDArray[np.uint32]) -> Iterator[tuple[str, Axes, int]]:
        if self._rows is None:
            self._rows = _Rows(self._tensors)
        yield from self._rows.find(words)


class _Rows:
    """Places by the two values that stand there: begins of rows, and every value of a vector. Made only on demand."""

    def __init__(self, tensors: Mapping[str, MappedTensor]) -> None:
        self._sources: list[tuple[str, Axes]] = []
        keys, firsts, numbers = [], [], []
        for tensor in tensors.values():
            for axes in tensor.list_orders():
                begins, pairs = tensor.read_row_begins(axes)
                keys.append(pairs.view(np.uint64).reshape(-1))
                firsts.append(begins)
                numbers.append(np.full(len(begins), len(self._sources), np.uint32))
                self._sources.append((tensor.name, axes))
        joined = np.concatenate(keys)
        order = np.argsort(joined, kind="stable")
        self._keys = joined[order]
        self._firsts = np.concatenate(firsts)[order]
        self._numbers = np.concatenate(numbers)[order]

    def find(self, words: npt.NDArray[np.uint32]) -> Iterator[tuple[str, Axes, int]]:
        """Yield the places that begin with these two words."""
        key = np.frombuffer(words.tobytes(), np.uint64)[0]
        begin, end = np.searchsorted(self._keys, key, "left"), np.searchsorted(self._keys, key, "right")
        for position in range(int(begin), int(end)):
            name, axes = self._sources[int(self._numbers[position])]
            yield name, axes, int(self._firsts[position])
