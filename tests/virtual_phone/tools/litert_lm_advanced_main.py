"""`litert_lm_advanced_main`: a `.litertlm` or `.task` in the runtime, timed or asked; LiteRT-LM prints such lines."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.virtual_phone.tools.flags import split_flags
from workers.devices.conditions import read_process_memory
from workers.devices.instrument import measure_bundle

_PREFIX = "I0000 00:00:00.000000    1 litert_lm_lib.cc:424] "
_RULE = "-" * 50
_FLAGS = {
    "backend": "cpu",
    "model_path": "",
    "input_prompt": "",
    "benchmark": "false",
    "benchmark_prefill_tokens": "0",
    "benchmark_decode_tokens": "0",
    "max_num_tokens": "0",
    "max_output_tokens": "-1",
    "use_session": "false",
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
    # What is logged goes to standard error; standard output is for answers.
    log(describe(_answer(flags) if flags["use_session"] == "true" else _benchmark(flags)))
    memory = read_process_memory(os.getpid())
    if memory is not None and flags["report_peak_memory_footprint"] == "true":
        log(f"{_PREFIX}Peak system ram usage: {memory[0] / 1e6:.2f}MB.")
        log(f"{_PREFIX}Peak private footprint: {memory[1] / 1e6:.2f}MB.")
    return 0


def log(text: str) -> None:
    """Print where the runtime logs."""
    print(text, file=sys.stderr)


def describe(found: Mapping[str, Any]) -> str:
    """Return the runtime's report on one turn."""
    lines = [
        f"{_PREFIX}BenchmarkInfo:",
        "  Init Phases (2):",
        f"    - Executor initialization: {found['init_s'] * 900:.2f} ms",
        f"    - Init Total: {found['init_s'] * 1000:.2f} ms",
        _RULE,
        f"  Time to first token: {found['ttft_s']:.2f} s",
        _RULE,
    ]
    for label, name in (("Prefill", "prefill"), ("Decode", "decode")):
        tokens, speed = found[f"{name}_tokens"], found[f"{name}_tokens_per_s"]
        duration_ms = 1000 * tokens / speed if speed else 0.0
        lines += [
            f"  {label} Turns (Total 1 turns):",
            f"    {label} Turn 1: Processed {tokens} tokens in {duration_ms:.6f}ms duration.",
            f"      {label} Speed: {speed:.2f} tokens/sec.",
        ]
    return "\n".join([*lines, _RULE])


def _benchmark(flags: Mapping[str, str]) -> dict[str, Any]:
    return measure_bundle(
        {
            "model": flags["model_path"],
            "prefill_tokens": int(flags["benchmark_prefill_tokens"]),
            "decode_tokens": int(flags["benchmark_decode_tokens"]),
            "threads": int(flags["num_cpu_threads"]) or os.cpu_count(),
            "cache_dir": flags["cache_dir"] or str(Path(flags["model_path"]).parent),
        }
    )


def _answer(flags: Mapping[str, str]) -> dict[str, Any]:
    """Answer the prompt in a session of default settings, as the tool does, and print it."""
    import litert_lm

    litert_lm.set_min_log_severity(litert_lm.LogSeverity.ERROR)
    engine = litert_lm.Engine(
        flags["model_path"],
        litert_lm.Backend.CPU(thread_count=int(flags["num_cpu_threads"]) or os.cpu_count()),
        cache_dir=flags["cache_dir"],
        enable_benchmark=True,
    )
    limit_tokens = int(flags["max_output_tokens"])
    with engine, engine.create_session(max_output_tokens=limit_tokens if limit_tokens > 0 else None) as session:
        session.run_prefill([flags["input_prompt"] or "What is the tallest building in the world?"])
        for text in session.run_decode().texts:
            print(f"output: {text}", flush=True)
        info = session.get_benchmark_info()
        return {
            "init_s": info.init_time_in_second,
            "ttft_s": info.time_to_first_token_in_second,
            "prefill_tokens": info.last_prefill_token_count,
            "prefill_tokens_per_s": info.last_prefill_tokens_per_second,
            "decode_tokens": info.last_decode_token_count,
            "decode_tokens_per_s": info.last_decode_tokens_per_second,
        }
