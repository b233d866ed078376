"""`litert_lm_advanced_main`: a `.litertlm` or `.task` in the runtime's own benchmark; LiteRT-LM prints such lines."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from tests.virtual_phone.tools.flags import split_flags
from workers.devices.conditions import read_process_memory
from workers.devices.instrument import measure_bundle

_FLAGS = {
    "backend": "cpu",
    "model_path": "",
    "input_prompt": "",
    "benchmark": "false",
    "benchmark_prefill_tokens": "0",
    "benchmark_decode_tokens": "0",
    "max_num_tokens": "0",
    "num_iterations": "1",
    "async": "true",
    "num_cpu_threads": "0",
    "report_peak_memory_footprint": "false",
    "cache_dir": "",
    "disable_cache": "false",
}


def main(argv: Sequence[str]) -> int:
    """Run the tool."""
    flags, unknown = split_flags(argv, _FLAGS)
    for word in unknown:
        print(f"ERROR: Unknown command line flag '{word.removeprefix('--').partition('=')[0]}'.")
    if unknown:
        return 1
    if not Path(flags["model_path"]).is_file():
        print(f"INVALID_ARGUMENT: Failed to open {flags['model_path']}")
        return 1
    if flags["backend"] != "cpu":
        print(f"UNIMPLEMENTED: the backend {flags['backend']} cannot be used on this device")
        return 1
    request = {
        "model": flags["model_path"],
        "prefill_tokens": int(flags["benchmark_prefill_tokens"]),
        "decode_tokens": int(flags["benchmark_decode_tokens"]),
        "threads": int(flags["num_cpu_threads"]) or os.cpu_count(),
        "cache_dir": flags["cache_dir"] or str(Path(flags["model_path"]).parent),
    }
    found = measure_bundle(request)
    print("BenchmarkInfo:")
    print("  Init Phases (2):")
    print(f"    - Executor initialization: {found['init_s'] * 900:.2f} ms")
    print(f"    - Init Total: {found['init_s'] * 1000:.2f} ms")
    print("--------------------------------------------------")
    print(f"  Time to first token: {found['ttft_s']:.2f} s")
    print("--------------------------------------------------")
    for label, name in (("Prefill", "prefill"), ("Decode", "decode")):
        tokens, speed = found[f"{name}_tokens"], found[f"{name}_tokens_per_s"]
        duration_ms = 1000 * tokens / speed if speed else 0.0
        print(f"  {label} Turns (Total 1 turns):")
        print(f"    {label} Turn 1: Processed {tokens} tokens in {duration_ms:.6f}ms duration.")
        print(f"      {label} Speed: {speed:.2f} tokens/sec.")
    print("--------------------------------------------------")
    memory = read_process_memory(os.getpid())
    if memory is not None and flags["report_peak_memory_footprint"] == "true":
        print(f"I0000 00:00:00.000000 1 main.cc:1] Peak system ram usage: {memory[0] / 1e6:.2f}MB.")
        print(f"I0000 00:00:00.000000 1 main.cc:1] Peak private footprint: {memory[1] / 1e6:.2f}MB.")
    return 0
