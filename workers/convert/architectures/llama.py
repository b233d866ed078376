"""The Llama family: `LlamaForCausalLM` (Llama 2, 3.x, TinyLlama, SmolLM and their like). Pure.

Reads a `config.json` as transformers 4 and 5 write it. Refuses by name what would change the result
silently. Called through `workers.convert.architectures`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from service.errors import CheckpointInvalid
from workers.convert.architectures.shape import ConfigReader, DecoderShape, Rope

#: What transformers assumes where a `config.json` is silent.
_DEFAULT_CONTEXT_LENGTH = 2048
_DEFAULT_NORM_EPSILON = 1e-6
_DEFAULT_THETA = 10_000.0


def read_shape(config: Mapping[str, Any]) -> DecoderShape:
    """Return the shape of a Llama checkpoint.

    Raises `CheckpointInvalid` for fields that contradict themselves and `ArchitectureUnsupported` for a
    choice that no engine reproduces (activation, rope type, pre-quantized weights).
    """
    return read_llama_like(config, architecture="LlamaForCausalLM", family="llama", attention_window=None)


def read_llama_like(
    config: Mapping[str, Any], *, architecture: str, family: str, attention_window: int | None
) -> DecoderShape:
    """Return the shape of any family that computes what Llama computes."""
    reader = ConfigReader(config, family)
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise reader.refuse("hidden_act", activation, "only 'silu' is")
    if config.get("quantization_config") is not None:
        raise reader.refuse("quantization_config", config["quantization_config"], "give float weights")
    heads = reader.read_size("num_attention_heads")
    hidden_size = reader.read_size("hidden_size")
    if config.get("head_dim") is None and hidden_size % heads:
        raise CheckpointInvalid(
            f"config.json: 'hidden_size' ({hidden_size}) is not a multiple of 'num_attention_heads' ({heads}) "
            "and 'head_dim' is not given.",
            file="config.json",
            field="head_dim",
        )
    shape = DecoderShape(
        architecture=architecture,
        family=family,
        vocabulary_size=reader.read_size("vocab_size"),
        layers=reader.read_size("num_hidden_layers"),
        hidden_size=hidden_size,
        intermediate_size=reader.read_size("intermediate_size"),
        heads=heads,
        key_value_heads=reader.read_size("num_key_value_heads", default=heads),
        head_size=reader.read_size("head_dim", default=hidden_size // heads),
        norm_epsilon=reader.read_positive("rms_norm_eps", _DEFAULT_NORM_EPSILON),
        rope=_read_rope(config, reader),
        context_length=reader.read_size("max_position_embeddings", _DEFAULT_CONTEXT_LENGTH),
        attention_window=attention_window,
        tied_embeddings=reader.read_flag("tie_word_embeddings", default=False),
        attention_bias=reader.read_flag("attention_bias", default=False),
        feed_forward_bias=reader.read_flag("mlp_bias", default=False),
    )
    _require_consistent(shape)
    return shape


def _require_consistent(shape: DecoderShape) -> None:
    if shape.heads % shape.key_value_heads:
        raise CheckpointInvalid(
            f"config.json: 'num_attention_heads' ({shape.heads}) is not a multiple of "
            f"'num_key_value_heads' ({shape.key_value_heads}).",
            file="config.json",
            field="num_key_value_heads",
        )
    if shape.head_size % 2:
        raise CheckpointInvalid(
            f"config.json: heads have {shape.head_size} channels; rotary positions need an even number.",
            file="config.json",
            field="head_dim",
        )


def _read_rope(config: Mapping[str, Any], reader: ConfigReader) -> Rope:
    """Read `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (transformers 4)."""
    field = "rope_parameters" if config.get("rope_parameters") is not None else "rope_scaling"
    settings = config.get(field)
    if settings is None:
        settings = {}
    if not isinstance(settings, Mapping):
        raise CheckpointInvalid(
            f"config.json: {field!r} must be an object, not {settings!r}.", file="config.json", field=field
        )
    partial = settings.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise reader.refuse("partial_rotary_factor", partial, "only 1.0 is")
    # An explicit null means the default, as in transformers.
    theta_value = settings.get("rope_theta", config.get("rope_theta"))
    theta = reader.require_positive("rope_theta", _DEFAULT_THETA if theta_value is None else theta_value)
    kind = settings.get("rope_type", settings.get("type", "default"))
    if kind == "default":
        return Rope(theta)
    factor = reader.require_positive(f"{field}.factor", settings.get("factor"))
    if kind == "linear":
        return Rope(theta, "linear", factor)
    if kind == "llama3":
        return _read_llama3_rope(config, settings, field, reader, theta, factor)
    raise reader.refuse(f"{field}.rope_type", kind, "supported are 'default', 'linear' and 'llama3'")


def _read_llama3_rope(
    config: Mapping[str, Any],
    settings: Mapping[str, Any],
    field: str,
    reader: ConfigReader,
    theta: float,
    factor: float,
) -> Rope:
    low = reader.require_positive(f"{field}.low_freq_factor", settings.get("low_freq_factor"))
    high = reader.require_positive(f"{field}.high_freq_factor", settings.get("high_freq_factor"))
    if high <= low:
        raise CheckpointInvalid(
            f"config.json: '{field}.high_freq_factor' ({high}) must exceed '{field}.low_freq_factor' ({low}).",
            file="config.json",
            field=field,
        )
    original = settings.get("original_max_position_embeddings", config.get("original_max_position_embeddings"))
    if original is None:
        raise CheckpointInvalid(
            f"config.json: '{field}.original_max_position_embeddings' is missing; llama3 scaling needs it.",
            file="config.json",
            field=field,
        )
    original_context = int(reader.require_positive(f"{field}.original_max_position_embeddings", original))
    return Rope(theta, "llama3", factor, low, high, original_context)
