"""Conversions that several tests share: each takes half a minute, so each runs once a session."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import LLAMA3_ROPE_SCALING, write_checkpoint
from workers.convert import bundle, convert, quantize

PREFILL_LENGTHS = (16, 64)
CONTEXT_LENGTH = 256


def ignore(_message: str, _fraction: float | None = None) -> None:
    """Take progress and say nothing."""


@dataclass(frozen=True)
class Workshop:
    """One checkpoint and the float graph that one engine made of it; makes the rest on demand, once."""

    checkpoint: Path
    convert: Path
    figures: dict[str, Any]
    folder: Path

    def quantize(self, recipe: str) -> Path:
        """Return the folder of the graph under a recipe."""
        folder = self.folder / recipe
        if not folder.exists():
            folder.mkdir()
            self.quantize_anew(recipe, folder)
        return folder

    def quantize_anew(
        self, recipe: str, folder: Path, graph_dir: Path | None = None, upload: Path | None = None, **params: Any
    ) -> dict[str, Any]:
        """Quantize the graph, or another of this checkpoint, into `folder`; returns the figures."""
        inputs = {"convert": graph_dir or self.convert, "checkpoint": self.checkpoint}
        if upload is not None:
            inputs["calibration"] = upload.parent
        return quantize.run({"recipe": recipe, "context_length": CONTEXT_LENGTH, **params}, inputs, folder, ignore)

    def bundle(self, recipe: str, bundle_format: str) -> Path:
        """Return the bundle of a recipe's graph."""
        folder = self.folder / f"{recipe}-{bundle_format}"
        if not folder.exists():
            inputs = {"checkpoint": self.checkpoint, "quantize": self.quantize(recipe)}
            folder.mkdir()
            bundle.run({"format": bundle_format, "context_length": CONTEXT_LENGTH}, inputs, folder, ignore)
        return folder / f"model.{bundle_format}"


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint with most of what a Llama may have: grouped heads, a head size of its own, llama3 rope."""
    rope = {**LLAMA3_ROPE_SCALING, "rope_theta": 20_000.0}
    # Rows in multiples of 128, so that every blockwise recipe applies.
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    config = {**sizes, "tie_word_embeddings": True, "rope_parameters": rope}
    folder = tmp_path_factory.mktemp("tiny")
    return write_checkpoint(folder, config=config, seed=3, shard_size="50KB")


def run_engine(engine: str, checkpoint: Path, folder: Path) -> Workshop:
    """Convert a checkpoint with one engine into `folder`."""
    output = folder / "convert"
    output.mkdir()
    params = {"engine": engine, "prefill_lengths": list(PREFILL_LENGTHS), "context_length": CONTEXT_LENGTH}
    figures = convert.run(params, {"checkpoint": checkpoint}, output, ignore)
    return Workshop(checkpoint, output, figures, folder)


@pytest.fixture(scope="session")
def reauthored_workshop(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """Return the tiny checkpoint converted by the engine `reauthored`."""
    return run_engine("reauthored", tiny_checkpoint, tmp_path_factory.mktemp("reauthored"))


@pytest.fixture(scope="session")
def traced_workshop(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """Return the tiny checkpoint converted by the engine `traced`."""
    return run_engine("traced", tiny_checkpoint, tmp_path_factory.mktemp("traced"))


@pytest.fixture(scope="session", params=["reauthored", "traced"])
def workshop(request: pytest.FixtureRequest) -> Workshop:
    """Return the tiny checkpoint converted by each engine in turn."""
    made: Workshop = request.getfixturevalue(f"{request.param}_workshop")
    return made
