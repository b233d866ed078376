"""Sources as people write them, and recipes of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.errors import InvalidRequest, SourceNotFound
from service.requests import (
    FolderSource,
    HttpsSource,
    HubSource,
    S3Source,
    parse_request,
    parse_source,
    parse_stored_request,
    write_source,
)


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


@pytest.mark.parametrize(
    ("text", "url", "label"),
    [
        ("https://Models.Example.org/mine", "https://models.example.org/mine/", "mine"),
        ("https://models.example.org:443/a%20b/", "https://models.example.org/a%20b/", "a-b"),
        ("https://[2001:DB8::1]:8443", "https://[2001:db8::1]:8443/", "2001-db8-1-8443"),
    ],
)
def test_a_web_folder_has_one_form(text: str, url: str, label: str) -> None:
    source = parse_source(text)
    assert source == HttpsSource(url=url)
    assert source.label == label
    assert parse_source(write_source({}, source)) == source


def test_a_bucket_is_written_as_everywhere() -> None:
    source = parse_source("s3://models/tiny/v2/")
    assert source == S3Source(bucket="models", prefix="tiny/v2")
    assert source.label == "v2"
    assert parse_source(write_source({}, source)) == source
    assert parse_source("s3://models") == S3Source(bucket="models")


def test_a_source_may_be_written_as_json() -> None:
    text = '{"kind": "https", "url": "https://h.example/m/", "files": ["tokenizer.json", "config.json"]}'
    source = parse_source(text)
    assert source == HttpsSource(url="https://h.example/m/", files=("config.json", "tokenizer.json"))
    assert parse_source(write_source({}, source)) == source


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("https://h.example/m/config.json", r"source\.url: name the folder that holds config\.json"),
        ("https://user:hush@h.example/m/", "must not hold a user name"),
        ("https://h.example/m/?token=hush", "must not hold a query"),
        ("https://0x7f.1/", "neither a host's name nor an IP address"),
        ('{"kind": "https", "url": "https://h.example/", "files": ["../x"]}', "is no file of a checkpoint"),
        ("s3://models/a//b", "is no prefix"),
        ("s3://models/../b", "is no prefix"),
        ("s3://models/a/model.safetensors", "name the prefix"),
        ("s3://M/x", r"source\.bucket"),
        ('{"kind": "https", "url"', "The source as JSON"),
    ],
)
def test_an_address_that_cannot_be_meant_is_refused_with_a_sentence(text: str, sentence: str) -> None:
    with pytest.raises(InvalidRequest, match=sentence) as caught:
        parse_source(text)
    assert "hush" not in str(caught.value.to_json())


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


@pytest.mark.parametrize(
    "fields", [{"devices": ["any"]}, {"formats": ["tflite"]}, {"formats": ["tflite"], "devices": ["host"]}]
)
def test_a_profile_is_of_a_graph_on_a_phone(fields: dict[str, list[str]]) -> None:
    with pytest.raises(InvalidRequest, match="a profile is of a graph on a phone"):
        parse_request({"source": {"kind": "hub", "repo": "a/b"}, **fields, "profile": True})


def test_control_a_profile_of_a_graph_on_a_phone_may_be_asked() -> None:
    fields = {"formats": ["litertlm", "tflite"], "devices": ["host", "any"], "profile": True}
    assert parse_request({"source": {"kind": "hub", "repo": "a/b"}, **fields}).profile


def test_a_stored_request_of_a_newer_version_is_read_as_far_as_it_is_known() -> None:
    request = parse_request({"source": {"kind": "hub", "repo": "a/b"}, "own_recipes": {}, "recipes": ["none"]})
    stored = request.to_json()
    newer = {**stored, "later": [1], "source": {**stored["source"], "mirror": "x"}}
    assert parse_stored_request(newer) == request
    with pytest.raises(InvalidRequest, match="later"):
        parse_request(newer)
    with pytest.raises(InvalidRequest, match="unheard-of"):
        parse_stored_request({**newer, "recipes": ["unheard-of"]})


def test_what_was_asked_is_the_same_whether_defaults_are_written_out() -> None:
    short = parse_request({"source": {"kind": "hub", "repo": "a/b"}})
    assert parse_request(short.to_json()).to_asked() == short.to_asked()
    assert parse_request({**short.to_json(), "priority": 1}).to_asked() != short.to_asked()
