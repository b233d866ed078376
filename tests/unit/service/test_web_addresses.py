"""Which addresses are of the public internet, whatever they are wrapped in."""

from __future__ import annotations

import pytest

from service.web_addresses import HostRules, is_public, read_place


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("::ffff:8.8.8.8", True),
        ("64:ff9b::8.8.8.8", True),
        ("127.0.0.1", False),
        ("0.0.0.0", False),
        ("100.64.0.1", False),
        ("169.254.169.254", False),
        ("224.0.0.1", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fec0::1", False),
        ("ff0e::1", False),
        ("::ffff:10.0.0.1", False),
        ("2002:7f00:1::", False),
        ("64:ff9b::a9fe:a9fe", False),
        ("64:ff9b:1::808:808", False),
        ("::8.8.8.8", False),
        ("2001:0:7f00:1::1", False),
    ],
)
def test_an_address_is_public_only_if_all_that_it_reaches_is(address: str, expected: bool) -> None:
    assert is_public(address) is expected


def test_an_operator_vouches_for_a_host_or_for_one_port_of_it() -> None:
    rules = HostRules(private_hosts=("Models.example", "127.0.0.1:8443", "[::1]:8443"))
    assert rules.is_private(read_place("http://models.example/"))
    assert rules.is_private(read_place("https://127.0.0.1:8443/"))
    assert rules.is_private(read_place("https://[::1]:8443/"))
    assert not rules.is_private(read_place("https://127.0.0.1:8444/"))
    assert not rules.is_private(read_place("https://x.models.example/"))
