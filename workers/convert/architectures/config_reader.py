"""Checked reading of `config.json`: single fields, rotary positions, windows, and what most families share. Pure.

What is wrong becomes a sentence that names field and value. The meaning of a family's own fields belongs to its
file beside this one, which calls this.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from service.errors import ArchitectureUnsupported, CheckpointInvalid
from workers.convert.architectures.shape import Activation, DecoderShape

#: More than any model has; a pattern of layers is never written out beyond it.
MAX_LAYERS = 256

#: Names of activations in transformers that are the same function.
_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def invalid(message: str, field: str) -> CheckpointInvalid:
    """Return the refusal of a config that contradicts itself."""
    return CheckpointInvalid(f"config.json: {message}", file="config.json", field=field)


class ConfigReader:
    """Reads fields of one `config.json` and turns what is wrong into sentences that name the field."""

    def __init__(self, config: Mapping[str, Any], family: str) -> None:
        self.config = config
        self.family = family

    def get(self, field: str, default: Any = None) -> Any:
        """Return a field as it is; `default` also replaces an explicit null."""
        value = self.config.get(field)
        return default if value is None else value

    def read_size(self, field: str, default: int | None = None) -> int:
        """Return a whole number of at least 1; `default` also replaces an explicit null."""
        value = self.get(field, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise invalid(f"{field!r} must be a whole number of at least 1, not {value!r}.", field)
        return value

    def read_positive(self, field: str, default: float | None = None) -> float:
        """Return a finite number above 0."""
        return self.require_positive(field, self.config.get(field, default))

    def read_optional(self, field: str, default: float | None = None) -> float | None:
        """Return a finite number above 0, or None where the field is null or missing without a default."""
        value = self.config.get(field, default)
        return None if value is None else self.require_positive(field, value)

    def require_positive(self, field: str, value: Any) -> float:
        """Return `value` as float if it is a finite number above 0; `field` is only for the message."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise invalid(f"{field!r} must be a finite number above 0, not {value!r}.", field)
        return float(value)

    def read_flag(self, field: str, default: bool) -> bool:
        """Return a boolean."""
        value = self.config.get(field, default)
        if not isinstance(value, bool):
            raise invalid(f"{field!r} must be true or false, not {value!r}.", field)
        return value

    def read_activation(self, field: str, default: str, *able: Activation) -> Activation:
        """Return the function between the matrices of the feed-forward; refuses those that are not in `able`."""
        value = self.get(field, default)
        activation = _ACTIVATIONS.get(value) if isinstance(value, str) else None
        if activation is None or activation not in able:
            names = [repr(name) for name, each in _ACTIVATIONS.items() if each in able]
            raise self.refuse(field, value, f"only {' or '.join(names)} is" if len(names) < 3 else one_of(names))
        return activation

    def require_off(self, *fields: str) -> None:
        """Refuse fields that are set: what they ask for changes the result, and no engine computes it."""
        for name in fields:
            if self.config.get(name):
                raise self.refuse(name, self.config[name], "it must be false or absent")

    def refuse(self, field: str, value: Any, remedy: str) -> ArchitectureUnsupported:
        """Return the refusal of a field whose value this family cannot be converted with."""
        return ArchitectureUnsupported(
            f"config.json: {field!r} is {value!r}, which is not supported for the {self.family} family; {remedy}.",
            file="config.json",
            field=field,
            value=value,
        )


def one_of(names: list[str]) -> str:
    """Return the remedy that lists what may stand there."""
    return f"supported are {', '.join(names[:-1])} and {names[-1]}"


@dataclass(frozen=True)
class Defaults:
    """What a family's class in transformers assumes where a `config.json` is silent."""

    context_length: int = 2048
    norm_epsilon: float = 1e-6
    tied_embeddings: bool = False
    #: None: hidden size by heads.
    head_size: int | None = None
    #: None: as many as heads.
    key_value_heads: int | None = None


