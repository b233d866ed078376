"""Which architectures can be converted, and what each one's `config.json` means. Pure; imports no tool.

Owns the table of families. A new family is one file that returns a `DecoderShape` and one line here. Called
by `workers.fetch.plan` (to refuse early) and by the engines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from service.errors import ArchitectureUnsupported
from workers.convert.architectures import (
    falcon,
    gemma,
    gemma2,
    gemma3,
    gpt2,
    llama,
    mistral,
    phi,
    phi3,
    qwen2,
    qwen3,
)
from workers.convert.architectures.shape import DecoderShape, Rope

__all__ = ["FAMILIES", "DecoderShape", "Family", "Rope", "find_family", "read_shape"]


@dataclass(frozen=True)
class Family:
    """One architecture that transformers names in `config.json`, and how it is read."""

    #: As transformers writes it in `model_type`.
    name: str
    architecture: str
    read_shape: Callable[[Mapping[str, Any]], DecoderShape]
    #: Engines that convert it, best first.
    engines: tuple[str, ...]


_BOTH = ("reauthored", "traced")

#: By the name that stands in `config.json` under "architectures".
FAMILIES: dict[str, Family] = {
    family.architecture: family
    for family in (
        Family("llama", "LlamaForCausalLM", llama.read_shape, _BOTH),
        Family("mistral", "MistralForCausalLM", mistral.read_shape, ("reauthored",)),
        Family("qwen2", "Qwen2ForCausalLM", qwen2.read_shape, _BOTH),
        Family("qwen3", "Qwen3ForCausalLM", qwen3.read_shape, _BOTH),
        Family("gemma", "GemmaForCausalLM", gemma.read_shape, _BOTH),
        Family("gemma2", "Gemma2ForCausalLM", gemma2.read_shape, _BOTH),
        Family("gemma3_text", "Gemma3ForCausalLM", gemma3.read_shape, _BOTH),
        Family("phi", "PhiForCausalLM", phi.read_shape, _BOTH),
        Family("phi3", "Phi3ForCausalLM", phi3.read_shape, _BOTH),
        Family("falcon", "FalconForCausalLM", falcon.read_shape, _BOTH),
        Family("gpt2", "GPT2LMHeadModel", gpt2.read_shape, _BOTH),
    )
}


def find_family(config: Mapping[str, Any]) -> Family:
    """Return the family of a `config.json`; raises `ArchitectureUnsupported` with those that are supported."""
    names = config.get("architectures")
    if isinstance(names, list) and len(names) == 1 and names[0] in FAMILIES:
        return FAMILIES[names[0]]
    raise ArchitectureUnsupported(
        f"config.json names the architectures {names!r}. Supported is exactly one of: {', '.join(FAMILIES)}.",
        architectures=names,
        supported=list(FAMILIES),
    )


def read_shape(config: Mapping[str, Any]) -> DecoderShape:
    """Return the shape of a checkpoint, whatever its family; raises as the family's `read_shape` does."""
    return find_family(config).read_shape(config)
