"""Which tool runs a format on a phone, and what it is told. Pure.

A backend that a tool does not have is refused before anything runs. Called by `workers.devices.phone`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from service.devices import TOOLS
from service.errors import RequestUnfit
from workers.devices.reports import parse_benchmark_model, parse_litert_lm

#: Format -> what reads its tool's report.
PARSERS: Mapping[str, Callable[[str], dict[str, Any]]] = {
    "tflite": parse_benchmark_model,
    "task": parse_litert_lm,
    "litertlm": parse_litert_lm,
}
#: Has `benchmark_model` time each node, which changes all times: never together with a timed run.
PROFILE_FLAG = "--enable_op_profiling=true"
#: Timed runs of a signature in one process.
_RUNS = 20
#: As long as a run may be told to take; the process has a deadline of its own.
_FOREVER_S = 86_400


def build_arguments(asked: Mapping[str, Any], model: str, cache_dir: str, signature: str | None) -> list[str]:
    """Return what a tool is told, without its own name, to run `model` (a path on the phone) once.

    `asked`: `format`, `backend`, `threads`, and for bundles `prefill_tokens` and `decode_tokens`. `signature` is the
    one to run of a `.tflite`. Raises `RequestUnfit` for a backend that the tool does not have.
    """
    if TOOLS[asked["format"]] == "benchmark_model":
        return _build_benchmark_model(asked, model, signature)
    return [
        *_build_litert_lm(asked, model, cache_dir),
        f"--benchmark_prefill_tokens={asked['prefill_tokens']}",
        f"--benchmark_decode_tokens={asked['decode_tokens']}",
    ]


def build_question(asked: Mapping[str, Any], model: str, cache_dir: str, prompt: str, limit_tokens: int) -> list[str]:
    """Return what LiteRT-LM's tool is told to answer a prompt as it stands, in at most `limit_tokens`.

    A session applies no chat template; without sampler settings in its metadata, as ours, a bundle answers greedily.
    `--benchmark` without token counts changes nothing but that they are told.
    """
    return [
        *_build_litert_lm(asked, model, cache_dir),
        "--use_session=true",
        f"--max_output_tokens={limit_tokens}",
        f"--input_prompt={prompt}",
    ]


def _build_litert_lm(asked: Mapping[str, Any], model: str, cache_dir: str) -> list[str]:
    return [
        f"--backend={asked['backend']}",
        f"--model_path={model}",
        "--benchmark",
        "--async=false",
        f"--num_cpu_threads={asked['threads']}",
        f"--cache_dir={cache_dir}",
    ]


def _build_benchmark_model(asked: Mapping[str, Any], model: str, signature: str | None) -> list[str]:
    if asked["backend"] == "npu":
        raise RequestUnfit("benchmark_model runs graphs on CPU and GPU. Ask for another backend, or for a bundle.")
    arguments = [
        f"--graph={model}",
        f"--num_threads={asked['threads']}",
        # Exactly so many runs: times would make slow phones do less.
        f"--num_runs={_RUNS}",
        "--min_secs=0",
        f"--max_secs={_FOREVER_S}",
        "--warmup_runs=1",
        "--warmup_min_secs=0",
        f"--use_gpu={'true' if asked['backend'] == 'gpu' else 'false'}",
    ]
    return [*arguments, f"--signature_to_run_for={signature}"] if signature else arguments


def find_fallback(asked: Mapping[str, Any], sample: Mapping[str, Any]) -> str | None:
    """Say where a process ran that was asked to run on the GPU and did not; None where nothing says so."""
    delegations = sample.get("delegations") or []
    if asked["backend"] != "gpu" or not delegations:
        return None
    shares = [found["share"] for found in delegations if "GPU" in found["delegate"].upper()]
    return None if any(share in ("whole", "part") for share in shares) else "cpu"
