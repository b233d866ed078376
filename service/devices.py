"""Devices as they are asked for: backends, tools, and selection by attributes. Pure.

A selector is written by people: `host`, `any`, `all`, or conditions joined by commas, all of which hold
(`soc=SM8650`, `ram_gib>=8,android>=14`, `all,kind=phone`). Without `all` it means any one device that fits.
Called by `service.requests`, `service.ledger` and `workers.devices`.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

#: Where a tool may compute.
BACKENDS: tuple[str, ...] = ("cpu", "gpu", "npu")
#: Format -> the tool that measures it on a phone.
TOOLS: Mapping[str, str] = {
    "tflite": "benchmark_model",
    "task": "litert_lm_advanced_main",
    "litertlm": "litert_lm_advanced_main",
}
#: The host that measures by itself, without a phone.
HOST = "host"
#: Kinds of devices that are reached by adb and have said what they are.
PHONE_KINDS = ("phone", "virtual")
#: How a selector of phones may begin.
ANY_OR_ALL = ("any", "all")
#: Resource class of a benchmark on a phone: device workers alone claim it, each for the phones that it follows.
PHONE_CLASS = "phone"
#: What may be asked of a device's record, besides its tags.
TEXT_ATTRIBUTES = ("serial", "manufacturer", "model", "device", "soc", "abi", "kind", "tag")
NUMBER_ATTRIBUTES = ("android", "sdk", "ram_gib", "cores")

_CONDITION = re.compile(r"([a-z_]+)\s*(>=|<=|!=|=|>|<)\s*(.+)")
_TESTS: Mapping[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq,
    "!=": operator.ne,
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_LONGEST = 400


@dataclass(frozen=True)
class Condition:
    """One demand on a device's record."""

    attribute: str
    test: str
    value: str | float

    def holds(self, record: Mapping[str, Any]) -> bool:
        """Whether a record meets it; what a device does not say meets nothing."""
        compare = _TESTS[self.test]
        if self.attribute == "tag":
            has_tag = str(self.value) in (record.get("tags") or ())
            return has_tag if self.test == "=" else not has_tag
        found = record.get(self.attribute)
        if found is None:
            return False
        if self.attribute in NUMBER_ATTRIBUTES:
            return compare(float(found), self.value)
        return compare(str(found).casefold(), str(self.value).casefold())


@dataclass(frozen=True)
class Selector:
    """Which devices a benchmark is asked on."""

    conditions: tuple[Condition, ...]
    #: On each device that fits, instead of any one.
    is_all: bool = False

    def fits(self, record: Mapping[str, Any]) -> bool:
        """Whether a device with this record is meant."""
        return all(condition.holds(record) for condition in self.conditions)


def list_measured(figures: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the measurements of a benchmark's figures: of its arms, those that have one; or the only one."""
    return [arm for arm in figures.get("arms", (figures,)) if "error" not in arm]


def list_arms(
    params: Mapping[str, Any], figures: Mapping[str, Any]
) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Return each measurement of a benchmark with what was asked for it (`backend`, `threads`; None: by default)."""
    asked = params.get("arms") or (params,)
    arms = zip(figures.get("arms", (figures,)), asked, strict=True)
    return [(found, way) for found, way in arms if "error" not in found]


def find_failed_arm(figures: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the error of the first arm of a benchmark that has no measurement, worded with its name; or None."""
    for arm in figures.get("arms", ()):
        if "error" in arm:
            way = f"{arm['format']} on {arm['backend']}" + (f", {arm['threads']} threads" if arm["threads"] else "")
            return {**arm["error"], "message": f"{way}: {arm['error']['message']}"}
    return None


def keep_one_kind(measurements: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the measurements of phones, or else of virtual ones, or else of hosts: kinds are never mixed."""
    for kind in ("phone", "virtual", "host"):
        found = [one for one in measurements if (one.get("device") or {}).get("kind") == kind]
        if found:
            return found
    return list(measurements)


def parse_selector(text: str) -> Selector:
    """Read a selector of phones; raises ValueError with a sentence that says what it may be."""
    words = [word.strip() for word in text.split(",")]
    is_all = words[0] == "all"
    conditions = words[1:] if words[0] in ANY_OR_ALL else words
    if len(text) > _LONGEST:
        raise ValueError(f"a device is selected in at most {_LONGEST} characters")
    return Selector(tuple(_parse_condition(word) for word in conditions), is_all)


def _parse_condition(text: str) -> Condition:
    found = _CONDITION.fullmatch(text)
    known = ", ".join((*TEXT_ATTRIBUTES, *NUMBER_ATTRIBUTES))
    if found is None:
        raise ValueError(f"{text!r} selects no device: write host, any, all, or NAME=VALUE with a name of {known}")
    attribute, test, value = found.groups()
    if attribute in NUMBER_ATTRIBUTES:
        try:
            return Condition(attribute, test, float(value))
        except ValueError:
            raise ValueError(f"{attribute} is compared with a number, not with {value!r}") from None
    if attribute not in TEXT_ATTRIBUTES:
        raise ValueError(f"a device has no attribute {attribute!r}: there are {known}")
    if test not in ("=", "!="):
        raise ValueError(f"{attribute} is text: compare it with = or !=")
    return Condition(attribute, test, value)
