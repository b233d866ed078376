"""What a graph is calibrated with: what is read of uploads, how it is cut, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from service.errors import CalibrationInvalid, ChatTemplateInvalid
from service.user_files import MAX_TEXT_BYTES
from workers.convert.calibration_text import CalibrationText, read_calibration_text

EXAMPLE = Path(__file__).parents[4] / "examples" / "addition"
CONTEXT = 64
START, END = 1, 2
TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message.content }}{% endfor %}="


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Return the example's tokenizer, without chat template and evaluation."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "special_tokens_map.json"):
        shutil.copyfile(EXAMPLE / name, folder / name)
    config = json.loads((EXAMPLE / "tokenizer_config.json").read_text(encoding="utf-8"))
    del config["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def upload(checkpoint: Path, content: bytes) -> Path:
    path = checkpoint.parent / "upload"
    path.write_bytes(content)
    return path


def read(checkpoint: Path, kind: str | None, content: bytes | None = None, context: int = CONTEXT) -> CalibrationText:
    return read_calibration_text(kind, None if content is None else upload(checkpoint, content), checkpoint, context)


def lines(prompts: Sequence[str]) -> bytes:
    return "\n".join(json.dumps({"prompt": prompt}) for prompt in prompts).encode()


def decode(checkpoint: Path, tokens: Sequence[int]) -> str:
    text: str = Tokenizer.from_file(str(checkpoint / "tokenizer.json")).decode(list(tokens))
    return text


def test_windows_fill_the_context_and_begin_as_texts_do(checkpoint: Path) -> None:
    text = read(checkpoint, "text", b"12+7=19 " * 40)
    assert [len(window) for window in text.windows] == [CONTEXT] * len(text.windows)
    assert {window[0] for window in text.windows} == {START}
    assert decode(checkpoint, text.windows[0]).startswith("12+7=19")
    assert text.figures["text_tokens_unused"] == max(0, text.figures["text_tokens"] - 4 * (CONTEXT - 1))
    assert len(text.windows) == 4
    assert (text.is_continued, text.stop_tokens) == (False, {END})


def test_what_exceeds_the_budget_is_left_and_said(checkpoint: Path) -> None:
    text = read(checkpoint, "text", b"12+7=19 " * 4000, context=4096)
    assert [len(window) for window in text.windows] == [4096]
    assert text.figures["text_tokens_unused"] == text.figures["text_tokens"] - 4095 > 0


def test_a_short_text_is_repeated_for_the_longest_chunk(checkpoint: Path) -> None:
    text = read(checkpoint, "text", b"12+7=")
    assert [len(window) for window in text.windows] == [CONTEXT]
    assert decode(checkpoint, text.windows[0]).startswith("12+7=12+7=")


def test_the_evaluation_comes_before_our_own_text(checkpoint: Path) -> None:
    assert read(checkpoint, None).figures["kind"] == "default"
    shutil.copyfile(EXAMPLE / "evaluation.jsonl", checkpoint / "evaluation.jsonl")
    text = read(checkpoint, None)
    assert text.figures["kind"] == "evaluation"
    assert decode(checkpoint, text.windows[0]).startswith("22+80=102 72+8=80 ")
    assert decode(checkpoint, text.starts[0]) == "22+80=102"
    assert read(checkpoint, "text", b"1+1=2").figures["kind"] == "text"


def test_prompts_are_rendered_by_the_models_own_template(checkpoint: Path) -> None:
    (checkpoint / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    text = read(checkpoint, "prompts", lines(["12+7", "30+4"]) + b"\n\n")
    assert [decode(checkpoint, start) for start in text.starts] == ["12+7=", "30+4="]
    # The template wrote the start token; it stands there once.
    assert [start.count(START) for start in text.starts] == [1, 1]
    assert decode(checkpoint, text.windows[0]).startswith("12+7=30+4=12+7=")
    assert text.is_continued
    assert text.figures["prompts"] == 2
    assert text.figures["prompts_truncated"] == text.figures["prompts_unused"] == 0


def test_long_and_many_prompts_are_cut_and_said(checkpoint: Path) -> None:
    (checkpoint / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    text = read(checkpoint, "prompts", lines(["1+" * 200, *["2+2"] * 149]))
    assert text.figures["prompts_truncated"] == 1
    assert (text.figures["prompts"], text.figures["prompts_unused"]) == (128, 22)
    assert all(len(start) < CONTEXT for start in text.starts)


@pytest.mark.parametrize("kind", ["text", "prompts"])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "were not uploaded"),
        (b"", "empty"),
        (b" \n\t\n", "empty"),
        (b"GIF89a\x01\0", r"binary \(a zero at character 7\)"),
        (b"abc \xff def", r"not UTF-8 text \(line 1, byte 4\)"),
        ("größer".encode("utf-16"), "binary|not UTF-8"),
        (b"x" * (MAX_TEXT_BYTES + 1), "more than (16777216|4194304) bytes"),
    ],
    ids=["missing", "empty", "blank", "binary", "latin1", "utf16", "huge"],
)
def test_data_of_the_wrong_kind_are_refused(checkpoint: Path, kind: str, content: bytes | None, reason: str) -> None:
    with pytest.raises(CalibrationInvalid, match=reason):
        read(checkpoint, kind, content)


@pytest.mark.parametrize(
    "line", ["plain text", "[1]", '{"text": "x"}', '{"prompt": 7}', '{"prompt": ""}', "[" * 100_000, '{"prompt": "x"']
)
def test_a_line_that_is_no_prompt_is_named(checkpoint: Path, line: str) -> None:
    with pytest.raises(CalibrationInvalid, match="The calibration data, line 3: not") as refusal:
        read(checkpoint, "prompts", b'{"prompt": "1+1="}\n\n' + line.encode())
    assert refusal.value.details["line"] == 3


def test_prompts_need_a_chat_template(checkpoint: Path) -> None:
    with pytest.raises(CalibrationInvalid, match="no chat template"):
        read(checkpoint, "prompts", lines(["12+7="]))


def test_a_hostile_template_is_stopped(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.fetch.chat_template.RENDER_TIME_S", 1)
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    picky = "{% if messages[0].content == '2+2' %}" + endless + "{% else %}ok{% endif %}"
    (checkpoint / "chat_template.jinja").write_text(picky, encoding="utf-8")
    assert read(checkpoint, "prompts", lines(["1+1"])).starts
    with pytest.raises(ChatTemplateInvalid, match="does not end within 1 s"):
        read(checkpoint, "prompts", lines(["1+1", "2+2"]))
    (checkpoint / "chat_template.jinja").write_text("{{ raise_exception('no') if 'x' in messages[0].content }}")
    with pytest.raises(ChatTemplateInvalid, match="refuses prompt 2"):
        read(checkpoint, "prompts", lines(["1+1", "x"]))


def test_an_unknown_kind_is_refused(checkpoint: Path) -> None:
    with pytest.raises(CalibrationInvalid, match="take 'text' or 'prompts'"):
        read(checkpoint, "audio", b"x")
