"""Checkpoints as transformers writes them pass, and are described as transformers counts them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import LLAMA3_ROPE_SCALING, TokenizerKind, build_model, write_checkpoint
from tests.unit.workers.fetch.tiny_checkpoint import ignore_progress
from workers.fetch import plan


def run(folder: Path) -> dict[str, Any]:
    params = {"engines": ["auto"], "formats": ["task", "litertlm", "tflite"]}
    return plan.run(params, {"checkpoint": folder}, folder / "none", ignore_progress)


@pytest.mark.parametrize(
    ("tokenizer", "kind"), [("byte_level", "json"), ("metaspace", "json"), ("sentencepiece", "sentencepiece")]
)
def test_every_tokenizer_of_the_field_passes(tmp_path: Path, tokenizer: TokenizerKind, kind: str) -> None:
    figures = run(write_checkpoint(tmp_path / "c", tokenizer=tokenizer, evaluation=[("1+1=", "2")]))
    assert (figures["tokenizer"], figures["has_chat_template"], figures["has_evaluation"]) == (kind, True, True)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"num_key_value_heads": 4, "head_dim": 32},
        {"rope_scaling": LLAMA3_ROPE_SCALING},
    ],
    ids=str,
)
def test_parameters_are_those_that_transformers_counts(tmp_path: Path, config: dict[str, Any]) -> None:
    folder = write_checkpoint(tmp_path / "c", config=config, dtype="float32", shard_size="100KB", chat_template=None)
    figures = run(folder)
    parameters = build_model(config).num_parameters()
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert (figures["parameters"], figures["weights_bytes"]) == (parameters, 4 * parameters)
    assert (figures["weights_dtype"], figures["has_chat_template"]) == ("float32", False)
