"""What the runtime must be told beside the graph: start and stop tokens, context, chat template.

Owns the reading of a checkpoint's token settings and the `LlmMetadata` message of LiteRT-LM, which stands in
`.litertlm` and `.task` alike. Called by `workers.convert.bundle`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from litert_lm_builder.runtime.proto import llm_metadata_pb2

from service.errors import BundleFailed, CheckpointInvalid

# LiteRT-LM 0.18 renders chat templates without `bos_token` and `eos_token`, and gives a message's content as a
# list of parts. Templates written for transformers expect both tokens and plain text, so this goes before them.
_TEMPLATE_PRELUDE = """\
{{%- set bos_token = {bos} -%}}
{{%- set eos_token = {eos} -%}}
{{%- set carried = namespace(messages=[]) -%}}
{{%- for message in messages -%}}
{{%- if message.content is string or message.content is not iterable -%}}
{{%- set carried.messages = carried.messages + [message] -%}}
{{%- else -%}}
{{%- set joined = namespace(text='') -%}}
{{%- for part in message.content -%}}
{{%- set joined.text = joined.text + (part.text if part.text is defined else '') -%}}
{{%- endfor -%}}
{{%- set carried.messages = carried.messages + [dict(message, content=joined.text)] -%}}
{{%- endif -%}}
{{%- endfor -%}}
{{%- set messages = carried.messages -%}}
"""

#: How LiteRT-LM marks that no start token is set. Source: `runtime/engine/engine_settings.cc`, `SessionConfig`.
_NO_START_TOKEN = -1

#: What the runtime's template engine lacks, and what means the same there: the tags by which training marks the
#: assistant's words (only their plainest spelling is known), none, and looking up a key that may be absent.
_TEMPLATE_REWRITES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\{%(-?)\s*generation\s*(-?)%\}"), r"{%\1 if true \2%}"),
    (re.compile(r"\{%(-?)\s*endgeneration\s*(-?)%\}"), r"{%\1 endif \2%}"),
    # There `none is none` is false, and only a name without a value passes the test.
    (re.compile(r"(\{%-?\s*set\s+\w+\s*=\s*)[Nn]one(\s*-?%\})"), r"\1_no_value\2"),
    (re.compile(r"""\.get\(\s*('[^']+'|"[^"]+")\s*\)"""), r"[\1]"),
)


@dataclass(frozen=True)
class TokenSettings:
    """How a checkpoint opens, closes and formats a text."""

    #: Put before every prompt by the tokenizer; None where it puts nothing.
    start_token_id: int | None
    stop_token_ids: tuple[int, ...]
    bos_token: str | None
    eos_token: str | None
    #: Jinja source as transformers reads it; None without one.
    chat_template: str | None


def read_token_settings(checkpoint_dir: Path) -> TokenSettings:
    """Read the token settings of a checkpoint from its JSON files, as transformers would apply them.

    Raises `CheckpointInvalid` when files contradict each other, `BundleFailed` when no stop token is known: the
    runtime refuses a model that cannot stop.
    """
    model = _read_json(checkpoint_dir / "config.json")
    generation = _read_json(checkpoint_dir / "generation_config.json")
    tokenizer = _read_json(checkpoint_dir / "tokenizer_config.json")
    special = _read_json(checkpoint_dir / "special_tokens_map.json")
    ids = _read_token_ids(checkpoint_dir)
    bos = _read_token_text("bos_token", tokenizer, special)
    eos = _read_token_text("eos_token", tokenizer, special)
    bos_id = _choose_id("bos_token_id", bos, ids, model)
    stops = _list_ids(generation.get("eos_token_id")) or _list_ids(model.get("eos_token_id"))
    if not stops and eos in ids:
        stops = (ids[eos],)
    if not stops:
        raise BundleFailed(
            "No stop token is known: give 'eos_token_id' in generation_config.json or config.json, or 'eos_token' "
            "in tokenizer_config.json. A model that cannot stop is refused by the runtime.",
        )
    return TokenSettings(
        start_token_id=bos_id if _adds_start_token(checkpoint_dir, tokenizer, bos_id) else None,
        stop_token_ids=stops,
        bos_token=bos,
        eos_token=eos,
        chat_template=read_chat_template(checkpoint_dir),
    )


