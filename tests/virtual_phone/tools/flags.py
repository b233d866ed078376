"""Flags as the real tools take them: `--name=value`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def split_flags(argv: Sequence[str], known: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Return the known flags over their defaults, and the words that are none."""
    values, rest = dict(known), []
    for word in argv:
        name, _, value = word.removeprefix("--").partition("=")
        if word.startswith("--") and name in known:
            values[name] = value or "true"
        else:
            rest.append(word)
    return values, rest
