"""Reports of the tools: whole ones as the tools print them, and everything that is less."""

from __future__ import annotations

import pytest

from service.errors import ToolReportInvalid
from workers.devices.reports import parse_answer, parse_benchmark_model, parse_litert_lm

#: As LiteRT's `benchmark_model` prints it, timings of a phone, a GPU delegate that took all and one that took nothing.
BENCHMARK_MODEL = """\
INFO: STARTING!
INFO: Log parameter values verbosely: [0]
INFO: Graph: [/data/local/tmp/model.tflite]
INFO: Use gpu: [1]
INFO: Loaded model /data/local/tmp/model.tflite
INFO: Created TensorFlow Lite delegate for GPU.
INFO: Explicitly applied GPU delegate, and the model graph will be completely executed by the delegate.
INFO: Though NNAPI delegate is explicitly applied, the model graph will not be executed by the delegate.
INFO: The input model file size (MB): 16.1527
INFO: Initialized session in 5664.36ms.
INFO: Running benchmark for at least 1 iterations and at least 0.5 seconds but terminate if exceeding 150 seconds.
INFO: count=2 first=328140 curr=309932 min=309932 max=328140 avg=319036 std=9104 p5=309932 median=328140 p95=328140

INFO: Running benchmark for at least 50 iterations and at least 1 seconds but terminate if exceeding 150 seconds.
INFO: count=50 first=1.307215e+06 curr=309783 min=305938 max=1.33303e+06 avg=309350 p5=306372 median=307968 p95=315711

INFO: Inference timings in us: Init: 5664363, First inference: 328140, Warmup (avg): 319036, Inference (avg): 309350
INFO: Note: as the benchmark tool itself affects memory footprint, this is only APPROXIMATE.
INFO: Memory footprint delta from the start of the tool (MB): init=95.4688 overall=99.5
INFO: Overall peak memory footprint (MB) via periodic monitoring: 256
"""
#: As LiteRT-LM's `litert_lm_advanced_main` prints it.
LITERT_LM = """\
I0000 00:00:1789784532.427623    8446 litert_lm_lib.cc:424] BenchmarkInfo:
  Init Phases (2):
    - Executor initialization: 860.20 ms
    - Init Total: 900.50 ms
--------------------------------------------------
  Time to first token: 2.12 s
--------------------------------------------------
  Prefill Turns (Total 1 turns):
    Prefill Turn 1: Processed 1024 tokens in 2084.601ms duration.
      Prefill Speed: 491.23 tokens/sec.
--------------------------------------------------
  Decode Turns (Total 1 turns):
    Decode Turn 1: Processed 256 tokens in 7977.563ms duration.
      Decode Speed: 32.09 tokens/sec.
--------------------------------------------------
I0000 00:00:1789784533.000000    8446 litert_lm_lib.cc:474] Peak system ram usage: 1568.74MB.
I0000 00:00:1789784533.000000    8446 litert_lm_lib.cc:477] Peak private footprint: 120.5MB.
"""


def test_benchmark_model_is_read_whole() -> None:
    found = parse_benchmark_model(BENCHMARK_MODEL)
    assert found["init_s"] == pytest.approx(5.664363)
    assert found["first_ms"] == pytest.approx(328.14)
    assert found["latency_ms"] == {
        "count": 50,
        "min": pytest.approx(305.938),
        "max": pytest.approx(1333.03),
        "avg": pytest.approx(309.35),
        "p5": pytest.approx(306.372),
        "median": pytest.approx(307.968),
        "p95": pytest.approx(315.711),
    }
    assert found["delegations"] == [{"delegate": "GPU", "share": "whole"}, {"delegate": "NNAPI", "share": "none"}]
    assert found["peak_rss_bytes"] == 256 << 20


def test_equal_times_are_times() -> None:
    text = BENCHMARK_MODEL.replace(
        "count=50 first=1.307215e+06 curr=309783 min=305938 max=1.33303e+06 avg=309350 p5=306372 median=307968 "
        "p95=315711",
        "count=50 curr=309350(all same)",
    )
    latency = parse_benchmark_model(text)["latency_ms"]
    assert latency["count"] == 50
    assert latency["median"] == latency["avg"] == pytest.approx(309.35)


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("INFO: STARTING!", "INFO: STARTING!\nWARN: Unconsumed cmdline flags: --warm_up=3", "--warm_up=3"),
        ("INFO: Inference timings in us", "INFO: nothing", "inference timings"),
        ("count=50 first=1.307215e+06", "count=0\nfirst=1", "count=0"),
        ("Init: 5664363", "Init: 0", "init = 0"),
        ("median=307968", "median=nan", "median = nan"),
        ("Inference (avg): 309350", "Inference (avg): 3", "the two that it prints differ"),
    ],
)
def test_benchmark_model_counts_only_whole(old: str, new: str, named: str) -> None:
    assert old in BENCHMARK_MODEL
    with pytest.raises(ToolReportInvalid) as caught:
        parse_benchmark_model(BENCHMARK_MODEL.replace(old, new))
    assert named in caught.value.message


