"""Families that only the exporter converts, as transformers builds them, with sizes named as Llama's are. Pure.

Owns their names and the reading of those sizes; nothing of what the layers compute is said here, and transformers
compares the weights with the config when the source is opened. Called through `workers.convert.architectures`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from workers.convert.architectures.config_reader import ConfigReader, Defaults, read_decoder, require_layers
from workers.convert.architectures.shape import DecoderShape


@dataclass(frozen=True)
class AsBuilt:
    """One such family."""

    #: As transformers writes it in `model_type`.
    name: str
    architecture: str
    #: Models of the field that have it.
    models: str
    #: Whether embeddings are tied where a config is silent.
    tied_embeddings: bool = False
    #: Fields of a `config.json` that must be false or absent: the exporter fails where they are set.
    off: tuple[str, ...] = ()

    def read_shape(self, config: Mapping[str, Any]) -> DecoderShape:
        """Return the sizes of a checkpoint; raises as `llama.read_shape` does, but for weights that do not fit."""
        reader = ConfigReader(config, self.name)
        reader.require_off(*self.off)
        require_layers(reader)
        return read_decoder(
            reader,
            self.architecture,
            Defaults(tied_embeddings=self.tied_embeddings),
            rope=None,
            # Nothing here computes norms, and not every family has them of this kind.
            norm_epsilon=1e-6,
            has_open_weights=True,
        )


#: One window for all layers, which the exporter gives no mask for; windows of single layers (`layer_types`) it has.
_WINDOW = ("sliding_window",)

#: Found by converting a small checkpoint of each decoder that transformers has.
AS_BUILT: tuple[AsBuilt, ...] = (
    AsBuilt("apertus", "ApertusForCausalLM", "Apertus"),
    AsBuilt("arcee", "ArceeForCausalLM", "AFM 4.5B"),
    AsBuilt("cohere", "CohereForCausalLM", "Command R, Aya", tied_embeddings=True),
    AsBuilt("cohere2", "Cohere2ForCausalLM", "Command R7B, Command A", tied_embeddings=True),
    AsBuilt("cwm", "CwmForCausalLM", "Code World Model"),
    AsBuilt("diffllama", "DiffLlamaForCausalLM", "DiffLlama"),
    AsBuilt("ernie4_5", "Ernie4_5ForCausalLM", "ERNIE 4.5, dense", tied_embeddings=True),
    AsBuilt("exaone4", "Exaone4ForCausalLM", "EXAONE 4.0"),
    AsBuilt("glm", "GlmForCausalLM", "GLM-4 9B, GLM-Edge"),
    AsBuilt("glm4", "Glm4ForCausalLM", "GLM-4 0414"),
    AsBuilt("helium", "HeliumForCausalLM", "Helium 1"),
    AsBuilt("hunyuan_v1_dense", "HunYuanDenseV1ForCausalLM", "Hunyuan, dense"),
    AsBuilt("hyperclovax", "HyperCLOVAXForCausalLM", "HyperCLOVA X SEED"),
    AsBuilt("jais2", "Jais2ForCausalLM", "Jais 2"),
    AsBuilt("ministral", "MinistralForCausalLM", "Ministral 8B"),
    AsBuilt("ministral3", "Ministral3ForCausalLM", "Ministral 3", off=_WINDOW),
    AsBuilt("nanochat", "NanoChatForCausalLM", "nanochat"),
    AsBuilt("olmo", "OlmoForCausalLM", "OLMo"),
    AsBuilt("olmo2", "Olmo2ForCausalLM", "OLMo 2"),
    AsBuilt("olmo3", "Olmo3ForCausalLM", "OLMo 3"),
    AsBuilt("seed_oss", "SeedOssForCausalLM", "Seed-OSS"),
    AsBuilt("starcoder2", "Starcoder2ForCausalLM", "StarCoder2", tied_embeddings=True, off=_WINDOW),
    AsBuilt("vaultgemma", "VaultGemmaForCausalLM", "VaultGemma", tied_embeddings=True),
)
