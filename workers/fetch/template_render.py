"""Render one chat template inside limits of its own and say how it went.

Owns a process: a script that `workers.fetch.chat_template` starts by path with `python -I`. Reads a JSON object
from standard input (`template`, `conversations`, `variables`, `limits`, `is_kept`), writes one to standard output
(`outcome`, `reason` and, where they are kept, `texts`: one a conversation, null where the template declined it).
Imports nothing of this project, so that it starts in a tenth of a second. What it renders is hostile: an endless loop
ends by a signal that kills the process, memory by a limit on its address space.

Source of the environment (options, extension, functions): `transformers.utils.chat_template_utils`.
"""

from __future__ import annotations

import datetime
import json
import resource
import signal
import sys
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox


class TemplateRaised(jinja2.TemplateError):
    """The template called `raise_exception`."""


class GenerationTag(jinja2.ext.Extension):
    """`{% generation %}`: marks the assistant's text for training; its body is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it so

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """Return the body as a scope of its own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


def _raise_exception(message: object) -> None:
    raise TemplateRaised(str(message)[:200])


def _format_now(form: str) -> str:
    return datetime.datetime.now(tz=datetime.UTC).strftime(form)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _set_limits(limits: dict[str, int]) -> None:
    """Bound this process; the default action of both signals is to kill it, whatever it computes."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = limits["memory_bytes"]
    resource.setrlimit(resource.RLIMIT_AS, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, limits["time_s"])


def _render(request: dict[str, Any]) -> dict[str, Any]:
    """Return the outcome: `rendered` with the texts, `syntax`, `raised`, `failed`, `memory` or `output`."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _format_now
    try:
        template = environment.from_string(request["template"])
        texts: list[str | None] = []
        for number, conversation in enumerate(request["conversations"]):
            try:
                length = 0
                pieces = []
                for piece in template.generate(
                    messages=conversation, add_generation_prompt=True, **request["variables"]
                ):
                    if request["is_kept"]:
                        pieces.append(piece)
                    length += len(piece)
                    if length > request["limits"]["output_characters"]:
                        return {"outcome": "output", "reason": ""}
                texts.append("".join(pieces))
            except TemplateRaised as error:
                # A template may decline a longer conversation, but not the plainest one.
                if number == 0:
                    return {"outcome": "raised", "reason": str(error)}
                texts.append(None)
    except MemoryError:
        return {"outcome": "memory", "reason": ""}
    except jinja2.TemplateSyntaxError as error:
        return {"outcome": "syntax", "reason": f"line {error.lineno}: {str(error.message)[:200]}"}
    except Exception as error:  # a template can provoke any of them; each is a refusal
        return {"outcome": "failed", "reason": f"{type(error).__name__}: {str(error)[:200]}"}
    return {"outcome": "rendered", "reason": "", "texts": texts}


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    _set_limits(asked["limits"])
    json.dump(_render(asked), sys.stdout)
