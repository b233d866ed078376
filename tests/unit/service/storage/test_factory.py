"""Which settings open which store."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.errors import InvalidRequest, InvalidSettings
from service.settings import Settings
from service.storage import S3Options, open_configured_store, open_store
from service.storage.folder import FolderStore


def test_file_url_opens_a_folder_and_makes_it(tmp_path: Path) -> None:
    root = tmp_path / "a folder" / "store"
    store = open_store(root.as_uri())
    assert isinstance(store, FolderStore)
    assert store.root == root
    assert root.is_dir()


def test_s3_url_names_bucket_and_prefix() -> None:
    from service.storage.s3 import S3Store

    options = S3Options(region="us-east-1", access_key_id="key", secret_access_key="secret")
    store = open_store("s3://bucket/some/prefix/", options)
    assert isinstance(store, S3Store)
    assert (store.bucket, store.prefix) == ("bucket", "some/prefix/")


@pytest.mark.parametrize(
    "url",
    ["", "relative/path", "/absolute", "file://host/x", "file:relative", "s3://", "s3:///x", "gs://b", "s3://b?x=1"],
)
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(InvalidSettings, match="store URL"):
        open_store(url)


def test_prefix_may_not_climb() -> None:
    with pytest.raises(InvalidRequest):
        open_store("s3://bucket/../x", S3Options(region="us-east-1"))


def test_secret_is_not_printed() -> None:
    assert "hunter2" not in repr(S3Options(secret_access_key="hunter2"))


def test_default_settings_open_a_folder_below_the_data_directory(tmp_path: Path) -> None:
    store = open_configured_store(Settings(data_dir=tmp_path, store_url=""))
    assert isinstance(store, FolderStore)
    assert store.root == tmp_path / "store"


def test_settings_reach_the_s3_store(tmp_path: Path) -> None:
    from service.storage.s3 import S3Store

    settings = Settings(
        data_dir=tmp_path,
        store_url="s3://bucket/prefix",
        s3_endpoint_url="http://store.invalid:9000",
        s3_region="us-east-1",
        s3_request_checksums="when_supported",
        s3_upload_checksum="md5",
        s3_part_bytes=8 << 20,
        s3_connections=3,
    )
    store = open_configured_store(settings)
    assert isinstance(store, S3Store)
    assert store.options == S3Options(
        endpoint_url="http://store.invalid:9000",
        region="us-east-1",
        addressing="path",
        request_checksum_calculation="when_supported",
        upload_checksum="md5",
        part_size_bytes=8 << 20,
        parallel=3,
    )


@pytest.mark.parametrize("value", ["when_required", "when_supported"])
def test_both_sides_of_boto3_s_own_checksums_are_settings(tmp_path: Path, value: str) -> None:
    from service.storage.s3 import S3Store

    for side, option in (("request", "request_checksum_calculation"), ("response", "response_checksum_validation")):
        fields = {f"s3_{side}_checksums": value, "s3_region": "us-east-1", "store_url": "s3://bucket"}
        store = open_configured_store(Settings.model_validate({"data_dir": tmp_path, **fields}))
        assert isinstance(store, S3Store)
        assert getattr(store._client.meta.config, option) == value
        other = "response_checksum_validation" if side == "request" else "request_checksum_calculation"
        assert getattr(store._client.meta.config, other) == "when_required", "control: each has its own"
