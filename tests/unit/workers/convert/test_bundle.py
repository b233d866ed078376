"""What a bundle holds, byte for byte; the graph is any bytes here."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from litert_lm_builder import litertlm_core, litertlm_peek
from litert_lm_builder.runtime.proto import llm_metadata_pb2

from service.errors import BundleFailed, UnknownName
from tests.checkpoints import TokenizerKind, write_tokenizer
from workers.convert import bundle, bundle_reader
from workers.convert.tokenizer import carry_as_is

GRAPH = bytes(range(256)) * 200 + b"end"
FORMATS = ("litertlm", "task")


def ignore(_message: str, _fraction: float | None = None) -> None:
    """Take progress and say nothing."""


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Path]:
    return write_inputs(tmp_path, "byte_level")


def write_inputs(folder: Path, kind: TokenizerKind) -> dict[str, Path]:
    checkpoint, quantize = folder / "checkpoint", folder / "quantize"
    write_tokenizer(checkpoint, kind)
    (checkpoint / "config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}), encoding="utf-8")
    quantize.mkdir()
    (quantize / "model.tflite").write_bytes(GRAPH)
    return {"checkpoint": checkpoint, "quantize": quantize}


def write(inputs: dict[str, Path], bundle_format: str, output_dir: Path) -> tuple[Path, dict[str, Any]]:
    output_dir.mkdir(exist_ok=True)
    params = {"format": bundle_format, "context_length": 128}
    figures = bundle.run(params, inputs, output_dir, ignore)
    return output_dir / f"model.{bundle_format}", figures


@pytest.mark.parametrize("bundle_format", FORMATS)
def test_the_graph_in_a_bundle_is_the_graph(inputs: dict[str, Path], tmp_path: Path, bundle_format: str) -> None:
    path, figures = write(inputs, bundle_format, tmp_path / "out")
    assert bytes(bundle_reader.extract_graph(path, bundle_format)) == GRAPH
    assert figures["size_bytes"] == path.stat().st_size
    assert [item.name for item in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("bundle_format", FORMATS)
def test_a_bundle_carries_metadata_and_tokenizer(inputs: dict[str, Path], tmp_path: Path, bundle_format: str) -> None:
    path, figures = write(inputs, bundle_format, tmp_path / "out")
    metadata = llm_metadata_pb2.LlmMetadata.FromString(bundle_reader.extract_metadata(path, bundle_format))
    assert metadata.max_num_tokens == 128
    carried = bundle_reader.extract_tokenizer(path, bundle_format)
    if bundle_format == "litertlm":
        assert carried == (inputs["checkpoint"] / "tokenizer.json").read_bytes()
        assert figures["tokenizer"] == {"kind": "hf_json", "mismatch_ratio": 0.0, "samples": 0}
    else:
        assert figures["tokenizer"]["kind"] == "sentencepiece_rebuilt"
        assert 0 < figures["tokenizer"]["mismatch_ratio"] < 0.5


@pytest.mark.parametrize("bundle_format", FORMATS)
def test_the_same_inputs_give_the_same_bytes(inputs: dict[str, Path], tmp_path: Path, bundle_format: str) -> None:
    first, _ = write(inputs, bundle_format, tmp_path / "first")
    second, _ = write(inputs, bundle_format, tmp_path / "second")
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("bundle_format", FORMATS)
def test_another_graph_gives_other_bytes(inputs: dict[str, Path], tmp_path: Path, bundle_format: str) -> None:
    first, _ = write(inputs, bundle_format, tmp_path / "first")
    (inputs["quantize"] / "model.tflite").write_bytes(GRAPH[::-1])
    second, _ = write(inputs, bundle_format, tmp_path / "second")
    assert first.read_bytes() != second.read_bytes()


def test_the_upstream_tool_reads_the_litertlm(
    inputs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = write(inputs, "litertlm", tmp_path / "out")
    dumped = tmp_path / "dumped"
    with (tmp_path / "peek.txt").open("w") as report:
        litertlm_peek.peek_litertlm_file(str(path), str(dumped), report)
    graphs = [item for item in dumped.iterdir() if item.suffix == ".tflite"]
    assert [graph.read_bytes() for graph in graphs] == [GRAPH]
    assert "prefill_decode" in graphs[0].name


def test_sections_of_a_litertlm_begin_at_blocks(inputs: dict[str, Path], tmp_path: Path) -> None:
    path, _ = write(inputs, "litertlm", tmp_path / "out")
    assert [section.begin % litertlm_core.BLOCK_SIZE for section in bundle_reader.list_sections(path)] == [0, 0, 0]


def test_the_graph_of_a_task_is_stored_at_a_page(inputs: dict[str, Path], tmp_path: Path) -> None:
    path, _ = write(inputs, "task", tmp_path / "out")
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert [entry.filename for entry in archive.infolist()] == [
            "TF_LITE_PREFILL_DECODE",
            "TOKENIZER_MODEL",
            "METADATA",
        ]
        assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}
    assert path.read_bytes().index(GRAPH) % 4096 == 0


def test_a_checkpoint_with_only_a_sentencepiece_model_becomes_a_litertlm(tmp_path: Path) -> None:
    inputs = write_inputs(tmp_path, "sentencepiece")
    (inputs["checkpoint"] / "tokenizer.json").unlink()
    path, figures = write(inputs, "litertlm", tmp_path / "out")
    assert figures["tokenizer"]["kind"] == "sentencepiece"
    carried = carry_as_is(inputs["checkpoint"]).content
    assert bundle_reader.extract_tokenizer(path, "litertlm") == carried


def test_an_unknown_format_is_refused_with_the_nearest(inputs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="Did you mean 'litertlm'"):
        bundle.run({"format": "litert-lm", "context_length": 128}, inputs, tmp_path, ignore)


def test_a_graph_whose_sizes_need_64_bits_stands_at_a_page(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", len(GRAPH) - 1)
    path, _ = write(inputs, "task", tmp_path / "out")
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    assert path.read_bytes().index(GRAPH) % 4096 == 0
    assert bytes(bundle_reader.extract_graph(path, "task")) == GRAPH


def test_a_file_that_is_no_bundle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(GRAPH)
    with pytest.raises(BundleFailed, match=r"model\.bin is not a \.litertlm file"):
        bundle_reader.extract_graph(path, "litertlm")
    with pytest.raises(BundleFailed, match=r"model\.bin is not a \.task file"):
        bundle_reader.extract_graph(path, "task")


def test_a_task_with_a_compressed_graph_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.task"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("TF_LITE_PREFILL_DECODE", GRAPH)
    with pytest.raises(BundleFailed, match="is compressed"):
        bundle_reader.extract_graph(path, "task")


def test_a_litertlm_with_two_tokenizers_is_refused(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = write(inputs, "litertlm", tmp_path / "out")
    sections = bundle_reader.list_sections(path)
    monkeypatch.setattr(bundle_reader, "list_sections", lambda _path: [*sections, *sections])
    with pytest.raises(BundleFailed, match="holds 2 sections"):
        bundle_reader.extract_graph(path, "litertlm")
