"""Verification of both engines' artifacts, and what it refuses because it does not run or is not what it claims."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from litert_lm_builder.runtime.proto import llm_metadata_pb2

from service import gates
from service.errors import CheckpointInvalid, UnknownName, VerificationFailed
from tests.convert.conftest import CONTEXT_LENGTH, PREFILL_LENGTHS, Workshop, ignore
from workers.convert import bundle, bundle_reader
from workers.convert.tokenizer import carry_as_is
from workers.verify import reference, verify
from workers.verify.graph import Graph

LENGTHS: dict[str, Any] = {"context_length": CONTEXT_LENGTH, "prefill_lengths": list(PREFILL_LENGTHS)}


@pytest.fixture(scope="module")
def answers(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the tiny checkpoint itself answers."""
    folder = tmp_path_factory.mktemp("reference")
    reference.run(LENGTHS, {"checkpoint": tiny_checkpoint}, folder, ignore)
    return folder


def prove(
    workshop: Workshop, answers: Path, output_dir: Path, kind: str = "tflite", recipe: str = "none", **changed: Any
) -> dict[str, Any]:
    """Verify one artifact of a workshop; `changed` overrides inputs (paths) and parameters.

    A bundle is verified in the folder in which the proof of its graph was left.
    """
    inputs = {"reference": answers, "quantize": workshop.quantize(recipe)}
    if kind != "tflite":
        inputs |= {"bundle": workshop.bundle(recipe, kind).parent, "verify_tflite": output_dir}
    inputs |= {name: changed.pop(name) for name in list(changed) if isinstance(changed[name], Path)}
    return verify.run({"format": kind, "recipe": recipe, **LENGTHS, **changed}, inputs, output_dir, ignore)


@pytest.mark.parametrize("recipe", ["none", "dynamic_int8"])
def test_artifacts_of_both_engines_pass_the_default_gates_in_all_formats(
    workshop: Workshop, answers: Path, tmp_path: Path, recipe: str
) -> None:
    figures = [prove(workshop, answers, tmp_path, kind, recipe) for kind in ("tflite", "litertlm", "task")]
    merged = gates.merge_figures(figures)
    assert [verdict.sentence for verdict in gates.judge(recipe, merged) if not verdict.passed] == []
    assert merged["formats"] == ["litertlm", "task", "tflite"]
    assert set(merged["parity"]["per_signature"]) == {
        "decode",
        "context_end",
        *(f"prefill_{n}" for n in PREFILL_LENGTHS),
    }
    assert merged["parity"]["positions"] >= 64
    assert merged["context"] == {"stated_tokens": 256, "usable_tokens": 256, "unusable_tokens": 0}
    assert json.loads(json.dumps(merged, allow_nan=False)) == merged
    assert [path.name for path in tmp_path.iterdir()] == ["graph.json"]


def test_inputs_are_left_as_they_were(reauthored_workshop: Workshop, answers: Path, tmp_path: Path) -> None:
    folder = reauthored_workshop.bundle("none", "litertlm").parent
    before = sorted(folder.iterdir())
    prove(reauthored_workshop, answers, tmp_path)
    prove(reauthored_workshop, answers, tmp_path, "litertlm")
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("kind", ["tflite", "litertlm"])
def test_figures_are_the_same_twice(reauthored_workshop: Workshop, answers: Path, tmp_path: Path, kind: str) -> None:
    prove(reauthored_workshop, answers, tmp_path, "tflite", "dynamic_int8")
    left = (tmp_path / "graph.json").read_bytes()
    first, second = (prove(reauthored_workshop, answers, tmp_path, kind, "dynamic_int8") for _ in range(2))
    assert first == second
    assert (tmp_path / "graph.json").read_bytes() == left


def test_source_answers_the_same_bytes_twice(tiny_checkpoint: Path, answers: Path, tmp_path: Path) -> None:
    reference.run(LENGTHS, {"checkpoint": tiny_checkpoint}, tmp_path, ignore)
    for name in ("reference.npz", "reference.json", "tokenizer.json"):
        assert (tmp_path / name).read_bytes() == (answers / name).read_bytes()


@pytest.mark.parametrize("kind", ["litertlm", "task"])
def test_bundle_with_another_graph_is_not_verified(
    reauthored_workshop: Workshop, answers: Path, tmp_path: Path, kind: str
) -> None:
    path = tmp_path / f"model.{kind}"
    content = bytearray(reauthored_workshop.bundle("none", kind).read_bytes())
    graph = bundle_reader.extract_graph(reauthored_workshop.bundle("none", kind), kind)
    content[content.index(graph[-4096:].tobytes()) + 4095] ^= 1
    path.write_bytes(content)
    prove(reauthored_workshop, answers, tmp_path)
    with pytest.raises(VerificationFailed, match="not the one that was proven"):
        prove(reauthored_workshop, answers, tmp_path, kind, bundle=tmp_path)


@pytest.mark.parametrize("kind", ["litertlm", "task"])
def test_bundle_of_another_recipe_is_not_verified(
    reauthored_workshop: Workshop, answers: Path, tmp_path: Path, kind: str
) -> None:
    prove(reauthored_workshop, answers, tmp_path, "tflite", "dynamic_int8")
    with pytest.raises(VerificationFailed, match="not the one that was proven"):
        prove(reauthored_workshop, answers, tmp_path, kind)


