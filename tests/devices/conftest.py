"""The phone that is held to what EdgeKiln counts on: a virtual one, or the one that `EDGEKILN_TEST_SERIAL` names.

`make test-device SERIAL=...` names one; it must not be in use, since whatever runs of EdgeKiln are on it are ended.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.virtual_phone.bench import AttachedPhone, adb_server, virtual_phone
from workers.devices import traces
from workers.devices.adb import Adb, Phone

SERIAL = os.environ.get("EDGEKILN_TEST_SERIAL", "")


@pytest.fixture(scope="session")
def attached(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Phone, AttachedPhone | None]]:
    """Yield the phone, and what stands behind it where it is virtual."""
    if SERIAL:
        host = os.environ.get("EDGEKILN_ADB_HOST", "127.0.0.1")
        yield Adb(host, int(os.environ.get("EDGEKILN_ADB_PORT", "5037"))).phone(SERIAL), None
        return
    folder = tmp_path_factory.mktemp("conformance")
    with adb_server(folder / "adb") as server, virtual_phone(server, folder / "phone") as virtual:
        yield Adb("127.0.0.1", server.port).phone(virtual.serial), virtual


@pytest.fixture
def phone(attached: tuple[Phone, AttachedPhone | None]) -> Iterator[Phone]:
    """Yield the phone, clean before and after."""
    found, _ = attached
    traces.close_runs(found)
    yield found
    traces.close_runs(found)


@pytest.fixture
def virtual(attached: tuple[Phone, AttachedPhone | None]) -> Iterator[AttachedPhone]:
    """Yield the virtual phone, whose faults can be chosen."""
    _, found = attached
    if found is None:
        pytest.skip("a real phone has no faults on request")
    yield found
    found.set_faults()
