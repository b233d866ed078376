"""Signatures lowered side by side make the file that the tool makes of them in sequence."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.convert.conftest import CONTEXT_LENGTH, PREFILL_LENGTHS

#: Two signatures that share weights, with a composite, a weight of ones, and a buffer that is not contiguous.
TOY = """
import os, pathlib, sys
import torch
from litert_torch._convert import interface
from workers.convert import side_by_side

target, processes, accident = sys.argv[1], int(sys.argv[2]), sys.argv[3]

class Toy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(100, 32)
        self.linear = torch.nn.Linear(32, 32)
        self.ones = torch.nn.Parameter(torch.ones(32))
        self.register_buffer("rows", torch.arange(64.0).reshape(32, 2).T)

    def forward(self, tokens, state):
        with open(target + ".pids", "a") as stream:
            print(os.getpid(), file=stream)
        if accident == "raise":
            raise LookupError("no such layer")
        if accident == "die":
            os.kill(os.getpid(), 9)
        x = torch.nn.functional.gelu(self.linear(self.embedding(tokens) * self.ones)) + self.rows[1] + state
        return {"logits": x @ self.embedding.weight.T, "state": x.sum(1, keepdim=True)}

toy = Toy().eval()
converter = interface.Converter()
for name, length in (("prefill_8", 8), ("decode", 1)):
    sample = {"tokens": torch.zeros(1, length, dtype=torch.int), "state": torch.zeros(1, 1, 32)}
    converter.add_signature(name, toy, sample_kwargs=sample)
try:
    with side_by_side.signatures_side_by_side(processes):
        converter.convert().export(target)
except Exception as error:
    print(f"{type(error).__name__}: {error}")
else:
    print(os.getpid())
"""


def run_python(*words: str, threads: int = 1) -> str:
    """Run a fresh interpreter, as a step is one, and return what it prints."""
    environment = {**os.environ, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(Path.cwd())}
    command = [sys.executable, "-W", "ignore", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def convert_toy(target: Path, processes: int, accident: str = "") -> tuple[str, set[str]]:
    """Return the last line printed and the processes in which the model was called."""
    last_line = run_python("-c", TOY, str(target), str(processes), accident).splitlines()[-1]
    return last_line, set(Path(f"{target}.pids").read_text().split())


def test_each_signature_has_a_process_of_its_own_and_the_file_is_the_same(tmp_path: Path) -> None:
    apart, together = tmp_path / "apart.tflite", tmp_path / "together.tflite"
    own_pid, pids = convert_toy(apart, 2)
    assert len(pids) == 2
    assert own_pid not in pids
    own_pid, pids = convert_toy(together, 1)
    assert pids == {own_pid}
    assert apart.read_bytes() == together.read_bytes()


def test_what_a_process_raises_is_raised(tmp_path: Path) -> None:
    assert convert_toy(tmp_path / "toy.tflite", 2, "raise")[0] == "LookupError: no such layer"


def test_a_process_that_dies_is_named(tmp_path: Path) -> None:
    said, _ = convert_toy(tmp_path / "toy.tflite", 2, "die")
    assert said.startswith("ChildCrashed: The process that lowered the signature ")
    assert f"exit code {-signal.SIGKILL}" in said


@pytest.mark.parametrize("engine", ["reauthored", "traced"])
def test_both_engines_write_the_same_bytes_on_one_core_and_on_two(
    engine: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    params = {"engine": engine, "prefill_lengths": PREFILL_LENGTHS, "context_length": CONTEXT_LENGTH}
    words = [
        "-m",
        "workers.convert.convert",
        "--params",
        json.dumps(params),
        "--input",
        f"checkpoint={tiny_checkpoint}",
    ]
    for threads in (1, 2):
        run_python(*words, "-o", str(tmp_path / str(threads)), threads=threads)
    assert (tmp_path / "1" / "model.tflite").read_bytes() == (tmp_path / "2" / "model.tflite").read_bytes()
