"""The host benchmark on real artifacts in the real runtimes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from service.errors import BenchmarkFailed
from workers.convert import bundle, convert
from workers.devices import host

CONTEXT_LENGTH = 128
PREFILL_LENGTHS = [8, 32]


def ignore(message: str, fraction: float | None = None) -> None:
    """Take progress."""


@pytest.fixture(scope="module")
def artifact_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the example in all three formats.

    Not a random model: what that one decodes may be no text, and then the runtime gives up.
    """
    checkpoint = Path(__file__).parents[2] / "examples" / "addition"
    artifact = tmp_path_factory.mktemp("artifact")
    lengths = {"prefill_lengths": PREFILL_LENGTHS, "context_length": CONTEXT_LENGTH}
    convert.run({"engine": "reauthored", **lengths}, {"checkpoint": checkpoint}, artifact, ignore)
    for bundle_format in ("task", "litertlm"):
        inputs = {"checkpoint": checkpoint, "quantize": artifact}
        bundle.run({"format": bundle_format, **lengths}, inputs, artifact, ignore)
    return artifact


def benchmark(artifact_dir: Path, output_dir: Path, **params: Any) -> dict[str, Any]:
    asked = {"processes": 3, "prefill_tokens": 32, "decode_tokens": 16, "threads": 1, **params}
    return host.run(asked, {"artifact": artifact_dir}, output_dir, ignore)


@pytest.mark.parametrize("bundle_format", ["litertlm", "task"])
def test_bundle_is_measured_in_fresh_processes(artifact_dir: Path, tmp_path: Path, bundle_format: str) -> None:
    before = sorted(artifact_dir.iterdir())
    figures = benchmark(artifact_dir, tmp_path, format=bundle_format)
    assert (figures["prefill_tokens"], figures["decode_tokens"], figures["threads"]) == (32, 16, 1)
    for name in ("prefill_tokens_per_s", "decode_tokens_per_s", "ttft_s", "init_s"):
        samples = figures[name]["samples"]
        assert min(samples) > 0
        # Measured, not copied: three processes never agree to the last digit.
        assert len(set(samples)) == 3
        assert min(samples) <= figures[name]["median"] <= max(samples)
        assert figures["cold"][name] not in samples
    # More than the file that it maps, less than any runaway.
    size_bytes = (artifact_dir / f"model.{bundle_format}").stat().st_size
    assert size_bytes < figures["peak_rss_bytes"] < 1 << 30
    assert 0 < figures["peak_anon_bytes"] < figures["peak_rss_bytes"]
    assert figures["verdict"] in ("stable", "noisy", "hot")
    kept = json.loads((tmp_path / "measurement.json").read_text())
    assert [sample["ttft_s"] for sample in kept["captures"][-1]["samples"]] == figures["ttft_s"]["samples"]
    assert sorted(artifact_dir.iterdir()) == before, "the runtime's cache was written beside the artifact"


def test_every_signature_of_a_graph_is_timed(artifact_dir: Path, tmp_path: Path) -> None:
    figures = benchmark(artifact_dir, tmp_path, format="tflite")
    assert set(figures["latency_ms"]) == {"decode", "prefill_8", "prefill_32"}
    for latency in figures["latency_ms"].values():
        assert len(latency["samples"]) == 3
        assert latency["iterations"]["count"] >= 15
        assert 0 < latency["iterations"]["p50"] <= latency["iterations"]["p90"] <= latency["iterations"]["p99"]


def test_request_that_the_runtime_refuses_fails_although_it_exits_with_zero(artifact_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(BenchmarkFailed, match=r"prefill_tokens_per_s = 0\.0.*too long"):
        benchmark(artifact_dir, tmp_path, format="litertlm", prefill_tokens=CONTEXT_LENGTH + 1)


def test_decode_cut_by_the_context_is_short(artifact_dir: Path, tmp_path: Path) -> None:
    figures = benchmark(artifact_dir, tmp_path, format="litertlm", decode_tokens=2 * CONTEXT_LENGTH)
    assert 0 < figures["decode_tokens"] <= CONTEXT_LENGTH - 32
    assert figures["verdict"] == "short"


@pytest.mark.parametrize("artifact_format", ["tflite", "task", "litertlm"])
def test_damaged_artifact_fails(artifact_dir: Path, tmp_path: Path, artifact_format: str) -> None:
    name = f"model.{artifact_format}"
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    shutil.copy(artifact_dir / name, damaged)
    with (damaged / name).open("r+b") as stream:
        stream.truncate((artifact_dir / name).stat().st_size // 2)
    with pytest.raises(BenchmarkFailed, match="cold process"):
        benchmark(damaged, tmp_path, format=artifact_format)
