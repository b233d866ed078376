"""Checked reading of rotary positions from a `config.json`, as transformers 4 and 5 write them. Pure.

Called by the family files beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from workers.convert.architectures.config_reader import ConfigReader, invalid, one_of
from workers.convert.architectures.shape import Rope

_DEFAULT_THETA = 10_000.0


def read_rope(
    reader: ConfigReader, *, default_theta: float = _DEFAULT_THETA, kinds: tuple[str, ...] = ("linear", "llama3")
) -> Rope:
    """Read `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (transformers 4).

    `kinds` are those that the family's class in transformers computes beside "default".
    """
    field, settings = read_rope_settings(reader)
    # An explicit null means the default, as in transformers.
    theta = settings.get("rope_theta", reader.config.get("rope_theta"))
    return read_rope_of(reader, field, settings, default_theta if theta is None else theta, kinds)


def read_rope_settings(reader: ConfigReader) -> tuple[str, Mapping[str, Any]]:
    """Return the field that holds the settings, and the settings; empty where there are none."""
    field = "rope_parameters" if reader.config.get("rope_parameters") is not None else "rope_scaling"
    settings = reader.get(field, {})
    if not isinstance(settings, Mapping):
        raise invalid(f"{field!r} must be an object, not {settings!r}.", field)
    return field, settings


def read_rope_of(
    reader: ConfigReader, field: str, settings: Mapping[str, Any], theta_value: Any, kinds: tuple[str, ...]
) -> Rope:
    """Return what one object of settings means."""
    theta = reader.require_positive("rope_theta", theta_value)
    kind = settings.get("rope_type", settings.get("type", "default"))
    if kind == "default":
        return Rope(theta)
    if kind not in kinds:
        raise reader.refuse(f"{field}.rope_type", kind, one_of([repr(each) for each in ("default", *kinds)]))
    if kind == "longrope":
        return _read_longrope(reader, field, settings, theta)
    factor = reader.require_positive(f"{field}.factor", settings.get("factor"))
    if kind == "linear":
        return Rope(theta, "linear", factor)
    return _read_llama3(reader, field, settings, theta, factor)


def read_rotary_channels(reader: ConfigReader, head_size: int, default: float = 1.0) -> int:
    """Return how many channels of a head turn."""
    _, settings = read_rope_settings(reader)
    value = settings.get("partial_rotary_factor", reader.config.get("partial_rotary_factor", default))
    return int(head_size * reader.require_positive("partial_rotary_factor", value))


def require_full_rotary(reader: ConfigReader) -> None:
    """Refuse a head of which only a part turns, for a family whose class knows no such thing."""
    _, settings = read_rope_settings(reader)
    partial = settings.get("partial_rotary_factor", reader.config.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise reader.refuse("partial_rotary_factor", partial, "only 1.0 is")


def _read_llama3(reader: ConfigReader, field: str, settings: Mapping[str, Any], theta: float, factor: float) -> Rope:
    low = reader.require_positive(f"{field}.low_freq_factor", settings.get("low_freq_factor"))
    high = reader.require_positive(f"{field}.high_freq_factor", settings.get("high_freq_factor"))
    if high <= low:
        raise invalid(f"'{field}.high_freq_factor' ({high}) must exceed '{field}.low_freq_factor' ({low}).", field)
    return Rope(theta, "llama3", factor, low, high, _read_original_context(reader, field, settings, "llama3"))


def _read_original_context(reader: ConfigReader, field: str, settings: Mapping[str, Any], kind: str) -> int:
    original = settings.get("original_max_position_embeddings", reader.config.get("original_max_position_embeddings"))
    if original is None:
        raise invalid(f"'{field}.original_max_position_embeddings' is missing; {kind} scaling needs it.", field)
    return int(reader.require_positive(f"{field}.original_max_position_embeddings", original))


def _read_longrope(reader: ConfigReader, field: str, settings: Mapping[str, Any], theta: float) -> Rope:
    """Read the factors for contexts up to the original length; beyond it transformers takes others.

    Source: transformers, `modeling_rope_utils.py`, `_compute_longrope_parameters`.
    """
    original = _read_original_context(reader, field, settings, "longrope")
    short = settings.get("short_factor")
    if not isinstance(short, list) or not 1 <= len(short) <= 4096:
        raise invalid(f"'{field}.short_factor' must be a list of numbers.", field)
    factors = tuple(reader.require_positive(f"{field}.short_factor", each) for each in short)
    factor = settings.get("factor")
    if factor is None:
        factor = reader.read_size("max_position_embeddings", original) / original
    factor = reader.require_positive(f"{field}.factor", factor)
    amplitude = settings.get("attention_factor")
    if amplitude is None:
        amplitude = 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(max(original, 2)))
    amplitude = reader.require_positive(f"{field}.attention_factor", amplitude)
    return Rope(theta, "longrope", original_context_length=original, wavelength_factors=factors, amplitude=amplitude)
