"""Will it fit: an artifact's peak memory on a device, from what was measured. Pure.

Owns what a prediction is made of, and the words about it. Three sources, the best one that there is: the same artifact
on the same device, the same artifact on others, or other artifacts of the same format, engine and backend, by

    peak = overhead + a * file + b * layers * context

(weights, and a KV cache of unknown width), fitted so that single outliers count little. Kinds of devices are never
mixed. Where nothing bears a prediction there is none. docs/decisions/0030-will-it-fit.md says why. Called by
`service.api` on what `service.ledger.peaks` reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from service.units import format_bytes

#: What is predicted, each by itself.
PEAKS = ("peak_rss_bytes", "peak_anon_bytes", "peak_pss_bytes")
#: Three coefficients, and each artifact is left out once to see how wrong they are.
_FEWEST_ARTIFACTS = 5
#: Of those that were measured last; each is one fit.
_MOST_ARTIFACTS = 60
#: How far beyond what was measured the model is believed.
_REACH = 2.0

Basis = Literal["device", "artifact", "model", "nothing"]


@dataclass(frozen=True)
class Shape:
    """What an artifact's memory hangs on."""

    #: SHA-256: equal bytes are the same artifact, whoever published them.
    digest: str
    format: str
    engine: str
    size_bytes: int
    #: Layers times tokens of context; the KV cache is a multiple of it.
    cache_units: int

    @property
    def terms(self) -> tuple[float, float, float]:
        """The model's inputs."""
        return 1.0, float(self.size_bytes), float(self.cache_units)


@dataclass(frozen=True)
class Peak:
    """What one measurement saw."""

    shape: Shape
    device_id: str
    #: `phone` or `virtual`.
    kind: str
    #: Where it really ran.
    backend: str
    figures: Mapping[str, int]


@dataclass(frozen=True)
class Range:
    """A predicted figure; the bounds are the estimate itself where one measurement is all there is."""

    estimate: float
    low: float
    high: float

    def to_json(self) -> dict[str, int]:
        """Return the wire form, in whole bytes."""
        return {name: round(value) for name, value in self.__dict__.items()}


@dataclass(frozen=True)
class Prediction:
    """The peaks of an artifact on a device, and what they were made of."""

    basis: Basis
    #: Measurements, or artifacts where a model was fitted.
    count: int
    peaks: Mapping[str, Range]
    #: Why there is none, or what there is.
    sentence: str


def predict(shape: Shape, device_id: str, kind: str, backend: str, known: Sequence[Peak]) -> Prediction:
    """Return what an artifact will take on a device, by the best source that `known` holds, the newest first."""
    fitting = [peak for peak in known if (peak.kind, peak.backend) == (kind, backend)]
    same = [peak for peak in fitting if peak.shape.digest == shape.digest]
    if same:
        return _repeat(device_id, same)
    return _model(
        shape, [peak for peak in fitting if (peak.shape.format, peak.shape.engine) == (shape.format, shape.engine)]
    )


def predict_all(
    shape: Shape, devices: Sequence[Mapping[str, Any]], backend: str, known: Sequence[Peak]
) -> list[dict[str, Any]]:
    """Do it for each of `devices`, as `service.ledger.peaks` reads them, and return the wire form, with verdicts."""
    of_each_kind: dict[str, Prediction] = {}
    answers = []
    for device in devices:
        kind = device["kind"]
        found = of_each_kind.get(kind) or predict(shape, device["id"], kind, backend, known)
        if found.basis in ("model", "nothing"):
            # No device makes a difference to it.
            of_each_kind[kind] = found
        answers.append(describe(found, device))
    return answers


def _repeat(device_id: str, same: Sequence[Peak]) -> Prediction:
    here = [peak for peak in same if peak.device_id == device_id]
    if here:
        return Prediction("device", len(here), _span(here), f"Measured here, {_count(len(here), 'time')}.")
    devices = len({peak.device_id for peak in same})
    sentence = f"Measured {_count(len(same), 'time')} on {_count(devices, 'other device')} of its kind."
    return Prediction("artifact", len(same), _span(same), sentence)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _span(peaks: Sequence[Peak]) -> dict[str, Range]:
    """The largest that was seen, between the least and the largest."""
    seen = {name: [peak.figures[name] for peak in peaks if name in peak.figures] for name in PEAKS}
    return {name: Range(max(found), min(found), max(found)) for name, found in seen.items() if found}