@pytest.mark.parametrize("kind", ["litertlm", "task"])
def test_bundle_that_is_none_is_not_verified(
    reauthored_workshop: Workshop, answers: Path, tmp_path: Path, kind: str
) -> None:
    (tmp_path / f"model.{kind}").write_bytes(b"not a bundle" * 100)
    prove(reauthored_workshop, answers, tmp_path)
    with pytest.raises(VerificationFailed, match="cannot be read"):
        prove(reauthored_workshop, answers, tmp_path, kind, bundle=tmp_path)


def test_bundle_whose_context_is_shorter_than_stated_is_not_verified(
    reauthored_workshop: Workshop, answers: Path, tmp_path: Path
) -> None:
    sound = reauthored_workshop.bundle("none", "litertlm")
    metadata = llm_metadata_pb2.LlmMetadata.FromString(bundle_reader.extract_metadata(sound, "litertlm"))
    metadata.max_num_tokens = CONTEXT_LENGTH // 2
    graph = reauthored_workshop.quantize("none") / "model.tflite"
    carried = carry_as_is(reauthored_workshop.checkpoint)
    bundle.write_litertlm(tmp_path / "model.litertlm", graph, carried, metadata.SerializeToString())
    prove(reauthored_workshop, answers, tmp_path)
    with pytest.raises(VerificationFailed, match=r"LiteRT-LM fails on model\.litertlm"):
        prove(reauthored_workshop, answers, tmp_path, "litertlm", bundle=tmp_path)


@pytest.mark.parametrize(
    ("changed", "match"),
    [({"context_length": 128}, "not the stated 128"), ({"prefill_lengths": [16]}, r"not the stated \[16\]")],
)
def test_graph_that_is_not_as_stated_is_not_verified(
    workshop: Workshop, answers: Path, tmp_path: Path, changed: dict[str, Any], match: str
) -> None:
    with pytest.raises(VerificationFailed, match=match):
        prove(workshop, answers, tmp_path, **changed)


def test_chunk_that_would_reach_beyond_the_context_is_not_fed(reauthored_workshop: Workshop) -> None:
    graph = Graph(reauthored_workshop.quantize("none") / "model.tflite")
    graph.prefill([5] * (CONTEXT_LENGTH - 1))
    graph.context_length = CONTEXT_LENGTH - 6
    with pytest.raises(VerificationFailed, match="multiple of the largest prefill length"):
        graph.prefill([5] * (CONTEXT_LENGTH - 7))


def test_generation_that_reuses_the_caches_is_that_of_a_fresh_graph(reauthored_workshop: Workshop) -> None:
    path = reauthored_workshop.quantize("none") / "model.tflite"
    prompt = list(range(5, 105))
    used = Graph(path)
    first = used.generate(prompt, 6, frozenset())
    again = used.generate(prompt, 6, frozenset())
    other = used.generate([*prompt[:50], *prompt[20:50]], 6, frozenset())
    assert again == first == Graph(path).generate(prompt, 6, frozenset())
    assert other == Graph(path).generate([*prompt[:50], *prompt[20:50]], 6, frozenset()) != first


def test_truncated_graph_is_not_verified(reauthored_workshop: Workshop, answers: Path, tmp_path: Path) -> None:
    content = (reauthored_workshop.quantize("none") / "model.tflite").read_bytes()
    (tmp_path / "model.tflite").write_bytes(content[: len(content) // 2])
    with pytest.raises(VerificationFailed, match="does not load"):
        prove(reauthored_workshop, answers, tmp_path, quantize=tmp_path)


def test_graph_that_answers_nan_is_not_verified(
    reauthored_workshop: Workshop, answers: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    content = bytearray((reauthored_workshop.quantize("none") / "model.tflite").read_bytes())
    largest = find_float_run(content)
    content[largest : largest + 4096] = np.full(1024, np.nan, dtype=np.float32).tobytes()
    (tmp_path / "model.tflite").write_bytes(content)
    with pytest.raises(VerificationFailed, match="NaN or infinite logits"):
        prove(reauthored_workshop, answers, tmp_path, quantize=tmp_path)


def find_float_run(content: bytearray) -> int:
    """Where at least 4 KiB of plausible weights begin."""
    floats = np.frombuffer(content, dtype=np.float32, count=len(content) // 4)
    plausible = (np.abs(floats) > 1e-6) & (np.abs(floats) < 10)
    runs = np.convolve(plausible.astype(np.float32), np.ones(4096), mode="valid")
    return int(runs.argmax()) * 4


def test_missing_artifact_is_not_verified(reauthored_workshop: Workshop, answers: Path, tmp_path: Path) -> None:
    with pytest.raises(VerificationFailed, match=r"no model\.task to verify"):
        prove(reauthored_workshop, answers, tmp_path, "task", bundle=tmp_path)


def test_unknown_format_is_refused(reauthored_workshop: Workshop, answers: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="litertlm"):
        verify.run({"format": "litert-lm", "recipe": "none", **LENGTHS}, {}, tmp_path, ignore)


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ('{"prompt": "1+1="}', "line 2"),
        ("no json", "line 2"),
        ('{"prompt": "", "answer": "2"}', "line 2.*none empty"),
        ('["1+1=", "2"]', "line 2"),
        ('{"prompt": "%s", "answer": "2"}' % ("long " * 400), "does not fit"),
    ],
)
def test_evaluation_that_cannot_be_asked_is_refused(
    tiny_checkpoint: Path, tmp_path: Path, line: str, match: str
) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, checkpoint)
    (checkpoint / "evaluation.jsonl").write_text(f'{{"prompt": "1+2=", "answer": "3"}}\n{line}\n', encoding="utf-8")
    with pytest.raises(CheckpointInvalid, match=match):
        reference.run(LENGTHS, {"checkpoint": checkpoint}, tmp_path, ignore)
