"""Chat templates in the runtime against transformers, and what happens when one is damaged or does not end.

One graph serves all: only the template in the checkpoint, in the source's answers and in the bundle differs.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from litert_lm_builder.runtime.proto import llm_metadata_pb2

from service import gates
from service.errors import ChatTemplateInvalid
from tests.chat_templates import TEMPLATES
from tests.convert.conftest import CONTEXT_LENGTH, PREFILL_LENGTHS, Workshop, ignore
from workers.convert import bundle, bundle_reader
from workers.convert.tokenizer import carry_as_is
from workers.verify import reference, runtime, source_conversations, verify

LENGTHS: dict[str, Any] = {"context_length": CONTEXT_LENGTH, "prefill_lengths": list(PREFILL_LENGTHS)}
ALL = {"user", "system", "turns", "unicode", "whitespace", "long", "tools", "tool_call"}

Prover = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def proof(reauthored_workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the proof of the one graph leaves."""
    answers, folder = tmp_path_factory.mktemp("reference"), tmp_path_factory.mktemp("proof")
    reference.run(LENGTHS, {"checkpoint": reauthored_workshop.checkpoint}, answers, ignore)
    inputs = {"reference": answers, "quantize": reauthored_workshop.quantize("none")}
    verify.run({"format": "tflite", "recipe": "none", **LENGTHS}, inputs, folder, ignore)
    return folder


def write_checkpoint(workshop: Workshop, folder: Path, template: str | None) -> Path:
    """Copy the checkpoint, with another chat template."""
    checkpoint = folder / "checkpoint"
    shutil.copytree(workshop.checkpoint, checkpoint)
    (checkpoint / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((checkpoint / "tokenizer_config.json").read_text(encoding="utf-8"))
    config.pop("chat_template", None)
    if template is not None:
        config["chat_template"] = template
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return checkpoint


@pytest.fixture
def prove(reauthored_workshop: Workshop, proof: Path, tmp_path: Path) -> Prover:
    """Verify a bundle of a checkpoint with a chat template; returns merged figures of the bundle alone."""

    def run(template: str | None, kind: str = "litertlm", damage: Callable[[str], str] | None = None) -> dict[str, Any]:
        checkpoint = write_checkpoint(reauthored_workshop, tmp_path, template)
        answers, folder = tmp_path / "reference", tmp_path / "bundle"
        answers.mkdir()
        folder.mkdir()
        reference.run(LENGTHS, {"checkpoint": checkpoint}, answers, ignore)
        inputs = {"checkpoint": checkpoint, "quantize": reauthored_workshop.quantize("none")}
        bundle.run({"format": kind, "context_length": CONTEXT_LENGTH}, inputs, folder, ignore)
        if damage is not None:
            damage_template(folder / f"model.{kind}", inputs["quantize"] / "model.tflite", checkpoint, damage)
        given = {"reference": answers, "bundle": folder, "verify_tflite": proof}
        return gates.merge_figures([verify.run({"format": kind, "recipe": "none", **LENGTHS}, given, tmp_path, ignore)])

    return run


def damage_template(path: Path, graph: Path, checkpoint: Path, damage: Callable[[str], str]) -> None:
    metadata = llm_metadata_pb2.LlmMetadata.FromString(bundle_reader.extract_metadata(path, "litertlm"))
    metadata.jinja_prompt_template = damage(metadata.jinja_prompt_template)
    bundle.write_litertlm(path, graph, carry_as_is(checkpoint), metadata.SerializeToString())


def refused(figures: dict[str, Any]) -> set[str]:
    return {each.gate for each in gates.judge("none", figures) if each.gate.startswith("conv") and not each.passed}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_runtime_renders_what_transformers_renders(prove: Prover, name: str) -> None:
    figures = prove(TEMPLATES[name])
    spoken = figures["conversation"]
    assert spoken.get("first_mismatch") is None
    assert (spoken["match_ratio"], spoken["misrendered"], spoken["misread"]) == (1.0, 0, 0)
    declined = {"mistral": set(), "qwen": set()}.get(name, {"tools", "tool_call"})
    assert set(spoken["declined"]) == declined
    assert spoken["samples"] == len(ALL - declined)
    assert spoken["start_added"] == (0 if name in ("llama3", "gemma", "mistral") else spoken["samples"])
    answered = figures["conversation_generation"]
    assert answered["prompts"] >= 1
    assert (answered["prompts_skipped"], answered.get("match_ratio", 1.0), answered["stops_missed"]) == (0, 1.0, 0)
    assert refused(figures) == set()


def test_a_rebuilt_tokenizer_is_told_from_a_damaged_template(prove: Prover) -> None:
    spoken = prove(TEMPLATES["chatml"], "task")["conversation"]
    assert spoken["misrendered"] == 0
    assert spoken["match_ratio"] == pytest.approx(1 - spoken["misread"] / spoken["samples"])


def test_a_template_that_asks_for_the_date_is_held_against_the_day_of_the_proof(prove: Prover) -> None:
    figures = prove("{{ strftime_now('%Y') }}" + TEMPLATES["chatml"])
    assert figures["conversation"]["misrendered"] == 0
    assert figures["conversation_generation"]["prompts"] == 0


def test_a_damaged_template_is_refused_and_the_first_difference_told(prove: Prover) -> None:
    figures = prove(TEMPLATES["phi"], damage=lambda template: template.replace("<|end|>", "<|END|>"))
    assert refused(figures) == {"conversation_rendered"}
    assert figures["conversation"]["first_mismatch"].startswith("user: at character")
    assert "<|END|>" in figures["conversation"]["first_mismatch"]


def test_a_template_that_declines_everything_proves_nothing(prove: Prover) -> None:
    figures = prove("{{ raise_exception('no') }}")
    assert figures["conversation"]["samples"] == 0
    assert refused(figures) == {"conversation_rendered", "conversation_stops"}


def test_a_checkpoint_without_a_template_is_not_asked(prove: Prover) -> None:
    figures = prove(None)
    assert "conversation" not in figures
    assert refused(figures) == set()


def test_a_template_that_does_not_end_once_it_is_given_tools_is_stopped(
    prove: Prover, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_conversations, "TIME_S", 2.0)
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(ChatTemplateInvalid, match="does not end within 2 s on the conversation 'tools'"):
        prove("{% if tools %}" + endless + "{% endif %}" + TEMPLATES["chatml"])


def test_a_template_that_does_not_end_in_the_runtime_alone_is_stopped(
    prove: Prover, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "RENDER_TIME_S", 1.0)
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(ChatTemplateInvalid, match="LiteRT-LM does not render the conversation 'user' within 1 s"):
        prove(TEMPLATES["chatml"], damage=lambda _: endless)
