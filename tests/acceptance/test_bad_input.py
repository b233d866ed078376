"""Everything that can be wrong with what a user gives, by the command line to one server; and the server goes on."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from tests.acceptance.conftest import EXAMPLE, Conversion, Document
from tests.kiln import Kiln, clean_environment, fired_up
from tests.unit.workers.fetch import tiny_checkpoint as tiny

WEIGHTS = "model.safetensors"
SHARD = "model-00002-of-00002.safetensors"


@dataclass(frozen=True)
class Bad:
    """One way to be wrong, and what must be said of it."""

    name: str
    code: str
    #: Each stands in the sentence.
    says: tuple[str, ...]
    #: Spoils a valid checkpoint.
    spoil: Callable[[Path], object] = field(default=lambda folder: None)
    #: Options of the command; `FILE` stands for a file that holds `content`.
    options: tuple[str, ...] = ()
    content: bytes = b""
    #: 2: the caller is told before anything is stored; 1: the job has failed.
    exit_code: int = 1


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def truncate(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-64])


def claim_terabytes(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(struct.pack("<Q", 1 << 42) + path.read_bytes()[8:])


def overlap_tensors(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    first, second = (name for name in list(header)[1:3])
    size = header[second]["data_offsets"][1] - header[second]["data_offsets"][0]
    begin = header[first]["data_offsets"][0]
    header[second]["data_offsets"] = [begin, begin + size]
    tiny.write_raw(folder / WEIGHTS, header, data[8 + length :])


def leave_a_pickle_only(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weights": [1.0]}))


def lose_a_shard(folder: Path) -> None:
    shutil.rmtree(folder)
    tiny.write_sharded(folder)
    (folder / SHARD).unlink()


def write_nan(folder: Path) -> None:
    tensors = tiny.build_tensors()
    tensors["model.norm.weight"][3] = np.nan
    tiny.write_tensors(folder / WEIGHTS, tensors)


def set_config(**values: object) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        tiny.write_json(folder / "config.json", {**tiny.CONFIG, **values})

    return spoil


def set_template(template: str) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        tiny.write_json(folder / "tokenizer_config.json", {**tiny.TOKENIZER_CONFIG, "chat_template": template})

    return spoil


def add_a_token(folder: Path) -> None:
    added = [*tiny.TOKENIZER["added_tokens"], {"id": tiny.VOCABULARY, "content": "<extra>", "special": True}]
    tiny.write_json(folder / "tokenizer.json", {**tiny.TOKENIZER, "added_tokens": added})


def set_tensor(name: str, *shape: int) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        tensors = tiny.build_tensors()
        assert tensors[name].shape != shape
        tiny.write_tensors(folder / WEIGHTS, {**tensors, name: np.ones(shape, np.float32)})

    return spoil


def take_the_example(folder: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(EXAMPLE, folder)


def forget_template(folder: Path) -> None:
    tiny.write_json(folder / "tokenizer_config.json", {**tiny.TOKENIZER_CONFIG, "chat_template": None})


def choose_word_pieces(folder: Path) -> None:
    vocabulary = {f"t{index}": index for index in range(tiny.VOCABULARY)}
    tiny.write_json(folder / "tokenizer.json", {**tiny.TOKENIZER, "model": {"type": "WordPiece", "vocab": vocabulary}})


#: Integers for the activations of every operation: the runtime aborts at them.
STATIC_EVERYWHERE = json.dumps(
    [
        {
            "regex": ".*",
            "operation": "*",
            "algorithm_key": "min_max_uniform_quantize",
            "op_config": {
                "activation_tensor_config": {"num_bits": 8, "symmetric": False, "granularity": "TENSORWISE"},
                "weight_tensor_config": {"num_bits": 8, "symmetric": True, "granularity": "CHANNELWISE"},
                "compute_precision": "INTEGER",
                "explicit_dequantize": False,
            },
        }
    ]
).encode()
_ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
CASES = [
    Bad("no-folder", "source_not_found", ("no-folder",), shutil.rmtree, exit_code=2),
    Bad(
        "recipe",
        "unknown_name",
        ("dynamc_int8", "Did you mean 'dynamic_int8'"),
        options=("-r", "dynamc_int8"),
        exit_code=2,
    ),
    Bad("format", "unknown_name", ("Did you mean 'litertlm'",), options=("-f", "litert-lm"), exit_code=2),
    Bad(
        "prefill",
        "invalid_request",
        ("prefill length 64", "context of 32"),
        options=("--prefill", "64", "--context", "32"),
        exit_code=2,
    ),
    Bad("context", "request_unfit", ("128", "config.json", "at most 64"), options=("--context", "128")),
    Bad("empty", "checkpoint_invalid", ("no weights", WEIGHTS), empty),
    Bad("tokenizer", "checkpoint_invalid", ("tokenizer.json",), lambda folder: (folder / "tokenizer.json").unlink()),
    Bad("config", "checkpoint_invalid", ("config.json",), lambda folder: (folder / "config.json").unlink()),
    Bad("shard", "checkpoint_invalid", (SHARD,), lose_a_shard),
    Bad("truncated", "checkpoint_invalid", (WEIGHTS, "truncated"), truncate),
    Bad("terabytes", "checkpoint_invalid", (WEIGHTS, str(1 << 42)), claim_terabytes),
    Bad("overlap", "checkpoint_invalid", (WEIGHTS,), overlap_tensors),
    Bad("pickle", "checkpoint_unsafe", ("pytorch_model.bin", "pickle", "safetensors"), leave_a_pickle_only),
    Bad("nan", "checkpoint_invalid", (WEIGHTS, "NaN", "model.norm.weight"), write_nan),
    Bad("disagree", "checkpoint_invalid", ("config.json demands",), set_config(num_hidden_layers=3)),
    Bad(
        "shape",
        "checkpoint_invalid",
        (
            "'model.embed_tokens.weight'",
            f"has shape [{tiny.VOCABULARY}, {tiny.HIDDEN}]",
            f"demands [16, {tiny.HIDDEN}]",
        ),
        set_config(vocab_size=16),
    ),
    Bad(
        "large-tokenizer",
        "checkpoint_invalid",
        (f"gives out {tiny.VOCABULARY + 1} ids", f"the embedding has {tiny.VOCABULARY} rows"),
        add_a_token,
    ),
    Bad(
        "operator",
        "architecture_unsupported",
        ("Qwen3_5ForCausalLM", "'gated_delta_update'", "lacks on CPUs", "Qwen3ForCausalLM"),
        set_config(architectures=["Qwen3_5ForCausalLM"], model_type="qwen3_5_text"),
    ),
    Bad(
        "activation",
        "architecture_unsupported",
        ("'hidden_act' is 'relu'", "llama", "only 'silu' is"),
        set_config(hidden_act="relu"),
    ),
    Bad(
        "architecture",
        "architecture_unsupported",
        ("MambaForCausalLM", "LlamaForCausalLM"),
        set_config(architectures=["MambaForCausalLM"], model_type="mamba"),
    ),
    Bad(
        "code",
        "checkpoint_unsafe",
        ("auto_map", "--ignore-custom-code"),
        set_config(auto_map={"AutoModel": "modeling.Model"}),
    ),
    Bad(
        "code-without-class",
        "checkpoint_unsafe",
        ("auto_map", "supported architecture"),
        set_config(auto_map={"AutoModel": "modeling.Model"}, architectures=["OwnForCausalLM"]),
    ),
    Bad(
        "code-ignored-without-class",
        "architecture_unsupported",
        ("OwnForCausalLM", "LlamaForCausalLM"),
        set_config(auto_map={"AutoModel": "modeling.Model"}, architectures=["OwnForCausalLM"]),
        options=("--ignore-custom-code",),
    ),
    Bad(
        "rope",
        "architecture_unsupported",
        ("config.json", "rope_scaling.rope_type", "'yarn'", "'llama3'"),
        set_config(rope_scaling={"rope_type": "yarn", "factor": 2.0}),
    ),
    Bad(
        "experts", "architecture_unsupported", ("MixtralForCausalLM",), set_config(architectures=["MixtralForCausalLM"])
    ),
    Bad(
        "quantized",
        "checkpoint_invalid",
        ("config.json", "quantized already", "bfloat16"),
        set_config(quantization_config={"quant_method": "gptq", "bits": 4}),
    ),
    Bad(
        "transposed",
        "checkpoint_invalid",
        ("model.layers.0.mlp.down_proj.weight", "[16, 8]", "config.json demands [8, 16]"),
        set_tensor("model.layers.0.mlp.down_proj.weight", 16, 8),
    ),
    Bad("greedy", "chat_template_invalid", ("chat_template", "MiB"), set_template("{{ 'x' * 10 ** 9 }}")),
    Bad(
        "escaping",
        "chat_template_invalid",
        ("chat_template", "__class__", "unsafe"),
        set_template("{{ ''.__class__.__mro__[1].__subclasses__() }}"),
    ),
    Bad(
        "own-recipe",
        "recipe_invalid",
        ("mine",),
        options=("--recipe-file", "mine=FILE"),
        content=b'[{"regex": ".*", "operation": "NO_SUCH_OPERATION", "algorithm_key": "min_max_uniform_quantize"}]',
        exit_code=2,
    ),
    Bad(
        "own-recipe-that-aborts",
        "recipe_unfit",
        ("'mine'", "static", "runtime aborts", "FULLY_CONNECTED"),
        options=("--recipe-file", "mine=FILE"),
        content=STATIC_EVERYWHERE,
        exit_code=2,
    ),
    Bad(
        "blocks",
        "recipe_unfit",
        ("'dynamic_int4_block32'", "blocks of 32", "8 values", "mixed_int4"),
        options=("-r", "dynamic_int4_block32"),
    ),
    Bad(
        "calibration-of-bytes",
        "invalid_request",
        ("calibration", "not UTF-8 text"),
        options=("-r", "static_int8", "--calibration", "FILE"),
        content=b"\xff\xfe\x00",
        exit_code=2,
    ),
    Bad(
        "calibration-without-prompts",
        "calibration_invalid",
        ("line 2", '{"prompt": "..."}'),
        options=("-r", "static_int8", "--calibration-prompts", "FILE"),
        content=b'{"prompt": "1+1="}\n{"question": "2+2="}\n',
        exit_code=2,
    ),
    Bad(
        "calibration-without-template",
        "calibration_invalid",
        ("no chat template", "plain text"),
        forget_template,
        options=("-r", "static_int8", "--calibration-prompts", "FILE"),
        content=b'{"prompt": "1+1="}\n',
    ),
    Bad("endless", "chat_template_invalid", ("chat_template", "does not end"), set_template(_ENDLESS)),
    Bad("word-pieces", "tokenizer_unsupported", ("WordPiece", "litertlm"), choose_word_pieces, options=("-f", "task")),
]


@dataclass(frozen=True)
class Outcome:
    """What a command has said."""

    exit_code: int
    output: str
    errors: str


def submit(kiln: Kiln, source: Path, *options: str) -> Outcome:
    command = [sys.executable, "-m", "service.cli", "submit", str(source), "--wait", "--json", *options]
    environment = {**clean_environment(kiln.folder, {}), "EDGEKILN_URL": kiln.client.url}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return Outcome(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def kiln(tmp_path_factory: pytest.TempPathFactory, conversion: Conversion) -> Iterator[Kiln]:
    """A server that has converted the example before, and may read a folder of checkpoints."""
    folder = tmp_path_factory.mktemp("bad-input")
    shutil.copytree(conversion.data_dir, folder / "data")
    (folder / "models").mkdir()
    with fired_up(folder, folder / "models") as kiln:
        yield kiln


@pytest.fixture(scope="module")
def outcomes(kiln: Kiln) -> dict[str, Outcome]:
    """What came of each case; they are submitted side by side."""

    def run(case: Bad) -> Outcome:
        folder = tiny.write_tiny(kiln.folder / "models" / case.name)
        case.spoil(folder)
        file = kiln.folder / f"{case.name}.file"
        file.write_bytes(case.content)
        return submit(kiln, folder, *(option.replace("FILE", str(file)) for option in case.options))

    with ThreadPoolExecutor(4) as pool:
        return dict(zip((case.name for case in CASES), pool.map(run, CASES), strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input_is_refused_with_a_sentence(case: Bad, outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes[case.name]
    assert outcome.exit_code == case.exit_code, outcome.errors
    if case.exit_code == 2:
        problem: Document = json.loads(outcome.output)
        code, sentence = problem["code"], problem["detail"]
        assert outcome.errors.strip().splitlines()[-1] == f"{code}: {sentence}"
    else:
        job: Document = json.loads(outcome.output)
        assert (job["state"], job["variants"][0]["artifacts"]) == ("failed", [])
        error = job["variants"][0]["error"]
        code, sentence = error["code"], error["message"]
        (failed,) = (step for step in job["steps"] if step["state"] == "failed")
        assert (failed["attempts"], failed["error"]["code"]) == (1, code)
    assert code == case.code, sentence
    assert all(words in sentence for words in case.says), sentence
    assert sentence[-1] in ".?"
    assert "Traceback" not in outcome.errors


def test_the_server_goes_on_after_all_that(kiln: Kiln, outcomes: dict[str, Outcome]) -> None:
    assert len(outcomes) == len(CASES)
    readiness = kiln.client.readiness()
    assert readiness["ready"], readiness
    assert "ended unexpectedly" not in kiln.output
    assert kiln.client.recipes()
    # The same bytes in another folder are the same work: only the checkpoint is fetched anew.
    source = shutil.copytree(EXAMPLE, kiln.folder / "models" / "addition")
    outcome = submit(kiln, source, "-r", "none", "-f", "litertlm")
    job = json.loads(outcome.output)
    assert (outcome.exit_code, job["state"]) == (0, "succeeded"), outcome.errors
    done = {step["kind"] for step in job["steps"] if not step["reused"]}
    assert done == {"resolve", "fetch", "plan", "publish"}
