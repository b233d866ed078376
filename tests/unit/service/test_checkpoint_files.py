"""Which names of a source are fetched, and what a listing alone refuses."""

from __future__ import annotations

import pytest

from service import checkpoint_files
from service.checkpoint_files import SourceFile, choose_needed, is_needed
from service.errors import CheckpointInvalid, CheckpointUnsafe

PARTS = ["config.json", "model.safetensors", "tokenizer.json"]


def listing(*names: str, size_bytes: int = 1) -> list[SourceFile]:
    return [SourceFile(name, size_bytes) for name in names]


@pytest.mark.parametrize(
    "name",
    [
        "modeling_llama.py",
        "pytorch_model.bin",
        "consolidated.00.pth",
        "consolidated.safetensors",
        "adapter_model.safetensors",
        "model.safetensors.py",
        "../config.json",
        "/etc/config.json",
        "original/model.safetensors",
        "./config.json",
        "config.json\n",
        "CONFIG.JSON",
        "model-00001-of-00002.safetensors/../x",
        "preprocessor_config.json",
    ],
)
def test_other_names_are_never_fetched(name: str) -> None:
    assert not is_needed(name)
    assert [file.path for file in choose_needed(listing(*PARTS, name), "It")] == PARTS


@pytest.mark.parametrize(
    "name", ["model-00001-of-00002.safetensors", "evaluation.jsonl", "chat_template.jinja", "tokenizer.model"]
)
def test_parts_of_a_checkpoint_are_fetched(name: str) -> None:
    assert name in [file.path for file in choose_needed(listing(*PARTS, name), "It")]


@pytest.mark.parametrize("pickle", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "model.ckpt"])
def test_pickled_weights_alone_are_unsafe(pickle: str) -> None:
    with pytest.raises(CheckpointUnsafe, match="convert the checkpoint to safetensors") as caught:
        choose_needed(listing("config.json", "tokenizer.json", pickle), "The folder /x")
    assert caught.value.details["file"] == pickle
    assert "The folder /x" in caught.value.message


@pytest.mark.parametrize("archive", ["model.zip", "model.tar.gz", "model.tgz", "model.safetensors.zip", "model.gguf"])
def test_archives_are_no_checkpoints(archive: str) -> None:
    assert not is_needed(archive)
    with pytest.raises(CheckpointInvalid, match="no weights"):
        choose_needed(listing("config.json", "tokenizer.json", archive), "It")


def test_pickles_beside_safetensors_are_left_behind() -> None:
    assert [file.path for file in choose_needed(listing(*PARTS, "pytorch_model.bin"), "It")] == PARTS


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["config.json", "tokenizer.json"], "no weights"),
        (["config.json", "tokenizer.json", "consolidated.safetensors"], r"consolidated\.safetensors but neither"),
        (["model.safetensors", "tokenizer.json"], r"no config\.json"),
        (["config.json", "model.safetensors", "vocab.json"], "no tokenizer"),
        ([*PARTS, "config.json"], "twice"),
    ],
)
def test_a_listing_without_the_parts_is_refused(names: list[str], reason: str) -> None:
    with pytest.raises(CheckpointInvalid, match=reason):
        choose_needed(listing(*names), "It")


@pytest.mark.parametrize(
    ("limit", "value"),
    [("MAX_LISTED_FILES", 2), ("MAX_NEEDED_FILES", 2), ("MAX_FILE_BYTES", 0), ("MAX_TOTAL_BYTES", 2)],
)
def test_number_and_sizes_are_capped(monkeypatch: pytest.MonkeyPatch, limit: str, value: int) -> None:
    assert choose_needed(listing(*PARTS), "It")
    monkeypatch.setattr(checkpoint_files, limit, value)
    with pytest.raises(CheckpointInvalid, match="more than"):
        choose_needed(listing(*PARTS), "It")


def test_a_size_that_is_not_stated_is_refused() -> None:
    with pytest.raises(CheckpointInvalid, match="states no size"):
        choose_needed(listing(*PARTS, size_bytes=-1), "It")
