"""What is predicted of memory, from how much, and when nothing is."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence

import pytest

from service import fit
from service.fit import Peak, Range, Shape, judge, predict

MIB = 1 << 20


def shape(number: int, size_mib: int = 100, units: int = 24 * 1024, **more: str) -> Shape:
    return Shape(
        f"{number:064x}", more.get("format", "litertlm"), more.get("engine", "reauthored"), size_mib * MIB, units
    )


def peak(of: Shape, figure: float, device: str = "A", kind: str = "phone", backend: str = "cpu") -> Peak:
    return Peak(of, device, kind, backend, {"peak_rss_bytes": round(figure), "peak_anon_bytes": round(figure / 4)})


def truth(of: Shape) -> float:
    """What the phones of these tests take: 60 MiB of runtime, the file and a bit, 2 kB a unit of cache."""
    return 60 * MIB + 1.1 * of.size_bytes + 2048 * of.cache_units


def measured(seed: int = 0, count: int = 12, spread: float = 0.02) -> list[Peak]:
    chance = random.Random(seed)
    shapes = [
        shape(number, chance.randrange(80, 600), chance.choice((12, 24, 32)) * chance.choice((512, 1024, 2048)))
        for number in range(count)
    ]
    return [peak(each, truth(each) * chance.uniform(1 - spread, 1 + spread)) for each in shapes]


OWN = shape(999, 300, 24 * 1024)


def test_nothing_measured_is_nothing_predicted() -> None:
    found = predict(OWN, "A", "phone", "cpu", [])
    assert (found.basis, found.count, dict(found.peaks)) == ("nothing", 0, {})
    assert judge(found, 8 << 30, 4 << 30) == (
        "unknown",
        "Nothing like it was measured yet on a device of this kind and backend.",
    )


def test_the_same_device_is_believed_first_then_the_same_artifact() -> None:
    known = [*measured(), peak(OWN, 500, "A"), peak(OWN, 700, "B"), peak(OWN, 600, "C")]
    here = predict(OWN, "A", "phone", "cpu", known)
    assert (here.basis, here.count, here.peaks["peak_rss_bytes"]) == ("device", 1, Range(500, 500, 500))
    elsewhere = predict(OWN, "D", "phone", "cpu", known)
    assert (elsewhere.basis, elsewhere.count) == ("artifact", 3)
    assert elsewhere.peaks["peak_rss_bytes"] == Range(700, 500, 700)
    assert elsewhere.sentence == "Measured 3 times on 3 other devices of its kind."
    assert "peak_pss_bytes" not in elsewhere.peaks, "nobody has measured it"


@pytest.mark.parametrize("seed", range(8))
def test_a_model_of_others_is_near_the_truth(seed: int) -> None:
    """One measurement of twelve is three times too large, and moves the estimate little."""
    known = measured(seed)
    known[3] = peak(known[3].shape, 3 * truth(known[3].shape))
    found = predict(OWN, "A", "phone", "cpu", known)
    rss = found.peaks["peak_rss_bytes"]
    assert (found.basis, found.count) == ("model", 12)
    assert rss.estimate == pytest.approx(truth(OWN), rel=0.1)
    assert rss.low <= truth(OWN) <= rss.high
    assert rss.high > 2 * rss.estimate, "the outlier is in the bounds: another may come"


def holds(known: Sequence[Peak]) -> tuple[int, float]:
    """Leave each out once; return how many bounds hold it, and how wide they are at most."""
    held, widest = 0, 0.0
    for number, other in enumerate(known):
        rest = [*known[:number], *known[number + 1 :]]
        rss = predict(other.shape, "X", "phone", "cpu", rest).peaks["peak_rss_bytes"]
        held += rss.low <= other.figures["peak_rss_bytes"] <= rss.high
        widest = max(widest, rss.high / rss.low)
    return held, widest


def test_bounds_hold_and_say_when_the_model_is_worthless() -> None:
    known = measured(5, count=20)
    held, widest = holds(known)
    assert held >= 17
    assert widest < 1.2
    # Control: peaks that have nothing to do with their artifacts are not predicted closely.
    figures = [one.figures for one in known]
    random.Random(1).shuffle(figures)
    _, widest = holds([dataclasses.replace(one, figures=other) for one, other in zip(known, figures, strict=True)])
    assert widest > 2


@pytest.mark.parametrize("other", [{"kind": "virtual"}, {"backend": "gpu"}])
def test_kinds_and_backends_are_never_mixed(other: Mapping[str, str]) -> None:
    strange = [peak(one.shape, 9e9, **other) for one in measured()]
    alone = predict(OWN, "A", "phone", "cpu", strange)
    assert alone.basis == "nothing"
    assert predict(OWN, "A", "phone", "cpu", [*measured(), *strange]) == predict(OWN, "A", "phone", "cpu", measured())
    # Control: of its own kind they count.
    assert predict(OWN, "A", other.get("kind", "phone"), other.get("backend", "cpu"), strange).basis == "model"


@pytest.mark.parametrize("field", ["format", "engine"])
def test_other_formats_and_engines_tell_nothing(field: str) -> None:
    known = [dataclasses.replace(one, shape=dataclasses.replace(one.shape, **{field: "other"})) for one in measured()]
    assert predict(OWN, "A", "phone", "cpu", known).basis == "nothing"


def test_too_few_or_too_far_is_nothing() -> None:
    few = predict(OWN, "A", "phone", "cpu", measured(count=4))
    assert (few.basis, few.count, few.sentence) == (
        "nothing",
        4,
        "4 artifacts like it measured; a prediction needs 5.",
    )
    # Five measurements of one artifact are one artifact.
    assert predict(OWN, "A", "phone", "cpu", [peak(shape(1), 1e8, name) for name in "ABCDE"]).count == 1
    huge = predict(shape(777, 5000), "A", "phone", "cpu", measured())
    assert (huge.basis, "file is far" in huge.sentence) == ("nothing", True)
    long = predict(shape(777, 300, 10**6), "A", "phone", "cpu", measured())
    assert (long.basis, "KV cache is far" in long.sentence) == ("nothing", True)


@pytest.mark.parametrize(
    ("available_bytes", "verdict"),
    [(1100, "fits"), (900, "tight"), (260, "doubtful"), (100, "too_large"), (None, "unknown")],
)
def test_verdicts(available_bytes: int | None, verdict: str) -> None:
    rss, anon = Range(1000, 900, 1100), Range(250, 200, 300)
    found = fit.Prediction("model", 9, {"peak_rss_bytes": rss, "peak_anon_bytes": anon}, "Predicted.")
    assert judge(found, 8000, available_bytes)[0] == verdict
    assert judge(found, 150, available_bytes)[0] == "too_large", "more than the device has at all"


def test_devices_of_a_kind_share_a_model_and_nothing_else() -> None:
    devices = [
        {"id": name, "kind": kind, "memory_bytes": 8 << 30, "memory_available_bytes": available_bytes}
        for name, kind, available_bytes in (("A", "phone", 4 << 30), ("B", "phone", 1 << 20), ("V", "virtual", 4 << 30))
    ]
    found = {each["id"]: each for each in fit.predict_all(OWN, devices, "cpu", measured())}
    assert {name: (each["verdict"], each["basis"]) for name, each in found.items()} == {
        "A": ("fits", "model"),
        "B": ("too_large", "model"),
        "V": ("unknown", "nothing"),
    }
    assert found["A"]["predicted"] == found["B"]["predicted"]
    known = [*measured(), peak(OWN, 500, "B"), peak(OWN, 700, "C")]
    found = {each["id"]: each for each in fit.predict_all(OWN, devices, "cpu", known)}
    assert (found["A"]["basis"], found["A"]["predicted"]["peak_rss_bytes"]["estimate"]) == ("artifact", 700)
    assert (found["B"]["basis"], found["B"]["predicted"]["peak_rss_bytes"]["estimate"]) == ("device", 500)
