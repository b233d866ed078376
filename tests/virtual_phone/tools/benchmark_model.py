"""`benchmark_model`: times one signature of a `.tflite`; LiteRT prints such lines."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tests.virtual_phone.tools.flags import split_flags
from workers.devices.conditions import read_process_memory
from workers.devices.instrument import make_input

_FLAGS = {
    "graph": "",
    "signature_to_run_for": "",
    "num_runs": "50",
    "min_secs": "1",
    "max_secs": "150",
    "warmup_runs": "1",
    "warmup_min_secs": "0.5",
    "num_threads": "-1",
    "use_xnnpack": "true",
    "use_gpu": "false",
    "enable_op_profiling": "false",
    "report_peak_memory_footprint": "false",
}


def main(argv: Sequence[str]) -> int:
    """Run the tool."""
    flags, unknown = split_flags(argv, _FLAGS)
    print("INFO: STARTING!")
    if unknown:
        print(f"WARN: Unconsumed cmdline flags: {' '.join(unknown)}")
    if not Path(flags["graph"]).is_file():
        print(f"ERROR: Could not open '{flags['graph']}'.\nERROR: Failed to initialize the interpreter.")
        return 1
    print(f"INFO: Graph: [{flags['graph']}]")
    if flags["use_gpu"] == "true":
        print("ERROR: Can't load OpenCL library on this device.\nINFO: Failed to apply GPU delegate.")
    else:
        print(
            "INFO: Explicitly applied XNNPACK delegate, and the model graph will be partially executed by the delegate"
            " w/ 2 delegate kernels."
        )
    print(f"INFO: The input model file size (MB): {Path(flags['graph']).stat().st_size / 1e6:g}")
    return _measure(flags)


def _measure(flags: dict[str, str]) -> int:
    from ai_edge_litert.interpreter import Interpreter

    started_s = time.perf_counter()
    threads = int(flags["num_threads"])
    interpreter = Interpreter(flags["graph"], num_threads=threads if threads > 0 else os.cpu_count())
    names = list(interpreter.get_signature_list())
    asked = flags["signature_to_run_for"]
    if asked not in names and (asked or len(names) > 1):
        print("ERROR: Please specify the signature to run: the model has several.")
        return 1
    runner = interpreter.get_signature_runner(asked or names[0])
    inputs = {
        name: make_input(name, list(detail["shape"]), np.dtype(detail["dtype"]).name)
        for name, detail in runner.get_input_details().items()
    }
    init_us = (time.perf_counter() - started_s) * 1e6
    print(f"INFO: Initialized session in {init_us / 1000:g}ms.")
    warm_us = _repeat(runner, inputs, int(flags["warmup_runs"]))
    print(_line(warm_us))
    timed_us = _repeat(runner, inputs, int(flags["num_runs"]))
    print(_line(timed_us))
    if flags["enable_op_profiling"] == "true":
        print(_profile(timed_us, asked or names[0]))
    print(
        f"INFO: Inference timings in us: Init: {init_us:g}, First inference: {warm_us[0]:g}, "
        f"Warmup (avg): {np.mean(warm_us):g}, Inference (avg): {np.mean(timed_us):g}"
    )
    memory = read_process_memory(os.getpid())
    if memory is not None:
        print(f"INFO: Memory footprint delta from the start of the tool (MB): init=1.5 overall={memory[1] / 1e6:g}")
        if flags["report_peak_memory_footprint"] == "true":
            print(f"INFO: Overall peak memory footprint (MB) via periodic monitoring: {memory[0] / 1e6:g}")
    sys.stdout.flush()
    return 0


def _profile(timed_us: Sequence[float], name: str) -> str:
    """Tell what the runtime tells us: all nodes are one, its delegate's, as builds without insight into it print."""
    first, average = timed_us[0] / 1000, float(np.mean(timed_us)) / 1000
    columns = "\t             [node type]\t          [start]\t  [first]\t [avg ms]\t     [%]\t  [cdf%]\t  [mem KB]"
    node = (
        f"\t   TfLiteXNNPackDelegate\t            0.000\t{first:9.3f}\t{average:9.3f}\t100.000%\t100.000%\t     0.000"
    )
    table = f"{columns}\t[times called]\t[Name]\n{node}\t        1\t[{name}]:0\n"
    return (
        "INFO: Operator-wise Profiling Info for Regular Benchmark Runs:\n"
        f"============================== Run Order ==============================\n{table}\n"
        f"============================== Top by Computation Time ==============================\n{table}\n"
        "Number of nodes executed: 1\n"
        "============================== Summary by node type ==============================\n"
        "\t             [Node type]\t  [count]\t  [avg ms]\t    [avg %]\t    [cdf %]\t  [mem KB]\t[times called]\n"
        f"\t   TfLiteXNNPackDelegate\t        1\t{average:10.3f}\t   100.000%\t   100.000%\t     0.000\t        1\n\n"
        f"Timings (microseconds): {_line(timed_us).removeprefix('INFO: ')}\nMemory (bytes): count=0\n1 nodes observed\n"
    )


def _repeat(runner: object, inputs: dict[str, object], count: int) -> list[float]:
    samples_us = []
    for _ in range(count):
        started_s = time.perf_counter()
        runner(**inputs)  # type: ignore[operator]
        samples_us.append((time.perf_counter() - started_s) * 1e6)
    return samples_us


def _line(samples_us: Sequence[float]) -> str:
    if not samples_us:
        return "INFO: count=0"
    if min(samples_us) == max(samples_us):
        return f"INFO: count={len(samples_us)} curr={samples_us[-1]:g}(all same)"
    p5, median, p95 = np.percentile(samples_us, (5, 50, 95))
    return (
        f"INFO: count={len(samples_us)} first={samples_us[0]:g} curr={samples_us[-1]:g} min={min(samples_us):g} "
        f"max={max(samples_us):g} avg={np.mean(samples_us):g} std={np.std(samples_us):.0f} p5={p5:g} "
        f"median={median:g} p95={p95:g}"
    )
