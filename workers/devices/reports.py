"""What the tools print, as figures. Pure.

A report counts only whole. An unknown flag, a figure that is not there, zero or no number raises `ToolReportInvalid`:
the tools end with status 0 for all of these. Called by `workers.devices.phone`.
"""

from __future__ import annotations

import math
import re
from typing import Any

from service.errors import ToolReportInvalid

_NUMBER = r"([-+]?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|nan|inf))"
_UNKNOWN_FLAG = re.compile(r"Unconsumed cmdline flags:\s*(.+)|Unknown command line flag '([^']+)'", re.IGNORECASE)
#: Lines of `benchmark_model` that begin a block of timings.
_COUNT = re.compile(r"\bcount=(\d+)(.*)")
#: Half of the last decimal, and what the tool's own order of adding costs.
_TTFT_ROUNDING_S = 0.006
_AGGREGATED = "Aggregated BenchmarkInfo"
#: What the tools say of a delegate, and what it means for the graph.
_DELEGATIONS = (
    (r"Explicitly applied (.+?) delegate, and the model graph will be completely executed by the delegate", "whole"),
    (
        r"Explicitly applied (.+?) delegate, and the model graph will be partially executed by the delegate"
        r"(?: w/ (\d+) delegate kernels)?",
        "part",
    ),
    (r"Though (\S+) delegate is (?:explicitly )?applied, the model graph will not be executed by", "none"),
    (r"Failed to apply (\S+) delegate", "none"),
)


def parse_benchmark_model(text: str) -> dict[str, Any]:
    """Read what `benchmark_model` printed of one signature.

    Returns `init_s`, `first_ms`, `latency_ms` (`count`, `avg`, and where told `min`, `max`, `p5`, `median`, `p95`),
    `delegations` (`[{delegate, share: whole | part | none}]`, of a part `kernels`), and where reported
    `peak_rss_bytes` and `footprint_bytes`.
    """
    refuse_unknown_flags("benchmark_model", text)
    blocks = [_read_block(count, rest) for count, rest in _COUNT.findall(text)]
    summary = re.search(
        rf"Inference timings in us: Init: {_NUMBER}, First inference: {_NUMBER}, Warmup \(avg\): {_NUMBER}, "
        rf"Inference \(avg\): {_NUMBER}",
        text,
    )
    if summary is None or not blocks:
        raise _incomplete("benchmark_model", "inference timings", text)
    timed = blocks[-1]
    if not timed.get("count"):
        raise _incomplete("benchmark_model", "timed runs: count=0", text)
    found: dict[str, Any] = {
        "init_s": _positive("benchmark_model", "init", summary[1]) / 1e6,
        "first_ms": _positive("benchmark_model", "first inference", summary[2]) / 1e3,
        "latency_ms": {
            name: value if name == "count" else _positive("benchmark_model", name, value) / 1e3
            for name, value in timed.items()
        },
        "delegations": _read_delegations(text),
    }
    # A mean over the runs must be the mean of the runs.
    average_ms = _positive("benchmark_model", "inference", summary[4]) / 1e3
    if not math.isclose(average_ms, found["latency_ms"]["avg"], rel_tol=1e-3):
        raise _incomplete("benchmark_model", "one average: the two that it prints differ", text)
    for name, label in (
        ("peak_rss_bytes", r"Overall peak memory footprint \(MB\) via periodic monitoring:"),
        ("footprint_bytes", r"Memory footprint delta from the start of the tool \(MB\): init=\S+ overall="),
    ):
        if match := re.search(rf"{label}\s*{_NUMBER}", text):
            found[name] = _mebibytes(match[1])
    return found


def parse_litert_lm(text: str) -> dict[str, Any]:
    """Read what `litert_lm_advanced_main` printed of one iteration.

    Returns `init_s`, `ttft_s`, `prefill_tokens`, `prefill_tokens_per_s`, `decode_tokens`, `decode_tokens_per_s`, and
    where reported `peak_rss_bytes` and `footprint_bytes`.
    """
    tool = "litert_lm_advanced_main"
    refuse_unknown_flags(tool, text)
    _, found, report = text.partition("BenchmarkInfo:")
    # A median of several iterations has the same labels; it is not what one process did.
    report = report.split(_AGGREGATED)[0]
    if not found:
        raise _incomplete(tool, "BenchmarkInfo", text)
    figures: dict[str, Any] = {
        "init_s": _find(tool, "init time", rf"(?:Init Total|Total init time): {_NUMBER} ms", report) / 1e3,
    }
    ttft = re.search(rf"Time to first token: {_NUMBER} s", report)
    if ttft is None:
        raise _incomplete(tool, "time to first token", text)
    for name in ("prefill", "decode"):
        label = name.capitalize()
        turns = re.findall(rf"{label} Turn \d+: Processed (\d+) tokens", report)
        speeds = re.findall(rf"{label} Speed: {_NUMBER} tokens/sec", report)
        if len(turns) != 1 or len(speeds) != 1:
            raise _incomplete(tool, f"one {name} turn: there are {len(turns)}", text)
        figures[f"{name}_tokens"] = int(_positive(tool, f"{name} tokens", turns[0]))
        figures[f"{name}_tokens_per_s"] = _positive(tool, f"{name} speed", speeds[0])
    figures["ttft_s"] = _sharpen_ttft(tool, figures, ttft[1])
    for name, label in (("peak_rss_bytes", "Peak system ram usage"), ("footprint_bytes", "Peak private footprint")):
        if match := re.search(rf"{label}:\s*{_NUMBER}\s*MB", text):
            figures[name] = _mebibytes(match[1])
    return figures


