"""Checkpoint to bundle through both engines, run in LiteRT-LM against transformers."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import litert_lm
import pytest
import torch
from ai_edge_litert.interpreter import Interpreter
from transformers import AutoModelForCausalLM, AutoTokenizer

from service.recipes import RECIPES
from tests.convert.conftest import CONTEXT_LENGTH, PREFILL_LENGTHS, Workshop, ignore
from workers.convert import bundle, bundle_reader

BUNDLE_FORMATS = ("litertlm", "task")
LOSSY = [name for name, recipe in RECIPES.items() if recipe.is_lossy]


class Source:
    """What transformers answers for the tiny checkpoint."""

    def __init__(self, checkpoint: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self._model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self._answers: dict[tuple[str, int], tuple[int, list[int]]] = {}

    def answer(self, prompt: str, tokens: int) -> tuple[int, list[int]]:
        """Return the prompt's length in tokens and the greedy continuation without its stop token."""
        if (prompt, tokens) not in self._answers:
            ids = self.tokenizer(prompt, return_tensors="pt")
            length = ids["input_ids"].shape[1]
            out = self._model.generate(**ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0)[0]
            answer = out[length:].tolist()
            self._answers[prompt, tokens] = length, answer[: answer.index(2)] if 2 in answer else answer
        return self._answers[prompt, tokens]


@pytest.fixture(scope="module")
def source(tiny_checkpoint: Path) -> Source:
    return Source(tiny_checkpoint)


@pytest.fixture(autouse=True)
def _quiet_runtime() -> None:
    litert_lm.set_min_log_severity(litert_lm.LogSeverity.FATAL)


def open_bundle(path: Path) -> litert_lm.Engine:
    """Open a bundle without leaving the runtime's weight cache beside it."""
    return litert_lm.Engine(str(path), cache_dir=":nocache")


def answer_with(engine: litert_lm.Engine, prompt: str, tokens: int) -> str:
    with engine.create_session(apply_prompt_template=False, max_output_tokens=tokens) as session:
        session.run_prefill([prompt])
        text: str = session.run_decode().texts[0]
        return text


@pytest.fixture
def engine(workshop: Workshop, request: pytest.FixtureRequest) -> Iterator[litert_lm.Engine]:
    recipe, bundle_format = request.param
    with open_bundle(workshop.bundle(recipe, bundle_format)) as opened:
        yield opened


def test_both_engines_make_graphs_with_the_same_interface(workshop: Workshop) -> None:
    assert workshop.figures["signatures"] == ["decode", "prefill_16", "prefill_64"]
    interpreter = Interpreter(str(workshop.convert / "model.tflite"))
    cache = {f"kv_cache_{kind}_{layer}" for kind in "kv" for layer in range(2)}
    for name, tokens in (("decode", 1), ("prefill_16", 16), ("prefill_64", 64)):
        runner = interpreter.get_signature_runner(name)
        inputs = {key: value["shape"].tolist() for key, value in runner.get_input_details().items()}
        outputs = set(runner.get_output_details())
        assert set(inputs) == {"tokens", "input_pos", "mask", *cache}
        assert outputs == (cache | {"logits"} if name == "decode" else cache)
        assert inputs["tokens"] == [1, tokens]
        assert inputs["mask"] == [1, 1, tokens, CONTEXT_LENGTH]
        assert inputs["kv_cache_k_0"] == [1, 2, CONTEXT_LENGTH, 32]
        assert inputs["kv_cache_v_0"] == [1, 2, 32, CONTEXT_LENGTH]


def test_only_the_graph_is_left(workshop: Workshop) -> None:
    assert [path.name for path in workshop.convert.iterdir()] == ["model.tflite"]


def test_tensorflow_is_not_needed(workshop: Workshop) -> None:
    assert workshop.figures["size_bytes"] > 0
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize("engine", [("none", item) for item in BUNDLE_FORMATS], indirect=True)
def test_a_float_bundle_answers_what_transformers_answers(engine: litert_lm.Engine, source: Source) -> None:
    _, expected = source.answer("The kiln is hot 12+7=", 40)
    assert len(expected) == 40
    assert answer_with(engine, "The kiln is hot 12+7=", 40) == engine.detokenize(expected)


