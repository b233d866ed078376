"""The host's cache: the oldest downloads go first, and none that is being used."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

import pytest

from service.host_cache import make_download_folder, trim_cache

HOUR_S = 3600.0
MIB = 1024**2


def make(cache_dir: Path, digit: str, age_s: float, size_bytes: int = MIB) -> Path:
    folder = cache_dir / "downloads" / (digit * 64)
    folder.mkdir(parents=True)
    part = folder / "model.safetensors"
    part.write_bytes(b"x" * size_bytes)
    for path in (part, folder):
        os.utime(path, (time.time() - age_s,) * 2)
    return folder


def trim(cache_dir: Path, max_bytes: int = 100 * MIB, keep_s: float = 100 * HOUR_S, dry_run: bool = False) -> list[str]:
    trimmed = trim_cache(cache_dir, max_bytes=max_bytes, keep_s=keep_s, dry_run=dry_run)
    return [download.path.name[0] for download, _ in trimmed]


def test_what_nobody_has_used_for_long_goes(tmp_path: Path) -> None:
    make(tmp_path, "a", 3 * HOUR_S)
    make(tmp_path, "b", HOUR_S)
    assert trim(tmp_path) == []
    assert trim(tmp_path, keep_s=2 * HOUR_S) == ["a"]
    assert trim(tmp_path, keep_s=0) == ["b"]
    assert list((tmp_path / "downloads").iterdir()) == []


def test_the_oldest_go_until_the_rest_fits(tmp_path: Path) -> None:
    for digit, hours in (("a", 1), ("b", 4), ("c", 2), ("d", 3)):
        make(tmp_path, digit, hours * HOUR_S)
    assert trim(tmp_path, max_bytes=5 * MIB) == []
    assert trim(tmp_path, max_bytes=5 * MIB // 2) == ["b", "d"]
    assert trim(tmp_path, max_bytes=0) == ["c"], "the one used last stays"


def test_a_file_in_it_counts_as_a_use(tmp_path: Path) -> None:
    folder = make(tmp_path, "a", 9 * HOUR_S)
    (folder / "model.safetensors").touch()
    assert trim(tmp_path, keep_s=HOUR_S) == []


def test_what_is_in_use_stays(tmp_path: Path) -> None:
    used, other = make(tmp_path, "a", 9 * HOUR_S), make(tmp_path, "b", 8 * HOUR_S)
    descriptor = os.open(used, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert trim(tmp_path, keep_s=HOUR_S) == ["b"]
    assert (used.exists(), other.exists()) == (True, False)
    os.close(descriptor)
    assert trim(tmp_path, keep_s=HOUR_S) == ["a"]


def test_holes_take_no_disk(tmp_path: Path) -> None:
    folder = make(tmp_path, "a", 2 * HOUR_S)
    make(tmp_path, "b", HOUR_S)
    with (folder / "model.safetensors").open("r+b") as part:
        part.truncate(10**12)
    os.utime(folder / "model.safetensors", (time.time() - 2 * HOUR_S,) * 2)
    assert trim(tmp_path, max_bytes=10 * MIB) == []


def test_a_dry_run_says_the_same_and_deletes_nothing(tmp_path: Path) -> None:
    folders = [make(tmp_path, "a", 9 * HOUR_S), make(tmp_path, "b", HOUR_S), make(tmp_path, "c", 0)]
    assert trim(tmp_path, max_bytes=2 * MIB, keep_s=5 * HOUR_S, dry_run=True) == ["a", "b"]
    assert all(folder.exists() for folder in folders)
    assert trim(tmp_path, max_bytes=2 * MIB, keep_s=5 * HOUR_S) == ["a", "b"]


@pytest.mark.parametrize("name", ["notes", "A" * 64, "a" * 63])
def test_what_is_no_download_is_left_alone(tmp_path: Path, name: str) -> None:
    other = tmp_path / "downloads" / name
    other.mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "downloads" / ("f" * 64)).symlink_to(tmp_path / "elsewhere")
    assert trim(tmp_path, max_bytes=0, keep_s=0) == []
    assert other.exists()


def test_a_host_without_a_cache_has_nothing_to_trim(tmp_path: Path) -> None:
    assert trim(tmp_path / "nowhere") == []


def test_a_folder_of_downloads_is_made_for_a_key_and_found_again(tmp_path: Path) -> None:
    folder = make_download_folder(tmp_path / "cache", "d" * 64)
    assert folder.stat().st_mode & 0o777 == 0o700
    (folder / "model.safetensors").write_bytes(b"part")
    assert make_download_folder(tmp_path / "cache", "d" * 64) == folder
    assert trim(tmp_path / "cache", keep_s=0) == ["d"], "where it looks is where they are"
