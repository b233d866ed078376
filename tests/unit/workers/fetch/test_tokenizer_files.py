"""Tokenizer files: kind, number of ids, what makes one unfit or unsafe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from service.errors import CheckpointInvalid, CheckpointUnsafe
from tests.unit.workers.fetch import tiny_checkpoint as tiny
from workers.fetch import tokenizer_files
from workers.fetch.checkpoint import read_checkpoint
from workers.fetch.tokenizer_files import TokenizerFacts, read_tokenizer, read_tokenizer_config


def build_sentencepiece(pieces: int) -> bytes:
    """Return the protobuf of a model with that many pieces and a trainer section, as sentencepiece writes it."""
    piece = b"\x0a\x03abc\x15\x00\x00\x80\x3f"
    trainer = b"\x18\x02\x20" + b"\x80\x04"
    section = b"\x12" + bytes([len(trainer)]) + trainer
    return (b"\x0a" + bytes([len(piece)]) + piece) * pieces + section


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.write_tiny(tmp_path / "checkpoint")


def write_vocabulary(folder: Path, model: Any, added: Any = ()) -> None:
    tiny.write_json(folder / "tokenizer.json", {"model": model, "added_tokens": added})


def test_ids_are_counted_over_vocabulary_and_added_tokens(folder: Path) -> None:
    assert read_tokenizer(folder, {}) == TokenizerFacts("json", 12, None)
    write_vocabulary(folder, {"type": "BPE", "vocab": {"a": 0, "b": 5}}, [{"id": 9, "content": "x"}])
    assert read_tokenizer(folder, {}).vocabulary_size == 10
    assert read_tokenizer(folder, {"added_tokens_decoder": {"20": {}}}).vocabulary_size == 21
    tiny.write_json(folder / "added_tokens.json", {"<x>": 30})
    assert read_tokenizer(folder, {}).vocabulary_size == 31


def test_a_unigram_model_counts_its_pieces(folder: Path) -> None:
    write_vocabulary(folder, {"type": "Unigram", "vocab": [["a", 0.0], ["b", -1.0]]})
    assert read_tokenizer(folder, {}).vocabulary_size == 2


@pytest.mark.parametrize("model", ["WordPiece", "WordLevel", "Unigram"])
def test_other_models_than_bpe_cannot_be_rebuilt(folder: Path, model: str) -> None:
    write_vocabulary(folder, {"type": model, "vocab": {"a": 0}})
    obstacle = read_tokenizer(folder, {}).sentencepiece_obstacle
    assert obstacle is not None
    assert model in obstacle


def test_a_sentencepiece_model_is_counted_and_removes_the_obstacle(folder: Path) -> None:
    write_vocabulary(folder, {"type": "WordPiece", "vocab": {"a": 0}})
    (folder / "tokenizer.model").write_bytes(build_sentencepiece(11))
    assert read_tokenizer(folder, {}) == TokenizerFacts("sentencepiece", 11, None)
    (folder / "tokenizer.json").unlink()
    assert read_tokenizer(folder, {}) == TokenizerFacts("sentencepiece", 11, None)


@pytest.mark.parametrize(
    "data",
    [b"", b"IQ== 0\nIg== 1\n", build_sentencepiece(3)[:-2], b"\xff" * 20, b"\x0a\xff\xff\xff\xff\x0f", b"\x12\x00"],
    ids=["empty", "tiktoken", "cut", "varint", "length", "no pieces"],
)
def test_something_else_than_sentencepiece_is_refused(folder: Path, data: bytes) -> None:
    (folder / "tokenizer.model").write_bytes(data)
    with pytest.raises(CheckpointInvalid, match=r"tokenizer\.model is not a SentencePiece model"):
        read_tokenizer(folder, {})


@pytest.mark.parametrize(
    "document",
    [{}, {"model": None}, {"model": {"vocab": {}}}, {"model": {"vocab": "x"}}, {"model": {"vocab": {"a": -1}}}]
    + [{"model": {"vocab": {"a": "0"}}}, {"model": {"vocab": {"a": 2**40}}}]
    + [
        {"model": {"vocab": {"a": 0}}, "added_tokens": added}
        for added in ({"id": 1}, [1], [{"content": "x"}], [{"id": 1}])
    ]
    + [{"model": {"vocab": {"a": 0}, "merges": merges}} for merges in ("a b", ["ab"], [["a"]], [["a", 1]], [7])],
    ids=str,
)
def test_a_malformed_tokenizer_is_refused(folder: Path, document: Any) -> None:
    tiny.write_json(folder / "tokenizer.json", document)
    with pytest.raises(CheckpointInvalid, match=r"tokenizer"):
        read_tokenizer(folder, {})


def test_a_tokenizer_larger_than_the_embedding_is_refused(folder: Path) -> None:
    vocabulary = {f"t{index}": index for index in range(tiny.VOCABULARY + 1)}
    write_vocabulary(folder, {"type": "BPE", "vocab": vocabulary})
    with pytest.raises(CheckpointInvalid, match="13 ids but the embedding has 12 rows") as caught:
        read_checkpoint(folder, tiny.ignore_progress)
    assert caught.value.details["tokenizer_ids"] == 13


def test_a_huge_tokenizer_is_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_files, "MAX_TOKENIZER_BYTES", 100)
    with pytest.raises(CheckpointInvalid, match="more than 100 bytes"):
        read_tokenizer(folder, {})


@pytest.mark.parametrize(
    "fields",
    [
        {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}},
        {"tokenizer_file": "/etc/passwd"},
        {"vocab_file": "../vocab.json"},
        {"init_kwargs": {"merges_file": "x"}},
        {"tokenizer_class": "evil.Tokenizer"},
        {"tokenizer_class": "evil/Tokenizer"},
        {"tokenizer_class": 7},
        {"trust_remote_code": True},
    ],
    ids=str,
)
def test_a_tokenizer_config_that_names_code_or_paths_is_unsafe(folder: Path, fields: dict[str, Any]) -> None:
    tiny.write_json(folder / "tokenizer_config.json", {**tiny.TOKENIZER_CONFIG, **fields})
    with pytest.raises(CheckpointUnsafe, match=r"^tokenizer_config\.json: "):
        read_tokenizer_config(folder)


def test_token_texts_may_look_like_paths(folder: Path) -> None:
    config = {**tiny.TOKENIZER_CONFIG, "eos_token": "</s>", "tokenizer_file": None, "name_or_path": "/home/me"}
    tiny.write_json(folder / "tokenizer_config.json", config)
    tiny.write_json(folder / "special_tokens_map.json", {"eos_token": {"content": "</s>"}})
    assert read_tokenizer_config(folder) == config
