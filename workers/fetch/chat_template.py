"""Chat templates, which are programs that a stranger wrote.

Owns the finding of a checkpoint's templates, their trial and the rendering of prompts, all by `template_render.py`, in
a process with little memory and a few seconds. Called by `workers.fetch.checkpoint` and
`workers.convert.calibration_text`. That a template passes its trial does not make it safe for every conversation.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from service.errors import ChatTemplateInvalid
from workers.fetch.strict_json import read_bounded

MAX_TEMPLATE_BYTES = 256 * 1024
MAX_TEMPLATES = 16
TIME_S = 3
#: For all prompts of a calibration together.
RENDER_TIME_S = 10
MEMORY_BYTES = 512 * 2**20
OUTPUT_CHARACTERS = 1_000_000

TEMPLATE_FILE = "chat_template.jinja"

_CONVERSATIONS: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": "What is a kiln?"}],
    [
        {"role": "user", "content": "What is a kiln?"},
        {"role": "assistant", "content": "A furnace for clay."},
        {"role": "user", "content": "How hot is it?"},
    ],
)

_SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


def list_templates(folder: Path, tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """Return the checkpoint's templates by the place they stand in; empty if it has none."""
    templates: dict[str, str] = {}
    stated = tokenizer_config.get("chat_template")
    if isinstance(stated, str):
        templates["tokenizer_config.json: chat_template"] = stated
    elif isinstance(stated, list) and len(stated) <= MAX_TEMPLATES:
        for index, item in enumerate(stated):
            if not isinstance(item, dict) or not isinstance(item.get("template"), str):
                raise _refuse("tokenizer_config.json: chat_template", "is a list of something else than templates")
            templates[f"tokenizer_config.json: chat_template[{index}]"] = item["template"]
    elif stated is not None:
        raise _refuse(
            "tokenizer_config.json: chat_template", f"is neither a text nor a list of at most {MAX_TEMPLATES}"
        )
    if (folder / TEMPLATE_FILE).is_file():
        try:
            templates[TEMPLATE_FILE] = read_bounded(folder / TEMPLATE_FILE, MAX_TEMPLATE_BYTES).decode("utf-8")
        except UnicodeDecodeError:
            raise _refuse(TEMPLATE_FILE, "is not UTF-8 text") from None
    return templates


def try_template(place: str, template: str, tokenizer_config: Mapping[str, Any]) -> None:
    """Render one template on the fixed conversations; raises `ChatTemplateInvalid` with the reason it failed."""
    if len(template.encode("utf-8", "replace")) > MAX_TEMPLATE_BYTES:
        raise _refuse(place, f"has more than {MAX_TEMPLATE_BYTES} bytes")
    _render(place, template, tokenizer_config, _CONVERSATIONS, TIME_S, is_kept=False)


def render_prompts(folder: Path, tokenizer_config: Mapping[str, Any], prompts: Sequence[str]) -> list[str] | None:
    """Return each prompt as the checkpoint's template renders it, ready for an answer; None without a template.

    Of several templates the file counts, then the one called `default`. Raises `ChatTemplateInvalid` when it does not
    render them all within its limits.
    """
    templates = list_templates(folder, tokenizer_config)
    if not templates:
        return None
    place = TEMPLATE_FILE if TEMPLATE_FILE in templates else next(iter(templates))
    stated = tokenizer_config.get("chat_template")
    if place != TEMPLATE_FILE and isinstance(stated, list):
        names = [item.get("name") for item in stated]
        place = list(templates)[names.index("default") if "default" in names else 0]
    conversations = [[{"role": "user", "content": prompt}] for prompt in prompts]
    texts = _render(place, templates[place], tokenizer_config, conversations, RENDER_TIME_S, is_kept=True)
    rendered = [text for text in texts if text is not None]
    if len(rendered) < len(prompts):
        raise _refuse(place, f"refuses prompt {texts.index(None) + 1}")
    return rendered


def _render(
    place: str,
    template: str,
    tokenizer_config: Mapping[str, Any],
    conversations: Sequence[Sequence[Mapping[str, str]]],
    time_s: int,
    is_kept: bool,
) -> list[str | None]:
    """Return the texts where they are kept, None where the template declines a conversation that is not the first."""
    request = {
        "template": template,
        "conversations": conversations,
        "is_kept": is_kept,
        "variables": {name: _read_token(tokenizer_config.get(name)) for name in _SPECIAL_TOKENS},
        "limits": {"time_s": time_s, "memory_bytes": MEMORY_BYTES, "output_characters": OUTPUT_CHARACTERS},
    }
    script = Path(__file__).with_name("template_render.py")
    try:
        done = subprocess.run(
            [sys.executable, "-I", str(script)],
            input=json.dumps(request).encode(),
            capture_output=True,
            timeout=4 * time_s,
            env={},
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise _refuse(place, f"does not end within {4 * time_s} s") from None
    if done.returncode == -signal.SIGALRM:
        raise _refuse(place, f"does not end within {time_s} s")
    if done.returncode < 0:
        raise _refuse(place, f"crashes the template engine (signal {-done.returncode})")
    if done.returncode > 0:
        # The script answers for whatever a template does, so this is memory that ran out beneath Python.
        raise _refuse(place, f"cannot be rendered within {MEMORY_BYTES // 2**20} MiB")
    answer = json.loads(done.stdout)
    reasons = {
        "syntax": f"does not parse ({answer['reason']})",
        "raised": f"refuses a conversation of one user message ({answer['reason']})",
        "failed": f"cannot be rendered ({answer['reason']})",
        "memory": f"needs more than {MEMORY_BYTES // 2**20} MiB for a short conversation",
        "output": f"writes more than {OUTPUT_CHARACTERS} characters for a short conversation",
    }
    if answer["outcome"] != "rendered":
        raise _refuse(place, reasons[answer["outcome"]])
    texts: list[str | None] = answer["texts"]
    return texts


def _read_token(value: Any) -> str:
    """Return a special token's text as tokenizer_config.json states it, a text or an object with `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""


def _refuse(place: str, reason: str) -> ChatTemplateInvalid:
    name = place.partition(":")[0]
    return ChatTemplateInvalid(f"The chat template in {place} {reason}; correct or remove it.", file=name, place=place)
