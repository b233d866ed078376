"""What the engines need to know of a decoder-only transformer, whatever its family. Pure.

Owns the dataclasses and the checked reading of single `config.json` fields; the meaning of fields belongs to
the family files beside it. Called by them; read by `workers.convert.reauthored` and `workers.fetch.plan`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from service.errors import ArchitectureUnsupported, CheckpointInvalid


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: how fast each pair of channels turns."""

    #: Base of the geometric series of wavelengths.
    theta: float
    #: `default`: as in the paper. `linear`: positions divided by `factor`. `llama3`: long wavelengths only.
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    #: Context length before the scaling, in tokens.
    original_context_length: int = 0


@dataclass(frozen=True)
class DecoderShape:
    """Sizes and choices of a decoder with RMS norms, rotary positions and a gated feed-forward."""

    architecture: str
    family: str
    vocabulary_size: int
    layers: int
    hidden_size: int
    intermediate_size: int
    heads: int
    key_value_heads: int
    head_size: int
    norm_epsilon: float
    rope: Rope
    #: The longest context the checkpoint was made for, in tokens.
    context_length: int
    #: Tokens that attention looks back on; None means all of them.
    attention_window: int | None
    tied_embeddings: bool
    attention_bias: bool
    feed_forward_bias: bool


class ConfigReader:
    """Reads fields of one `config.json` and turns what is wrong into sentences that name the field."""

    def __init__(self, config: Mapping[str, Any], family: str) -> None:
        self._config = config
        self._family = family

    def read_size(self, field: str, default: int | None = None) -> int:
        """Return a whole number of at least 1; `default` also replaces an explicit null."""
        value = self._config.get(field)
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CheckpointInvalid(
                f"config.json: {field!r} must be a whole number of at least 1, not {value!r}.",
                file="config.json",
                field=field,
            )
        return value

    def read_positive(self, field: str, default: float | None = None) -> float:
        """Return a finite number above 0."""
        return self.require_positive(field, self._config.get(field, default))

    def require_positive(self, field: str, value: Any) -> float:
        """Return `value` as float if it is a finite number above 0; `field` is only for the message."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise CheckpointInvalid(
                f"config.json: {field!r} must be a finite number above 0, not {value!r}.",
                file="config.json",
                field=field,
            )
        return float(value)

    def read_flag(self, field: str, default: bool) -> bool:
        """Return a boolean."""
        value = self._config.get(field, default)
        if not isinstance(value, bool):
            raise CheckpointInvalid(
                f"config.json: {field!r} must be true or false, not {value!r}.", file="config.json", field=field
            )
        return value

    def refuse(self, field: str, value: Any, remedy: str) -> ArchitectureUnsupported:
        """Return the refusal of a field whose value this family cannot be converted with."""
        return ArchitectureUnsupported(
            f"config.json: {field!r} is {value!r}, which is not supported for the {self._family} family; {remedy}.",
            file="config.json",
            field=field,
            value=value,
        )
