"""Selection of phones by what they are."""

from __future__ import annotations

from typing import Any

import pytest

from service.devices import keep_one_kind, parse_selector
from service.errors import InvalidRequest
from service.requests import parse_request

PHONE = {
    "serial": "R5CT1",
    "model": "SM-S928B",
    "soc": "SM8650",
    "android": 14,
    "ram_gib": 12.0,
    "tags": ["lab", "new"],
}


@pytest.mark.parametrize(
    "text",
    [
        "any",
        "all",
        "serial=R5CT1",
        "soc=sm8650",
        "ram_gib>=8,android>=14",
        "all, tag=lab",
        "tag!=old,ram_gib<16",
    ],
)
def test_a_phone_that_is_meant_fits(text: str) -> None:
    assert parse_selector(text).fits(PHONE)


@pytest.mark.parametrize(
    "text", ["serial=R5CT2", "ram_gib>12", "android<14", "tag=old", "all,tag!=lab", "abi=arm64-v8a"]
)
def test_a_phone_that_is_not_meant_does_not_fit(text: str) -> None:
    """`abi`: what a phone does not say meets nothing."""
    assert not parse_selector(text).fits(PHONE)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("galaxy", "selects no device"),
        ("colour=blue", "no attribute 'colour'"),
        ("ram_gib>=much", "compared with a number"),
        ("model>A", "is text"),
        ("", "selects no device"),
    ],
)
def test_what_selects_nothing_is_refused_with_what_would(text: str, named: str) -> None:
    with pytest.raises(InvalidRequest, match=named):
        parse_request({"source": {"kind": "folder", "path": "/m"}, "devices": [text]})


def test_kinds_are_never_mixed() -> None:
    def of(kind: str) -> dict[str, Any]:
        return {"device": {"kind": kind}}

    assert keep_one_kind([of("host"), of("virtual"), of("phone")]) == [of("phone")]
    assert keep_one_kind([of("host"), of("virtual"), of("virtual")]) == [of("virtual")] * 2
    assert keep_one_kind([of("host")]) == [of("host")]
