"""A bundle in the real runtime: what LiteRT-LM tokenizes, scores, renders and generates, and where it stops.

Owns every question that is put to `litert_lm.Engine`. Must not know thresholds. Called by `workers.verify.verify`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import litert_lm

from service.errors import ChatTemplateInvalid, VerificationFailed
from workers.verify.conversations import TOOL, Rendered
from workers.verify.generation import Answer

litert_lm.set_min_log_severity(litert_lm.LogSeverity.ERROR)

#: The runtime's own word: packed weights stay in memory, as they would be written for one use only.
_NO_CACHE = ":nocache"
_GREEDY = litert_lm.SamplerConfig(top_k=1, top_p=1.0, temperature=1.0, seed=0)


#: What rendering one conversation may take; honest templates take milliseconds.
RENDER_TIME_S = 20.0


class _SampleTool(litert_lm.Tool):  # type: ignore[misc]  # the package has no types
    """The tool of the sample conversations; it is never called."""

    def get_tool_description(self) -> dict[str, Any]:
        return TOOL

    def execute(self, param: Mapping[str, Any]) -> Any:
        raise NotImplementedError


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
        #: Whether a thread is still inside the engine and will not return.
        self._hangs = False
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
        if not self._hangs:
            self._engine.close()

    @property
    def stop_tokens(self) -> list[list[int]]:
        """Stop sequences that the bundle declares."""
        return [list(sequence) for sequence in self._engine.eos_token_ids]

    @property
    def start_token(self) -> int | None:
        """The token that the runtime puts before every prompt; None where it puts none."""
        start = self._engine.bos_token_id
        return None if start is None else int(start)

    def encode_plain(self, text: str) -> list[int]:
        """Return the ids of a text alone."""
        return list(self._engine.tokenize(text))

    def encode(self, text: str) -> list[int]:
        """Return the ids that the runtime makes of a prompt, its start token included."""
        return ([] if self.start_token is None else [self.start_token]) + self.encode_plain(text)

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

    def measure_loss(self, text: str) -> float:
        """Return the sum of the losses of all tokens of a text but the first, in nats; see `workers.verify.scoring`.

        Raises `VerificationFailed` when the runtime does not score the text, or not every token of it.
        """
        tokens = len(self.encode_plain(text))
        try:
            with self._engine.create_session(apply_prompt_template=False) as session:
                scores = session.run_text_scoring([text]).token_scores[0]
        except (RuntimeError, IndexError) as error:
            raise VerificationFailed(
                f"LiteRT-LM does not score {tokens} tokens with {self._name}: {error}.", file=self._name
            ) from error
        if len(scores) != tokens:
            raise VerificationFailed(
                f"LiteRT-LM scores {len(scores)} of {tokens} tokens with {self._name}.", file=self._name
            )
        return -float(sum(scores[1:]))

    def render(self, conversation: Rendered) -> str:
        """Return what the bundle's chat template makes of a conversation; empty where the runtime refuses it.

        Raises `ChatTemplateInvalid` when rendering does not end; the runtime is of no use then.
        """
        return self._run_within(lambda: self._render(conversation), conversation)

    def _render(self, conversation: Rendered) -> str:
        *before, last = conversation.messages
        with self._engine.create_conversation(
            messages=before or None,
            tools=[_SampleTool()] if conversation.has_tools else None,
            automatic_tool_calling=False,
        ) as opened:
            return str(opened.render_message_to_string(last))

    def _run_within(self, task: Callable[[], str], conversation: Rendered) -> str:
        """Run what may hang inside the engine, where no signal reaches it, in a thread that may be left behind."""
        results: list[str] = []

        def run() -> None:
            try:
                results.append(task())
            except RuntimeError:
                results.append("")

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(RENDER_TIME_S)
        if not results:
            self._hangs = True
            raise ChatTemplateInvalid(
                f"LiteRT-LM does not render the conversation {conversation.name!r} within {RENDER_TIME_S:.0f} s: the "
                f"chat template in {self._name} does not end. Correct or remove it.",
                file=self._name,
                conversation=conversation.name,
            )
        return results[0]

    def reply(self, conversation: Rendered, limit_tokens: int) -> Answer | None:
        """Continue a conversation greedily by at most `limit_tokens`, through the Conversation API.

        None where the tokens are no UTF-8, which fails in LiteRT-LM 0.18.1; see `answer`. Raises `VerificationFailed`.
        """
        *before, last = conversation.messages
        try:
            with self._engine.create_conversation(
                messages=before or None,
                automatic_tool_calling=False,
                sampler_config=_GREEDY,
                max_output_tokens=limit_tokens,
            ) as opened:
                message = opened.send_message(last)
                info = opened.get_benchmark_info()
        except RuntimeError as error:
            if self._has_byte_fallback:
                return None
            raise VerificationFailed(
                f"LiteRT-LM fails on {self._name} in the conversation {conversation.name!r}: {error}.", file=self._name
            ) from error
        return Answer(str(message.contents), info.last_prefill_token_count, info.last_decode_token_count)

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
