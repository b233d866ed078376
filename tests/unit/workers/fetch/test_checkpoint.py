"""Checkpoints that are damaged, contradictory or hostile: each is refused with file and reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.errors import ArchitectureUnsupported, CheckpointInvalid, CheckpointUnsafe
from tests.unit.workers.fetch import tiny_checkpoint as tiny
from workers.fetch.checkpoint import Checkpoint, read_checkpoint


def read(folder: Path) -> Checkpoint:
    return read_checkpoint(folder, tiny.ignore_progress)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.write_tiny(tmp_path / "checkpoint")


def change_json(path: Path, **fields: Any) -> None:
    document = json.loads(path.read_text())
    tiny.write_json(path, {**document, **fields})


@pytest.mark.parametrize(("dtype", "name"), [("BF16", "bfloat16"), ("F16", "float16"), ("F32", "float32")])
def test_a_valid_checkpoint_is_described(tmp_path: Path, dtype: str, name: str) -> None:
    checkpoint = read(tiny.write_tiny(tmp_path / "c", dtype=dtype))
    parameters = sum(values.size for values in tiny.build_tensors().values())
    assert checkpoint.parameters == parameters
    assert checkpoint.weights_bytes == parameters * (4 if dtype == "F32" else 2)
    assert checkpoint.weights_dtype == name
    assert (checkpoint.family.name, checkpoint.shape.layers) == ("llama", tiny.LAYERS)
    assert (checkpoint.tokenizer.kind, checkpoint.tokenizer.vocabulary_size) == ("json", tiny.VOCABULARY)
    assert checkpoint.has_chat_template
    assert not checkpoint.has_evaluation


def test_shards_are_the_same_checkpoint(tmp_path: Path, folder: Path) -> None:
    assert read(tiny.write_sharded(tmp_path / "sharded")) == read(folder)


def test_old_rotary_buffers_are_not_weights(tmp_path: Path, folder: Path) -> None:
    tensors = tiny.build_tensors() | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}
    assert read(tiny.write_tiny(tmp_path / "c", tensors)) == read(folder)


def test_tied_embeddings_need_no_output_layer(tmp_path: Path) -> None:
    tensors = tiny.build_tensors()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    stored = read(tiny.write_tiny(tmp_path / "stored", tensors, tie_word_embeddings=True))
    del tensors["lm_head.weight"]
    absent = read(tiny.write_tiny(tmp_path / "absent", tensors, tie_word_embeddings=True))
    assert stored.parameters == absent.parameters


def test_a_tied_output_layer_that_differs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointInvalid, match=r"lm_head\.weight .* differs"):
        read(tiny.write_tiny(tmp_path / "c", tie_word_embeddings=True))


def test_biases_are_demanded_where_the_config_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointInvalid, match=r"lack 8 tensors .*q_proj\.bias"):
        read(tiny.write_tiny(tmp_path / "c", attention_bias=True))


# --- weights -------------------------------------------------------------------------------------


def spoil_tensor(name: str, change: Callable[[Any], Any]) -> tiny.Tensors:
    tensors = tiny.build_tensors()
    tensors[name] = change(tensors[name])
    return tensors


def test_a_tensor_of_another_shape_is_named_with_both_shapes(tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    with pytest.raises(CheckpointInvalid, match=r"k_proj.* shape \[8, 4\].* demands \[4, 8\]") as caught:
        read(tiny.write_tiny(tmp_path / "c", spoil_tensor(name, np.transpose)))
    assert caught.value.details == {"tensor": name, "found_shape": [8, 4], "expected_shape": [4, 8]}


def test_missing_and_foreign_tensors_are_named(tmp_path: Path) -> None:
    tensors = tiny.build_tensors()
    del tensors["model.norm.weight"]
    with pytest.raises(CheckpointInvalid, match=r"lack 1 tensor .*: model\.norm\.weight\."):
        read(tiny.write_tiny(tmp_path / "missing", tensors))
    tensors = tiny.build_tensors() | {"model.layers.2.mlp.up_proj.weight": np.ones((16, 8), np.float32)}
    with pytest.raises(CheckpointInvalid, match=r"no place: model\.layers\.2\.mlp\.up_proj\.weight\."):
        read(tiny.write_tiny(tmp_path / "extra", tensors))


@pytest.mark.parametrize("config", [{"num_hidden_layers": 3}, {"vocab_size": 13}, {"intermediate_size": 17}])
def test_config_and_weights_that_disagree_are_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(CheckpointInvalid, match=r"config\.json demands"):
        read(tiny.write_tiny(tmp_path / "c", **config))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_named_and_counted(tmp_path: Path, value: float) -> None:
    def spoil(values: Any) -> Any:
        values.reshape(-1)[[0, -1]] = value
        return values

    name = "model.layers.0.mlp.down_proj.weight"
    with pytest.raises(CheckpointInvalid, match=r"NaN or infinite: .*down_proj\.weight \(2\)") as caught:
        read(tiny.write_tiny(tmp_path / "c", spoil_tensor(name, spoil)))
    assert caught.value.details == {"file": "model.safetensors", "tensor": name, "count": 2}


def test_truncated_weights_are_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointInvalid, match=r"model\.safetensors: .* truncated"):
        read(folder)


# --- shards --------------------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return tiny.write_sharded(tmp_path / "sharded")


INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / SECOND).unlink()
    with pytest.raises(CheckpointInvalid, match=f"shard {SECOND}.* is missing") as caught:
        read(sharded)
    assert caught.value.details["file"] == SECOND


@pytest.mark.parametrize("extra", ["model-00003-of-00003.safetensors", "model.safetensors"])
def test_a_shard_that_the_index_does_not_name_is_refused(sharded: Path, extra: str) -> None:
    shutil.copy(sharded / FIRST, sharded / extra)
    with pytest.raises(CheckpointInvalid, match=f"does not name {extra}"):
        read(sharded)


def test_a_missing_index_is_named(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    with pytest.raises(CheckpointInvalid, match=r"index\.json is missing"):
        read(sharded)


def change_map(sharded: Path, change: Callable[[dict[str, str]], object]) -> None:
    document = json.loads((sharded / INDEX).read_text())
    change(document["weight_map"])
    tiny.write_json(sharded / INDEX, document)


def test_a_tensor_in_another_shard_than_stated_is_named(sharded: Path) -> None:
    change_map(sharded, lambda weight_map: weight_map.update({"model.norm.weight": SECOND}))
    with pytest.raises(CheckpointInvalid, match=f"{FIRST} holds tensor 'model.norm.weight', .* places in {SECOND}"):
        read(sharded)


def test_a_tensor_that_the_index_forgets_or_invents_is_named(sharded: Path) -> None:
    change_map(sharded, lambda weight_map: weight_map.pop("model.norm.weight"))
    with pytest.raises(CheckpointInvalid, match=r"'model\.norm\.weight', .* places nowhere"):
        read(sharded)
    change_map(sharded, lambda weight_map: weight_map.update({"model.norm.weight": FIRST, "ghost": SECOND}))
    with pytest.raises(CheckpointInvalid, match=r"'ghost' .* does not hold it"):
        read(sharded)


@pytest.mark.parametrize("place", ["../../etc/passwd", "/etc/passwd", "pytorch_model.bin", 7, None])
def test_an_index_that_names_other_files_is_unsafe(sharded: Path, place: Any) -> None:
    change_map(sharded, lambda weight_map: weight_map.update({"model.norm.weight": place}))
    with pytest.raises(CheckpointUnsafe, match="not a shard's name"):
        read(sharded)


@pytest.mark.parametrize("document", [{}, {"weight_map": []}, {"weight_map": {}}, []])
def test_an_index_without_a_map_is_refused(sharded: Path, document: Any) -> None:
    tiny.write_json(sharded / INDEX, document)
    with pytest.raises(CheckpointInvalid, match=r"index\.json"):
        read(sharded)


# --- configuration -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b'{"hidden_size": 8, "hidden_size": 9}',
        b"\xff\xfe",
        b'{"a":' * 200 + b"1" + b"}" * 200,
        b"[" * 200_000,
        b'{"a": ' + b"1" * 10_000 + b"}",
        b'{"a": "' + b"x" * 300_000 + b'"}',
    ],
    ids=["empty", "cut", "list", "null", "nan", "inf", "twice", "utf16", "deep", "deeper", "digits", "huge"],
)
def test_a_config_that_is_no_sane_json_object_is_refused(folder: Path, text: bytes) -> None:
    (folder / "config.json").write_bytes(text)
    with pytest.raises(CheckpointInvalid, match=r"config\.json") as caught:
        read(folder)
    assert len(caught.value.message) < 500


def test_an_unknown_architecture_lists_the_supported_ones(tmp_path: Path) -> None:
    folder = tiny.write_tiny(tmp_path / "c", architectures=["BertModel"], model_type="bert")
    with pytest.raises(ArchitectureUnsupported, match=r"BertModel.*LlamaForCausalLM") as caught:
        read(folder)
    assert "LlamaForCausalLM" in caught.value.details["supported"]


@pytest.mark.parametrize("names", [None, [], "LlamaForCausalLM", ["LlamaForCausalLM", "Other"], [7], ["x" * 1000]])
def test_architectures_must_be_one_name(tmp_path: Path, names: Any) -> None:
    with pytest.raises(CheckpointInvalid, match="list of one name"):
        read(tiny.write_tiny(tmp_path / "c", architectures=names))


def test_architecture_and_model_type_must_agree(tmp_path: Path) -> None:
    with pytest.raises(CheckpointInvalid, match="model_type is 'gpt2'"):
        read(tiny.write_tiny(tmp_path / "c", model_type="gpt2"))


@pytest.mark.parametrize(
    "fields",
    [
        {"auto_map": {"AutoConfig": "evil.Config"}},
        {"nested": {"deeper": [{"auto_map": {}}]}},
        {"trust_remote_code": True},
        {"custom_pipelines": {"x": {"impl": "y"}}},
        {"vision_config": {"tokenizer_file": "/etc/passwd"}},
        {"attn_implementation": "someone/kernel"},
        {"_attn_implementation": "https://example.com/kernel"},
        {"something": ["fine", "../outside"]},
        {"something": "evil.py"},
        {"something": "weights.bin"},
        {"something": "C:\\windows"},
        {"something": "~root"},
        {"adapter": ".."},
    ],
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_fields_that_name_code_or_paths_are_unsafe(folder: Path, name: str, fields: dict[str, Any]) -> None:
    change_json(folder / name, **fields)
    with pytest.raises(CheckpointUnsafe, match=f"^{name}: ") as caught:
        read(folder)
    assert caught.value.details["field"].partition(".")[0].partition("[")[0] in fields


def test_harmless_labels_are_let_through(folder: Path) -> None:
    change_json(
        folder / "config.json", _name_or_path="/home/me/model", trust_remote_code=False, transformers_version="5"
    )
    assert read(folder)


def test_a_checkpoint_that_is_quantized_already_is_refused(folder: Path) -> None:
    change_json(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(CheckpointInvalid, match="quantized already"):
        read(folder)


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_size": -8},
        {"hidden_size": "8"},
        {"hidden_size": True},
        {"hidden_size": 8.0},
        {"hidden_size": None},
        {"num_hidden_layers": 10**6},
        {"vocab_size": 2**40, "bos_token_id": None},
        {"max_position_embeddings": 2**60},
        {"intermediate_size": 10**30},
        {"num_attention_heads": 3},
        {"num_key_value_heads": 3},
        {"num_key_value_heads": 0},
        {"head_dim": 3},
        {"rms_norm_eps": -1},
        {"rope_theta": "10000"},
        {"rope_scaling": "linear"},
        {"attention_bias": "yes"},
        {"bos_token_id": 12},
        {"eos_token_id": [2, -1]},
        {"pad_token_id": "0"},
    ],
    ids=str,
)
def test_numbers_that_no_model_has_are_refused(folder: Path, fields: dict[str, Any]) -> None:
    document = {**tiny.CONFIG, **fields}
    tiny.write_json(folder / "config.json", {name: value for name, value in document.items() if value is not None})
    with pytest.raises(CheckpointInvalid, match=r"^config\.json"):
        read(folder)


def test_no_padding_may_be_written_as_minus_one(folder: Path) -> None:
    change_json(folder / "config.json", pad_token_id=-1)
    assert read(folder)


def test_generation_ids_must_be_tokens(folder: Path) -> None:
    change_json(folder / "generation_config.json", eos_token_id=[2, 99])
    with pytest.raises(CheckpointInvalid, match=r"generation_config\.json: eos_token_id is \[2, 99\]"):
        read(folder)


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reason"),
    [("config.json", "no config"), ("tokenizer.json", "no tokenizer"), ("model.safetensors", "no weights")],
)
def test_missing_files_are_named(folder: Path, name: str, reason: str) -> None:
    (folder / name).unlink()
    with pytest.raises(CheckpointInvalid, match=reason) as caught:
        read(folder)
    assert caught.value.details["file"] == name


def test_a_pickle_alone_is_unsafe(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointUnsafe, match=r"pytorch_model\.bin, a pickle"):
        read(folder)


def test_links_are_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    (folder / "tokenizer.json").symlink_to(tmp_path / "tokenizer.json")
    with pytest.raises(CheckpointUnsafe, match=r"tokenizer\.json is a link"):
        read(folder)


# --- evaluation ----------------------------------------------------------------------------------


def test_evaluation_examples_are_found(folder: Path) -> None:
    (folder / "evaluation.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n\n{"prompt": "2+2=", "answer": "4"}\n')
    assert read(folder).has_evaluation


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no prompt"),
        ("\n\n", "no prompt"),
        ('{"prompt": "a", "answer": "b"}\n{"prompt": "a"}\n', "line 2: not"),
        ('{"prompt": "a", "answer": ""}', "line 1: not"),
        ('{"prompt": 1, "answer": "b"}', "line 1: not"),
        ("[1]", "line 1: not"),
        ('{"prompt": "a", "answer"', "line 1: not.*it is not JSON"),
    ],
)
def test_malformed_evaluation_names_its_line(folder: Path, text: str, reason: str) -> None:
    (folder / "evaluation.jsonl").write_text(text)
    with pytest.raises(CheckpointInvalid, match=reason):
        read(folder)
