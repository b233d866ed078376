"""Whether the graph inside a bundle is the very one that was verified.

Owns that comparison. Must not write or run anything. Called by `workers.verify.verify`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from service.errors import BundleFailed, VerificationFailed
from workers.convert.bundle_reader import extract_graph

_BLOCK_BYTES = 1 << 24


def require_same_graph(bundle: Path, graph: Path) -> None:
    """Raise `VerificationFailed` unless the graph inside `bundle` is byte-identical with the file `graph`."""
    try:
        inside = extract_graph(bundle, bundle.suffix.removeprefix("."))
    except BundleFailed as error:
        raise VerificationFailed(f"{bundle.name} cannot be read: {error.message}", file=bundle.name) from error
    size_bytes = graph.stat().st_size
    if len(inside) != size_bytes:
        raise VerificationFailed(
            f"The graph inside {bundle.name} has {len(inside)} bytes, the verified one {size_bytes}.",
            file=bundle.name,
        )
    held = np.frombuffer(inside, dtype=np.uint8)
    verified = np.memmap(graph, dtype=np.uint8, mode="r")
    for start in range(0, size_bytes, _BLOCK_BYTES):
        differs = held[start : start + _BLOCK_BYTES] != verified[start : start + _BLOCK_BYTES]
        if differs.any():
            offset = start + int(differs.argmax())
            raise VerificationFailed(
                f"The graph inside {bundle.name} differs from the verified one at byte {offset}.",
                file=bundle.name,
                offset_bytes=offset,
            )