def _model(shape: Shape, alike: Sequence[Peak]) -> Prediction:
    """Predict from artifacts that are like it, or say why not."""
    if not alike:
        return Prediction("nothing", 0, {}, "Nothing like it was measured yet on a device of this kind and backend.")
    count = min(_MOST_ARTIFACTS, len({peak.shape.digest for peak in alike}))
    if count < _FEWEST_ARTIFACTS:
        sentence = f"{_count(count, 'artifact')} like it measured; a prediction needs {_FEWEST_ARTIFACTS}."
        return Prediction("nothing", count, {}, sentence)
    shapes = [peak.shape for peak in alike]
    for what, own, others in (
        ("file", shape.size_bytes, [one.size_bytes for one in shapes]),
        ("KV cache", shape.cache_units, [one.cache_units for one in shapes]),
    ):
        if not min(others) / _REACH <= own <= max(others) * _REACH:
            sentence = f"Its {what} is far from those of the {_count(count, 'artifact')} that were measured."
            return Prediction("nothing", count, {}, sentence)
    peaks = {name: found for name in PEAKS if (found := _fit(shape, name, alike)) is not None}
    sentence = f"Predicted from {count} artifacts of the same format, engine and backend."
    return Prediction("model" if peaks else "nothing", count, peaks, sentence)


def _fit(shape: Shape, name: str, alike: Sequence[Peak]) -> Range | None:
    """Predict one peak; its bounds are the largest errors on an artifact that was left out."""
    largest: dict[Shape, float] = {}
    for peak in alike:
        if name in peak.figures:
            largest[peak.shape] = max(largest.get(peak.shape, 0.0), float(peak.figures[name]))
    if len(largest) < _FEWEST_ARTIFACTS:
        return None
    points = list(largest.items())[:_MOST_ARTIFACTS]
    errors = [1.0]
    for left_out, (other, seen) in enumerate(points):
        guess = _evaluate(_solve(points[:left_out] + points[left_out + 1 :]), other)
        if guess <= 0:
            return None
        errors.append(seen / guess)
    estimate = _evaluate(_solve(points), shape)
    return Range(estimate, estimate * min(errors), estimate * max(errors))


def _solve(points: Sequence[tuple[Shape, float]]) -> Sequence[float]:
    """Return the coefficients, none negative; a point far from the others counts by its distance, not its square."""
    import numpy as np
    from scipy.optimize import least_squares, nnls

    terms = np.array([shape.terms for shape, _ in points])
    scales = np.maximum(terms.max(axis=0), 1.0)
    top = max(seen for _, seen in points)
    matrix, seen = terms / scales, np.array([value for _, value in points]) / top
    start, _ = nnls(matrix, seen)
    fitted = least_squares(
        lambda weights: matrix @ weights - seen,
        np.maximum(start, 1e-6),
        bounds=(0, np.inf),
        loss="soft_l1",
        f_scale=0.02,
        x_scale="jac",
    )
    return [float(weight) for weight in fitted.x * top / scales]


def _evaluate(coefficients: Sequence[float], shape: Shape) -> float:
    return sum(coefficient * term for coefficient, term in zip(coefficients, shape.terms, strict=True))


def judge(prediction: Prediction, memory_bytes: int | None, available_bytes: int | None) -> tuple[str, str]:
    """Return `fits`, `tight`, `doubtful`, `too_large` or `unknown`, and a sentence.

    `available_bytes`: what the device had to give (MemAvailable) when it was last looked at.
    """
    rss, anon = (prediction.peaks.get(name) for name in ("peak_rss_bytes", "peak_anon_bytes"))
    for name, limit_bytes in (("RAM", memory_bytes), ("available memory", available_bytes)):
        if anon and limit_bytes is not None and anon.low > limit_bytes:
            return (
                "too_large",
                f"It needs at least {format_bytes(round(anon.low))} of the {name}. {prediction.sentence}",
            )
    if rss is None and anon is None:
        return "unknown", prediction.sentence
    if available_bytes is None:
        return "unknown", f"Nobody has seen how much memory the device has to give. {prediction.sentence}"
    if rss and rss.high <= available_bytes:
        return "fits", prediction.sentence
    if anon and anon.high <= available_bytes:
        words = "It fits without the file's own pages, which are read again where memory is short."
        return "tight", f"{words} {prediction.sentence}"
    return "doubtful", f"The available memory lies within what it may take. {prediction.sentence}"


def describe(prediction: Prediction, device: Mapping[str, Any]) -> dict[str, Any]:
    """Return the wire form of what is known of an artifact on a device, which is as `service.ledger.peaks` reads it."""
    verdict, sentence = judge(prediction, device["memory_bytes"], device["memory_available_bytes"])
    return {
        **device,
        "verdict": verdict,
        "sentence": sentence,
        "basis": prediction.basis,
        "count": prediction.count,
        "predicted": {name: found.to_json() for name, found in prediction.peaks.items()},
    }
