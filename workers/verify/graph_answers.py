"""What the proof of a graph leaves for the proofs of the bundles that hold it, so that nothing is run twice.

Owns the file `graph.json` and the test that a bundle holds that very graph. Must not run anything. Written by the
`verify` step of the bare graph, read by those of its bundles.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from service.errors import BundleFailed, VerificationFailed
from workers.convert.bundle_reader import extract_graph
from workers.verify.probe import Generation

ANSWERS_FILE = "graph.json"


@dataclass(frozen=True)
class GraphAnswers:
    """What the interpreter answered with one graph."""

    #: SHA-256 of the graph's bytes.
    graph_digest: str
    #: Largest absolute error of a logit on the whole probe.
    max_abs_error: float
    #: Sum of the losses of each window of the text, in nats.
    text_losses: Sequence[float]
    #: Generations of the prompts that a bundle's runtime is asked too, in the order of `verify.select_graph_items`.
    generations: Sequence[Generation]


def write_graph_answers(answers: GraphAnswers, folder: Path) -> None:
    """Write `graph.json`; equal answers give equal bytes."""
    text = json.dumps(asdict(answers), indent=1, sort_keys=True, allow_nan=False)
    (folder / ANSWERS_FILE).write_text(text + "\n", encoding="utf-8")


def read_graph_answers(folder: Path) -> GraphAnswers:
    """Read `graph.json`."""
    document = json.loads((folder / ANSWERS_FILE).read_text(encoding="utf-8"))
    generations = [Generation(**generation) for generation in document.pop("generations")]
    return GraphAnswers(**document, generations=generations)


def require_same_graph(bundle: Path, answers: GraphAnswers) -> None:
    """Raise `VerificationFailed` unless the graph inside `bundle` is byte for byte the one that was proven."""
    try:
        inside = extract_graph(bundle, bundle.suffix.removeprefix("."))
    except BundleFailed as error:
        raise VerificationFailed(f"{bundle.name} cannot be read: {error.message}", file=bundle.name) from error
    digest = hashlib.sha256(inside).hexdigest()
    if digest != answers.graph_digest:
        raise VerificationFailed(
            f"The graph inside {bundle.name} ({digest[:12]}) is not the one that was proven "
            f"({answers.graph_digest[:12]}).",
            file=bundle.name,
            digest=digest,
            proven=answers.graph_digest,
        )


def digest_graph(path: Path) -> str:
    """Return the SHA-256 of a graph's file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
