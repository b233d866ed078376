from __future__ import annotations

from pathlib import Path

import pytest

from service import user_files
from service.errors import CheckpointInvalid, EvaluationInvalid

GOOD = b'{"prompt": "1+2=", "answer": "3"}\n'


def write(folder: Path, data: bytes) -> Path:
    path = folder / "upload"
    path.write_bytes(data)
    return path


def test_an_upload_takes_the_place_of_the_checkpoints_evaluation(tmp_path: Path) -> None:
    (tmp_path / "evaluation.jsonl").write_bytes(b'{"prompt": "a", "answer": "b"}\n')
    assert user_files.read_evaluation(None, tmp_path) == [("a", "b")]
    upload = write(tmp_path, b"\xef\xbb\xbf" + GOOD + b"\n" + '{"prompt": "ü\u2028", "answer": "v"}'.encode())
    assert user_files.read_evaluation(upload, tmp_path) == [("1+2=", "3"), ("ü\u2028", "v")]


def test_no_evaluation_is_none(tmp_path: Path) -> None:
    assert user_files.read_evaluation(None, tmp_path) == []


@pytest.mark.parametrize(
    ("second", "match"),
    [
        (b'{"prompt": "1+1="}', "line 2: not"),
        (b"no json", "line 2: not"),
        (b'["1+1=", "2"]', "line 2: not"),
        (b'{"prompt": "a", "prompt": "b", "answer": "2"}', "line 2.*twice"),
        (b'{"prompt": "a", "answer": NaN}', "line 2.*NaN"),
        (b'{"prompt": "", "answer": "2"}', "line 2.*none empty"),
        (b'{"prompt": "1+1=", "answer": ""}', "line 2.*none empty"),
        (b'{"prompt": "a", "answer": 2}', "line 2.*with texts"),
        (b'{"prompt": "\\ud800", "answer": "2"}', "line 2.*surrogate"),
        (b'{"prompt": "\xff", "answer": "2"}', "not UTF-8 text .line 2"),
        (b"[" * 5000, "line 2.*nested"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, second: bytes, match: str) -> None:
    upload = write(tmp_path, GOOD + second + b"\n")
    with pytest.raises(EvaluationInvalid, match=match):
        user_files.read_evaluation(upload, tmp_path)
    upload.rename(tmp_path / "evaluation.jsonl")
    with pytest.raises(CheckpointInvalid, match=match):
        user_files.read_evaluation(None, tmp_path)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"\n \n", "there is no prompt"),
        (GOOD * (user_files.MAX_LINES + 1), f"line {user_files.MAX_LINES + 1}: there are more"),
        (GOOD + b'{"prompt": "a", "answer": "b", "x": [' + b"{}," * 50_000 + b"{}]}", "line 2: longer than"),
        (b" " * (user_files.MAX_LINES_BYTES + 1), "more than"),
    ],
)
def test_an_evaluation_has_bounds(tmp_path: Path, data: bytes, match: str) -> None:
    with pytest.raises(EvaluationInvalid, match=match):
        user_files.read_evaluation(write(tmp_path, data), tmp_path)


@pytest.mark.parametrize(
    ("data", "match"),
    [(b"", "empty"), (b" \n", "empty"), (b"a\n\xff", "not UTF-8 text .line 2"), (b"a\0b", "binary")],
)
def test_a_text_that_is_none_is_refused(tmp_path: Path, data: bytes, match: str) -> None:
    with pytest.raises(EvaluationInvalid, match=match):
        user_files.read_perplexity_text(write(tmp_path, data))


def test_a_text_is_read_as_it_is(tmp_path: Path) -> None:
    assert user_files.read_perplexity_text(write(tmp_path, b"Ein Ofen.\n")) == "Ein Ofen.\n"
