"""The picture of a comparison: what is drawn, where, and what is not."""

from __future__ import annotations

from itertools import combinations
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from service.commands.plot import draw_front
from service.comparison import Candidate, compare
from tests.unit.service.test_choice import make

SVG = "{http://www.w3.org/2000/svg}"
FIVE = [
    make("none", kl=3e-12, size=5.1e6, speed=2600),
    make("float16", kl=2e-12, size=2.7e6, speed=1600),
    make("dynamic_int8", kl=7e-4, size=1.55e6, speed=3700),
    make("weight_only_int8", kl=4e-4, size=1.56e6, speed=1800),
    make("dynamic_int4", published=False, kl=0.034, size=0.94e6, speed=4000),
]


def draw(candidates: list[Candidate]) -> ET.Element:
    (front,) = compare(candidates)
    return ET.fromstring(draw_front(front.to_json(), "job_1: <litertlm>"))


def places(panel: ET.Element) -> dict[str, tuple[float, float]]:
    """Return where the mark of each published variant stands."""
    found = {}
    for mark in panel.iter(f"{SVG}circle"):
        title = mark.find(f"{SVG}title")
        assert title is not None
        found[str(title.text).split()[0]] = (float(mark.attrib["cx"]), float(mark.attrib["cy"]))
    return found


def test_smaller_is_left_and_closer_to_the_source_is_higher() -> None:
    size, speed = draw(FIVE).findall(f"{SVG}g")
    by_size, by_speed = places(size), places(speed)
    assert sorted(by_size, key=lambda name: by_size[name][0]) == ["dynamic_int8", "weight_only_int8", "float16", "none"]
    assert sorted(by_speed, key=lambda name: by_speed[name][0]) == [
        "float16",
        "weight_only_int8",
        "none",
        "dynamic_int8",
    ]
    # Rounding is no quality: both stand at the top.
    assert by_size["none"][1] == by_size["float16"][1] < by_size["weight_only_int8"][1] < by_size["dynamic_int8"][1]
    for panel in (size, speed):
        assert len(list(panel.iter(f"{SVG}path"))) == 1, "one cross, for the refused"


@pytest.mark.parametrize("candidates", [FIVE, [make(f"variant_{n}", kl=0.1, size=1e6) for n in range(6)]])
def test_no_name_covers_another(candidates: list[Candidate]) -> None:
    for panel in draw(candidates).findall(f"{SVG}g"):
        names = {each.variant for each in candidates}
        labels = [text for text in panel.iter(f"{SVG}text") if text.text in names]
        assert len(labels) == len(candidates)
        for one, other in combinations(labels, 2):
            is_apart = abs(float(one.attrib["y"]) - float(other.attrib["y"])) >= 11
            assert is_apart or spans(one)[1] <= spans(other)[0] or spans(other)[1] <= spans(one)[0]


def spans(label: ET.Element) -> tuple[float, float]:
    x, width = float(label.attrib["x"]), 6 * len(str(label.text))
    return (x, x + width) if label.attrib["text-anchor"] == "start" else (x - width, x)


def test_what_was_not_measured_is_not_drawn_but_said() -> None:
    picture = draw([*FIVE[:2], make("unproven", size=1e6), make("unmeasured", kl=0.1, size=1e6)])
    size, speed = picture.findall(f"{SVG}g")
    assert set(places(size)) == {"none", "float16", "unmeasured"}
    assert set(places(speed)) == {"none", "float16"}
    assert any("Not measured: unproven." in str(text.text) for text in picture.iter(f"{SVG}text"))


def test_a_picture_of_nothing_is_a_picture() -> None:
    picture = draw([make("a", published=False)])
    assert picture.findall(f"{SVG}g") == []
    assert any("Not measured: a." in str(text.text) for text in picture.iter(f"{SVG}text"))


def test_the_same_job_is_the_same_picture() -> None:
    (front,) = compare(FIVE)
    document: dict[str, Any] = front.to_json()
    assert draw_front(document, "x") == draw_front(document, "x")