def read_decoder(reader: ConfigReader, architecture: str, defaults: Defaults, **choices: Any) -> DecoderShape:
    """Return a shape from the fields that most families share; `choices` are fields of `DecoderShape` and go first.

    Raises `CheckpointInvalid` for fields that contradict themselves and `ArchitectureUnsupported` for weights that
    are quantized already.
    """
    if reader.config.get("quantization_config") is not None:
        raise reader.refuse("quantization_config", reader.config["quantization_config"], "give float weights")
    hidden_size = reader.read_size("hidden_size")
    if "heads" not in choices:
        choices["heads"] = reader.read_size("num_attention_heads")
    heads = choices["heads"]
    if "head_size" not in choices:
        choices["head_size"] = _read_head_size(reader, defaults, hidden_size, heads)
    if "key_value_heads" not in choices:
        choices["key_value_heads"] = reader.read_size("num_key_value_heads", defaults.key_value_heads or heads)
    if "intermediate_size" not in choices:
        choices["intermediate_size"] = reader.read_size("intermediate_size")
    if "norm_epsilon" not in choices:
        choices["norm_epsilon"] = reader.read_positive("rms_norm_eps", defaults.norm_epsilon)
    if "context_length" not in choices:
        choices["context_length"] = reader.read_size("max_position_embeddings", defaults.context_length)
    shape = DecoderShape(
        architecture=architecture,
        family=reader.family,
        vocabulary_size=reader.read_size("vocab_size"),
        layers=reader.read_size("num_hidden_layers"),
        hidden_size=hidden_size,
        tied_embeddings=reader.read_flag("tie_word_embeddings", defaults.tied_embeddings),
        **choices,
    )
    _require_consistent(shape)
    return shape


def _read_head_size(reader: ConfigReader, defaults: Defaults, hidden_size: int, heads: int) -> int:
    if reader.config.get("head_dim") is None and defaults.head_size is None and hidden_size % heads:
        raise invalid(
            f"'hidden_size' ({hidden_size}) is not a multiple of 'num_attention_heads' ({heads}) "
            "and 'head_dim' is not given.",
            "head_dim",
        )
    return reader.read_size("head_dim", defaults.head_size or hidden_size // heads)


def _require_consistent(shape: DecoderShape) -> None:
    # Where layers differ, the family's file has compared each.
    if not shape.layer_sizes and shape.heads % shape.key_value_heads:
        raise invalid(
            f"'num_attention_heads' ({shape.heads}) is not a multiple of "
            f"'num_key_value_heads' ({shape.key_value_heads}).",
            "num_key_value_heads",
        )
    turning = shape.head_size if shape.rotary_channels is None else shape.rotary_channels
    if shape.rope is not None and (turning % 2 or not 2 <= turning <= shape.head_size):
        raise invalid(
            f"of the {shape.head_size} channels of a head {turning} turn; rotary positions need an even number.",
            "head_dim" if turning == shape.head_size else "partial_rotary_factor",
        )


def require_layers(reader: ConfigReader) -> int:
    """Return the number of layers, if each may be walked through."""
    layers = reader.read_size("num_hidden_layers")
    if layers > MAX_LAYERS:
        raise invalid(f"'num_hidden_layers' is {str(layers)[:50]}; at most {MAX_LAYERS} is taken.", "num_hidden_layers")
    return layers


def read_windows(reader: ConfigReader, default: tuple[str, ...], window: int | None) -> tuple[int | None, ...]:
    """Return what each layer looks back on, from `layer_types` or from the family's own pattern.

    `default` is the pattern that repeats where `layer_types` is not given, `window` what "sliding_attention" means.
    Empty when no layer has a window.
    """
    layers = require_layers(reader)
    types = reader.get("layer_types", [default[layer % len(default)] for layer in range(layers)])
    if not isinstance(types, list) or len(types) != layers:
        raise invalid(f"'layer_types' must list one type for each of the {layers} layers.", "layer_types")
    for each in types:
        if each not in ("full_attention", "sliding_attention"):
            raise reader.refuse("layer_types", each, one_of(["'full_attention'", "'sliding_attention'"]))
    if "sliding_attention" not in types:
        return ()
    if window is None:
        raise invalid("'layer_types' has sliding attention, but 'sliding_window' is not given.", "sliding_window")
    return tuple(window if each == "sliding_attention" else None for each in types)
