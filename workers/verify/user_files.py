"""Files that a user brings to be asked or read: prompts with answers, and a text for perplexity.

Owns their bounds, and sentences that name the line. Must not tokenize or run anything. Called by
`workers.verify.reference`.
"""

from __future__ import annotations

from pathlib import Path

from service.errors import CheckpointInvalid, EdgeKilnError, EvaluationInvalid
from workers.fetch.strict_json import parse_json

#: A file of prompts and answers, in bytes and in lines: each line costs a generation of every artifact.
MAX_EVALUATION_BYTES = 4 * 2**20
MAX_EVALUATION_PAIRS = 2_000
MAX_TEXT_BYTES = 16 * 2**20

CHECKPOINT_FILE = "evaluation.jsonl"

_FORM = '{"prompt": "...", "answer": "..."}'


def read_evaluation(upload: Path | None, checkpoint: Path) -> list[tuple[str, str]]:
    """Return (prompt, answer) pairs of the upload, else of the checkpoint's own `evaluation.jsonl`, else none.

    Raises `EvaluationInvalid` for an upload and `CheckpointInvalid` for the checkpoint's file; both name the line.
    """
    if upload is not None:
        return _read_pairs(upload, "The evaluation", EvaluationInvalid)
    path = checkpoint / CHECKPOINT_FILE
    return _read_pairs(path, CHECKPOINT_FILE, CheckpointInvalid) if path.is_file() else []


def read_text(upload: Path | None) -> str | None:
    """Return the uploaded text, if any; raises `EvaluationInvalid` unless it is UTF-8 with something in it."""
    if upload is None:
        return None
    text = _read_utf8(upload, "The text for perplexity", MAX_TEXT_BYTES, EvaluationInvalid)
    if "\0" in text:
        raise EvaluationInvalid("The text for perplexity holds zero characters, so it is no text.")
    if not text.strip():
        raise EvaluationInvalid("The text for perplexity is empty. Upload some sentences.")
    return text


def _read_pairs(path: Path, name: str, error: type[EdgeKilnError]) -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    for number, line in enumerate(_read_utf8(path, name, MAX_EVALUATION_BYTES, error).split("\n"), start=1):
        if not line.strip():
            continue
        if len(pairs) == MAX_EVALUATION_PAIRS:
            raise error(f"{name} line {number}: there are more than {MAX_EVALUATION_PAIRS} prompts.", line=number)
        pairs.append(_read_pair(line, number, name, error))
    if not pairs:
        raise error(f"{name} holds no prompt. Write a {_FORM} a line.")
    return pairs


def _read_pair(line: str, number: int, name: str, error: type[EdgeKilnError]) -> tuple[str, str]:
    try:
        item = parse_json(line, "It")
    except CheckpointInvalid as failure:
        raise error(f"{name} line {number} is not {_FORM}. {failure.message}", line=number) from failure
    if not isinstance(item, dict) or not {"prompt", "answer"} <= set(item):
        raise error(f"{name} line {number} is not {_FORM}. Correct or remove it.", line=number)
    prompt, answer = item["prompt"], item["answer"]
    if not (isinstance(prompt, str) and isinstance(answer, str) and prompt):
        raise error(f"{name} line {number}: prompt and answer must be texts, the prompt not empty.", line=number)
    if not is_unicode(prompt) or not is_unicode(answer):
        raise error(f"{name} line {number} holds half of a surrogate pair, which is no character.", line=number)
    return prompt, answer


def is_unicode(text: str) -> bool:
    """Return whether UTF-8 can write the text; JSON can spell what it cannot."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _read_utf8(path: Path, name: str, limit_bytes: int, error: type[EdgeKilnError]) -> str:
    with path.open("rb") as stream:
        data = stream.read(limit_bytes + 1)
    if len(data) > limit_bytes:
        raise error(f"{name} has more than {limit_bytes} bytes.", limit_bytes=limit_bytes)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as failure:
        line = data.count(b"\n", 0, failure.start) + 1
        raise error(f"{name} is not UTF-8 text (line {line}, byte {failure.start}).", line=line) from None
