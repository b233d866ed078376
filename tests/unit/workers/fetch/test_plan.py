"""The step `plan`: facts, defaults, and requests that a checkpoint cannot fulfil."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from service.errors import (
    CalibrationInvalid,
    ChatTemplateInvalid,
    CheckpointUnsafe,
    RecipeUnfit,
    RequestUnfit,
    TokenizerUnsupported,
    UnknownName,
)
from service.recipes import parse_own_recipe
from tests.unit.workers.fetch import tiny_checkpoint as tiny
from workers.fetch import plan


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.write_tiny(tmp_path / "checkpoint")


def run(folder: Path, **params: Any) -> dict[str, Any]:
    asked = {"engines": ["auto"], "formats": ["tflite"], "prefill_lengths": None, "context_length": None, **params}
    return plan.run(asked, {"checkpoint": folder}, folder / "none", tiny.ignore_progress)


def test_facts_are_complete(folder: Path) -> None:
    figures = run(folder, engines=["auto", "traced", "reauthored"])
    reasons = figures.pop("engine_reasons")
    predicted = figures.pop("predicted_peak_anon_bytes")
    assert set(predicted) == {"reference", "bundle", "convert:reauthored", "convert:traced"}
    assert reasons["auto"].startswith("auto chooses reauthored for LlamaForCausalLM")
    parameters = sum(values.size for values in tiny.build_tensors().values())
    assert figures == {
        "architecture": "LlamaForCausalLM",
        "family": "llama",
        "engines": {"auto": "reauthored", "traced": "traced", "reauthored": "reauthored"},
        "prefill_lengths": [32],
        "context_length": 64,
        "model_context_length": 64,
        "parameters": parameters,
        "weights_bytes": 2 * parameters,
        "weights_dtype": "bfloat16",
        "tokenizer": "json",
        "has_chat_template": True,
        "has_evaluation": False,
        "vocabulary_size": 12,
        "layers": 2,
    }
    assert json.loads(json.dumps(figures)) == figures


def test_code_that_the_checkpoint_names_is_ignored_where_that_is_asked_for(folder: Path) -> None:
    custom = {"AutoConfig": "someone/else--configuration.Config", "AutoTokenizer": ["tokenization.Tokenizer", None]}
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        path = folder / name
        document = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        tiny.write_json(path, {**document, "auto_map": custom, "custom_pipelines": {"x": {"impl": "own.py"}}})
        with pytest.raises(CheckpointUnsafe, match=f"^{name}: .*--ignore-custom-code") as caught:
            run(folder)
        assert caught.value.details["field"] in ("auto_map", "custom_pipelines")
        assert run(folder, ignore_custom_code=True)["family"] == "llama"
        path.write_text(json.dumps(document), encoding="utf-8")


@pytest.mark.parametrize(
    "fields",
    [
        {"trust_remote_code": True},
        {"custom_generate": "own"},
        {"text_config": {"auto_map": {"AutoConfig": "own.Config"}}},
        {"auto_map": {}, "something": "own.py"},
    ],
    ids=str,
)
def test_what_would_run_code_is_refused_even_then(folder: Path, fields: dict[str, Any]) -> None:
    tiny.write_json(folder / "config.json", {**tiny.CONFIG, **fields})
    with pytest.raises(CheckpointUnsafe, match=r"^config\.json: ") as caught:
        run(folder, ignore_custom_code=True)
    assert "ignore-custom-code" not in str(caught.value)


@pytest.mark.parametrize(
    ("model_context", "context", "prefill"),
    [(2, 2, [1]), (64, 64, [32]), (251, 250, [125]), (512, 512, [128]), (131072, 1280, [128])],
)
def test_default_lengths_follow_the_model(tmp_path: Path, model_context: int, context: int, prefill: list[int]) -> None:
    figures = run(tiny.write_tiny(tmp_path / "c", max_position_embeddings=model_context))
    assert (figures["context_length"], figures["prefill_lengths"]) == (context, prefill)
    assert figures["model_context_length"] == model_context


def test_lengths_are_taken_as_asked_in_ascending_order(folder: Path) -> None:
    figures = run(folder, prefill_lengths=[48, 8, 48], context_length=48)
    assert (figures["context_length"], figures["prefill_lengths"]) == (48, [8, 48])


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        ({"context_length": 65}, "65 tokens was asked for, but the model's is 64"),
        ({"context_length": 1}, "at least 2"),
        ({"context_length": 32, "prefill_lengths": [8, 33]}, "33 tokens exceeds the context of 32"),
        ({"context_length": 50, "prefill_lengths": [8, 32]}, "context of 32 or 64 tokens"),
        ({"context_length": 61}, "no multiple of the largest prefill length, 30"),
        ({"prefill_lengths": [0]}, "not positive"),
        ({"prefill_lengths": []}, "ask for 1 to 8"),
        ({"prefill_lengths": list(range(1, 10))}, "ask for 1 to 8"),
    ],
)
def test_lengths_that_the_checkpoint_cannot_have_are_unfit(folder: Path, params: dict[str, Any], reason: str) -> None:
    with pytest.raises(RequestUnfit, match=reason):
        run(folder, **params)


def test_an_engine_that_does_not_convert_the_family_is_unfit(tmp_path: Path) -> None:
    folder = tiny.write_tiny(tmp_path / "c", architectures=["MistralForCausalLM"], model_type="mistral")
    assert run(folder)["engines"] == {"auto": "reauthored"}
    with pytest.raises(RequestUnfit, match=r"'traced' does not convert MistralForCausalLM; ask for reauthored"):
        run(folder, engines=["traced"])


def test_unknown_names_offer_the_nearest(folder: Path) -> None:
    with pytest.raises(UnknownName, match="'litertlm'"):
        run(folder, formats=["litert-lm"])
    with pytest.raises(UnknownName, match="'traced'"):
        run(folder, engines=["trace"])


def test_task_needs_a_tokenizer_that_can_be_rebuilt(folder: Path) -> None:
    assert run(folder, formats=["task"])
    tiny.write_json(folder / "tokenizer.json", {"model": {"type": "WordPiece", "vocab": {"a": 0}}})
    assert run(folder, formats=["tflite", "litertlm"])
    with pytest.raises(TokenizerUnsupported, match=r"WordPiece model.* Ask for litertlm"):
        run(folder, formats=["litertlm", "task"])


def test_an_endless_chat_template_is_a_sentence_and_not_a_deadline(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.fetch.chat_template.TIME_S", 1)
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    (folder / "chat_template.jinja").write_text(endless)
    with pytest.raises(ChatTemplateInvalid, match=r"chat_template\.jinja does not end within"):
        run(folder)


def test_heavy_libraries_are_never_imported() -> None:
    script = (
        "import sys, workers.fetch.plan, workers.fetch.fetch, workers.fetch.resolve;"
        "print([name for name in ('torch', 'transformers', 'tensorflow', 'litert_torch') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


BLOCKWISE = {
    "regex": ".*",
    "operation": "FULLY_CONNECTED",
    "op_config": {
        "weight_tensor_config": {"num_bits": 4, "granularity": "BLOCKWISE_64"},
        "compute_precision": "INTEGER",
    },
}
STATIC = {
    "regex": ".*",
    "operation": "INPUT",
    "op_config": {
        "activation_tensor_config": {"num_bits": 8, "symmetric": False},
        "weight_tensor_config": {"num_bits": 8, "granularity": "CHANNELWISE"},
        "compute_precision": "INTEGER",
    },
}


def test_blocks_that_do_not_divide_the_rows_are_refused_with_the_matrix(folder: Path) -> None:
    hidden = tiny.CONFIG["hidden_size"]
    assert hidden % 32
    run(folder, recipes=["dynamic_int8", "mixed_int4", "static_int8"])
    with pytest.raises(RecipeUnfit, match=rf"blocks of 32, .* model\.embed_tokens\.weight have {hidden}") as caught:
        run(folder, recipes=["dynamic_int8", "dynamic_int4_block32"])
    assert caught.value.message.endswith("Ask for mixed_int4 or dynamic_int4.")


def test_own_recipes_are_held_against_shapes_and_engines(folder: Path) -> None:
    with pytest.raises(RecipeUnfit, match="blocks of 64"):
        run(folder, recipes=["mine"], own_recipes={"mine": parse_own_recipe("mine", [BLOCKWISE])})
    # A part of the names may well be divisible: the quantizer decides.
    part = parse_own_recipe("mine", [{**BLOCKWISE, "regex": "down_proj"}])
    run(folder, recipes=["mine"], own_recipes={"mine": part})
    with pytest.raises(RecipeUnfit, match="cannot run as tflite from the engine reauthored"):
        run(folder, recipes=["mine"], own_recipes={"mine": parse_own_recipe("mine", [STATIC])})


def test_calibration_prompts_need_a_chat_template(folder: Path) -> None:
    prompts = {"kind": "prompts"}
    run(folder, recipes=["static_int8"], calibration=prompts)
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    del config["chat_template"]
    tiny.write_json(folder / "tokenizer_config.json", config)
    run(folder, recipes=["dynamic_int8"], calibration=prompts)
    run(folder, recipes=["static_int8"], calibration={"kind": "text"})
    with pytest.raises(CalibrationInvalid, match="no chat template"):
        run(folder, recipes=["static_int8"], calibration=prompts)
