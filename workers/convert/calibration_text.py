"""What a float graph is shown to calibrate it: token sequences from an uploaded file, an evaluation or our own text.

Owns how much of calibration data is used, and how they become tokens; `service.user_files` reads them. Must not run a
graph. Called by `workers.convert.calibration`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from service import user_files
from service.errors import CalibrationInvalid, CheckpointInvalid
from workers.fetch.chat_template import render_prompts

Tokens = list[int]

#: Tokens that every prefill signature is shown, in windows of the whole context; one window at least.
WINDOW_TOKENS = 4096
MAX_WINDOWS = 4
#: Prompts of a file that are rendered; more than the windows can hold of most.
MAX_PROMPTS = 128
#: Beginnings that are also fed through `decode` alone.
MAX_STARTS = 8
START_TOKENS = 16

#: Prose, dialogue, a list, code, figures and other scripts: what general models are asked about.
DEFAULT_TEXT = """\
The potter opened the kiln at dawn, when the bricks were no longer hot. Two bowls had cracked along the rim, but the
blue glaze on the others had run just as she had hoped, thin at the edge and deep in the middle. "Six out of eight,"
she said. "Last week it was three. Shall we try a slower fire tomorrow?" Her brother nodded and wrote it down.

Question: Why do some metals conduct electricity better than others?
Answer: Their outer electrons are bound more loosely, so that they move freely when a voltage is applied.

How to repair a bicycle tube: 1. Take the wheel off. 2. Find the hole; water shows where air escapes. 3. Sand the
rubber around it. 4. Apply glue, wait five minutes, and press the patch on firmly.

def find_median(values):
    ordered = sorted(values)
    middle = len(ordered) // 2
    if len(ordered) % 2:
        return ordered[middle]
    return (ordered[middle - 1] + ordered[middle]) / 2

On 14 March 1998, 2,750 visitors paid 3.20 each: 2750 * 3.20 = 8800. Temperatures fell from 21.5 to -4 degrees.
<p class="note">See <a href="/index.html">the index</a>.</p> {"id": 17, "tags": ["red", "new"], "open": true}

La bibliothèque ouvre à neuf heures, sauf le dimanche. Der Fluss war über Nacht gestiegen, und niemand wagte die
Überfahrt. El tren salió tarde, pero llegó a tiempo. Книга лежала на столе у окна. 春天来了，河边的树都绿了。
"""  # noqa: RUF001 - other scripts are meant


@dataclass(frozen=True)
class CalibrationText:
    """Token sequences, each beginning as a text does."""

    #: As long as the context each; for the prefill signatures, and `decode` behind them.
    windows: list[Tokens]
    #: Beginnings for `decode` alone.
    starts: list[Tokens]
    #: Whether the graph continues the starts: they are prompts, whose answers nobody wrote.
    is_continued: bool
    #: Tokens that end an answer.
    stop_tokens: frozenset[int]
    #: What was used and what was left.
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reader:
    """The checkpoint's tokenizer, and what a text begins with."""

    encode: Callable[[str], Tokens]
    opening: Tokens
    stop_tokens: frozenset[int]


def read_calibration_text(
    kind: str | None, upload: Path | None, checkpoint: Path, context_length: int
) -> CalibrationText:
    """Return what to calibrate with.

    `kind` is `text` (UTF-8 text) or `prompts` (JSON lines `{"prompt": "..."}`, rendered by the checkpoint's chat
    template) for the file `upload`, or None: then the checkpoint's `evaluation.jsonl` where it has one, else a small
    text of our own. What exceeds the context or the budget is cut, and the figures say so. Raises
    `CalibrationInvalid`, or `ChatTemplateInvalid` for a template that renders nothing.
    """
    reader = open_reader(checkpoint)
    if kind not in (None, "text", "prompts"):
        raise CalibrationInvalid(
            f"Calibration data of the kind {kind!r} are unknown; take 'text' or 'prompts'.", kind=kind
        )
    if kind is not None:
        if upload is None or not upload.is_file():
            raise CalibrationInvalid("The calibration data were not uploaded.")
        if kind == "prompts":
            return _divide_prompts(reader, user_files.read_calibration_prompts(upload), checkpoint, context_length)
        text = user_files.read_calibration_text(upload)
        return _divide(reader, reader.encode(text), [], context_length, {"kind": "text"})
    pairs = [prompt + answer for prompt, answer in user_files.read_evaluation(None, checkpoint)]
    if pairs:
        starts = [reader.encode(pair) for pair in pairs[:MAX_STARTS]]
        return _divide(reader, reader.encode(" ".join(pairs)), starts, context_length, {"kind": "evaluation"})
    return _divide(reader, reader.encode(DEFAULT_TEXT), [], context_length, {"kind": "default"})


