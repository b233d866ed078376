"""Fields of a checkpoint's JSON files that make a library run code or open paths of the checkpoint's choosing.

Owns the lists of such fields and the refusals. Pure; called by `workers.fetch.checkpoint` on config.json,
generation_config.json and tokenizer_config.json before transformers or any runtime sees them.
"""

from __future__ import annotations

import re
from typing import Any

from service.errors import CheckpointInvalid, CheckpointUnsafe
from workers.fetch.strict_json import walk

#: Keys that name code to import. `trust_remote_code` is refused unless it is false.
CODE_KEYS: frozenset[str] = frozenset({"auto_map", "custom_pipelines", "custom_generate", "trust_remote_code"})

#: Those of them that, at the top of a document, only offer code beside a class that transformers has itself: left
#: alone, the built-in class is taken (`docs/decisions/0009-custom-code.md`).
IGNORABLE_KEYS: frozenset[str] = frozenset({"auto_map", "custom_pipelines"})

#: Labels that transformers writes and never opens.
LABEL_KEYS: frozenset[str] = frozenset({"_name_or_path", "name_or_path"})

#: Keys of tokenizer_config.json that transformers hands to a loader as file names, before its own.
PATH_KEY_SUFFIXES: tuple[str, ...] = ("_file", "_files", "_path", "_dir", "_folder", "_url")

_PATH = re.compile(r"[/\\]|^~|^\.\.?$|\.(py|pyc|so|bin|pt|pth|pkl|json|jsonl|safetensors|gguf|jinja|txt|model)$", re.I)
_CLASS_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}")


def refuse_unsafe(
    document: dict[str, Any], name: str, *, is_code_ignored: bool = False, is_built_in: bool = True
) -> None:
    """Raise `CheckpointUnsafe` for any field of config.json or generation_config.json that names code or a path.

    `is_code_ignored`: let pass what `IGNORABLE_KEYS` lists. `is_built_in`: whether to offer that.
    """
    for place, key, value in walk(_ignore_code(document) if is_code_ignored else document, name):
        _refuse_code(place, key, value, name, is_built_in=is_built_in)
        if key in LABEL_KEYS:
            continue
        if isinstance(value, str) and _PATH.search(value):
            raise _refuse_path(place, value, name)
    if document.get("quantization_config") is not None or document.get("compression_config") is not None:
        raise CheckpointInvalid(
            f"{name} says that the checkpoint is quantized already; submit the one in bfloat16, float16 or float32.",
            file=name,
            field="quantization_config",
        )


def refuse_unsafe_tokenizer(document: dict[str, Any], name: str, *, is_code_ignored: bool = False) -> None:
    """Raise `CheckpointUnsafe` for fields of tokenizer_config.json that name code or a path.

    Token texts and chat templates may hold anything (`</s>` has a slash), so only keys that loaders open and
    class names are judged. `is_code_ignored` as in `refuse_unsafe`.
    """
    for place, key, value in walk(_ignore_code(document) if is_code_ignored else document, name):
        _refuse_code(place, key, value, name, is_built_in=True)
        if isinstance(value, str) and key not in LABEL_KEYS and key.endswith(PATH_KEY_SUFFIXES):
            raise _refuse_path(place, value, name)
        if key.endswith("_class") and value is not None and not _is_class_name(value):
            raise CheckpointUnsafe(f"{name}: {place} is not the name of a class.", file=name, field=place)


def _is_class_name(value: Any) -> bool:
    if isinstance(value, list):
        return all(each is None or _is_class_name(each) for each in value)
    return isinstance(value, str) and _CLASS_NAME.fullmatch(value) is not None


def _ignore_code(document: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in document.items() if key not in IGNORABLE_KEYS}


def _refuse_code(place: str, key: str, value: Any, name: str, *, is_built_in: bool) -> None:
    if key not in CODE_KEYS or (key == "trust_remote_code" and value is False):
        return
    if is_built_in and place in IGNORABLE_KEYS:
        remedy = "Ask with ignore_custom_code (--ignore-custom-code) to convert with the built-in class instead"
    else:
        remedy = "Remove the field if the model is one of a supported architecture"
    raise CheckpointUnsafe(
        f"{name}: {place} asks to run code that comes with the checkpoint; that is never done. {remedy}.",
        file=name,
        field=place,
    )


def _refuse_path(place: str, value: str, name: str) -> CheckpointUnsafe:
    return CheckpointUnsafe(
        f"{name}: {place} is {value[:100]!r}, a path or address; a checkpoint's files may not name others. "
        "Remove the field.",
        file=name,
        field=place,
    )
