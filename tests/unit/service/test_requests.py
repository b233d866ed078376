"""Sources as people write them."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.errors import SourceNotFound
from service.requests import FolderSource, HubSource, parse_source


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
