"""Chat templates as hostile programs: each trial ends, and says why a template is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from service.errors import ChatTemplateInvalid, CheckpointInvalid
from workers.fetch import chat_template
from workers.fetch.chat_template import list_templates, try_template

CHATML = (
    "{%- for message in messages -%}\n"
    "{{ '<|im_start|>' + message.role + '\\n' + (message['content'] | trim) + '<|im_end|>\\n' }}\n"
    "{%- endfor -%}\n"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give templates a second, so that the endless ones end soon."""
    monkeypatch.setattr(chat_template, "TIME_S", 1)


@pytest.mark.parametrize(
    "template",
    [
        CHATML,
        "{{ bos_token }}{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
        "{{ messages | tojson(indent=2) }}{{ strftime_now('%Y') }}{% for m in messages %}{% break %}{% endfor %}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
        "{% if messages | length > 1 %}{{ raise_exception('one message only') }}{% endif %}{{ messages[0].content }}",
        "{% if tools %}{{ tools }}{% endif %}{{ bos_token + messages[0]['content'] }}",
    ],
    ids=["chatml", "generation", "functions", "namespace", "single turn", "undefined tools"],
)
def test_honest_templates_pass(template: str) -> None:
    try_template("chat_template.jinja", template, {"bos_token": {"content": "<s>"}, "eos_token": "</s>"})


@pytest.mark.usefixtures("limits")
@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages %}", "does not parse"),
        ("{{ messages | nosuchfilter }}", "does not parse"),
        ("{% include '/etc/passwd' %}", "cannot be rendered"),
        ("{{ raise_exception('never') }}", "refuses a conversation of one user message"),
        ("{{ messages.__class__.__mro__ }}", "cannot be rendered"),
        ("{{ messages.append(1) }}", "cannot be rendered"),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", "cannot be rendered"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "does not end within 1 s"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}", "more than 1000000 char"),
        ("{{ 10 ** (10 ** 9) }}", "does not end within 1 s"),
        ("{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}", "cannot be rendered"),
        ("{{ 'x' * 2000000 }}", "more than 1000000 characters"),
        ("{{ 'x' * 10 ** 9 }}", "MiB"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "cannot be rendered"),
    ],
    ids=[
        *["cut", "filter", "include", "raises", "escape", "mutates", "range", "loops", "floods", "power"],
        *["recursion", "long", "memory", "nested"],
    ],
)
def test_hostile_templates_are_stopped(template: str, reason: str) -> None:
    with pytest.raises(ChatTemplateInvalid, match=reason) as caught:
        try_template("chat_template.jinja", template, {})
    assert caught.value.details["file"] == "chat_template.jinja"
    assert caught.value.message.startswith("The chat template in chat_template.jinja")


def test_a_huge_template_is_not_tried() -> None:
    with pytest.raises(ChatTemplateInvalid, match="more than 262144 bytes"):
        try_template("tokenizer_config.json: chat_template", "x" * 262145, {})


def test_templates_are_found_in_both_files(tmp_path: Path) -> None:
    assert list_templates(tmp_path, {}) == {}
    assert list_templates(tmp_path, {"chat_template": "a"}) == {"tokenizer_config.json: chat_template": "a"}
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    assert list(list_templates(tmp_path, {"chat_template": named}).values()) == ["a", "b"]
    (tmp_path / "chat_template.jinja").write_text("c")
    assert list(list_templates(tmp_path, {"chat_template": "a"}).values()) == ["a", "c"]


@pytest.mark.parametrize("stated", [7, {"default": "x"}, [1], [{"name": "x"}], [{"template": "x"}] * 17])
def test_a_template_of_another_type_is_refused(tmp_path: Path, stated: Any) -> None:
    with pytest.raises(ChatTemplateInvalid):
        list_templates(tmp_path, {"chat_template": stated})


def test_a_template_file_that_is_huge_or_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ChatTemplateInvalid, match="not UTF-8"):
        list_templates(tmp_path, {})
    (tmp_path / "chat_template.jinja").write_bytes(b"x" * 262145)
    with pytest.raises(CheckpointInvalid, match="more than 262144 bytes"):
        list_templates(tmp_path, {})