def parse_answer(words: str, log: str) -> dict[str, Any]:
    """Read what `litert_lm_advanced_main` answered to one prompt in a session.

    `words` is what it printed for people, `output: TEXT` and line ends; `log` the rest, with its benchmark's report.
    Returns `text`, `prompt_tokens` and `generated_tokens`. No answer is an error, never an empty one.
    """
    tool = "litert_lm_advanced_main"
    refuse_unknown_flags(tool, log)
    _, found, text = words.partition("output: ")
    if not found:
        raise _incomplete(tool, "an answer to a prompt", log)
    _, _, report = log.partition("BenchmarkInfo:")
    counts = {}
    for name, label in (("prompt_tokens", "Prefill"), ("generated_tokens", "Decode")):
        turns = re.findall(rf"{label} Turn \d+: Processed (\d+) tokens", report.split(_AGGREGATED)[0])
        if len(turns) != 1:
            raise _incomplete(tool, f"one {label.lower()} turn of an answer: there are {len(turns)}", log)
        counts[name] = int(_positive(tool, f"{label.lower()} tokens of an answer", turns[0]))
    return {"text": text.removesuffix("\n"), **counts}


def _sharpen_ttft(tool: str, figures: dict[str, Any], printed: str) -> float:
    """The tool prints two decimals of what it derives from other figures: derived again, it has them all.

    A fast model's 0.00 is a time, then; beside slower figures it is none.
    """
    derived_s: float = figures["prefill_tokens"] / figures["prefill_tokens_per_s"] + 1 / figures["decode_tokens_per_s"]
    if abs(derived_s - float(printed)) <= _TTFT_ROUNDING_S:
        return derived_s
    return _positive(tool, "time to first token", printed)


def refuse_unknown_flags(tool: str, text: str) -> None:
    """Raise `ToolReportInvalid` where a tool says that it did not understand what it was told."""
    if match := _UNKNOWN_FLAG.search(text):
        flag = (match[1] or match[2]).strip()
        raise ToolReportInvalid(
            f"This {tool} does not know the flag {flag!r}: it is of another version than the ones that are understood. "
            "Register one that does: `edgekiln tools add`.",
            flag=flag,
        )


def _read_block(count: str, rest: str) -> dict[str, Any]:
    """Read `count=50 first=… avg=…`, or its short forms: `count=0`, and `count=N curr=T(all same)`."""
    values: dict[str, Any] = dict(re.findall(rf"(\w+)={_NUMBER}", rest))
    if "all same" in rest and "curr" in values:
        same = values["curr"]
        values = dict.fromkeys(("min", "max", "avg", "median", "p5", "p95"), same)
    names = ("min", "max", "avg", "p5", "median", "p95")
    return {"count": int(count), **{name: values[name] for name in names if name in values}}


def _read_delegations(text: str) -> list[dict[str, Any]]:
    found = []
    for pattern, share in _DELEGATIONS:
        for match in re.finditer(pattern, text):
            delegation: dict[str, Any] = {"delegate": match[1].strip(), "share": share}
            if match.re.groups > 1 and match[2]:
                delegation["kernels"] = int(match[2])
            found.append(delegation)
    return found


def _find(tool: str, name: str, pattern: str, text: str) -> float:
    match = re.search(pattern, text)
    if match is None:
        raise _incomplete(tool, name, text)
    return _positive(tool, name, match[1])


def _positive(tool: str, name: str, text: str) -> float:
    value = float(text)
    if not math.isfinite(value) or value <= 0:
        raise ToolReportInvalid(f"{tool} reported {name} = {text}: nothing ran, whatever its exit status.", figure=name)
    return value


def _mebibytes(text: str) -> int | None:
    """The tools divide by 1024 * 1024 and write MB; what is not measured they print as -1 or 0."""
    value = float(text)
    return round(value * 1024 * 1024) if math.isfinite(value) and value > 0 else None


def _incomplete(tool: str, what: str, text: str) -> ToolReportInvalid:
    last = next((line for line in reversed(text.splitlines()) if line.strip()), "nothing")
    return ToolReportInvalid(
        f"{tool} did not report {what}. Its last line: {last.strip()[:200]!r}.", last_line=last.strip()[:200]
    )
