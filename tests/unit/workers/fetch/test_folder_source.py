"""Pinning and copying a local folder through the steps `resolve` and `fetch`."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from service.errors import (
    CheckpointUnsafe,
    DiskFull,
    InvalidRequest,
    SourceChanged,
    SourceForbidden,
    SourceNotFound,
)
from tests.unit.workers.fetch.tiny_checkpoint import ignore_progress, write_tiny
from workers.fetch import fetch, resolve
from workers.fetch import folder as folder_source


def pin(path: Path | str) -> dict[str, Any]:
    return resolve.run({"source": {"kind": "folder", "path": str(path)}}, {}, Path("/nonexistent"), ignore_progress)


def bring(source: dict[str, Any], output_dir: Path) -> dict[str, Any]:
    output_dir.mkdir(exist_ok=True)
    return fetch.run({"source": source}, {}, output_dir, ignore_progress)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "tiny")


def test_needed_files_are_copied_byte_for_byte(folder: Path, tmp_path: Path) -> None:
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    (folder / "sub").mkdir()
    (folder / "sub" / "config.json").write_text("{}")
    figures = pin(folder)
    fetched = bring(figures["source"], tmp_path / "out")
    copied = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert copied == {file["path"]: (folder / file["path"]).read_bytes() for file in figures["files"]}
    assert "modeling_evil.py" not in copied
    assert fetched["size_bytes"] == figures["size_bytes"] == sum(len(data) for data in copied.values())


def test_revision_and_digest_depend_on_needed_bytes_alone(folder: Path, tmp_path: Path) -> None:
    first = pin(folder)["source"]
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "README.md").write_text("other words")
    second = pin(tmp_path / "copy")["source"]
    assert first["revision"] == second["revision"]
    digests = {
        bring(source, tmp_path / str(index))["checkpoint_digest"] for index, source in enumerate([first, second])
    }
    assert len(digests) == 1
    (tmp_path / "copy" / "config.json").write_text("{}")
    assert pin(tmp_path / "copy")["source"]["revision"] != first["revision"]


def test_progress_is_in_bytes_and_ends_at_one(folder: Path) -> None:
    seen: list[tuple[str, float | None]] = []
    source = {"kind": "folder", "path": str(folder)}
    figures = resolve.run({"source": source}, {}, folder, lambda text, fraction=None: seen.append((text, fraction)))
    assert seen[-1][1] == 1.0
    assert str(figures["size_bytes"]) in seen[-1][0]


@pytest.mark.parametrize("spoil", ["change", "add", "remove"])
def test_files_that_changed_since_the_pin_are_refused(folder: Path, tmp_path: Path, spoil: str) -> None:
    source = pin(folder)["source"]
    if spoil == "change":
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    elif spoil == "add":
        (folder / "evaluation.jsonl").write_text("{}")
    else:
        (folder / "generation_config.json").unlink()
    with pytest.raises(SourceChanged, match="no longer those"):
        bring(source, tmp_path / "out")


def test_a_missing_folder_is_not_found(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(SourceNotFound, match="There is no folder"):
        pin(tmp_path / "nowhere")
    with pytest.raises(SourceNotFound, match="is a file"):
        pin(folder / "config.json")
    with pytest.raises(SourceNotFound, match="There is no folder"):
        pin(folder / "config.json" / "deeper")


def test_a_relative_path_and_an_unknown_field_are_invalid(folder: Path) -> None:
    with pytest.raises(InvalidRequest, match="absolute"):
        pin("relative")
    with pytest.raises(InvalidRequest, match="no field 'token'"):
        resolve.run({"source": {"kind": "folder", "path": "/x", "token": "y"}}, {}, folder, ignore_progress)
    with pytest.raises(InvalidRequest, match="kind of source 'ftp'"):
        resolve.run({"source": {"kind": "ftp"}}, {}, folder, ignore_progress)


def test_fetch_demands_a_pinned_source(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="no revision"):
        bring({"kind": "folder", "path": str(folder)}, tmp_path / "out")


def test_a_link_that_leaves_the_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("{}")
    (folder / "evaluation.jsonl").symlink_to(secret)
    with pytest.raises(CheckpointUnsafe, match="leaves the folder"):
        pin(folder)


def test_a_link_put_there_after_the_pin_is_refused(folder: Path, tmp_path: Path) -> None:
    source = pin(folder)["source"]
    moved = shutil.move(folder / "config.json", tmp_path / "config.json")
    (folder / "config.json").symlink_to(moved)
    with pytest.raises(CheckpointUnsafe, match="leaves the folder"):
        bring(source, tmp_path / "out")


def test_a_link_inside_the_folder_is_followed(folder: Path, tmp_path: Path) -> None:
    plain = pin(folder)["source"]["revision"]
    (folder / "config.json").rename(folder / "real.json")
    (folder / "config.json").symlink_to("real.json")
    source = pin(folder)["source"]
    assert source["revision"] == plain
    bring(source, tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").is_symlink()


@pytest.mark.parametrize("depth", [0, 1])
def test_a_folder_that_became_a_link_is_not_followed(folder: Path, tmp_path: Path, depth: int) -> None:
    """The service admitted what the path led to when the job came; its owner may not lead it elsewhere."""
    source = pin(folder)["source"]
    replaced = [folder, *folder.parents][depth]
    secret = tmp_path.with_name(f"{tmp_path.name}-secret")
    replaced.rename(secret)
    replaced.symlink_to(secret)
    with pytest.raises(SourceChanged, match="through a link"):
        pin(folder)
    with pytest.raises(SourceChanged, match="through a link"):
        bring(source, secret / "out")
    replaced.unlink()
    secret.rename(replaced)
    bring(source, tmp_path / "out")


def test_a_folder_that_becomes_a_link_while_it_is_read_is_not_followed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = pin(folder)["source"]
    open_regular = folder_source._open_folder

    def swap(path: Path) -> Any:
        # After all was judged, before the first file is opened.
        if not path.is_symlink():
            path.rename(tmp_path / "secret")
            path.symlink_to(tmp_path / "secret")
        return open_regular(path)

    monkeypatch.setattr(folder_source, "_open_folder", swap)
    with pytest.raises(SourceChanged, match="through a link"):
        bring(source, tmp_path / "out")
    assert folder.is_symlink(), "control: it was swapped"


def test_a_link_to_nothing_is_named(folder: Path) -> None:
    (folder / "evaluation.jsonl").symlink_to("nowhere")
    with pytest.raises(SourceNotFound, match=r"evaluation\.jsonl .* link to nothing"):
        pin(folder)


def test_a_pipe_does_not_hang_the_step(folder: Path) -> None:
    os.mkfifo(folder / "evaluation.jsonl")
    with pytest.raises(CheckpointUnsafe, match="not a regular file"):
        pin(folder)


def test_an_unreadable_file_is_forbidden(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_really = os.open

    def refuse(path: str, *rest: Any, **options: Any) -> int:
        if path == "config.json":
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return open_really(path, *rest, **options)

    # Permissions do not bind the superuser, whom tests may run as.
    monkeypatch.setattr("workers.fetch.folder.os.open", refuse)
    with pytest.raises(SourceForbidden, match=r"config\.json may not be read"):
        pin(folder)


def test_a_full_disk_is_retryable_and_named(folder: Path, tmp_path: Path) -> None:
    source = pin(folder)["source"]
    output_dir = tmp_path / "out"
    output_dir.mkdir()
    (output_dir / "model.safetensors").symlink_to("/dev/full")
    with pytest.raises(DiskFull, match="No space is left") as caught:
        bring(source, output_dir)
    assert caught.value.retryable
