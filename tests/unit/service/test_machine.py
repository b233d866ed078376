"""What a process may use of its machine, from control groups as files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from service.machine import count_memory_bytes, find_usable_cores, find_usable_memory_bytes

MIB = 1024**2


@pytest.fixture
def groups(tmp_path: Path) -> tuple[Path, Path]:
    """A process in the group `kiln/worker`, which limits nothing yet."""
    root = tmp_path / "cgroup"
    (root / "kiln" / "worker").mkdir(parents=True)
    for folder in (root / "kiln", root / "kiln" / "worker"):
        (folder / "memory.max").write_text("max\n")
        (folder / "cpu.max").write_text("max 100000\n")
    own = tmp_path / "own"
    own.write_text("0::/kiln/worker\n")
    return own, root


def test_without_limits_the_machine_is_the_limit(groups: tuple[Path, Path], tmp_path: Path) -> None:
    assert find_usable_memory_bytes(*groups) == count_memory_bytes()
    assert find_usable_cores(*groups) == os.cpu_count()
    assert find_usable_memory_bytes(tmp_path / "none", tmp_path / "none") == count_memory_bytes()
    # cgroup v1 lists controllers by number and name; it is not read.
    (tmp_path / "v1").write_text("4:memory:/kiln\n")
    assert find_usable_cores(tmp_path / "v1", tmp_path / "none") == os.cpu_count()


def test_the_least_limit_on_the_way_up_holds(groups: tuple[Path, Path]) -> None:
    root = groups[1]
    (root / "kiln" / "memory.max").write_text(f"{64 * MIB}\n")
    (root / "kiln" / "worker" / "memory.max").write_text(f"{96 * MIB}\n")
    assert find_usable_memory_bytes(*groups) == 64 * MIB


@pytest.mark.parametrize(("quota", "cores"), [("50000 100000", 1), ("100000 100000", 1), ("9000000000 100000", None)])
def test_a_quota_counts_as_whole_cores(groups: tuple[Path, Path], quota: str, cores: int | None) -> None:
    (groups[1] / "kiln" / "worker" / "cpu.max").write_text(f"{quota}\n")
    assert find_usable_cores(*groups) == (cores or os.cpu_count())


def test_a_container_that_sees_itself_as_the_root_is_limited(tmp_path: Path) -> None:
    (tmp_path / "own").write_text("0::/\n")
    (tmp_path / "memory.max").write_text(f"{32 * MIB}\n")
    assert find_usable_memory_bytes(tmp_path / "own", tmp_path) == 32 * MIB
