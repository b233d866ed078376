"""Whether the graph inside a bundle is the very one that was verified.

Owns that comparison. Must not write or run anything. Called by `workers.verify.verify`.
"""

from __future__ import annotations

from pathlib import Path

from service.errors import BundleFailed, VerificationFailed
from workers.convert.bundle_reader import extract_graph

_BLOCK_BYTES = 1 << 20


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
    with graph.open("rb") as outside:
        for offset in range(0, size_bytes, _BLOCK_BYTES):
            if inside[offset : offset + _BLOCK_BYTES] != outside.read(_BLOCK_BYTES):
                raise VerificationFailed(
                    f"The graph inside {bundle.name} differs from the verified one near byte {offset}.",
                    file=bundle.name,
                    offset_bytes=offset,
                )
