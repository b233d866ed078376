"""A generative `.tflite` graph in the LiteRT interpreter: prefill, decode and the caches between them.

Owns the signature conventions of both engines (`prefill_N` and `decode`; tokens, positions, per layer one K and V
cache or the state of a convolution, the mask built inside or given as input). Must not know the source or judge a
figure. Called by `workers.verify.parity` and `workers.convert.calibration`; tests use it to run what they convert.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from ai_edge_litert.interpreter import Interpreter

from service.errors import VerificationFailed
from workers.verify import probe
from workers.verify.probe import Generation

Arrays = dict[str, npt.NDArray[Any]]

_PREFILL = re.compile(r"prefill(?:_(\d+))?")
_CACHE = re.compile(r"kv_cache_[kv]_\d+")
_CONVOLUTION = re.compile(r"kv_cache_c_\d+")
#: What is fed back, of attention and of convolutions.
_STATE = re.compile(rf"{_CACHE.pattern}|{_CONVOLUTION.pattern}")
#: Added to the scores of positions that must not be attended to; finite, as a row may be all masked.
MASKED = np.float32(-0.7 * np.finfo(np.float32).max)


class Graph:
    """One open `.tflite` with its caches; positions advance as tokens are fed."""

    def __init__(
        self, path: Path, threads: int | None = None, open_interpreter: Callable[[Path, int], Any] | None = None
    ) -> None:
        """Open `path`; raises `VerificationFailed` when it does not load or its signatures are not understood.

        `open_interpreter` yields another interpreter than LiteRT's own, as calibration does, which watches.
        """
        try:
            self._interpreter = (open_interpreter or _open_interpreter)(path, threads or count_cores())
            names = list(self._interpreter.get_signature_list())
            self._runners = {name: self._interpreter.get_signature_runner(name) for name in names}
        except (ValueError, RuntimeError) as error:
            raise VerificationFailed(
                f"{path.name} does not load in the LiteRT interpreter: {error}", file=path.name
            ) from error
        self._prefills = self._find_prefills()
        if "decode" not in self._runners or not self._prefills:
            raise VerificationFailed(
                f"{path.name} has the signatures {', '.join(names) or 'none'}; "
                "a generative graph needs `decode` and at least one `prefill`.",
                file=path.name,
                signatures=names,
            )
        self._inputs = {name: runner.get_input_details() for name, runner in self._runners.items()}
        self._outputs = {name: runner.get_output_details() for name, runner in self._runners.items()}
        self._require_known_inputs(path)
        self.context_length = self._read_context_length(path)
        self._has_convolutions = any(_CONVOLUTION.fullmatch(name) for name in self._inputs["decode"])
        self.caches: Arrays = {}
        #: The tokens whose keys and values the caches hold, from position 0 on.
        self._held: list[int] = []
        self.reset()

    @property
    def signatures(self) -> list[str]:
        """Names of all signatures."""
        return list(self._runners)

    @property
    def prefill_lengths(self) -> list[int]:
        """Chunk lengths of the prefill signatures, ascending."""
        return sorted(self._prefills)

    def find_prefill(self, length: int) -> str:
        """Return the name of the prefill signature of a chunk length."""
        return self._prefills[length]

    def reset(self) -> None:
        """Forget everything: caches of zeros."""
        details = self._inputs["decode"]
        self._held = []
        self.caches = {
            name: np.zeros(detail["shape"], dtype=detail["dtype"])
            for name, detail in details.items()
            if _STATE.fullmatch(name)
        }

    def prefill(self, tokens: Sequence[int], length: int | None = None) -> None:
        """Feed `tokens` from position 0 on.

        `length` names the only signature to use; without it the chunks are those that LiteRT-LM would choose.
        """
        chunks = probe.plan_chunks(len(tokens), [length] if length is not None else self.prefill_lengths)
        start = 0
        for size, count in chunks:
            self._feed(self._prefills[size], tokens[start : start + count], start, size)
            start += count

    def decode(self, token: int, position: int) -> probe.Floats:
        """Feed one token at `position`; returns the logits of what follows: float32 [vocab]."""
        outputs = self._feed("decode", [token], position, 1)
        return outputs["logits"].reshape(-1).astype(np.float32)

    def generate(self, tokens: Sequence[int], limit_tokens: int, stop_tokens: frozenset[int]) -> Generation:
        """Continue `tokens` greedily, by at most `limit_tokens`, a stop token included.

        What the caches already hold of `tokens` is not computed again, if it is all but the last; a convolution's state
        has forgotten what was before its last tokens, so that it must hold no more than that.
        """
        before = list(tokens[:-1])
        held = self._held if self._has_convolutions else self._held[: len(before)]
        if held != before:
            self.reset()
            self.prefill(before)
        generated: list[int] = []
        margins: list[float] = []
        token = tokens[-1]
        while len(generated) < limit_tokens:
            logits = self.decode(token, len(tokens) - 1 + len(generated))
            token = int(logits.argmax())
            generated.append(token)
            margins.append(float(probe.measure_margins(logits[None])[0]))
            if token in stop_tokens:
                return Generation(generated, margins, stopped=True)
        return Generation(generated, margins, stopped=False)

    def _feed(self, signature: str, tokens: Sequence[int], start: int, size: int) -> Arrays:
        """Run one chunk of `size` with `tokens` in front and padding behind, as the runtime lays it out."""
        count = len(tokens)
        if start + size > self.context_length:
            # The graph would move the chunk back over tokens it already holds, and LiteRT-LM fails.
            raise VerificationFailed(
                f"A prompt that reaches position {start + count - 1} needs the signature {signature} from position "
                f"{start} on, beyond the context of {self.context_length}. Ask for a context that is a multiple of the "
                "largest prefill length.",
                signature=signature,
                position=start,
            )
        padded = np.zeros((1, size), dtype=np.int32)
        padded[0, :count] = tokens
        positions = np.zeros(size, dtype=np.int32)
        positions[:count] = np.arange(start, start + count)
        details = self._inputs[signature]
        feeds: Arrays = {name: self.caches[name] for name in self.caches if name in details}
        feeds["tokens"] = padded.astype(details["tokens"]["dtype"])
        feeds["input_pos"] = positions.astype(details["input_pos"]["dtype"])
        if "mask" in details:
            feeds["mask"] = build_mask(details["mask"], start, count)
        try:
            outputs: Arrays = self._runners[signature](**feeds)
        except (ValueError, RuntimeError) as error:
            raise VerificationFailed(
                f"The signature {signature} fails at position {start}: {error}", signature=signature, position=start
            ) from error
        self.caches.update({name: value for name, value in outputs.items() if name in self.caches})
        self._held[start:] = [int(token) for token in tokens]
        return outputs

    def _find_prefills(self) -> dict[int, str]:
        prefills: dict[int, str] = {}
        for name, runner in self._runners.items():
            if _PREFILL.fullmatch(name):
                details = runner.get_input_details()
                if "tokens" in details:
                    prefills[int(details["tokens"]["shape"][-1])] = name
        return prefills

    def _require_known_inputs(self, path: Path) -> None:
        for signature in ("decode", *self._prefills.values()):
            names = set(self._inputs[signature])
            unknown = sorted(name for name in names - {"tokens", "input_pos", "mask"} if not _STATE.fullmatch(name))
            missing = sorted({"tokens", "input_pos"} - names)
            if unknown or missing:
                raise VerificationFailed(
                    f"The signature {signature} of {path.name} has the unknown inputs {unknown} "
                    f"and lacks {missing}; it cannot be proven.",
                    file=path.name,
                    signature=signature,
                )
        if "logits" not in self._outputs["decode"]:
            raise VerificationFailed(f"The signature decode of {path.name} yields no logits.", file=path.name)

    def _read_context_length(self, path: Path) -> int:
        """Return how many positions the caches hold: K is [1, heads, positions, size] or [1, positions, ...]."""
        details = self._inputs["decode"]
        if "mask" in details:
            return int(details["mask"]["shape"][-1])
        shapes = [set(map(int, detail["shape"][1:])) for name, detail in details.items() if _CACHE.fullmatch(name)]
        if not shapes:
            raise VerificationFailed(f"The signature decode of {path.name} has no KV cache.", file=path.name)
        return max(set.intersection(*shapes))


def _open_interpreter(path: Path, threads: int) -> Interpreter:
    return Interpreter(model_path=str(path), num_threads=threads)


def count_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0))


def build_mask(detail: dict[str, Any], start: int, count: int) -> npt.NDArray[Any]:
    """Return the causal mask of `count` tokens from position `start`; rows of padding are all masked.

    Boolean masks say what may be attended to; float masks are added to the scores. Shape [1, 1, chunk, context].
    """
    size, context_length = (int(extent) for extent in detail["shape"][-2:])
    allowed = np.arange(context_length)[None, :] <= (start + np.arange(size))[:, None]
    allowed[count:] = False
    mask = allowed if detail["dtype"] == np.bool_ else np.where(allowed, np.float32(0), MASKED)
    return mask.astype(detail["dtype"]).reshape(detail["shape"])
