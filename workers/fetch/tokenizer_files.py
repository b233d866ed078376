"""A checkpoint's tokenizer files, read without any tokenizer library.

Owns what can be known from their structure: the kind, how many ids it gives out, and whether a SentencePiece
model can stand for it. Called by `workers.fetch.checkpoint`; the rebuilding itself is the bundle step's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.errors import CheckpointInvalid
from workers.fetch.strict_json import read_bounded, read_json_object
from workers.fetch.unsafe_fields import refuse_unsafe_tokenizer

MAX_TOKENIZER_BYTES = 64 * 2**20
MAX_CONFIG_BYTES = 4 * 2**20

JSON_FILE = "tokenizer.json"
SENTENCEPIECE_FILE = "tokenizer.model"
CONFIG_FILE = "tokenizer_config.json"

#: The model of tokenizer.json that `workers.convert.tokenizer` rebuilds as SentencePiece.
REBUILDABLE_MODEL = "BPE"

_SENTENCEPIECE_PIECES_FIELD = 1


@dataclass(frozen=True)
class TokenizerFacts:
    """What the files say."""

    #: `sentencepiece` when tokenizer.model is there, else `json`.
    kind: str
    #: One more than the highest id.
    vocabulary_size: int
    #: Why no SentencePiece model can stand for it; None when one can.
    sentencepiece_obstacle: str | None


def read_tokenizer(folder: Path, tokenizer_config: Mapping[str, Any]) -> TokenizerFacts:
    """Read every tokenizer file; raises `CheckpointInvalid` when none is there or one is malformed."""
    json_path, sentencepiece_path = folder / JSON_FILE, folder / SENTENCEPIECE_FILE
    if not json_path.is_file() and not sentencepiece_path.is_file():
        raise CheckpointInvalid(
            "The checkpoint has no tokenizer; add tokenizer.json or tokenizer.model.", file=JSON_FILE
        )
    sizes = [_count_added(folder, tokenizer_config)]
    obstacle: str | None = None
    if json_path.is_file():
        document = read_json_object(json_path, MAX_TOKENIZER_BYTES)
        sizes.append(_count_json(document))
        obstacle = _find_obstacle(document)
    if sentencepiece_path.is_file():
        data = read_bounded(sentencepiece_path, MAX_TOKENIZER_BYTES)
        sizes.append(_count_pieces(data))
        obstacle = None
    kind = "sentencepiece" if sentencepiece_path.is_file() else "json"
    return TokenizerFacts(kind, max(sizes), obstacle)


def read_tokenizer_config(folder: Path, *, is_code_ignored: bool = False) -> dict[str, Any]:
    """Return tokenizer_config.json (empty if there is none), refusing fields that name code or paths."""
    for name in ("special_tokens_map.json", "added_tokens.json"):
        if (folder / name).is_file():
            refuse_unsafe_tokenizer(read_json_object(folder / name, MAX_CONFIG_BYTES), name)
    for name in ("vocab.json", "merges.txt"):
        if (folder / name).is_file():
            read_bounded(folder / name, MAX_TOKENIZER_BYTES)
    if not (folder / CONFIG_FILE).is_file():
        return {}
    document = read_json_object(folder / CONFIG_FILE, MAX_CONFIG_BYTES)
    refuse_unsafe_tokenizer(document, CONFIG_FILE, is_code_ignored=is_code_ignored)
    return document


def _find_obstacle(document: Mapping[str, Any]) -> str | None:
    model = document["model"].get("type")
    if model == REBUILDABLE_MODEL:
        return None
    return f"tokenizer.json holds a {str(model)[:50]} model; only {REBUILDABLE_MODEL} can be rebuilt as SentencePiece"


def _count_json(document: Mapping[str, Any]) -> int:
    """Return one more than the highest id of a tokenizer.json."""
    model = document.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict | list) or not model["vocab"]:
        raise CheckpointInvalid(f"{JSON_FILE} has no model with a vocabulary.", file=JSON_FILE)
    vocabulary = model["vocab"]
    # A Unigram model lists [piece, score] pairs in the order of their ids.
    ids = list(range(len(vocabulary))) if isinstance(vocabulary, list) else list(vocabulary.values())
    added = document.get("added_tokens") or []
    if not isinstance(added, list) or not all(_is_token(each) for each in added):
        raise CheckpointInvalid(f"{JSON_FILE}: added_tokens is not a list of ids and contents.", file=JSON_FILE)
    merges = model.get("merges") or []
    if not isinstance(merges, list) or not all(_is_merge(each) for each in merges):
        raise CheckpointInvalid(f"{JSON_FILE}: merges is not a list of pairs.", file=JSON_FILE)
    return _require_ids([*ids, *(each.get("id") for each in added)], JSON_FILE)


def _is_token(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("content"), str) and "id" in value


def _is_merge(value: Any) -> bool:
    """Tell whether a merge is a pair of texts, or one text with a space between them as old writers store it."""
    if isinstance(value, list):
        return len(value) == 2 and all(isinstance(each, str) for each in value)
    return isinstance(value, str) and " " in value


def _count_added(folder: Path, tokenizer_config: Mapping[str, Any]) -> int:
    """Return one more than the highest id of tokens that stand beside the vocabulary; 0 if there are none."""
    ids: list[Any] = []
    if (folder / "added_tokens.json").is_file():
        ids += read_json_object(folder / "added_tokens.json", MAX_CONFIG_BYTES).values()
    decoder = tokenizer_config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict) or not all(key.isascii() and key.isdigit() for key in decoder):
        raise CheckpointInvalid(f"{CONFIG_FILE}: added_tokens_decoder does not map ids.", file=CONFIG_FILE)
    ids += [int(key) for key in decoder if len(key) < 20]
    return _require_ids(ids, "added_tokens.json") if ids else 0


def _require_ids(ids: list[Any], name: str) -> int:
    if not all(type(each) is int and 0 <= each < 2**31 for each in ids):
        raise CheckpointInvalid(f"{name} has token ids that are not non-negative integers.", file=name)
    return int(max(ids)) + 1


def _count_pieces(data: bytes) -> int:
    """Return the number of pieces of a SentencePiece model, a protobuf message whose field 1 repeats per piece."""
    count = sum(1 for field in _list_fields(data) if field == _SENTENCEPIECE_PIECES_FIELD)
    if not count:
        raise _refuse_sentencepiece()
    return count


def _list_fields(data: bytes) -> Iterator[int]:
    """Yield the field numbers of a protobuf message's top level, skipping their contents."""
    position = 0
    while position < len(data):
        key, position = _read_varint(data, position)
        wire_type = key & 7
        if wire_type == 0:
            _, position = _read_varint(data, position)
        elif wire_type == 2:
            length, position = _read_varint(data, position)
            position += length
        elif wire_type in (1, 5):
            position += 8 if wire_type == 1 else 4
        else:
            raise _refuse_sentencepiece()
        if position > len(data):
            raise _refuse_sentencepiece()
        yield key >> 3


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            break
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise _refuse_sentencepiece()


def _refuse_sentencepiece() -> CheckpointInvalid:
    return CheckpointInvalid(
        f"{SENTENCEPIECE_FILE} is not a SentencePiece model, or it is truncated.", file=SENTENCEPIECE_FILE
    )
