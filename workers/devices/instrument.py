"""The process that is measured: runs one artifact once and writes what it saw.

Owns the calls into the runtimes and imports as little else as possible, because its memory is a figure. Must not
judge. Started by `workers.devices.host` as `python -m workers.devices.instrument REQUEST ANSWER`, one fresh process a
sample; both are JSON files, because the runtimes print to standard output.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from workers.devices.conditions import read_process_memory

#: A natural text: the runtime fills a shorter prompt up with token 0, after which a model may emit bytes that are no
#: text, and then the runtime gives up ("Stable text shrunk compared to released").
_PROMPT = "The kiln was lit before dawn, and by noon the potter could read the colour of the fire. "
#: Hardly any tokenizer covers more of English than this with one token.
_PROMPT_CHARACTERS_PER_TOKEN = 12

#: Runs before the clock starts: the first ones grow buffers.
WARMUP_RUNS = 3
#: Timed runs of a signature: this many, or as many as fit in the time, but never fewer than the least.
MOST_RUNS = 50
LEAST_RUNS = 5
SIGNATURE_TIME_S = 2.0


def measure_bundle(request: dict[str, Any]) -> dict[str, Any]:
    """Run LiteRT-LM's own benchmark on a `.task` or `.litertlm` and return its figures as they are.

    The runtime reports a request that failed as zeros and raises nothing; the caller judges.
    """
    import litert_lm

    characters = request["prefill_tokens"] * _PROMPT_CHARACTERS_PER_TOKEN
    benchmark = litert_lm.Benchmark(
        request["model"],
        backend=litert_lm.Backend.CPU(thread_count=request["threads"]),
        prefill_tokens=request["prefill_tokens"],
        decode_tokens=request["decode_tokens"],
        cache_dir=request["cache_dir"],
        # The runtime cuts it to the tokens asked for.
        prompt=_PROMPT * (characters // len(_PROMPT) + 1),
    )
    info = benchmark.run()
    return {
        "init_s": info.init_time_in_second,
        "ttft_s": info.time_to_first_token_in_second,
        "prefill_tokens": info.last_prefill_token_count,
        "prefill_tokens_per_s": info.last_prefill_tokens_per_second,
        "decode_tokens": info.last_decode_token_count,
        "decode_tokens_per_s": info.last_decode_tokens_per_second,
    }


def measure_graph(request: dict[str, Any]) -> dict[str, Any]:
    """Time every signature of a `.tflite` in LiteRT's compiled model and return all iterations in ms.

    The `litert-benchmark` tool of the same package fills token inputs with negative numbers, which no
    embedding takes; the inputs here are valid, the timed call is the same.
    """
    from ai_edge_litert.compiled_model import CompiledModel
    from ai_edge_litert.hardware_accelerator import HardwareAccelerator
    from ai_edge_litert.options import CpuOptions, Options

    started_s = time.perf_counter()
    options = Options(
        hardware_accelerators=HardwareAccelerator.CPU, cpu_options=CpuOptions(num_threads=request["threads"])
    )
    model = CompiledModel.from_file(request["model"], options=options)
    init_s = time.perf_counter() - started_s
    latency_ms = {name: _time_signature(model, name) for name in model.get_signature_list()}
    return {"init_s": init_s, "latency_ms": latency_ms}


def _time_signature(model: Any, signature: str) -> list[float]:
    details = model.get_input_tensor_details(signature)
    inputs = {name: model.create_input_buffer_by_name(signature, name) for name in details}
    names = model.get_output_tensor_details(signature)
    outputs = {name: model.create_output_buffer_by_name(signature, name) for name in names}
    for name, buffer in inputs.items():
        buffer.write(make_input(name, details[name]["shape"], details[name]["dtype"]))
    for _ in range(WARMUP_RUNS):
        model.run_by_name(signature, inputs, outputs)
    samples_ms: list[float] = []
    end_s = time.perf_counter() + SIGNATURE_TIME_S
    while len(samples_ms) < LEAST_RUNS or (len(samples_ms) < MOST_RUNS and time.perf_counter() < end_s):
        started_s = time.perf_counter()
        model.run_by_name(signature, inputs, outputs)
        samples_ms.append((time.perf_counter() - started_s) * 1000)
    return samples_ms


def make_input(name: str, shape: list[int], dtype: str) -> Any:
    """Return an array that any language model takes: positions count up, token ids are 0, masks admit all.

    Other floating-point inputs (the KV cache) are small random numbers, the same each time.
    """
    import numpy as np

    if "pos" in name:
        return np.arange(int(np.prod(shape))).reshape(shape).astype(dtype)
    if dtype == "bool":
        return np.ones(shape, dtype=np.bool_)
    if np.issubdtype(np.dtype(dtype), np.floating) and "mask" not in name:
        return np.random.default_rng(0).uniform(-1, 1, shape).astype(dtype)
    return np.zeros(shape, dtype=dtype)


def main(request_path: str, answer_path: str) -> None:
    """Measure what the request names and write the answer."""
    request = json.loads(Path(request_path).read_text())
    measure = measure_graph if request["format"] == "tflite" else measure_bundle
    answer = measure(request)
    memory = read_process_memory(os.getpid())
    if memory is not None:
        answer["peak_rss_bytes"], answer["peak_anon_bytes"] = memory
    Path(answer_path).write_text(json.dumps(answer))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
