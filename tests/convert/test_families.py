"""The re-authored model of every family computes what transformers computes; no conversion."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from litert_torch.generative.layers import kv_cache
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from service.errors import CheckpointInvalid
from tests.families.cases import CASES, Case, find_case
from workers.convert import architectures, reauthored
from workers.fetch import plan
from workers.verify.source import open_model, open_source

CONTEXT_LENGTH = 128
#: Largest difference of a logit, in parts of the logits' range; float32 rounding stays far below.
TOLERANCE = 2e-5
TOKENS = torch.randint(0, 512, (1, 100), generator=torch.Generator().manual_seed(1), dtype=torch.int)


def compute_ours(checkpoint: Path, chunk: int = 64) -> torch.Tensor:
    """Return logits, float32 [1, 100, vocabulary], computed in chunks through the cache."""
    shape = architectures.read_shape(json.loads((checkpoint / "config.json").read_text(encoding="utf-8")))
    model = reauthored.build_model(checkpoint, shape, CONTEXT_LENGTH)
    cache = kv_cache.KVCache.from_model_config(CONTEXT_LENGTH, model.config, kv_layout=kv_cache.KV_LAYOUT_TRANSPOSED)
    full = torch.triu(torch.full((CONTEXT_LENGTH, CONTEXT_LENGTH), float("-inf")), 1)
    logits = []
    for start in range(0, TOKENS.shape[1], chunk):
        positions = torch.arange(start, min(start + chunk, TOKENS.shape[1]), dtype=torch.int)
        mask = full[positions.long()][None, None]
        outputs = model(TOKENS[:, positions.long()], positions, cache, mask=mask)
        cache = outputs["kv_cache"]
        logits.append(outputs["logits"])
    return torch.cat(logits, dim=1)


@torch.no_grad()
def compute_theirs(checkpoint: Path) -> torch.Tensor:
    logits: torch.Tensor = open_model(checkpoint)(TOKENS.long()).logits
    return logits


def measure_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return the largest difference in parts of the range of `theirs`."""
    return float((ours - theirs).abs().max() / (theirs.max() - theirs.min()))


REAUTHORED = [case for case in CASES if "reauthored" in architectures.FAMILIES[case.architecture].engines]


@pytest.mark.parametrize("case", REAUTHORED, ids=lambda case: case.name)
def test_logits_equal_those_of_transformers(case: Case, tmp_path: Path) -> None:
    checkpoint = case.write(tmp_path, has_tokenizer=False)
    theirs = compute_theirs(checkpoint)
    assert theirs.max() - theirs.min() > 1
    assert measure_difference(compute_ours(checkpoint), theirs) < TOLERANCE


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_checkpoint_is_understood_before_anything_is_loaded(case: Case, tmp_path: Path) -> None:
    checkpoint = case.write(tmp_path / "c")
    asked = {"engines": ["auto"], "formats": ["litertlm", "tflite"], "context_length": CONTEXT_LENGTH}
    params = {**asked, "ignore_custom_code": case.has_custom_code}
    facts = plan.run(params, {"checkpoint": checkpoint}, tmp_path, lambda *_: None)
    config = AutoConfig.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_config(config)
    # Gemma 4 and Apertus store single numbers that they do not train.
    parameters = {name for name, _ in model.named_parameters()}
    scalars = [name for name, tensor in model.state_dict().items() if tensor.numel() == 1 and name not in parameters]
    assert facts["architecture"] == case.architecture
    assert facts["parameters"] == model.num_parameters() + len(scalars)
    assert facts["layers"] == config.num_hidden_layers


def test_a_gpt2_of_the_bare_model_needs_no_prefix(tmp_path: Path) -> None:
    case = next(each for each in CASES if each.name == "gpt2")
    checkpoint = case.write(tmp_path / "c")
    expected = compute_ours(checkpoint)
    path = checkpoint / "model.safetensors"
    bare = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
    # Old writers stored the causal mask too.
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 256, 256) for layer in range(2)}
    masks |= {f"h.{layer}.attn.masked_bias": torch.tensor(-1e4) for layer in range(2)}
    save_file({**bare, **masks}, path)
    params = {"engines": ["auto"], "formats": ["tflite"]}
    assert plan.run(params, {"checkpoint": checkpoint}, tmp_path, lambda *_: None)["family"] == "gpt2"
    assert torch.equal(compute_ours(checkpoint), expected)
    assert measure_difference(expected, compute_theirs(checkpoint)) < TOLERANCE


def test_code_that_a_checkpoint_names_is_never_imported(tmp_path: Path) -> None:
    case = next(each for each in CASES if each.name == "falcon-7b")
    checkpoint = case.write(tmp_path / "c")
    (checkpoint / "own.py").write_text("raise AssertionError('imported')", encoding="utf-8")
    custom = {
        "AutoConfig": "own.Config",
        "AutoModelForCausalLM": "own.Model",
        "AutoTokenizer": ["own.Slow", "own.Fast"],
    }
    for name in ("config.json", "tokenizer_config.json"):
        document = json.loads((checkpoint / name).read_text(encoding="utf-8"))
        (checkpoint / name).write_text(json.dumps({**document, "auto_map": custom}), encoding="utf-8")
    source = open_source(checkpoint)
    assert type(source.model).__module__ == "transformers.models.falcon.modeling_falcon"
    assert type(source.tokenizer).__module__.startswith("transformers.")


def test_a_window_shows_in_the_logits(tmp_path: Path) -> None:
    case = next(each for each in CASES if each.name == "gemma3")
    checkpoint = case.write(tmp_path, has_tokenizer=False)
    windowed = compute_ours(checkpoint)
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    (checkpoint / "config.json").write_text(json.dumps({**config, "sliding_window": 256}), encoding="utf-8")
    whole = compute_ours(checkpoint)
    assert torch.equal(windowed[:, :24], whole[:, :24])
    assert measure_difference(windowed[:, 24:], whole[:, 24:]) > 0.01


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model.layers.1.mlp.up_proj.weight": (96, 64)}, r"up_proj.weight' has shape \[96, 64\]; .* \[128, 64\]"),
        ({"model.layers.1.mlp.up_proj.weight": None}, "lack 1 tensor that config.json demands: model.layers.1.mlp.up"),
        ({"model.layers.1.mlp.extra.weight": (4, 4)}, "1 tensor that config.json gives no place: model.layers.1.mlp"),
    ],
    ids=["shape", "missing", "extra"],
)
def test_weights_that_only_transformers_knows_are_compared_when_opened(
    tmp_path: Path, change: dict[str, tuple[int, ...] | None], reason: str
) -> None:
    checkpoint = find_case("olmo2").write(tmp_path / "c", has_tokenizer=False)
    open_model(checkpoint)
    path = checkpoint / "model.safetensors"
    tensors = load_file(path) | {name: torch.ones(shape) for name, shape in change.items() if shape}
    save_file({name: tensor for name, tensor in tensors.items() if change.get(name, ()) is not None}, path)
    with pytest.raises(CheckpointInvalid, match=reason):
        open_model(checkpoint)


def test_their_embedding_is_compared_before_anything_is_loaded(tmp_path: Path) -> None:
    checkpoint = find_case("olmo2").write(tmp_path / "c")
    path = checkpoint / "model.safetensors"
    save_file({**load_file(path), "model.embed_tokens.weight": torch.ones(512, 48)}, path)
    with pytest.raises(CheckpointInvalid, match=r"embed_tokens.weight' has shape \[512, 48\]"):
        plan.run({"engines": ["auto"], "formats": ["tflite"]}, {"checkpoint": checkpoint}, tmp_path, lambda *_: None)
