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
    gemma3n,
    gemma4,
    gpt2,
    granite,
    lfm2,
    llama,
    mistral,
    openelm,
    phi,
    phi3,
    qwen2,
    qwen3,
    smollm3,
)
from workers.convert.architectures.as_built import AS_BUILT
from workers.convert.architectures.shape import DecoderShape, Rope

__all__ = ["FAMILIES", "UNCONVERTIBLE", "DecoderShape", "Family", "Rope", "find_family", "read_shape"]


@dataclass(frozen=True)
class Family:
    """One architecture that transformers names in `config.json`, and how it is read."""

    #: As transformers writes it in `model_type`.
    name: str
    architecture: str
    #: Models of the field that have it.
    models: str
    read_shape: Callable[[Mapping[str, Any]], DecoderShape]
    #: Engines that convert it, best first.
    engines: tuple[str, ...]
    #: Why the first of them is the best, as measured; ends a sentence that names it.
    evidence: str


_BOTH = ("reauthored", "traced")
_REAUTHORED = ("reauthored",)
_TRACED = ("traced",)

#: Measured on a small model of each family (docs/supported.md) and on TinyLlama's shape (docs/memory.md).
_EQUAL = (
    "the logits of both engines differ from the source's by less than 1e-6 of their range, but its file is smaller (by "
    "3 to 11 percent on small models), and it reads the weights where they lie: 1 GiB of memory for 1.1 billion "
    "parameters, of which the other engine holds three to four copies"
)
_NO_WINDOWS = "the other engine's exporter takes neither its window nor wavelengths that change with the text's length"
_NO_ATTENTION = "its class in transformers does not let the other engine's attention in"
_ASKED_HEADS = "exporter asks for key-value heads, which its config does not name"
_NO_KEY_VALUE_HEADS = f"the other engine's {_ASKED_HEADS}"
_NO_CLASS = "the other engine needs a class of transformers, which has none"
_UNTRIED = "the other engine is not tried with its window"
_UNLIKE = "its layers are unlike any that the other engine rebuilds; the logits differ by less than 1e-6 of their range"

_UNDESCRIBED = "the other engine has no description of its layers; the logits differ by less than 3e-6 of their range"

_EXPERTS = "choosing its experts becomes the operator 'aten.histc', which the converter lacks"
_NO_MASK = "its class in transformers does not pass on the positions that the exporter's attention needs"
_TWO_SIZES = "its keys and values differ in size, and the exporter's cache has one size"

#: Architectures of the field that no engine converts, and why.
UNCONVERTIBLE: dict[str, str] = {
    **dict.fromkeys(
        ("BloomForCausalLM", "GPTNeoXForCausalLM", "MptForCausalLM", "OPTForCausalLM", "PersimmonForCausalLM"),
        f"the {_ASKED_HEADS}",
    ),
    **dict.fromkeys(
        (
            "Ernie4_5_MoeForCausalLM",
            "Glm4MoeForCausalLM",
            "GptOssForCausalLM",
            "GraniteMoeForCausalLM",
            "MixtralForCausalLM",
            "OlmoeForCausalLM",
            "PhimoeForCausalLM",
            "Qwen2MoeForCausalLM",
            "Qwen3MoeForCausalLM",
        ),
        _EXPERTS,
    ),
    **dict.fromkeys(("NemotronForCausalLM", "StableLmForCausalLM"), _NO_MASK),
    **dict.fromkeys(("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM", "MiniCPM3ForCausalLM"), _TWO_SIZES),
    "Qwen3_5ForCausalLM": "its linear attention becomes the operator 'gated_delta_update', which the interpreter lacks "
    "on CPUs, and LiteRT-LM 0.18.1 has no buffers for its states (kv_cache_r)",
    "Gemma3ForConditionalGeneration": "it holds an image encoder; submit its text model as Gemma3ForCausalLM",
    "Gemma3nForConditionalGeneration": "it holds image and audio encoders; submit its text model as Gemma3nForCausalLM",
    "Gemma4ForConditionalGeneration": "it holds image and audio encoders; submit its text model as Gemma4ForCausalLM",
    "Qwen3_5ForConditionalGeneration": "it holds an image encoder, and its text model needs the operator "
    "'gated_delta_update', which the interpreter lacks on CPUs",
}

