"""The source's side of conversations: what its chat template makes of the samples, in transformers.

Owns the rendering of a template that a stranger wrote: in a process of its own, with a deadline and little memory, as a
template that behaved when it was fetched may not end once it is given tools. Called by `workers.verify.reference`.
"""

from __future__ import annotations

import multiprocessing
import resource
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from transformers.utils import chat_template_utils

from service.errors import ChatTemplateInvalid
from workers.verify.conversations import TOOL, Rendered, Sample, mark_date

#: For all samples together; honest templates take milliseconds.
TIME_S = 20.0
#: What rendering may need beyond what the process has mapped before.
MEMORY_BYTES = 1 << 30
MAX_CHARACTERS = 1_000_000


def render_samples(tokenizer: Any, samples: Sequence[Sample]) -> tuple[list[Rendered], dict[str, str]]:
    """Return the samples as the chat template renders them, and why it declines the others, by name.

    Nothing without a template. Raises `ChatTemplateInvalid` when rendering does not end, dies, or grows without bound.
    """
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if template is None:
        return [], {}
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_render_all, args=(tokenizer, template, samples, sender), daemon=True)
    process.start()
    sender.close()
    rendered: list[Rendered] = []
    declined: dict[str, str] = {}
    try:
        for sample in samples:
            answer = _receive(receiver, sample)
            if answer["text"] is None:
                declined[sample.name] = answer["reason"]
            else:
                rendered.append(Rendered(sample.name, sample.messages, sample.has_tools, answer["text"]))
    finally:
        process.kill()
        process.join()
        receiver.close()
    return rendered, declined


def _receive(receiver: Connection, sample: Sample) -> dict[str, Any]:
    """Return what became of one sample: its `text`, or None and the `reason`."""
    try:
        answer: dict[str, Any] | None = receiver.recv() if receiver.poll(TIME_S) else None
    except EOFError:
        raise _refuse(sample, "crashes the template engine") from None
    if answer is None:
        raise _refuse(sample, f"does not end within {TIME_S:.0f} s")
    if len(answer["text"] or "") > MAX_CHARACTERS:
        raise _refuse(sample, f"writes more than {MAX_CHARACTERS} characters")
    if answer["reason"] == "memory":
        raise _refuse(sample, f"needs more than {MEMORY_BYTES >> 20} MiB")
    return answer


def _refuse(sample: Sample, reason: str) -> ChatTemplateInvalid:
    return ChatTemplateInvalid(
        f"The chat template {reason} on the conversation {sample.name!r}; correct or remove it.",
        conversation=sample.name,
    )


class _MarkedClock:
    """A clock whose every date is a mark."""

    @classmethod
    def now(cls) -> _MarkedClock:
        return cls()

    def strftime(self, form: str) -> str:
        return mark_date(form)


def _render_all(tokenizer: Any, template: str, samples: Sequence[Sample], sender: Connection) -> None:
    """Answer sample after sample; runs in the child."""
    mapped_bytes = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped_bytes + MEMORY_BYTES,) * 2)
    # What `strftime_now` of transformers asks for the time; a keyword of that name would reach templates as text.
    chat_template_utils.datetime = _MarkedClock
    for sample in samples:
        try:
            answer = _render_one(tokenizer, template, sample)
        except MemoryError:
            answer = {"text": None, "reason": "memory"}
        except Exception as error:  # a template can provoke any of them; each declines the conversation
            answer = {"text": None, "reason": f"{type(error).__name__}: {str(error)[:200]}"}
        sender.send(answer)


def _render_one(tokenizer: Any, template: str, sample: Sample) -> dict[str, Any]:
    def render(tools: list[dict[str, Any]] | None) -> str:
        return str(
            tokenizer.apply_chat_template(
                sample.messages,
                tools=tools,
                chat_template=template,
                add_generation_prompt=True,
                tokenize=False,
            )
        )

    if not sample.has_tools:
        return {"text": render(None), "reason": ""}
    text = render([TOOL])
    if text == render(None):
        return {"text": None, "reason": "the template does not speak of tools"}
    if len(sample.messages) > 1 and not ("K\u00f6ln" in text and "1040" in text):
        return {"text": None, "reason": "the template leaves out tool calls or their results"}
    return {"text": text, "reason": ""}
