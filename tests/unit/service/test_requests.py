"""Sources as people write them, and recipes of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.errors import InvalidRequest, SourceNotFound
from service.requests import FolderSource, HubSource, parse_request, parse_source


@pytest.fixture(autouse=True)
def in_a_folder_with_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)


def test_a_folder_that_is_there_is_a_folder(tmp_path: Path) -> None:
    assert parse_source("models/tiny") == FolderSource(path=str(tmp_path / "models" / "tiny"))


@pytest.mark.parametrize("text", ["models/tinny", "./models", "/nowhere/at/all", "tiny", "~/nowhere"])
def test_a_mistyped_folder_never_goes_to_the_hub(text: str, tmp_path: Path) -> None:
    (tmp_path / "models" / "tiny").rmdir()
    (tmp_path / "models").rmdir() if text == "./models" else None
    with pytest.raises(SourceNotFound, match="neither a folder here nor a Hub repository"):
        parse_source(text)


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("owner/name", HubSource(repo="owner/name")),
        ("owner/name@v1.0", HubSource(repo="owner/name", revision="v1.0")),
        ("hf://models/tinny", HubSource(repo="models/tinny")),
    ],
)
def test_what_can_only_be_a_repository_is_one(text: str, source: HubSource) -> None:
    assert parse_source(text) == source


WEIGHTS = {"num_bits": 8, "granularity": "CHANNELWISE"}
ENTRIES = [
    {
        "regex": ".*",
        "operation": "FULLY_CONNECTED",
        "op_config": {"weight_tensor_config": WEIGHTS, "compute_precision": "INTEGER"},
    }
]


def test_a_recipe_of_ones_own_is_named_like_any_other() -> None:
    document = {"source": {"kind": "hub", "repo": "a/b"}, "recipes": ["none", "mine"], "own_recipes": {"mine": ENTRIES}}
    request = parse_request(document)
    assert list(request.variant_names) == ["none", "mine"]
    assert parse_request(request.to_json()) == request


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"recipes": ["mine"]}, "Unknown recipe 'mine'"),
        ({"own_recipes": {"mine": ENTRIES}}, "recipes does not name"),
        ({"recipes": ["none"], "own_recipes": {"none": ENTRIES}}, "'none' cannot name"),
        ({"recipes": ["Mine"], "own_recipes": {"Mine": ENTRIES}}, "'Mine' cannot name"),
        ({"recipes": ["mine"], "own_recipes": {"mine": []}}, "mine"),
        ({"recipes": ["mine"], "own_recipes": {"mine": "int8"}}, "own_recipes"),
    ],
)
def test_a_recipe_that_is_none_is_refused(fields: dict[str, object], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        parse_request({"source": {"kind": "hub", "repo": "a/b"}, **fields})
