"""Writes the float32 graph of a checkpoint from a template: no tracing, no torch, a few blocks of memory.

Owns the comparison of checkpoint and template, and the values for which the converter would have made another graph:
whatever is not certain to become the file of a full conversion is refused with the difference. Called by
`workers.convert.template` and by hand.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from service.errors import CheckpointInvalid, DiskFull, TemplateUnfit
from workers.convert import architectures
from workers.convert.architectures import DecoderShape
from workers.convert.architectures.parameters import complete_names, find_embedding, find_output, is_ignored
from workers.convert.template_files import (
    SKELETON_FILE,
    Template,
    describe_graph,
    load_template,
    require_same_graph,
)
from workers.convert.template_map import Piece
from workers.convert.template_tensors import MappedTensor, MappedTensors, Values
from workers.steps import Progress, run_by_hand

MODEL_FILE = "model.tflite"

_COPY_BYTES = 1 << 24
#: A single value is a constant as any other, unless operations with it do nothing.
_FOLDED_SCALARS = (-1.0, 0.0, 1.0)


def run(params: Mapping[str, Any], inputs: Mapping[str, Path], output_dir: Path, progress: Progress) -> dict[str, Any]:
    """Write `model.tflite` from `inputs["checkpoint"]` and `inputs["template"]`; see `workers.steps`.

    `params` are those of `convert`. Raises `TemplateUnfit` where a full conversion is the way.
    """
    template = load_template(inputs["template"])
    checkpoint_dir = inputs["checkpoint"]
    config = json.loads((checkpoint_dir / "config.json").read_text(encoding="utf-8"))
    lengths = [int(length) for length in params["prefill_lengths"]]
    require_same_graph(template, describe_graph(config, params["engine"], lengths, int(params["context_length"])))
    target = output_dir / MODEL_FILE
    write_graph(template, inputs["template"], config, checkpoint_dir, target, progress)
    return {"engine": params["engine"], "pieces": len(template.pieces), "size_bytes": target.stat().st_size}


def write_graph(
    template: Template,
    template_dir: Path,
    config: Mapping[str, Any],
    checkpoint_dir: Path,
    target: Path,
    progress: Progress,
) -> None:
    """Write the graph of a checkpoint to `target`.

    Raises `TemplateUnfit` for a checkpoint that the template is not for, naming the difference, `CheckpointInvalid`
    for values that are not finite, and `DiskFull`. What was begun is removed then.
    """
    shape = architectures.find_family(config).read_shape(config)
    try:
        with MappedTensors(checkpoint_dir) as stored, target.open("xb") as stream:
            tensors = require_same_tensors(template, shape, stored)
            # Taken at once: a full disk is noticed before anything is written.
            os.posix_fallocate(stream.fileno(), 0, template.size_bytes)
            with (template_dir / SKELETON_FILE).open("rb") as skeleton:
                _write(template, tensors, skeleton, stream, progress)
    except BaseException as error:
        target.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(f"No space left for the graph of {template.size_bytes} bytes.") from error
        raise


def require_same_tensors(
    template: Template, shape: DecoderShape, stored: Mapping[str, MappedTensor]
) -> dict[str, MappedTensor]:
    """Return the stored tensors by the template's names; raises `TemplateUnfit` unless these are exactly its tensors.

    As everywhere, the bare model's names are completed, old buffers are passed over, and a tied output layer may be
    stored as long as it is the embedding.
    """
    tensors = {name: stored[written] for name, written in complete_names(shape, stored).items()}
    output = find_output(shape)
    if shape.tied_embeddings and output in tensors and output not in template.tensors:
        _require_equal(tensors[output], tensors[find_embedding(shape)])
        del tensors[output]
    tensors = {name: tensor for name, tensor in tensors.items() if name in template.tensors or not is_ignored(name)}
    for name in sorted(template.tensors.keys() | tensors.keys()):
        if name not in tensors:
            raise TemplateUnfit(f"The template needs a tensor {name!r}, which the weights lack.", tensor=name)
        if name not in template.tensors:
            raise TemplateUnfit(
                f"The weights hold a tensor {name!r}, which the template has no place for.", tensor=name
            )
        ours, theirs = template.tensors[name], tensors[name].extents
        if ours != theirs:
            raise TemplateUnfit(
                f"The template has {list(ours)} as the shape of {name!r}, and the weights have {list(theirs)}.",
                tensor=name,
            )
    return tensors


def _require_equal(output: MappedTensor, embedding: MappedTensor) -> None:
    axes = (0, 1)
    is_equal = output.extents == embedding.extents and all(
        np.array_equal(ours, theirs)
        for ours, theirs in zip(
            output.read_blocks(axes, 0, output.values), embedding.read_blocks(axes, 0, embedding.values), strict=True
        )
    )
    if not is_equal:
        raise TemplateUnfit(
            f"The embeddings are tied, and {output.name!r} differs from {embedding.name!r}.", tensor=output.name
        )


def _write(
    template: Template,
    tensors: Mapping[str, MappedTensor],
    skeleton: BinaryIO,
    stream: BinaryIO,
    progress: Progress,
) -> None:
    usual = _UsualValues()
    for gap, piece in zip(template.list_gaps(), (*template.pieces, None), strict=True):
        left = gap
        while left:
            block = skeleton.read(min(left, _COPY_BYTES))
            if not block:
                raise TemplateUnfit("The template's skeleton is shorter than its pieces say.")
            stream.write(block)
            left -= len(block)
        if piece is None:
            break
        progress(f"Writing {piece.tensor}", piece.begin_byte / template.size_bytes)
        for values in _read_finite(piece, tensors[piece.tensor]):
            usual.add(piece, values)
            stream.write(values.data)
    usual.finish()
    progress("Written", 1.0)


def _read_finite(piece: Piece, tensor: MappedTensor) -> Iterator[Values]:
    for values in piece.read_blocks(tensor):
        if not np.isfinite(values).all():
            raise CheckpointInvalid(f"The tensor {piece.tensor!r} holds NaN or infinity.", tensor=piece.tensor)
        yield np.ascontiguousarray(values)


class _UsualValues:
    """Raises `TemplateUnfit` for constants that the converter would have treated unlike those of the template.

    It folds a constant whose values are all the same, and keeps one of two that are equal.
    """

    def __init__(self) -> None:
        self._begin: Piece | None = None
        self._value = np.float32(0)
        self._is_uniform = False
        self._size_bytes = 0
        self._checksum = 0
        self._seen: dict[tuple[int, int], Piece] = {}

    def add(self, piece: Piece, values: Values) -> None:
        """Take the next values of a constant."""
        if self._begin is None or piece.buffer != self._begin.buffer:
            self.finish()
            self._begin, self._value, self._is_uniform = piece, values[0], True
            self._size_bytes = self._checksum = 0
        self._is_uniform = self._is_uniform and bool((values == self._value).all())
        self._checksum = zlib.crc32(values.data, self._checksum)
        self._size_bytes += values.nbytes

    def finish(self) -> None:
        """Judge the constant whose values were taken."""
        begin, self._begin = self._begin, None
        if begin is None:
            return
        if self._is_uniform and (self._size_bytes > self._value.nbytes or self._value in _FOLDED_SCALARS):
            raise TemplateUnfit(
                f"All values of {begin.tensor!r} are {self._value}, which the converter folds away.",
                tensor=begin.tensor,
            )
        twin = self._seen.setdefault((self._size_bytes, self._checksum), begin)
        # A tied tensor is held twice by the template, too.
        if (twin.tensor, twin.axes, twin.first) != (begin.tensor, begin.axes, begin.first):
            raise TemplateUnfit(
                f"The tensors {twin.tensor!r} and {begin.tensor!r} are equal, of which the converter may keep one.",
                tensors=[twin.tensor, begin.tensor],
            )


if __name__ == "__main__":
    sys.exit(run_by_hand(run, "Write the float32 graph of a checkpoint from a template."))