def build_metadata(settings: TokenSettings, context_length: int, *, must_name_start: bool = False) -> bytes:
    """Return the serialized `LlmMetadata`; equal arguments give equal bytes.

    `must_name_start`: say even that there is no start token. LiteRT-LM 0.18 takes the metadata of a `.task` for an
    older message when it names none.
    """
    message = llm_metadata_pb2.LlmMetadata()
    if settings.start_token_id is not None or must_name_start:
        start = _NO_START_TOKEN if settings.start_token_id is None else settings.start_token_id
        message.start_token.token_ids.ids.append(start)
    for token_id in settings.stop_token_ids:
        message.stop_tokens.add().token_ids.ids.append(token_id)
    message.max_num_tokens = context_length
    message.llm_model_type.generic_model.SetInParent()
    if settings.chat_template is not None:
        message.jinja_prompt_template = build_runtime_template(settings)
    return bytes(message.SerializeToString(deterministic=True))


def build_runtime_template(settings: TokenSettings) -> str:
    """Return the chat template as the runtime must get it, so that it renders what transformers renders.

    The start token is left out where the runtime puts it itself: it refuses a text that brings one.
    """
    bos = "" if settings.start_token_id is not None else settings.bos_token or ""
    prelude = _TEMPLATE_PRELUDE.format(bos=json.dumps(bos), eos=json.dumps(settings.eos_token or ""))
    template = settings.chat_template or ""
    for pattern, replacement in _TEMPLATE_REWRITES:
        template = pattern.sub(replacement, template)
    return prelude + template


def read_chat_template(checkpoint_dir: Path) -> str | None:
    """Return the checkpoint's default chat template from `chat_template.jinja` or `tokenizer_config.json`."""
    own_file = checkpoint_dir / "chat_template.jinja"
    if own_file.is_file():
        return own_file.read_text(encoding="utf-8")
    stored = _read_json(checkpoint_dir / "tokenizer_config.json").get("chat_template")
    if isinstance(stored, list):
        named = {item["name"]: item["template"] for item in stored if isinstance(item, dict)}
        stored = named.get("default")
    if stored is not None and not isinstance(stored, str):
        raise CheckpointInvalid(
            "tokenizer_config.json: 'chat_template' is neither text nor a list with a template named 'default'.",
            file="tokenizer_config.json",
            field="chat_template",
        )
    return stored


def _read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, or nothing where the file is optional and absent."""
    if not path.is_file():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise CheckpointInvalid(f"{path.name} must hold a JSON object.", file=path.name)
    return content


def _read_token_text(name: str, *sources: dict[str, Any]) -> str | None:
    """Return a special token's text, which stands as a string or as an object with `content`."""
    for source in sources:
        value = source.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            return value
    return None


def _read_token_ids(checkpoint_dir: Path) -> dict[str | None, int]:
    """Return the ids of the tokens that `tokenizer.json` lists as added, by text."""
    added = _read_json(checkpoint_dir / "tokenizer.json").get("added_tokens", [])
    return {token["content"]: token["id"] for token in added}


def _choose_id(field: str, text: str | None, ids: dict[str | None, int], model: dict[str, Any]) -> int | None:
    """Return the id of a special token: the tokenizer's where it names one, else the model's."""
    if text in ids:
        return ids[text]
    value = model.get(field)
    return value if isinstance(value, int) else None


def _list_ids(value: Any) -> tuple[int, ...]:
    """Return token ids given as one number, a list or null, without repetitions, in order."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(item, int) and item >= 0 for item in values):
        raise CheckpointInvalid(f"'eos_token_id' must be a token id or a list of them, not {value!r}.")
    return tuple(dict.fromkeys(values))


def _adds_start_token(checkpoint_dir: Path, tokenizer_config: dict[str, Any], bos_id: int | None) -> bool:
    """Say whether transformers puts the start token before a plain text.

    The post-processor of `tokenizer.json` decides, whatever a flag beside it says (transformers 5.23). A
    SentencePiece model alone is Llama's first tokenizer, which adds the token unless the flag forbids it.
    """
    if bos_id is None:
        return False
    backend = _read_json(checkpoint_dir / "tokenizer.json")
    if not backend:
        return tokenizer_config.get("add_bos_token") is not False
    return _leads_with(backend.get("post_processor"), bos_id)


def _leads_with(processor: Any, bos_id: int) -> bool:
    """Say whether a post-processor of `tokenizer.json` puts the token `bos_id` first."""
    if not isinstance(processor, dict):
        return False
    if processor.get("type") == "Sequence":
        return any(_leads_with(part, bos_id) for part in processor.get("processors", []))
    if processor.get("type") != "TemplateProcessing":
        return False
    first = (processor.get("single") or [{}])[0]
    name = first.get("SpecialToken", {}).get("id")
    known = processor.get("special_tokens", {}).get(name, {})
    return bool(known.get("ids", [None])[0] == bos_id)
