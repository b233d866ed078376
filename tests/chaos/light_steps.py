"""Step functions that do next to nothing, in the shapes that the ledger and the publication need.

A checkpoint is one file, `model.json`, with a seed and a fate. Its artifact is a pure function of that file, so that
whoever downloads it can tell whether it is the right one. Run in children by the real runner; `light_catalog` puts them
in the place of the real ones.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from service.errors import CheckpointInvalid
from workers.steps import Progress

Params = Mapping[str, Any]
Inputs = Mapping[str, Path]

MODEL_FILE = "model.json"
ARTIFACT_BYTES = 20_000
#: Longest time that a step takes, so that workers are hit while they are at it.
LONGEST_S = 0.3
#: How long a step takes that a checkpoint says to hold: until somebody ends it.
_HELD_S = 3600.0


def write_model(folder: Path, seed: int, fate: str, longest_s: float = LONGEST_S) -> Path:
    """Write a checkpoint whose job will meet `fate`: `succeeded`, `invalid`, `crashed` or `refused`."""
    folder.mkdir(parents=True)
    (folder / MODEL_FILE).write_text(json.dumps({"seed": seed, "fate": fate, "longest_s": longest_s}))
    return folder


def make_artifact(model: bytes, recipe: str) -> bytes:
    """Return what a job on this checkpoint must publish."""
    return random.Random(hashlib.sha256(model + recipe.encode()).digest()).randbytes(ARTIFACT_BYTES)


def resolve(params: Params, inputs: Inputs, output_dir: Path, progress: Progress) -> dict[str, Any]:
    model = _read_model(Path(params["source"]["path"]))
    _work("resolve", model, progress)
    return {"source": {**params["source"], "revision": hashlib.sha256(model).hexdigest()}}


def fetch(params: Params, inputs: Inputs, output_dir: Path, progress: Progress) -> dict[str, Any]:
    model = _read_model(Path(params["source"]["path"]))
    _work("fetch", model, progress)
    (output_dir / MODEL_FILE).write_bytes(model)
    digest = hashlib.sha256(model).hexdigest()
    return {"checkpoint_digest": digest, "files": [{"name": MODEL_FILE, "sha256": digest, "size_bytes": len(model)}]}


def plan(params: Params, inputs: Inputs, output_dir: Path, progress: Progress) -> dict[str, Any]:
    model = _read_model(inputs["checkpoint"])
    _work("plan", model, progress)
    if _fate(model) == "invalid":
        raise CheckpointInvalid("The checkpoint is fated to be refused.", file=MODEL_FILE)
    engines = {name: "reauthored" if name == "auto" else name for name in params["engines"]}
    return {"engines": engines, "prefill_lengths": [8], "context_length": 64}


def reference(params: Params, inputs: Inputs, output_dir: Path, progress: Progress) -> dict[str, Any]:
    return _copy("reference", inputs["checkpoint"], output_dir, progress, b"\n\n")


def convert(params: Params, inputs: Inputs, output_dir: Path, progress: Progress) -> dict[str, Any]:
    return _copy("convert", inputs["checkpoint"], output_dir, progress, b"\n")


def quantize(params: Params, inputs: Inputs, output_dir: Path, progress: Progress) -> dict[str, Any]:
    model = _read_model(inputs["convert"])
    _work("quantize", model, progress)
    if _fate(model) == "crashed":
        os.kill(os.getpid(), signal.SIGKILL)
    (output_dir / "model.tflite").write_bytes(make_artifact(model, params["recipe"]))
    return {}


def verify(params: Params, inputs: Inputs, output_dir: Path, progress: Progress) -> dict[str, Any]:
    model = _read_model(inputs["reference"])
    _work("verify", model, progress)
    data = (inputs["quantize"] / "model.tflite").read_bytes()
    if data != make_artifact(model, params["recipe"]):
        raise CheckpointInvalid("The graph is not what its checkpoint makes.")
    return {
        "format": params["format"],
        "size_bytes": len(data),
        "context": {"unusable_tokens": 0},
        "parity": {
            "max_abs_error_ratio": 1.0 if _fate(model) == "refused" else 0.0,
            "top1_agreement_confident": 1.0,
            "confident_share": 1.0,
        },
        "generation": {"match_ratio": 1.0, "stops_missed": 0},
    }


def _copy(kind: str, folder: Path, output_dir: Path, progress: Progress, ending: bytes) -> dict[str, Any]:
    """Write bytes that are no other step's, and mean the same."""
    model = _read_model(folder)
    _work(kind, model, progress)
    (output_dir / MODEL_FILE).write_bytes(model + ending)
    return {}


def _read_model(folder: Path) -> bytes:
    return (folder / MODEL_FILE).read_bytes().rstrip(b"\n")


def _fate(model: bytes) -> str:
    fate: str = json.loads(model)["fate"]
    return fate


def _work(kind: str, model: bytes, progress: Progress) -> None:
    progress("at it", 0.5)
    if json.loads(model).get("hold") == kind:
        print(f"{kind} holds", flush=True)
        time.sleep(_HELD_S)
    time.sleep(random.Random(model).uniform(0, json.loads(model).get("longest_s", LONGEST_S)))