#: By the name that stands in `config.json` under "architectures".
FAMILIES: dict[str, Family] = {
    family.architecture: family
    for family in (
        Family(
            "llama",
            "LlamaForCausalLM",
            "Llama 2, 3, 3.1, 3.2, TinyLlama, SmolLM, SmolLM2, AMD-Llama",
            llama.read_shape,
            _BOTH,
            _EQUAL,
        ),
        Family("mistral", "MistralForCausalLM", "Mistral", mistral.read_shape, _REAUTHORED, _UNTRIED),
        Family(
            "qwen2", "Qwen2ForCausalLM", "Qwen2, Qwen2.5, DeepSeek-R1-Distill-Qwen", qwen2.read_shape, _BOTH, _EQUAL
        ),
        Family("qwen3", "Qwen3ForCausalLM", "Qwen3", qwen3.read_shape, _BOTH, _EQUAL),
        Family("gemma", "GemmaForCausalLM", "Gemma", gemma.read_shape, _BOTH, _EQUAL),
        Family("gemma2", "Gemma2ForCausalLM", "Gemma 2", gemma2.read_shape, _BOTH, _EQUAL),
        Family("gemma3_text", "Gemma3ForCausalLM", "Gemma 3, text", gemma3.read_shape, _BOTH, _EQUAL),
        Family("phi", "PhiForCausalLM", "Phi-1, Phi-1.5, Phi-2", phi.read_shape, _BOTH, _EQUAL),
        Family("phi3", "Phi3ForCausalLM", "Phi-3, Phi-3.5, Phi-4-mini", phi3.read_shape, _REAUTHORED, _NO_WINDOWS),
        Family("falcon", "FalconForCausalLM", "Falcon 1B, 7B, 40B", falcon.read_shape, _REAUTHORED, _NO_ATTENTION),
        Family("gpt2", "GPT2LMHeadModel", "GPT-2", gpt2.read_shape, _REAUTHORED, _NO_KEY_VALUE_HEADS),
        Family("openelm", "OpenELMForCausalLM", "OpenELM", openelm.read_shape, _REAUTHORED, _NO_CLASS),
        Family("smollm3", "SmolLM3ForCausalLM", "SmolLM3", smollm3.read_shape, _TRACED, _UNLIKE),
        Family("granite", "GraniteForCausalLM", "Granite 3, dense", granite.read_shape, _TRACED, _UNLIKE),
        Family("gemma3n_text", "Gemma3nForCausalLM", "Gemma 3n, text", gemma3n.read_shape, _TRACED, _UNLIKE),
        Family("gemma4_text", "Gemma4ForCausalLM", "Gemma 4, text", gemma4.read_shape, _TRACED, _UNLIKE),
        Family("lfm2", "Lfm2ForCausalLM", "LFM2", lfm2.read_shape, _TRACED, _UNLIKE),
        *(
            Family(each.name, each.architecture, each.models, each.read_shape, _TRACED, _UNDESCRIBED)
            for each in AS_BUILT
        ),
    )
}


def find_family(config: Mapping[str, Any]) -> Family:
    """Return the family of a `config.json`; raises `ArchitectureUnsupported` with those that are supported."""
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 else None
    if name in FAMILIES:
        return FAMILIES[name]
    if name in UNCONVERTIBLE:
        raise ArchitectureUnsupported(
            f"config.json names the architecture {name!r}, which no engine converts: {UNCONVERTIBLE[name]}. "
            f"Supported are {', '.join(FAMILIES)}.",
            architectures=names,
            supported=list(FAMILIES),
        )
    raise ArchitectureUnsupported(
        f"config.json names the architectures {names!r}. Supported is exactly one of: {', '.join(FAMILIES)}.",
        architectures=names,
        supported=list(FAMILIES),
    )


def read_shape(config: Mapping[str, Any]) -> DecoderShape:
    """Return the shape of a checkpoint, whatever its family; raises as the family's `read_shape` does."""
    return find_family(config).read_shape(config)
