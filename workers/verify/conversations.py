"""Conversations that the source and the runtime both render, and how far they agree.

Owns the sample conversations and the rules of the comparison. Must not render anything or judge a figure. Called by
`workers.verify.reference`, which renders them with the checkpoint's chat template in transformers, and by
`workers.verify.verify`, which lets LiteRT-LM render and tokenize them.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tokenizers import Tokenizer

Messages = list[dict[str, Any]]

#: What templates that speak of tools are told of one.
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "read_temperature",
        "description": "The temperature of a kiln, in degrees Celsius.",
        "parameters": {
            "type": "object",
            "properties": {
                "kiln": {"type": "string", "description": "Its name."},
                "minutes": {"type": "integer", "description": "How long to watch it."},
            },
            "required": ["kiln"],
        },
    },
}

_QUESTION = {"role": "user", "content": "What is a kiln?"}
#: The id has nine characters of [a-z0-9], as the strictest templates demand.
_CALL = {
    "id": "call00001",
    "type": "function",
    "function": {"name": "read_temperature", "arguments": {"kiln": "Köln <2>", "minutes": 5}},
}
_TOOL_TURNS: Messages = [
    {"role": "user", "content": "How hot is the kiln?"},
    {"role": "assistant", "content": "", "tool_calls": [_CALL]},
    {"role": "tool", "name": "read_temperature", "tool_call_id": "call00001", "content": '{"celsius": 1040}'},
]


@dataclass(frozen=True)
class Sample:
    """One conversation; its last message is the one that is answered."""

    name: str
    messages: Messages
    #: Whether the tool is offered.
    has_tools: bool = False


SAMPLES: tuple[Sample, ...] = (
    Sample("user", [_QUESTION]),
    Sample("system", [{"role": "system", "content": "Answer in one word."}, _QUESTION]),
    Sample(
        "turns",
        [
            _QUESTION,
            {"role": "assistant", "content": "A furnace for clay."},
            {"role": "user", "content": "How hot is it?"},
        ],
    ),
    Sample(
        "unicode",
        [
            {"role": "user", "content": "Größe, 東京, привет, 🙂 👩‍🚀 — “quoted” 'it''s' \\n {x} <b>&amp;"},
            {"role": "assistant", "content": "Ça va: ½ ≤ 1…"},
            {"role": "user", "content": "日本語で?"},
        ],
    ),
    Sample(
        "whitespace",
        [
            {"role": "user", "content": "  two leading,\ttab\n\n  and a blank line \n"},
            {"role": "assistant", "content": " answer \n"},
            {"role": "user", "content": "def f():\n    return 1\n"},
        ],
    ),
    Sample("long", [{"role": "user", "content": "The potter waits. " * 200}]),
    Sample("tools", [_TOOL_TURNS[0]], has_tools=True),
    Sample("tool_call", _TOOL_TURNS, has_tools=True),
)

#: Conversations that are answered too: one question, one that follows an answer, and those of `ask_alone`.
REPLIED = ("user", "turns")
#: How the names of `ask_alone` begin.
ALONE = "evaluation_"


def ask_alone(prompts: Sequence[str]) -> list[Sample]:
    """Return conversations of one question each, which are answered too."""
    return [Sample(f"{ALONE}{number}", [{"role": "user", "content": text}]) for number, text in enumerate(prompts, 1)]


#: How the source marks a date that its template asks for: the day of rendering is the runtime's, not the source's.
_DATE = re.compile("\ue000([^\ue000\ue001]*)\ue001")


def mark_date(form: str) -> str:
    """Return what stands for the current date in a form of `strftime`, for templates that ask for one."""
    return f"\ue000{form}\ue001"


def fill_dates(text: str, now: datetime.datetime) -> str:
    """Return the text with the marks of `mark_date` replaced by a date."""
    return _DATE.sub(lambda match: now.strftime(match[1]), text)


@dataclass(frozen=True)
class Rendered:
    """One conversation as the source renders it."""

    name: str
    messages: Messages
    has_tools: bool
    #: What the chat template yields, ready to be answered; dates are marked.
    text: str

    @property
    def has_date(self) -> bool:
        """Whether the template asks for the current date."""
        return _DATE.search(self.text) is not None

    def to_json(self) -> dict[str, Any]:
        """Return the form that `reference.json` keeps."""
        return asdict(self)


@dataclass(frozen=True)
class Dialect:
    """How a bundle's runtime reads and renders."""

    #: Text that the runtime makes of a conversation; raises `VerificationFailed` where it cannot.
    render: Callable[[Rendered], str]
    #: Ids of a text without a start token.
    encode: Callable[[str], Sequence[int]]
    #: Put before every prompt; None where nothing is.
    start_token: int | None


class ConversationComparison:
    """Counts how many conversations the runtime turns into the source's token ids."""

    def __init__(self, tokenizer: Tokenizer, dialect: Dialect, now: datetime.datetime) -> None:
        """`tokenizer`: the source's. `now`: for templates that ask for the date."""
        self._tokenizer = tokenizer
        self._dialect = dialect
        self._now = now
        self._matched = self._misrendered = self._misread = self._started = self._samples = 0
        self._first_mismatch: str | None = None

    def add(self, rendered: Rendered) -> bool:
        """Compare one conversation; returns whether the ids agree."""
        self._samples += 1
        text = fill_dates(rendered.text, self._now)
        expected = list(self._tokenizer.encode(text, add_special_tokens=False).ids)
        own_text = self._dialect.render(rendered)
        given = list(self._dialect.encode(own_text))
        start = self._dialect.start_token
        if start is not None:
            # The runtime puts it in front by itself, whether the template writes it or not.
            self._started += expected[:1] != [start]
            expected = expected[1:] if expected[:1] == [start] else expected
        if given == expected:
            self._matched += 1
            return True
        if self._removes_start(text) == own_text:
            self._misread += 1
        else:
            self._misrendered += 1
        if self._first_mismatch is None:
            self._first_mismatch = f"{rendered.name}: {self._describe(self._removes_start(text), own_text)}"
        return False

    def describe(self) -> dict[str, Any]:
        """Return the figures.

        `match_ratio`: share of conversations with equal ids. The others were either `misrendered`, the template's text
        being another, or `misread`, equal texts being other tokens to a tokenizer that was rebuilt. `start_added`: in
        how many the runtime puts a start token that the template does not write.
        """
        figures: dict[str, Any] = {
            "samples": self._samples,
            "match_ratio": self._matched / self._samples,
            "misrendered": self._misrendered,
            "misread": self._misread,
            "start_added": self._started,
        }
        if self._first_mismatch is not None:
            figures["first_mismatch"] = self._first_mismatch
        return figures

    def _removes_start(self, text: str) -> str:
        """Return the text without the start token, which the bundle's template leaves to the runtime."""
        start = self._dialect.start_token
        name = None if start is None else self._tokenizer.id_to_token(start)
        return text.removeprefix(name) if name else text

    @staticmethod
    def _describe(expected: str, given: str) -> str:
        if expected == given:
            return "the text is equal, but the bundle's tokenizer reads it as other tokens"
        pairs = enumerate(zip(expected, given, strict=False))
        place = next((index for index, (one, other) in pairs if one != other), min(len(expected), len(given)))
        begin = max(0, place - 20)
        return (
            f"at character {place} the runtime renders {given[begin : place + 30]!r}, "
            f"transformers {expected[begin : place + 30]!r}"
        )


def read_rendered(document: Mapping[str, Any]) -> list[Rendered]:
    """Return the conversations of `reference.json`."""
    return [Rendered(**item) for item in document["conversations"]]
