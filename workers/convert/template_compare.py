"""Compares the graph that a template gave with that of a full conversion, byte by byte.

Called by `workers.convert.template` and by tests.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from service.errors import TemplateUnfit
from workers.convert.template_graph import list_buffers, mapped

_BLOCK_BYTES = 1 << 24


def require_same_bytes(written: Path, converted: Path) -> None:
    """Raise `TemplateUnfit` at the first difference, with the constant in which it lies."""
    sizes = written.stat().st_size, converted.stat().st_size
    if sizes[0] != sizes[1]:
        raise TemplateUnfit(
            f"The template gives a graph of {sizes[0]} bytes, and a full conversion one of {sizes[1]}.",
            written_bytes=sizes[0],
            converted_bytes=sizes[1],
        )
    with mapped(written) as ours, mapped(converted) as theirs:
        for begin in range(0, sizes[0], _BLOCK_BYTES):
            count = min(_BLOCK_BYTES, sizes[0] - begin)
            different = np.frombuffer(ours, np.uint8, count, begin) != np.frombuffer(theirs, np.uint8, count, begin)
            if different.any():
                _refuse(theirs, begin + int(different.argmax()))


def _refuse(content: Any, position: int) -> None:
    for buffer in list_buffers(content):
        if buffer.begin_byte <= position < buffer.begin_byte + buffer.size_bytes:
            raise TemplateUnfit(
                f"The constant {buffer.tensor!r} depends on the weights in a way that was not found: byte {position} "
                "differs from a full conversion's.",
                constant=buffer.tensor,
                byte=position,
            )
    raise TemplateUnfit(
        f"Byte {position} of the graph, in none of its constants, depends on the weights.", byte=position
    )
