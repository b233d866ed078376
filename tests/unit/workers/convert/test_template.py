"""Templates of graphs that are written here, so that what stands where is known."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np
import pytest
import torch
from ai_edge_litert import schema_py_generated as schema
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch_file

from service.errors import BlobCorrupt, CheckpointInvalid, TemplateUnfit
from tests import large_graph
from workers.convert import architectures
from workers.convert.template_checkpoint import list_tensors, write_checkpoint
from workers.convert.template_compare import require_same_bytes
from workers.convert.template_files import (
    SKELETON_FILE,
    describe_graph,
    load_template,
    require_same_graph,
    save_template,
)
from workers.convert.template_graph import mapped
from workers.convert.template_map import find_places
from workers.convert.template_tensors import MappedTensors
from workers.convert.template_write import require_same_tensors, write_graph

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
LAYER = "model.layers.0."
QUERY, KEY, VALUE = (f"{LAYER}self_attn.{each}_proj.weight" for each in "qkv")
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
FIRST_NORM, SECOND_NORM = f"{LAYER}input_layernorm.weight", f"{LAYER}post_attention_layernorm.weight"
GATE, UP, DOWN = (f"{LAYER}mlp.{each}_proj.weight" for each in ("gate", "up", "down"))
OUTPUT = f"{LAYER}self_attn.o_proj.weight"
TABLE = np.linspace(0, 1, 24, dtype=np.float32)

Weights = dict[str, np.ndarray[Any, np.dtype[np.float32]]]


def read_weights(folder: Path) -> Weights:
    with MappedTensors(folder) as tensors:
        return {
            name: tensor.read(tuple(range(len(tensor.extents))), 0, tensor.values).reshape(tensor.extents).copy()
            for name, tensor in tensors.items()
        }


def lay_out(weights: Weights, **more: Any) -> dict[str, Any]:
    """Return constants as a converter might make them of these weights: each of the ways there are."""
    return {
        "as it is": weights[EMBEDDING],
        "tied twice": weights[EMBEDDING],
        "transposed": weights[HEAD].T,
        "concatenated": np.concatenate([weights[QUERY], weights[KEY], weights[VALUE]]),
        "upper rows": weights[GATE][:24],
        "lower rows": weights[GATE][24:],
        "rows in turn": np.concatenate([weights[UP][1::2], weights[UP][::2]]),
        "columns": np.ascontiguousarray(weights[DOWN].T[8:]),
        "other columns": np.ascontiguousarray(weights[DOWN].T[:8]),
        "output": weights[OUTPUT],
        "offset": weights[NORM] + np.float32(1),
        "scaled": weights[FIRST_NORM] * np.float32(5.656854),
        "norm": weights[SECOND_NORM],
        "table": TABLE,
        "shape": np.array([1, 16, 4], np.int32),
        **more,
    }


def write_tflite(path: Path, constants: Mapping[str, Any]) -> Path:
    model, graph = schema.ModelT(), schema.SubGraphT()
    model.version, model.buffers, graph.tensors = 3, [schema.BufferT()], []
    for name, values in constants.items():
        buffer, tensor = schema.BufferT(), schema.TensorT()
        buffer.data = np.frombuffer(np.ascontiguousarray(values).tobytes(), np.uint8)
        tensor.name, tensor.buffer, tensor.shape = name.encode(), len(model.buffers), list(values.shape)
        model.buffers.append(buffer)
        graph.tensors.append(tensor)
    graph.inputs, graph.outputs, graph.operators = [], [], []
    model.subgraphs, model.operatorCodes = [graph], []
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    path.write_bytes(builder.Output())
    return path


class Bench:
    """A template made of random weights, and what it makes of others."""

    def __init__(self, folder: Path, *, is_large: bool = False, **more: Any) -> None:
        self.folder, self.is_large, self.more = folder, is_large, more
        self.template_dir = folder / "template"
        self.template_dir.mkdir()
        checkpoint = write_checkpoint(CONFIG, folder / "made", seed=1)
        with MappedTensors(checkpoint) as tensors, mapped(self.convert(read_weights(checkpoint), "made")) as content:
            self.places = find_places(content, tensors)
            extents = {name: tensor.extents for name, tensor in tensors.items()}
            described = describe_graph(CONFIG, "reauthored", [16], 64)
            unplaced, pieces = self.places.unplaced, self.places.pieces
            save_template(self.template_dir, content, described, extents, unplaced, pieces)
        self.other = read_weights(write_checkpoint(CONFIG, folder / "other", seed=2))

    def convert(self, weights: Weights, name: str) -> Path:
        """Stands for a full conversion."""
        path = write_tflite(self.folder / f"{name}.tflite", lay_out(weights, **self.more))
        if not self.is_large:
            return path
        large_graph.spread_graph(path, self.folder / f"{name}-large.tflite")
        return self.folder / f"{name}-large.tflite"

    def store(self, weights: Mapping[str, Any]) -> Path:
        folder = self.folder / "stored"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(CONFIG))
        save_file(dict(weights), folder / "model.safetensors")
        return folder

    def write(self, checkpoint: Path, config: Mapping[str, Any] = CONFIG) -> Path:
        target = self.folder / "written.tflite"
        template = load_template(self.template_dir)
        write_graph(template, self.template_dir, config, checkpoint, target, lambda _message, _fraction=None: None)
        return target

    def refuse(self, weights: Mapping[str, Any], config: Mapping[str, Any] = CONFIG) -> str:
        checkpoint = self.store(weights)
        with pytest.raises((TemplateUnfit, CheckpointInvalid)) as raised:
            self.write(checkpoint, config)
        assert not (self.folder / "written.tflite").exists()
        return str(raised.value)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_a_written_graph_is_the_converted_one(bench: Bench) -> None:
    require_same_bytes(bench.write(bench.folder / "other"), bench.convert(bench.other, "other"))
    assert bench.places.unplaced == ()


def test_it_is_so_where_weights_stand_behind_the_flatbuffer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As in graphs of more than 2 GiB, without a hole of that size.
    monkeypatch.setattr(large_graph, "WEIGHTS_BEGIN_BYTES", 1 << 20)
    bench = Bench(tmp_path, is_large=True)
    written = bench.write(bench.folder / "other")
    assert max(piece.begin_byte for piece in bench.places.pieces) > 1 << 20
    require_same_bytes(written, bench.convert(bench.other, "other"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrower_weights_are_widened(bench: Bench, dtype: str) -> None:
    narrow = {name: torch.from_numpy(values).to(getattr(torch, dtype)) for name, values in bench.other.items()}
    folder = bench.folder / "narrow"
    folder.mkdir()
    save_torch_file(narrow, folder / "model.safetensors")
    wide = {name: values.to(torch.float32).numpy() for name, values in narrow.items()}
    require_same_bytes(bench.write(folder), bench.convert(wide, "wide"))


def test_the_template_holds_no_weight(bench: Bench) -> None:
    weights = read_weights(bench.folder / "made")
    skeleton = (bench.template_dir / SKELETON_FILE).read_bytes()
    assert TABLE.tobytes() in skeleton
    assert not any(row.tobytes() in skeleton for values in weights.values() for row in np.atleast_2d(values))


def test_a_constant_that_is_half_a_tensor_is_named(tmp_path: Path) -> None:
    weights = read_weights(write_checkpoint(CONFIG, tmp_path / "checkpoint", seed=1))
    half = np.concatenate([weights[OUTPUT][:4].reshape(-1), TABLE])
    with pytest.raises(TemplateUnfit, match=r"of the constant 'half' only the first 512 are explained: .*o_proj"):
        Bench(tmp_path, half=half)


def test_a_constant_that_depends_on_weights_otherwise_is_named(bench: Bench) -> None:
    written = bench.write(bench.folder / "other")
    bench.more = {"table": TABLE + 1}
    with pytest.raises(TemplateUnfit, match="The constant 'table' depends on the weights"):
        require_same_bytes(written, bench.convert(bench.other, "other"))


def test_a_tensor_that_stands_nowhere_is_known(tmp_path: Path) -> None:
    assert Bench(tmp_path, norm=TABLE).places.unplaced == (SECOND_NORM,)


def test_other_weights_are_refused_with_the_difference(bench: Bench) -> None:
    assert f"needs a tensor '{HEAD}'" in bench.refuse({n: v for n, v in bench.other.items() if n != HEAD})


@pytest.mark.parametrize(
    ("name", "values", "sentence"),
    [
        ("more.weight", np.ones((2, 2), np.float32), "hold a tensor 'more.weight', which the template has no place"),
        (HEAD, np.ones((47, 32), np.float32), r"\[48, 32\] as the shape of 'lm_head.weight', and the weights have"),
        (NORM, np.full(32, 0.5, np.float32), "All values of 'model.norm.weight' are 1.5"),
        (HEAD, np.full((48, 32), np.nan, np.float32), "'lm_head.weight' holds NaN"),
    ],
)
def test_weights_that_would_become_another_graph_are_refused(
    bench: Bench, name: str, values: Any, sentence: str
) -> None:
    assert re.search(sentence, bench.refuse({**bench.other, name: values}))


def test_equal_tensors_are_refused(bench: Bench) -> None:
    down = np.concatenate([bench.other[DOWN][:, :8], bench.other[OUTPUT].T], axis=1)
    said = bench.refuse({**bench.other, DOWN: down})
    assert "are equal" in said


def test_a_tied_output_layer_may_be_stored_only_if_it_is_the_embedding(tmp_path: Path) -> None:
    tied = {**CONFIG, "tie_word_embeddings": True}
    assert HEAD not in list_tensors(tied)
    bench = Bench(tmp_path)
    made = load_template(bench.template_dir)
    untied = {name: extents for name, extents in made.tensors.items() if name != HEAD}
    template = dataclasses.replace(made, tensors=untied)
    shape = architectures.find_family(tied).read_shape(tied)
    with MappedTensors(bench.store({**bench.other, HEAD: bench.other[EMBEDDING]})) as stored:
        assert HEAD not in require_same_tensors(template, shape, stored)
    with MappedTensors(bench.folder / "other") as stored, pytest.raises(TemplateUnfit, match="differs from"):
        require_same_tensors(template, shape, stored)


@pytest.mark.parametrize(
    ("change", "asked", "field"),
    [
        ({"rope_theta": 5e5}, {}, "config.rope"),
        ({"hidden_size": 64}, {}, "config.head"),
        ({"tie_word_embeddings": True}, {}, "config.tied_embeddings"),
        ({}, {"prefill_lengths": [32]}, "prefill_lengths"),
        ({}, {"context_length": 32}, "context_length"),
        ({}, {"engine": "traced"}, "config"),
    ],
)
def test_another_graph_is_refused_with_the_difference(
    bench: Bench, change: dict[str, Any], asked: dict[str, Any], field: str
) -> None:
    template = load_template(bench.template_dir)
    lengths = {"engine": "reauthored", "prefill_lengths": [16], "context_length": 64}
    require_same_graph(template, describe_graph(CONFIG, **lengths))
    with pytest.raises(TemplateUnfit, match=field):
        require_same_graph(template, describe_graph({**CONFIG, **change}, **{**lengths, **asked}))


def test_what_no_graph_depends_on_makes_no_difference(bench: Bench) -> None:
    lengths = {"engine": "traced", "prefill_lengths": [16], "context_length": 64}
    named = {**CONFIG, "_name_or_path": "somebody/else", "transformers_version": "4.1", "torch_dtype": "float16"}
    assert describe_graph(named, **lengths) == describe_graph(CONFIG, **lengths)


def test_a_damaged_skeleton_is_noticed(bench: Bench) -> None:
    path = bench.template_dir / SKELETON_FILE
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(BlobCorrupt, match=SKELETON_FILE):
        load_template(bench.template_dir)
