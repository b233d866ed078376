"""OpenELM as transformers would have it: the source model that artifacts of this family are held against.

transformers 5.23 has no class of this architecture, only code that comes with checkpoints, which is never run. This one
is written from the paper (arXiv 2404.14619, section 2.1) and the fields of the published configurations, and shares
nothing with the engines. Called by `workers.verify.reference`, through `register`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast


class OpenELMConfig(PreTrainedConfig):  # type: ignore[misc]
    """The fields of a published `config.json`; lists have one entry a layer."""

    model_type = "openelm"
    attribute_map = {  # noqa: RUF012 - transformers reads it from the class
        "hidden_size": "model_dim",
        "num_hidden_layers": "num_transformer_layers",
        "max_position_embeddings": "max_context_length",
        "tie_word_embeddings": "share_input_output_layers",
    }

    vocab_size: int = 32_000
    max_context_length: int = 2048
    num_transformer_layers: int = 1
    model_dim: int = 64
    head_dim: int = 16
    num_query_heads: Sequence[int] = (4,)
    num_kv_heads: Sequence[int] = (2,)
    ffn_multipliers: Sequence[float] = (1.0,)
    ffn_dim_divisor: int = 256
    ffn_with_glu: bool = True
    activation_fn_name: str = "swish"
    normalize_qk_projections: bool = True
    share_input_output_layers: bool = True
    rope_freq_constant: int = 10_000
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    use_cache: bool = True

    def find_inner_size(self, layer: int) -> int:
        """Return the feed-forward's size in a layer: the nearest multiple of the divisor, not a tenth too small."""
        size, step = self.ffn_multipliers[layer] * self.model_dim, self.ffn_dim_divisor
        rounded = max(step, int((size + step / 2) / step) * step)
        return rounded + step if rounded < 0.9 * size else rounded


class _Attention(nn.Module):
    """Grouped-query attention whose queries and keys are normalised head by head, then turned."""

    def __init__(self, config: OpenELMConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads, self.groups = config.num_query_heads[layer], config.num_kv_heads[layer]
        self.head_size, self.theta = config.head_dim, float(config.rope_freq_constant)
        self.qkv_proj = nn.Linear(config.model_dim, (self.heads + 2 * self.groups) * self.head_size, bias=False)
        self.out_proj = nn.Linear(self.heads * self.head_size, config.model_dim, bias=False)
        is_normed = config.normalize_qk_projections
        self.q_norm = nn.RMSNorm(self.head_size, eps=1e-6) if is_normed else nn.Identity()
        self.k_norm = nn.RMSNorm(self.head_size, eps=1e-6) if is_normed else nn.Identity()

    def forward(self, hidden: torch.Tensor, start: int, cache: Any) -> torch.Tensor:
        batch, tokens, _ = hidden.shape
        heads = self.qkv_proj(hidden).view(batch, tokens, -1, self.head_size).transpose(1, 2)
        queries, keys, values = heads.split([self.heads, self.groups, self.groups], dim=1)
        positions = torch.arange(start, start + tokens, device=hidden.device)
        queries, keys = self._turn(self.q_norm(queries), positions), self._turn(self.k_norm(keys), positions)
        if cache is not None:
            keys, values = cache.update(keys, values, self.layer)
        seen = torch.arange(keys.shape[2], device=hidden.device)
        attended = functional.scaled_dot_product_attention(
            queries,
            keys.repeat_interleave(self.heads // self.groups, dim=1),
            values.repeat_interleave(self.heads // self.groups, dim=1),
            attn_mask=seen[None, :] <= positions[:, None],
        )
        projected: torch.Tensor = self.out_proj(attended.transpose(1, 2).reshape(batch, tokens, -1))
        return projected

    def _turn(self, states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Rotate channel i against channel i + half by position / theta^(i / half), in [batch, heads, tokens, size]."""
        half = self.head_size // 2
        powers = torch.arange(half, dtype=torch.float32, device=states.device) / half
        turns = torch.polar(torch.ones(1, device=states.device), positions[:, None] * self.theta**-powers)
        pairs = torch.complex(states[..., :half].float(), states[..., half:].float()) * turns
        return torch.cat([pairs.real, pairs.imag], dim=-1).to(states.dtype)


class _FeedForward(nn.Module):
    """One hidden layer; gate and values come out of one matrix, the gate first."""

    def __init__(self, config: OpenELMConfig, layer: int) -> None:
        super().__init__()
        inner, self.is_gated = config.find_inner_size(layer), config.ffn_with_glu
        self.proj_1 = nn.Linear(config.model_dim, 2 * inner if self.is_gated else inner, bias=False)
        self.proj_2 = nn.Linear(inner, config.model_dim, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.is_gated:
            gate, values = self.proj_1(hidden).chunk(2, dim=-1)
            inner = functional.silu(gate) * values
        else:
            inner = functional.silu(self.proj_1(hidden))
        projected: torch.Tensor = self.proj_2(inner)
        return projected


class _Layer(nn.Module):
    def __init__(self, config: OpenELMConfig, layer: int) -> None:
        super().__init__()
        self.attn_norm = nn.RMSNorm(config.model_dim, eps=1e-6)
        self.attn = _Attention(config, layer)
        self.ffn_norm = nn.RMSNorm(config.model_dim, eps=1e-6)
        self.ffn = _FeedForward(config, layer)

    def forward(self, hidden: torch.Tensor, start: int, cache: Any) -> torch.Tensor:
        hidden = hidden + self.attn(self.attn_norm(hidden), start, cache)
        added: torch.Tensor = hidden + self.ffn(self.ffn_norm(hidden))
        return added


class _Decoder(nn.Module):
    def __init__(self, config: OpenELMConfig) -> None:
        super().__init__()
        self.token_embeddings = nn.Embedding(config.vocab_size, config.model_dim)
        self.layers = nn.ModuleList(_Layer(config, layer) for layer in range(config.num_transformer_layers))
        self.norm = nn.RMSNorm(config.model_dim, eps=1e-6)


class OpenELMForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A decoder with sizes of its own in every layer, named as published checkpoints name it."""

    config_class = OpenELMConfig
    base_model_prefix = "transformer"
    _supports_sdpa = True
    _tied_weights_keys = {"lm_head.weight": "transformer.token_embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: OpenELMConfig) -> None:
        super().__init__(config)
        if config.activation_fn_name not in ("swish", "silu"):
            raise ValueError(f"activation_fn_name is {config.activation_fn_name!r}; only swish is known")
        self.transformer = _Decoder(config)
        self.lm_head = nn.Linear(config.model_dim, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return what transformers ties to the output layer."""
        return self.transformer.token_embeddings

    def get_output_embeddings(self) -> nn.Module:
        """Return what transformers ties to the embeddings."""
        return self.lm_head

    def forward(
        self,
        input_ids: torch.Tensor,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Return `logits`, float [batch, kept, vocab], of int64 [batch, tokens] that follow what the cache holds."""
        cache = DynamicCache() if use_cache and past_key_values is None else past_key_values
        start = 0 if cache is None else cache.get_seq_length()
        hidden = self.transformer.token_embeddings(input_ids)
        for layer in self.transformer.layers:
            hidden = layer(hidden, start, cache)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(self.transformer.norm(hidden[:, kept]))
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)


def register() -> None:
    """Make transformers' own `from_pretrained` find the class; may be called again."""
    AutoConfig.register("openelm", OpenELMConfig, exist_ok=True)
    AutoModelForCausalLM.register(OpenELMConfig, OpenELMForCausalLM, exist_ok=True)
