"""The grammar of object keys."""

from __future__ import annotations

import pytest

from service.errors import InvalidRequest
from service.storage import blob_key, check_digest, check_key, manifest_key

DIGEST = "0123456789abcdef" * 4


def test_layout_is_fixed() -> None:
    assert blob_key(DIGEST) == f"blobs/01/{DIGEST}"
    assert manifest_key(DIGEST) == f"manifests/{DIGEST}.json"


@pytest.mark.parametrize("digest", ["", "0" * 63, "0" * 65, "A" * 64, "g" * 64, "0" * 64 + "\n", "../" + "0" * 61])
def test_digests_are_lower_case_hex(digest: str) -> None:
    for function in (check_digest, blob_key, manifest_key):
        with pytest.raises(InvalidRequest):
            function(digest)


@pytest.mark.parametrize("key", ["a", "blobs/ab/cd", "a.b/c-d_e", "_", "x" * 512])
def test_good_keys_pass(key: str) -> None:
    assert check_key(key) == key
