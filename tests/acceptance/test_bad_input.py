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
    options: tuple[str, ...] = ()
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


def choose_word_pieces(folder: Path) -> None:
    vocabulary = {f"t{index}": index for index in range(tiny.VOCABULARY)}
    tiny.write_json(folder / "tokenizer.json", {**tiny.TOKENIZER, "model": {"type": "WordPiece", "vocab": vocabulary}})


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
        "architecture",
        "architecture_unsupported",
        ("MambaForCausalLM", "LlamaForCausalLM"),
        set_config(architectures=["MambaForCausalLM"], model_type="mamba"),
    ),
    Bad("code", "checkpoint_unsafe", ("auto_map",), set_config(auto_map={"AutoModel": "modeling.Model"})),
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
        return submit(kiln, folder, *case.options)

    with ThreadPoolExecutor(4) as pool:
        return dict(zip((case.name for case in CASES), pool.map(run, CASES), strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input_is_refused_with_a_sentence(case: Bad, outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes[case.name]
    assert outcome.exit_code == case.exit_code, outcome.errors
    if case.exit_code == 2:
        assert outcome.output == ""
        code, _, sentence = outcome.errors.strip().splitlines()[-1].partition(": ")
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
