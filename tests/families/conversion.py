"""One small checkpoint converted by one engine, and held against transformers.

Owns the measuring: logits through the interpreter, greedy text through the runtime. Called by the conversions of
this folder and, for the families that every run of the tests converts, by `tests/convert`.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import litert_lm
import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from tests.families.cases import Case
from workers.convert import bundle, convert
from workers.verify import graph as graph_module

CONTEXT_LENGTH = 128
PREFILL_LENGTHS = (16, 64)
#: Tokens before the one whose logits are compared; the later ones reach over several chunks and beyond any window.
PROMPT_LENGTHS = (0, 17, 80, CONTEXT_LENGTH - 1)
#: Largest difference of a logit in parts of the logits' range.
TOLERANCE = 1e-3

#: Attention's caches, and the states of convolutions (`c`), which the proof's reader of graphs does not name.
_STATE = re.compile(r"kv_cache_[kvc]_\d+")

_SENTENCE = "The kiln is hot and the clay is wet 12+7=19. "


def ignore(_message: str, _fraction: float | None = None) -> None:
    """Take progress and say nothing."""


def load_source(checkpoint: Path) -> Any:
    """Return the checkpoint as transformers computes it in float32."""
    # transformers 5.23 adds ALiBi twice where attention is eager; soft limits of scores it knows only there.
    has_alibi = json.loads((checkpoint / "config.json").read_text(encoding="utf-8")).get("alibi")
    attention = "sdpa" if has_alibi else "eager"
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation=attention).eval()


@dataclass(frozen=True)
class Conversion:
    """A converted checkpoint."""

    folder: Path
    figures: dict[str, Any]
    seconds: float

    @property
    def checkpoint(self) -> Path:
        """The source's folder."""
        return self.folder / "checkpoint"

    @cached_property
    def source(self) -> Any:
        """The source's model."""
        return load_source(self.checkpoint)

    def measure_parity(self) -> float:
        """Return the largest difference of a logit of `decode`, in parts of the range of the source's logits."""
        with mock.patch.object(graph_module, "_CACHE", _STATE):
            return self._measure_parity()

    def _measure_parity(self) -> float:
        graph = graph_module.Graph(self.folder / "convert" / "model.tflite")
        prompt = np.random.default_rng(5).integers(3, 512, CONTEXT_LENGTH).tolist()
        with torch.no_grad():
            expected = self.source(torch.tensor([prompt])).logits[0].numpy()
        worst = 0.0
        for length in PROMPT_LENGTHS:
            graph.reset()
            if length:
                graph.prefill(prompt[:length])
            worst = max(worst, float(np.abs(graph.decode(prompt[length], length) - expected[length]).max()))
        return worst / float(expected.max() - expected.min())

    def answer_in_runtime(self, prompt_tokens: int) -> tuple[str, str]:
        """Return what LiteRT-LM and what transformers say after a prompt, up to the end of the context."""
        output = self.folder / "bundle"
        if not output.exists():
            output.mkdir()
            inputs = {"checkpoint": self.checkpoint, "quantize": self.folder / "convert"}
            bundle.run({"format": "litertlm", "context_length": CONTEXT_LENGTH}, inputs, output, ignore)
        # As it stands: for some families transformers puts its own splitting of words in place of the file's.
        tokenizer = Tokenizer.from_file(str(self.checkpoint / "tokenizer.json"))
        prompt = tokenizer.decode(tokenizer.encode(_SENTENCE * 20, add_special_tokens=False).ids[: prompt_tokens - 1])
        ids = torch.tensor([tokenizer.encode(prompt).ids])
        length = ids.shape[1]
        room = CONTEXT_LENGTH - length
        generated = self.source.generate(
            input_ids=ids, max_new_tokens=room, do_sample=False, pad_token_id=0, eos_token_id=2
        )[0][length:].tolist()
        expected = generated[: generated.index(2)] if 2 in generated else generated
        litert_lm.set_min_log_severity(litert_lm.LogSeverity.FATAL)
        with litert_lm.Engine(str(output / "model.litertlm"), cache_dir=":nocache") as engine:
            with engine.create_session(apply_prompt_template=False, max_output_tokens=room) as session:
                session.run_prefill([prompt])
                text: str = session.run_decode().texts[0]
            return text, engine.detokenize(expected)


def convert_case(case: Case, engine: str, folder: Path) -> Conversion:
    """Write and convert a checkpoint into `folder`."""
    checkpoint = case.write(folder / "checkpoint")
    output = folder / "convert"
    output.mkdir()
    params = {"engine": engine, "prefill_lengths": list(PREFILL_LENGTHS), "context_length": CONTEXT_LENGTH}
    start_s = time.monotonic()
    figures = convert.run(params, {"checkpoint": checkpoint}, output, ignore)
    return Conversion(folder, figures, time.monotonic() - start_s)
