"""Which tokenizer goes into a bundle, and how faithfully it reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Tokenizer

from service.errors import TokenizerUnsupported
from tests.checkpoints import write_tokenizer
from workers.convert import tokenizer
from workers.convert.tokenizer_samples import SAMPLES


def read(content: bytes) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=content)


def change_definition(folder: Path, **fields: Any) -> None:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **fields}), encoding="utf-8")


def test_a_format_that_takes_tokenizer_json_gets_it_as_it_is(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "sentencepiece")
    carried = tokenizer.carry_as_is(tmp_path)
    assert carried.kind == "hf_json"
    assert carried.content == (tmp_path / "tokenizer.json").read_bytes()


def test_a_checkpoint_with_only_a_sentencepiece_model_is_carried(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "sentencepiece")
    (tmp_path / "tokenizer.json").unlink()
    for carried in (tokenizer.carry_as_is(tmp_path), tokenizer.carry_as_sentencepiece(tmp_path)):
        assert carried.kind == "sentencepiece"
        assert carried.samples == 0
        stored = read((tmp_path / "tokenizer.model").read_bytes())
        assert [read(carried.content).encode(text) for text in SAMPLES] == [stored.encode(text) for text in SAMPLES]
        assert read(carried.content).encode("Hello</s>")[-1] == 2


def test_a_file_that_is_no_sentencepiece_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(TokenizerUnsupported, match=r"tokenizer\.model is not a SentencePiece model"):
        tokenizer.carry_as_is(tmp_path)


def test_a_sentencepiece_model_beside_tokenizer_json_is_compared_with_it(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "sentencepiece")
    carried = tokenizer.carry_as_sentencepiece(tmp_path)
    assert carried.kind == "sentencepiece"
    # Only after a special token in mid-text does transformers begin a new word; SentencePiece does not.
    special = carried.samples - len(SAMPLES)
    assert special == 2
    assert carried.mismatch_ratio == pytest.approx(special / carried.samples)


def test_special_tokens_of_a_sentencepiece_model_can_be_written_in_text(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "sentencepiece")
    as_stored = read((tmp_path / "tokenizer.model").read_bytes())
    assert 2 not in as_stored.encode("Hello</s>")
    assert read(tokenizer.carry_as_sentencepiece(tmp_path).content).encode("Hello</s>")[-1] == 2


@pytest.mark.parametrize(("kind", "limit"), [("metaspace", 0.05), ("byte_level", 0.15)])
def test_a_rebuilt_model_reads_nearly_all_samples_alike(tmp_path: Path, kind: Any, limit: float) -> None:
    write_tokenizer(tmp_path, kind)
    carried = tokenizer.carry_as_sentencepiece(tmp_path)
    assert carried.kind == "sentencepiece_rebuilt"
    assert carried.mismatch_ratio <= limit
    original = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    differing = [
        text
        for text in SAMPLES
        if read(carried.content).encode(text) != original.encode(text, add_special_tokens=False).ids
    ]
    special = 2 if kind == "metaspace" else 0
    assert carried.mismatch_ratio == pytest.approx((len(differing) + special) / carried.samples)


@pytest.mark.parametrize("kind", ["metaspace", "byte_level"])
def test_a_rebuilt_model_gives_every_text_back(tmp_path: Path, kind: Any) -> None:
    write_tokenizer(tmp_path, kind)
    rebuilt = read(tokenizer.carry_as_sentencepiece(tmp_path).content)
    assert [rebuilt.decode(rebuilt.encode(text)) for text in SAMPLES] == list(SAMPLES)


def test_rebuilding_gives_the_same_bytes_again(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "byte_level")
    assert tokenizer.carry_as_sentencepiece(tmp_path) == tokenizer.carry_as_sentencepiece(tmp_path)


def test_a_vocabulary_of_single_characters_is_rebuilt_exactly(tmp_path: Path) -> None:
    vocabulary = {token: index for index, token in enumerate(["?", "<s>", "</s>", *"0123456789+= abc"])}
    definition = {
        "version": "1.0",
        "added_tokens": [
            {"id": index, "content": token, "special": True, "normalized": False, "single_word": False,
             "lstrip": False, "rstrip": False}
            for index, token in enumerate(["<s>", "</s>"], start=1)
        ],
        "model": {"type": "BPE", "vocab": vocabulary, "merges": [], "unk_token": "?"},
    }  # fmt: skip
    original = Tokenizer.from_str(json.dumps(definition))
    content = tokenizer.build_sentencepiece(definition)
    texts = ["12+7=", " 1 ", "abc", "</s>1<s>", "1z2"]
    assert tokenizer.measure_mismatch(original, content, texts) == 0.0


def test_the_checkpoints_own_prompts_are_compared_too(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "byte_level")
    before = tokenizer.carry_as_sentencepiece(tmp_path)
    # Spaces in a row are split by a regular expression that SentencePiece does not have.
    line = json.dumps({"prompt": "three    four", "answer": "c"})
    (tmp_path / "evaluation.jsonl").write_text(f"{line}\n\n{line}\n", encoding="utf-8")
    after = tokenizer.carry_as_sentencepiece(tmp_path)
    assert after.samples == before.samples + 2
    assert after.mismatch_ratio > before.mismatch_ratio


def test_a_model_other_than_bpe_cannot_be_rebuilt(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "byte_level")
    change_definition(tmp_path, model={"type": "WordPiece", "vocab": {"a": 0}})
    with pytest.raises(TokenizerUnsupported, match=r"'WordPiece'.*'litertlm'"):
        tokenizer.carry_as_sentencepiece(tmp_path)


def test_a_rebuilt_model_that_reads_otherwise_is_refused(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "metaspace")
    change_definition(tmp_path, normalizer={"type": "Replace", "pattern": {"String": "e"}, "content": "o"})
    with pytest.raises(TokenizerUnsupported, match="cannot be carried as SentencePiece"):
        tokenizer.carry_as_sentencepiece(tmp_path)


@pytest.mark.parametrize("carry", [tokenizer.carry_as_is, tokenizer.carry_as_sentencepiece])
def test_a_checkpoint_without_tokenizer_is_refused(tmp_path: Path, carry: Any) -> None:
    with pytest.raises(TokenizerUnsupported, match=r"neither tokenizer\.json nor tokenizer\.model"):
        carry(tmp_path)
