"""The artifact's graph against the source's answers: parity, per signature.

Owns what is fed through which signature and how rows become figures. Must not know bundles or thresholds. Called
by `workers.verify.verify`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from service.errors import VerificationFailed
from workers.steps import Progress
from workers.verify import probe
from workers.verify.graph import Graph


def require_stated_settings(graph: Graph, context_length: int, prefill_lengths: Sequence[int]) -> None:
    """Raise `VerificationFailed` when the graph's own shapes are not those that the artifact is said to have."""
    if graph.context_length != context_length:
        raise VerificationFailed(
            f"The graph's caches hold {graph.context_length} positions, not the stated {context_length}.",
            figure=graph.context_length,
            stated=context_length,
        )
    if graph.prefill_lengths != sorted(set(prefill_lengths)):
        raise VerificationFailed(
            f"The graph has prefill lengths {graph.prefill_lengths}, not the stated {sorted(set(prefill_lengths))}.",
            figure=graph.prefill_lengths,
            stated=sorted(set(prefill_lengths)),
        )


def answer_cases(graph: Graph, cases: Sequence[probe.Case], progress: Progress, share: float = 0.6) -> probe.Floats:
    """Return the graph's logits at the compared positions of all cases, in order: float32 [positions, vocab].

    The graph keeps what the last case fed it. `share` is that of the step's time, for `progress`.

    Prefill signatures return no logits: what they computed shows in the decode steps that follow. Raises
    `VerificationFailed` that names signature and position when a logit is not finite.
    """
    rows: list[probe.Floats] = []
    for number, case in enumerate(cases):
        if number % 8 == 0:
            progress("logits on the probe", 0.05 + share * number / len(cases))
        graph.reset()
        if case.prefill_tokens:
            graph.prefill(case.tokens[: case.prefill_tokens], case.prefill_length)
        for position in case.positions:
            row = graph.decode(case.tokens[position], position)
            if not np.isfinite(row).all():
                raise VerificationFailed(
                    f"The artifact answers with NaN or infinite logits at position {position} ({case.name}).",
                    signature=case.name,
                    position=position,
                )
            rows.append(row)
    return np.stack(rows)


def compare_cases(cases: Sequence[probe.Case], source: probe.Floats, artifact: probe.Floats) -> dict[str, Any]:
    """Return parity figures over all rows, and under `per_signature` those of each signature's own rows."""
    figures: dict[str, Any] = dict(probe.compare_logits(source, artifact))
    rows = {name: find_rows(cases, name) for name in dict.fromkeys(case.name for case in cases)}
    figures["per_signature"] = {name: probe.compare_logits(source[own], artifact[own]) for name, own in rows.items()}
    return figures


def measure_loss(graph: Graph, tokens: Sequence[int]) -> float:
    """Return the sum of the losses of all tokens but the first, in nats, each fed through `decode`."""
    graph.reset()
    losses = []
    for position, following in enumerate(tokens[1:]):
        row = graph.decode(tokens[position], position)
        losses.append(-float(probe.log_softmax(row[None])[0, following]))
    return float(sum(losses))


def find_rows(cases: Sequence[probe.Case], name: str) -> npt.NDArray[np.bool_]:
    """Return which of all cases' rows belong to the cases of one name."""
    return np.array([case.name == name for case in cases for _ in case.positions])