def test_litert_lm_is_read_whole() -> None:
    found = parse_litert_lm(LITERT_LM)
    assert found == {
        "init_s": pytest.approx(0.9005),
        # The printed 2.12 s with the decimals that its parts have.
        "ttft_s": pytest.approx(1024 / 491.23 + 1 / 32.09),
        "prefill_tokens": 1024,
        "prefill_tokens_per_s": 491.23,
        "decode_tokens": 256,
        "decode_tokens_per_s": 32.09,
        "peak_rss_bytes": round(1568.74 * 1024 * 1024),
        "footprint_bytes": round(120.5 * 1024 * 1024),
    }


def test_a_fast_models_time_is_rounded_away_and_derived_again() -> None:
    fast = LITERT_LM.replace("491.23", "491230.00").replace("32.09", "3209.00")
    assert parse_litert_lm(fast.replace("2.12 s", "0.00 s"))["ttft_s"] == pytest.approx(1024 / 491230 + 1 / 3209)


def test_a_median_of_iterations_is_no_process() -> None:
    aggregated = LITERT_LM + LITERT_LM.replace(
        "BenchmarkInfo:", "Aggregated BenchmarkInfo (median of 3 iterations):"
    ).replace("491.23", "999.00")
    assert parse_litert_lm(aggregated)["prefill_tokens_per_s"] == 491.23


def test_an_older_build_names_its_init_otherwise() -> None:
    text = LITERT_LM.replace("    - Init Total: 900.50 ms", "    Total init time: 1922.03 ms")
    assert parse_litert_lm(text)["init_s"] == pytest.approx(1.92203)


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("BenchmarkInfo:", "nothing", "BenchmarkInfo"),
        ("Decode Turn 1: Processed 256 tokens in 7977.563ms duration.", "No decode turns recorded.", "decode turn"),
        ("Decode Speed: 32.09", "Decode Speed: 0.00", "decode speed = 0.00"),
        ("Prefill Speed: 491.23", "Prefill Speed: inf", "prefill speed = inf"),
        ("Time to first token: 2.12 s", "", "time to first token"),
        ("Time to first token: 2.12 s", "Time to first token: 0.00 s", "time to first token = 0.00"),
        ("Init Total", "Init", "init time"),
        ("I0000", "ERROR: Unknown command line flag 'disable_cache'.\nI0000", "disable_cache"),
    ],
)
def test_litert_lm_counts_only_whole(old: str, new: str, named: str) -> None:
    assert old in LITERT_LM
    with pytest.raises(ToolReportInvalid) as caught:
        parse_litert_lm(LITERT_LM.replace(old, new, 1))
    assert named in caught.value.message


@pytest.mark.parametrize("end", range(0, len(LITERT_LM) - 400, 40))
def test_a_report_that_was_cut_off_is_none(end: int) -> None:
    with pytest.raises(ToolReportInvalid):
        parse_litert_lm(LITERT_LM[:end])


@pytest.mark.parametrize(("words", "text"), [("output: a\nb\n", "a\nb"), ("output: \n", ""), ("output: a\n\n", "a\n")])
def test_an_answer_is_read_with_its_counts(words: str, text: str) -> None:
    assert parse_answer(words, LITERT_LM) == {"text": text, "prompt_tokens": 1024, "generated_tokens": 256}


@pytest.mark.parametrize(
    ("words", "old", "new", "named"),
    [
        ("", "", "", "an answer to a prompt"),
        ("output: a\n", "BenchmarkInfo:", "nothing", "prefill turn"),
        ("output: a\n", "Decode Turn 1", "Decode Turn", "decode turn"),
        ("output: \n", "Processed 256", "Processed 0", "decode tokens of an answer = 0"),
        ("output: a\n", "I0000", "ERROR: Unknown command line flag 'use_session'.\nI0000", "use_session"),
    ],
)
def test_no_answer_is_an_error(words: str, old: str, new: str, named: str) -> None:
    with pytest.raises(ToolReportInvalid) as caught:
        parse_answer(words, LITERT_LM.replace(old, new, 1) if old else LITERT_LM)
    assert named in caught.value.message


@pytest.mark.parametrize(("words", "kernels"), [(" w/ 2 delegate kernels", {"kernels": 2}), ("", {})])
def test_a_part_of_a_graph_says_in_how_many_kernels(words: str, kernels: dict[str, int]) -> None:
    part = f"the model graph will be partially executed by the delegate{words}."
    text = BENCHMARK_MODEL.replace("the model graph will be completely executed by the delegate.", part)
    assert parse_benchmark_model(text)["delegations"][0] == {"delegate": "GPU", "share": "part", **kernels}


@pytest.mark.parametrize(("kind", "turn"), [("prefill", "Prefill"), ("decode", "Decode")])
def test_several_turns_are_no_one_process(kind: str, turn: str) -> None:
    line = next(line for line in LITERT_LM.splitlines() if f"{turn} Turn 1" in line)
    with pytest.raises(ToolReportInvalid, match=f"one {kind} turn: there are 2"):
        parse_litert_lm(LITERT_LM.replace(line, f"{line}\n{line.replace('Turn 1', 'Turn 2')}"))
