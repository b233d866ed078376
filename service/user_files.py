"""Files that a user brings beside a checkpoint: prompts with answers, a text for perplexity, calibration data.

Owns their bounds, and sentences that name the line. Must not tokenize or run anything. Called by `service.api` when a
job is submitted, and by the steps that read the files.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from service.errors import CalibrationInvalid, CheckpointInvalid, EdgeKilnError, EvaluationInvalid
from service.strict_json import JsonInvalid, parse_json

#: What an uploaded file is called in the folder that a step sees.
UPLOAD_FILE = "upload"

#: A file of prompts, in bytes and in lines: each pair of an evaluation costs a generation of every artifact.
MAX_LINES_BYTES = 4 * 2**20
MAX_LINES = 2_000
#: One of its lines; JSON in memory is many times as large.
MAX_LINE_BYTES = 128 * 2**10
#: A text, of which perplexity reads the beginning and calibration a few thousand tokens.
MAX_TEXT_BYTES = 16 * 2**20

#: The checkpoint's own prompts and answers.
EVALUATION_FILE = "evaluation.jsonl"

_PAIR = '{"prompt": "...", "answer": "..."}'
_PROMPT = '{"prompt": "..."}'
_EVALUATION = "The evaluation"
_PERPLEXITY_TEXT = "The text for perplexity"
_CALIBRATION = "The calibration data"


def require_size(purpose: str, size_bytes: int, kind: str | None = None) -> None:
    """Raise `EvaluationInvalid` or `CalibrationInvalid` for more bytes than are read; see `check_upload`."""
    names = {"evaluation": _EVALUATION, "perplexity_text": _PERPLEXITY_TEXT}
    error = EvaluationInvalid if purpose in names else CalibrationInvalid
    limit_bytes = MAX_LINES_BYTES if purpose == "evaluation" or kind == "prompts" else MAX_TEXT_BYTES
    _require_size(size_bytes, names.get(purpose, _CALIBRATION), limit_bytes, error)


def check_upload(purpose: str, path: Path, kind: str | None = None) -> None:
    """Read an upload as the steps will; `purpose` is its name in the request, `kind` is of calibration data.

    Raises `EvaluationInvalid` or `CalibrationInvalid`.
    """
    if purpose == "evaluation":
        read_evaluation(path, path.parent)
    elif purpose == "perplexity_text":
        read_perplexity_text(path)
    elif kind == "prompts":
        read_calibration_prompts(path)
    else:
        read_calibration_text(path)


def read_evaluation(upload: Path | None, checkpoint: Path) -> list[tuple[str, str]]:
    """Return (prompt, answer) pairs of the upload, else of the checkpoint's own `evaluation.jsonl`, else none.

    Raises `EvaluationInvalid` for an upload and `CheckpointInvalid` for the checkpoint's file; both name the line.
    """
    if upload is not None:
        return _read_pairs(upload, _EVALUATION, EvaluationInvalid)
    path = checkpoint / EVALUATION_FILE
    return _read_pairs(path, EVALUATION_FILE, CheckpointInvalid) if path.is_file() else []


def read_perplexity_text(upload: Path) -> str:
    """Return an uploaded text; raises `EvaluationInvalid` unless it is UTF-8 with something in it."""
    return _read_text(upload, _PERPLEXITY_TEXT, EvaluationInvalid)


def read_calibration_text(upload: Path) -> str:
    """Return an uploaded text; raises `CalibrationInvalid` unless it is UTF-8 with something in it."""
    return _read_text(upload, _CALIBRATION, CalibrationInvalid)


def read_calibration_prompts(upload: Path) -> list[str]:
    """Return uploaded prompts, in order; raises `CalibrationInvalid` that names the line."""
    advice = "Upload such lines, or plain text as the kind text."
    prompts = []
    text = _require_text(
        _read_utf8(upload, _CALIBRATION, MAX_LINES_BYTES, CalibrationInvalid), _CALIBRATION, CalibrationInvalid
    )
    for number, item in _read_lines(text, _CALIBRATION, _PROMPT, CalibrationInvalid, advice):
        prompt = item.get("prompt")
        if not isinstance(prompt, str) or not prompt.strip():
            raise CalibrationInvalid(
                f"{_CALIBRATION}, line {number}: not {_PROMPT} with a prompt that is not empty. {advice}", line=number
            )
        prompts.append(_require_unicode(prompt, number, _CALIBRATION, CalibrationInvalid))
    return prompts


def _read_pairs(path: Path, name: str, error: type[EdgeKilnError]) -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    text = _read_utf8(path, name, MAX_LINES_BYTES, error)
    for number, item in _read_lines(text, name, _PAIR, error, "Correct or remove it."):
        prompt, answer = item.get("prompt"), item.get("answer")
        if not (isinstance(prompt, str) and isinstance(answer, str) and prompt and answer):
            raise error(f"{name}, line {number}: not {_PAIR} with texts, none empty.", line=number)
        _require_unicode(prompt + answer, number, name, error)
        pairs.append((prompt, answer))
    if not pairs:
        raise error(f"{name}: there is no prompt in it. Write a {_PAIR} a line.")
    return pairs


def _read_lines(
    text: str, name: str, form: str, error: type[EdgeKilnError], advice: str
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield number and object of every line that is not blank."""
    count = 0
    # `splitlines` would also split at separators that JSON allows inside of texts.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        count += 1
        if count > MAX_LINES:
            raise error(f"{name}, line {number}: there are more than {MAX_LINES} prompts.", line=number)
        if len(line.encode()) > MAX_LINE_BYTES:
            raise error(f"{name}, line {number}: longer than {MAX_LINE_BYTES} bytes.", line=number)
        try:
            item = parse_json(line)
        except JsonInvalid as failure:
            raise error(f"{name}, line {number}: not {form}; it {failure}. {advice}", line=number) from None
        if not isinstance(item, dict):
            raise error(f"{name}, line {number}: not {form}. {advice}", line=number)
        yield number, item


def _require_unicode(text: str, number: int, name: str, error: type[EdgeKilnError]) -> str:
    if not is_unicode(text):
        raise error(f"{name}, line {number}: half of a surrogate pair, which is no character.", line=number)
    return text


def is_unicode(text: str) -> bool:
    """Return whether UTF-8 can write the text; JSON can spell what it cannot."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _read_text(path: Path, name: str, error: type[EdgeKilnError]) -> str:
    return _require_text(_read_utf8(path, name, MAX_TEXT_BYTES, error), name, error)


def _require_text(text: str, name: str, error: type[EdgeKilnError]) -> str:
    if "\0" in text:
        raise error(f"{name}: binary (a zero at character {text.index(chr(0))}), so it is no text. Upload UTF-8 text.")
    if not text.strip():
        raise error(f"{name}: empty. Upload some sentences.")
    return text


def _require_size(size_bytes: int, name: str, limit_bytes: int, error: type[EdgeKilnError]) -> None:
    if size_bytes > limit_bytes:
        raise error(f"{name}: more than {limit_bytes} bytes.", limit_bytes=limit_bytes)


def _read_utf8(path: Path, name: str, limit_bytes: int, error: type[EdgeKilnError]) -> str:
    with path.open("rb") as stream:
        data = stream.read(limit_bytes + 1)
    _require_size(len(data), name, limit_bytes, error)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as failure:
        line = data.count(b"\n", 0, failure.start) + 1
        raise error(
            f"{name}: not UTF-8 text (line {line}, byte {failure.start}). Save it as UTF-8.", line=line
        ) from None