def open_reader(checkpoint: Path) -> Reader:
    """Open the checkpoint's tokenizer as the source's is opened."""
    # Only calibration pays for this import.
    from workers.verify.source_tokenizer import open_tokenizer

    try:
        tokenizer, _ = open_tokenizer(checkpoint)
    except (OSError, ValueError) as error:
        raise CheckpointInvalid(f"The tokenizer cannot be opened: {error}", file="tokenizer.json") from error

    def encode(text: str) -> Tokens:
        return [int(token) for token in tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]

    whole = [int(token) for token in tokenizer("a", verbose=False)["input_ids"]]
    opening = whole[:1] if tokenizer.bos_token_id is not None and whole[:1] == [tokenizer.bos_token_id] else []
    stop = tokenizer.eos_token_id
    return Reader(encode, opening, frozenset() if stop is None else frozenset([int(stop)]))


def _divide_prompts(reader: Reader, prompts: list[str], checkpoint: Path, context_length: int) -> CalibrationText:
    used = prompts[:MAX_PROMPTS]
    path = checkpoint / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    rendered = render_prompts(checkpoint, config, used)
    if rendered is None:
        raise CalibrationInvalid(
            "The checkpoint has no chat template to render the calibration prompts with; upload plain text as the kind "
            "text.",
            kind="prompts",
        )
    encoded = []
    for text in rendered:
        tokens = reader.encode(text)
        # A template writes the start token itself.
        encoded.append(tokens[len(reader.opening) :] if tokens[: len(reader.opening)] == reader.opening else tokens)
    room = context_length - len(reader.opening)
    figures = {
        "kind": "prompts",
        "prompts": len(used),
        "prompts_unused": len(prompts) - len(used),
        "prompts_truncated": sum(len(tokens) > room for tokens in encoded),
    }
    stream = [token for tokens in encoded for token in tokens[:room]]
    return _divide(reader, stream, encoded[:MAX_STARTS], context_length, figures, is_continued=True)


def _divide(
    reader: Reader,
    stream: Tokens,
    starts: list[Tokens],
    context_length: int,
    figures: Mapping[str, Any],
    is_continued: bool = False,
) -> CalibrationText:
    """Cut a stream of tokens into windows; a short one is repeated, as every signature must be shown something."""
    if not stream:
        raise CalibrationInvalid("The checkpoint's tokenizer makes no tokens of the calibration data.")
    room = max(1, context_length - len(reader.opening))
    most = max(1, min(MAX_WINDOWS, WINDOW_TOKENS // context_length))
    count = min(most, -(-len(stream) // room))
    endless = cycle(stream)
    windows = [(reader.opening + list(islice(endless, room)))[:context_length] for _ in range(count)]
    beginnings = [tokens[:START_TOKENS] for tokens in starts] or [
        stream[place : place + START_TOKENS] for place in range(0, min(len(stream), MAX_STARTS * room), room)
    ]
    described = {
        **figures,
        "text_tokens": len(stream),
        "text_tokens_unused": max(0, len(stream) - count * room),
        "windows": count,
        "window_tokens": context_length,
    }
    limit = max(1, context_length - 1)
    return CalibrationText(
        windows,
        [(reader.opening + tokens)[:limit] for tokens in beginnings],
        is_continued,
        reader.stop_tokens,
        described,
    )
