"""A bundle in the real runtime: what LiteRT-LM tokenizes, generates and where it stops.

Owns every question that is put to `litert_lm.Engine`. Must not know thresholds. Called by `workers.verify.verify`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import litert_lm

from service.errors import VerificationFailed
from workers.verify.generation import Answer

litert_lm.set_min_log_severity(litert_lm.LogSeverity.ERROR)

#: The runtime's own word: packed weights stay in memory, as they would be written for one use only.
_NO_CACHE = ":nocache"
_GREEDY = litert_lm.SamplerConfig(top_k=1, top_p=1.0, temperature=1.0, seed=0)


class _DecodeFailed(Exception):
    """The runtime stopped in the middle of an answer."""


class Runtime:
    """A bundle, loaded by LiteRT-LM on the CPU; use as a context manager."""

    def __init__(self, bundle: Path, has_byte_fallback: bool, threads: int) -> None:
        """Load `bundle`; no cache is written. Raises `VerificationFailed` when the runtime refuses it.

        `has_byte_fallback`: whether the source's tokenizer spells unknown characters as bytes; see `answer`.
        """
        self._name = bundle.name
        self._has_byte_fallback = has_byte_fallback
        try:
            self._engine = litert_lm.Engine(
                str(bundle),
                litert_lm.Backend.CPU(thread_count=threads),
                cache_dir=_NO_CACHE,
                enable_benchmark=True,
            )
        except RuntimeError as error:
            raise VerificationFailed(f"LiteRT-LM does not load {bundle.name}: {error}.", file=bundle.name) from error

    def __enter__(self) -> Runtime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._engine.close()

    @property
    def stop_tokens(self) -> list[list[int]]:
        """Stop sequences that the bundle declares."""
        return [list(sequence) for sequence in self._engine.eos_token_ids]

    def encode(self, text: str) -> list[int]:
        """Return the ids that the runtime makes of a prompt, its start token included."""
        start = self._engine.bos_token_id
        return ([] if start is None else [start]) + list(self._engine.tokenize(text))

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text that the runtime makes of ids."""
        return str(self._engine.detokenize(list(tokens)))

    def answer(self, prompt: str, limit_tokens: int) -> Answer:
        """Continue a raw prompt greedily by at most `limit_tokens`.

        LiteRT-LM 0.18.1 fails ("Stable text shrunk compared to released") where a model with a byte-fallback
        `tokenizer.json` generates bytes that are no UTF-8, as random weights do: then the answer is cut short of
        that point, and says so. Raises `VerificationFailed` for every other failure, and for no token at all.
        """
        answer = self._try_answer(prompt, limit_tokens)
        if answer is not None:
            return answer
        longest, failing = 0, limit_tokens
        while failing - longest > 1:
            middle = (longest + failing) // 2
            shorter = self._try_answer(prompt, middle)
            if shorter is None:
                failing = middle
            else:
                answer, longest = shorter, middle
        if answer is None or not self._has_byte_fallback:
            raise VerificationFailed(
                f"LiteRT-LM fails on {self._name} at generated token {failing} for the prompt {prompt[:40]!r}.",
                file=self._name,
            )
        return replace(answer, is_cut=True)

    def _try_answer(self, prompt: str, limit_tokens: int) -> Answer | None:
        """Return the answer, or None when decoding failed and a shorter answer may still succeed."""
        try:
            with self._engine.create_session(
                apply_prompt_template=False, sampler_config=_GREEDY, max_output_tokens=limit_tokens
            ) as session:
                session.run_prefill([prompt])
                text = "".join(self._decode(session))
                info = session.get_benchmark_info()
        except _DecodeFailed:
            return None
        except RuntimeError as error:
            raise VerificationFailed(
                f"LiteRT-LM fails on {self._name} with the prompt {prompt[:40]!r}: {error}.", file=self._name
            ) from error
        if info.last_decode_token_count <= 0:
            raise VerificationFailed(
                f"LiteRT-LM generates 0 tokens from {self._name} for the prompt {prompt[:40]!r}.", file=self._name
            )
        return Answer(text, info.last_prefill_token_count, info.last_decode_token_count)

    def _decode(self, session: Any) -> list[str]:
        try:
            return list(session.run_decode().texts)
        except RuntimeError as error:
            raise _DecodeFailed from error

    def compare_tokenizer(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, float | int]:
        """Return how often the runtime's tokenizer differs from the source's: share of samples, both ways."""
        encode = sum(self._engine.tokenize(sample["text"]) != sample["tokens"] for sample in samples)
        decode = sum(self._engine.detokenize(sample["tokens"]) != sample["decoded"] for sample in samples)
        return {
            "mismatch_ratio": (encode + decode) / (2 * len(samples)),
            "encode_mismatch_ratio": encode / len(samples),
            "decode_mismatch_ratio": decode / len(samples),
            "samples": len(samples),
        }
