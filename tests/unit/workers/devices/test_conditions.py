"""What is read from the kernel."""

from __future__ import annotations

import json
import mmap
import os
import platform
import subprocess

from workers.devices.conditions import describe_host, describe_tools, read_conditions, read_process_memory


def test_host_is_described_without_its_name() -> None:
    described = describe_host()
    assert described["kind"] == "host"
    assert described["memory_bytes"] == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 1 <= described["usable_cores"] <= described["cores"]
    assert platform.node() not in json.dumps(described)


def test_conditions_are_json_and_missing_ones_are_null() -> None:
    found = json.loads(json.dumps(read_conditions()))
    assert found["load_average_1m"] >= 0
    assert found["memory_available_bytes"] > 0
    for name in ("governors", "frequencies_khz", "temperatures_mc"):
        assert found[name] is None or len(found[name]) > 0


def test_tools_have_versions() -> None:
    assert set(describe_tools("litert-lm", "ai-edge-litert")) == {"litert-lm", "ai-edge-litert"}


def test_memory_grows_by_what_is_touched() -> None:
    before = read_process_memory(os.getpid())
    size_bytes = 32 << 20
    with mmap.mmap(-1, size_bytes) as block:
        block.write(b"x" * size_bytes)
        after = read_process_memory(os.getpid())
    assert before is not None
    assert after is not None
    assert after[1] - before[1] >= size_bytes // 2
    assert after[0] >= after[1]


def test_ended_process_has_no_memory() -> None:
    with subprocess.Popen(["true"]) as process:
        # Ended, but not yet reaped: its folder in /proc is still there.
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert read_process_memory(process.pid) is None