@pytest.mark.parametrize("engine", [("none", item) for item in BUNDLE_FORMATS], indirect=True)
def test_the_context_is_usable_to_its_last_token(engine: litert_lm.Engine, source: Source) -> None:
    ids = source.tokenizer("The kiln is hot. " * 100, add_special_tokens=False)["input_ids"][:200]
    prompt = source.tokenizer.decode(ids)
    room = CONTEXT_LENGTH - 201
    length, expected = source.answer(prompt, room + 1)
    assert length == 201
    assert len(expected) > room
    assert answer_with(engine, prompt, CONTEXT_LENGTH) == engine.detokenize(expected[:room])


@pytest.mark.parametrize("engine", [("none", item) for item in BUNDLE_FORMATS], indirect=True)
def test_a_conversation_is_rendered_as_transformers_renders_it(engine: litert_lm.Engine, source: Source) -> None:
    rendered = source.tokenizer.apply_chat_template(
        [{"role": "user", "content": "12+7="}], tokenize=False, add_generation_prompt=True
    )
    with engine.create_conversation(max_output_tokens=8) as conversation:
        # The start token is not text for the runtime: it puts the token there itself.
        assert "<s>" + conversation.render_message_to_string("12+7=") == rendered
        conversation.send_message("12+7=")
        assert conversation.token_count > len(source.tokenizer(rendered, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("bundle_format", BUNDLE_FORMATS)
@pytest.mark.parametrize("recipe", LOSSY)
def test_every_recipe_runs_in_the_runtime(workshop: Workshop, recipe: str, bundle_format: str) -> None:
    path = workshop.bundle(recipe, bundle_format)
    graph = (workshop.quantize(recipe) / "model.tflite").read_bytes()
    assert bytes(bundle_reader.extract_graph(path, bundle_format)) == graph
    with open_bundle(path) as engine:
        assert answer_with(engine, "The kiln is hot", 8)


@pytest.mark.parametrize("bundle_format", BUNDLE_FORMATS)
def test_a_checkpoint_without_start_token_runs(
    reauthored_workshop: Workshop, source: Source, bundle_format: str, tmp_path: Path
) -> None:
    checkpoint = shutil.copytree(reauthored_workshop.checkpoint, tmp_path / "checkpoint")
    definition = json.loads((checkpoint / "tokenizer.json").read_text(encoding="utf-8"))
    (checkpoint / "tokenizer.json").write_text(json.dumps({**definition, "post_processor": None}), encoding="utf-8")
    inputs = {"checkpoint": checkpoint, "quantize": reauthored_workshop.convert}
    bundle.run({"format": bundle_format, "context_length": CONTEXT_LENGTH}, inputs, tmp_path, ignore)
    _, expected = Source(checkpoint).answer("The kiln is hot", 12)
    with open_bundle(tmp_path / f"model.{bundle_format}") as engine:
        assert answer_with(engine, "The kiln is hot", 12) == engine.detokenize(expected)
        assert expected != source.answer("The kiln is hot", 12)[1]


def test_recipes_differ_in_size_as_their_names_say(workshop: Workshop) -> None:
    sizes = {name: (workshop.quantize(name) / "model.tflite").stat().st_size for name in RECIPES}
    for kind in ("dynamic", "weight_only"):
        assert sizes["none"] > sizes["float16"] > sizes[f"{kind}_int8"] > sizes[f"{kind}_int4"]
    # An embedding that is also the output matrix is stored twice, as int8 and as int4.
    assert sizes["float16"] > sizes["mixed_int4"] > sizes["dynamic_int4"]
    assert sizes["dynamic_int4_block32"] > sizes["dynamic_int4_block64"] > sizes["dynamic_int4_block128"]


@pytest.mark.parametrize("recipe", LOSSY)
def test_quantizing_again_gives_the_same_bytes(reauthored_workshop: Workshop, recipe: str, tmp_path: Path) -> None:
    first = reauthored_workshop.quantize(recipe) / "model.tflite"
    reauthored_workshop.quantize_anew(recipe, tmp_path)
    assert (tmp_path / "model.tflite").read_bytes() == first.read_bytes()


def test_converting_by_hand_in_another_process_gives_the_same_bytes(
    reauthored_workshop: Workshop, tmp_path: Path
) -> None:
    # Lengths in another order and another hash seed: neither may show.
    params = {"engine": "reauthored", "prefill_lengths": list(PREFILL_LENGTHS)[::-1], "context_length": CONTEXT_LENGTH}
    command = [sys.executable, "-m", "workers.convert.convert", "--params", json.dumps(params)]
    command += ["--input", f"checkpoint={reauthored_workshop.checkpoint}", "-o", str(tmp_path)]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == reauthored_workshop.figures
    assert digest(tmp_path / "model.tflite") == digest(reauthored_workshop.convert / "model.tflite")


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
