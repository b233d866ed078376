"""What the step `convert` refuses before it converts, and how the converter's failures arrive."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from litert_torch import progress as tool_progress

from service.errors import ArchitectureUnsupported, ConversionFailed, DiskFull, RequestUnfit, UnknownName
from tests.convert.conftest import Workshop, ignore
from workers.convert import convert, toolfixes

PARAMS: dict[str, Any] = {"engine": "reauthored", "prefill_lengths": [16], "context_length": 128}


def run(checkpoint: Path, output_dir: Path, **changes: Any) -> dict[str, Any]:
    return convert.run({**PARAMS, **changes}, {"checkpoint": checkpoint}, output_dir, ignore)


def write_config(folder: Path, checkpoint: Path, **changes: Any) -> Path:
    """Write the config of a checkpoint, changed, without any weights."""
    folder.mkdir()
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, **changes}), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context_length": 257}, "257 exceeds the model's 256"),
        ({"prefill_lengths": [16, 129]}, "129 exceeds the context length 128"),
        ({"prefill_lengths": []}, "one or more whole numbers"),
        ({"prefill_lengths": [0, 16]}, "one or more whole numbers"),
    ],
)
def test_lengths_that_the_checkpoint_cannot_do(
    changes: dict[str, Any], message: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(RequestUnfit, match=message):
        run(tiny_checkpoint, tmp_path, **changes)


def test_an_unknown_engine_is_refused_with_the_nearest(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="Did you mean 'traced'"):
        run(tiny_checkpoint, tmp_path, engine="tracing")


def test_an_unknown_architecture_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = write_config(tmp_path / "other", tiny_checkpoint, architectures=["MambaForCausalLM"])
    with pytest.raises(ArchitectureUnsupported, match="MambaForCausalLM"):
        run(folder, tmp_path)


def test_an_engine_that_does_not_take_the_architecture_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = write_config(tmp_path / "other", tiny_checkpoint, architectures=["MistralForCausalLM"])
    with pytest.raises(RequestUnfit, match="does not take MistralForCausalLM; ask for reauthored"):
        run(folder, tmp_path, engine="traced")


def test_a_context_beyond_the_attention_window_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = write_config(tmp_path / "other", tiny_checkpoint, architectures=["MistralForCausalLM"], sliding_window=64)
    with pytest.raises(RequestUnfit, match="window of 64 tokens"):
        run(folder, tmp_path)


def test_a_failing_converter_is_a_failed_conversion(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Path:
        raise RuntimeError("failed to legalize operation")

    monkeypatch.setattr("workers.convert.reauthored.convert", fail)
    with pytest.raises(ConversionFailed, match="RuntimeError: failed to legalize operation"):
        run(tiny_checkpoint, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_apart(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("workers.convert.traced.convert", fail)
    with pytest.raises(DiskFull, match="No space left"):
        run(tiny_checkpoint, tmp_path, engine="traced")


def test_a_graph_without_the_signatures_asked_for_is_refused(
    reauthored_workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def give_another(*arguments: Any) -> Path:
        return Path(shutil.copy(reauthored_workshop.convert / "model.tflite", arguments[-1]))

    monkeypatch.setattr("workers.convert.reauthored.convert", give_another)
    with pytest.raises(ConversionFailed, match=r"expected were \['decode', 'prefill_16'\]"):
        run(reauthored_workshop.checkpoint, tmp_path)


def test_the_tools_tasks_become_progress(capsys: pytest.CaptureFixture[str]) -> None:
    heard: list[str] = []
    with toolfixes.tool_tasks_reported(heard.append):
        with tool_progress.task("LiteRT-Torch Convert"), tool_progress.task("Torch Export: decode"):
            with tool_progress.task("ExportedProgram Run Decompositions"):
                pass
        with tool_progress.task("Write Model to /tmp/model.tflite"):
            pass
    assert heard == ["Torch Export: decode", "Write Model"]
    assert capsys.readouterr().out == ""
