"""Folders of partial downloads are made for a key and deleted when nobody resumes them."""

from __future__ import annotations

import os
from pathlib import Path

from workers.fetch.partial_downloads import prepare_folder


def test_only_old_folders_named_by_a_key_are_deleted(tmp_path: Path) -> None:
    own, stale, fresh, other = ("c" * 64, "a" * 64, "b" * 64, "notes")
    for name in (own, stale, fresh, other):
        (tmp_path / "root" / name).mkdir(parents=True)
        (tmp_path / "root" / name / "model.safetensors").write_bytes(b"part")
    for name in (own, stale, other):
        os.utime(tmp_path / "root" / name, (0, 0))
    folder = prepare_folder(tmp_path / "root", own)
    assert (folder / "model.safetensors").read_bytes() == b"part"
    assert sorted(each.name for each in (tmp_path / "root").iterdir()) == [fresh, own, other]


def test_a_folder_is_made_for_a_new_key(tmp_path: Path) -> None:
    assert prepare_folder(tmp_path / "deep" / "root", "d" * 64).is_dir()
