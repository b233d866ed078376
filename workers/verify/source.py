"""The checkpoint itself, opened with transformers: what it tokenizes, answers and generates.

Owns every call of the source's model and tokenizer. Must not know the probe. Called by `workers.verify.reference`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from service.errors import CheckpointInvalid, TokenizerUnsupported
from workers.convert.architectures.parameters import is_ignored, require_none_extra, require_none_missing
from workers.verify import probe
from workers.verify.probe import Generation
from workers.verify.source_tokenizer import open_tokenizer


@dataclass(frozen=True)
class Source:
    """The checkpoint, opened with transformers in float32."""

    model: Any
    tokenizer: Any
    stop_tokens: frozenset[int]
    #: Parts of the tokenizer that had to be read from `tokenizer.json`; see `open_tokenizer`.
    restored: tuple[str, ...] = ()

    def encode(self, text: str) -> list[int]:
        """Return token ids as the model is meant to get them, its leading special tokens included."""
        return [int(token) for token in self.tokenizer(text, verbose=False)["input_ids"]]

    def encode_plain(self, text: str) -> list[int]:
        """Return the text's own token ids, without any that the tokenizer adds."""
        return [int(token) for token in self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]

    def add_start(self, tokens: Sequence[int]) -> list[int]:
        """Return tokens with what the tokenizer puts before every text in front, unless they begin with it."""
        plain, whole = self.encode_plain("a"), self.encode("a")
        start = whole[: len(whole) - len(plain)] if plain and whole[-len(plain) :] == plain else []
        return list(tokens) if list(tokens[: len(start)]) == start else [*start, *tokens]

    def measure_loss(self, tokens: Sequence[int]) -> float:
        """Return the sum of the losses of all tokens but the first, in nats."""
        ids = torch.tensor([list(tokens)])
        logits = self.model(ids, use_cache=False).logits[0, :-1].float()
        return float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none").double().sum())


def open_source(checkpoint: Path) -> Source:
    """Open model and tokenizer from local files, without remote code."""
    tokenizer, restored = open_tokenizer(checkpoint)
    model = open_model(checkpoint)
    return Source(model, tokenizer, frozenset(find_stop_tokens(model, tokenizer)), restored)


def open_model(checkpoint: Path) -> Any:
    """Open the model in float32, with transformers' own class or, where it has none, with ours.

    Fused attention answers as eager attention does (the largest difference is below 1e-6 of the logit range) and
    takes less than half the time on a full context. It knows no soft limit of scores, which needs the eager one; that
    one adds Falcon's ALiBi twice (transformers 5.23, `modeling_falcon.py`).
    """
    config = AutoConfig.from_pretrained(checkpoint, local_files_only=True, trust_remote_code=False)
    has_soft_limit = getattr(config, "attn_logit_softcapping", None) is not None
    model, loaded = AutoModelForCausalLM.from_pretrained(
        checkpoint,
        output_loading_info=True,
        # They are told with the others that do not fit.
        ignore_mismatched_sizes=True,
        dtype=torch.float32,
        attn_implementation="eager" if has_soft_limit else "sdpa",
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
    )
    _require_loaded(loaded)
    return model.eval()


def _require_loaded(loaded: Mapping[str, Any]) -> None:
    """Raise `CheckpointInvalid` unless every weight that the class has was found, of its shape, and no other."""
    if loaded["mismatched_keys"]:
        name, found, expected = sorted(loaded["mismatched_keys"])[0]
        raise CheckpointInvalid(
            f"The tensor {name!r} has shape {list(found)}; config.json demands {list(expected)}.",
            tensor=name,
            found_shape=list(found),
            expected_shape=list(expected),
        )
    require_none_missing(sorted(loaded["missing_keys"]))
    require_none_extra(sorted(name for name in loaded["unexpected_keys"] if not is_ignored(name)))


def find_stop_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Return the tokens that end a generation, as transformers decides: the generation config's, else the others'."""
    for value in (model.generation_config.eos_token_id, model.config.eos_token_id, tokenizer.eos_token_id):
        stops = {int(token) for token in value} if isinstance(value, list | tuple) else {value} - {None}
        if stops:
            return stops
    return set()


def write_tokenizer(tokenizer: Any, path: Path) -> None:
    """Write the tokenizer in the one form that `verify` opens without transformers."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise TokenizerUnsupported(
            f"The tokenizer {type(tokenizer).__name__} has no tokenizer.json form. Save it as a fast tokenizer."
        )
    path.write_text(backend.to_str(), encoding="utf-8")


def require_finite(logits: probe.Floats) -> None:
    """Raise `CheckpointInvalid` when the source answers with NaN or infinity."""
    if not np.isfinite(logits).all():
        raise CheckpointInvalid("The source answers the probe with NaN or infinite logits: its weights are damaged.")


def generate(source: Source, prompts: Sequence[Sequence[int]], limit_tokens: int) -> list[Generation]:
    """Continue each prompt greedily until a stop token or `limit_tokens`; prompts must be equally long."""
    results = [Generation([], [], stopped=False) for _ in prompts]
    live = list(range(len(prompts)))
    output = source.model(torch.tensor([list(prompt) for prompt in prompts]), use_cache=True, logits_to_keep=1)
    cache = output.past_key_values
    for step in range(limit_tokens):
        logits = output.logits[:, -1].float()
        best = torch.topk(logits, 2, dim=-1)
        tokens = best.indices[:, 0]
        margins = (best.values[:, 0] - best.values[:, 1]).tolist()
        for index in list(live):
            token = int(tokens[index])
            generation = results[index]
            generation.tokens.append(token)
            generation.margins.append(float(margins[index]))
            if token in source.stop_tokens:
                results[index] = Generation(generation.tokens, generation.margins, stopped=True)
                live.remove(index)
        if not live or step + 1 == limit_tokens:
            break
        output = source.model(tokens[:, None], past_key_values=cache, use_cache=True)
    return results


def describe_prompt(text: str, tokens: Sequence[int], limit_tokens: int, generation: Generation) -> dict[str, Any]:
    """Return one prompt and its generation in the form that `reference.json` keeps."""
    return {
        "prompt": text,
        "tokens": list(tokens),
        "limit_tokens": limit_tokens,
        "generated": generation.tokens,
        "margins": generation.margins,
        "stopped": generation.stopped,
    }
