"""How often verdicts, intervals and words of benchmarks are right, on simulated devices whose truth is known.

    python benchmarks/calibration.py
    python benchmarks/calibration.py --devices 200 --seed 7 --json calibration.json
    python benchmarks/calibration.py --set tuning

Every capture runs through `workers.devices.capture.measure` and every comparison through `service.difference`, as in
the product; only the phone is simulated (`benchmarks/simulated_devices.py`), and it does not say how hot it is, which
is the hard case. Devices are drawn anew for each capture or comparison. Half of the captures are of bundles (speeds),
half of graphs (times). Thresholds were chosen on `--set tuning`; the default is the set that was not used for that,
with other seeds.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.simulated_devices import (
    DECODE_TOKENS,
    DECODE_TOKENS_PER_S,
    JUDGED,
    LIMITS,
    PREFILL_TOKENS,
    PROCESSES,
    SESSION_SD,
    TUNING,
    Model,
    Rng,
    Session,
    Set,
    SimulatedPhone,
    find_truth,
)
from service.difference import find_changes, find_metrics
from workers.devices import capture

SETS = {"judged": JUDGED, "tuning": TUNING, "limits": LIMITS}
#: Keeps the seeds of the sets apart.
_STREAMS = {"judged": 1, "tuning": 2, "limits": 3}
FORMATS = ("litertlm", "tflite")
#: The decode speed of bundles, and the latency of graphs.
METRIC = {"litertlm": "decode_tokens_per_s", "tflite": "latency_ms.decode"}
#: Their truth on a device whose log speed is 0.
BASE = {"litertlm": DECODE_TOKENS_PER_S, "tflite": 1000 / DECODE_TOKENS_PER_S}
#: True differences that a comparison is to find, as shares.
DIFFERENCES = (0.0, 0.05, 0.1, 0.2)


def measure(rng: Rng, session: Session, model_format: str, folder: Path, log_level: float) -> dict[str, Any]:
    """Return the figures of one measurement of one session."""
    phone = SimulatedPhone(rng, session, log_level)
    asked = {
        "format": model_format,
        "processes": PROCESSES,
        "threads": 4,
        "backend": "cpu",
        "prefill_tokens": PREFILL_TOKENS,
        "decode_tokens": DECODE_TOKENS,
    }
    device = capture.Device(
        record={"name": "simulated", "kind": "virtual"},
        run_process=phone.run_process,
        read_conditions=phone.read_conditions,
    )
    return capture.measure(device, asked, folder, lambda *_: None)


def judge_captures(rng: Rng, model: Model, devices: int, folder: Path) -> dict[str, Any]:
    """Measure many devices of a model: what the verdicts are, and how often the interval holds the truth."""
    verdicts: Counter[str] = Counter()
    first: Counter[str] = Counter()
    held, held_later = [], []
    for number in range(devices):
        session, model_format = model.draw(rng), FORMATS[number % 2]
        log_level = rng.normal(0, SESSION_SD)
        found = measure(rng, session, model_format, folder, log_level)
        document = json.loads((folder / capture.DOCUMENT).read_text())
        verdicts[found["verdict"]] += 1
        first[document["captures"][0]["verdict"]] += 1
        if found["verdict"] == "stable":
            truth = find_truth(rng, session, found["captures"])
            held.append(_holds(found, model_format, truth + log_level))
            held_later.append(_holds(found, model_format, truth + rng.normal(0, SESSION_SD)))
    return {
        "model": model.name,
        "devices": devices,
        "first_verdicts": _shares(first),
        "verdicts": _shares(verdicts),
        "coverage": _mean(held),
        "coverage_another_day": _mean(held_later),
    }


def judge_words(rng: Rng, model: Model, devices: int, difference: float, folder: Path) -> dict[str, Any]:
    """Compare two measurements of many devices, of which the second is faster by `difference`; only stable ones."""
    words: Counter[str] = Counter()
    held = []
    for number in range(devices):
        session, model_format = model.draw(rng), FORMATS[number % 2]
        levels = [level + rng.normal(0, SESSION_SD) for level in (0.0, np.log1p(difference))]
        pair = [measure(rng, session, model_format, folder, level) for level in levels]
        if any(found["verdict"] != "stable" for found in pair):
            continue
        change = next(each for each in find_changes(*pair) if each.metric == METRIC[model_format])
        words[change.verdict] += 1
        truth = np.exp((levels[1] - levels[0]) * (1 if model_format == "litertlm" else -1))
        if change.interval:
            held.append(change.interval[0] <= truth <= change.interval[1])
    return {
        "model": model.name,
        "difference": difference,
        "devices": devices,
        "compared": words.total(),
        "words": _shares(words),
        "coverage": _mean(held),
    }


def _holds(found: Mapping[str, Any], model_format: str, log_truth: float) -> bool:
    """Whether the interval of a measurement holds the true median."""
    better, summary = find_metrics(found)[METRIC[model_format]]
    low, high = np.log(np.asarray(summary["interval"]) / BASE[model_format])
    return bool(low <= (log_truth if better == "higher" else -log_truth) <= high)


def _shares(counts: Counter[str]) -> dict[str, float]:
    return {name: count / counts.total() for name, count in sorted(counts.items())}


def _mean(flags: Sequence[bool]) -> float | None:
    return float(np.mean(flags)) if flags else None


def calibrate(models: Set, seed: Sequence[int], devices: int) -> dict[str, Any]:
    """Return all figures of a set of models; `devices` of each model, for verdicts and for each difference."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        # A stream of its own for each: a model that is added changes no other's figures.
        streams = {
            (purpose, model.name): np.random.default_rng([*seed, number, purpose])
            for purpose in range(1 + len(DIFFERENCES))
            for number, model in enumerate((*models.healthy, *models.throttled))
        }
        return {
            "devices": devices,
            "healthy": [judge_captures(streams[0, each.name], each, devices, folder) for each in models.healthy],
            "throttled": [judge_captures(streams[0, each.name], each, devices, folder) for each in models.throttled],
            "comparisons": [
                judge_words(streams[1 + number, each.name], each, devices, difference, folder)
                for each in models.healthy
                for number, difference in enumerate(DIFFERENCES)
            ],
        }


def print_report(found: Mapping[str, Any]) -> None:
    """Print the figures as tables of Markdown, as docs/devices.md has them."""
    print(f"\n{found['devices']} measurements each; a noisy or hot capture was repeated once.\n")
    _print_row("healthy", "hot at first", "hot", "noisy", "stable", "interval holds the median", "on another day")
    _print_row("---", *["---:"] * 6)
    for row in found["healthy"]:
        shares = [row["first_verdicts"].get("hot", 0.0), *(row["verdicts"].get(name, 0.0) for name in _COLUMNS)]
        _print_row(row["model"], *map(_percent, [*shares, row["coverage"], row["coverage_another_day"]]))
    print()
    _print_row("throttled", "hot at first", "hot", "noisy", "passed as stable")
    _print_row("---", *["---:"] * 4)
    for row in found["throttled"]:
        shares = [row["first_verdicts"].get("hot", 0.0), *(row["verdicts"].get(name, 0.0) for name in _COLUMNS)]
        _print_row(row["model"], *map(_percent, shares))
    print()
    _print_row(
        "compared", "truly faster by", "faster", "slower", "no difference", "unclear", "interval holds the ratio"
    )
    _print_row("---", *["---:"] * 6)
    for row in found["comparisons"]:
        shares = [row["words"].get(word, 0.0) for word in ("faster", "slower", "no difference", "unclear")]
        _print_row(row["model"], *map(_percent, [row["difference"], *shares, row["coverage"]]))


_COLUMNS = ("hot", "noisy", "stable")


def _print_row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |")


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share * 100:.1f} %"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=1000, help="Of each model, for each figure.")
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--set", choices=SETS, default="judged")
    parser.add_argument("--json", type=Path, help="Write all figures there too.")
    given = parser.parse_args(arguments)
    found = calibrate(SETS[given.set], [_STREAMS[given.set], given.seed], given.devices)
    print_report(found)
    if given.json:
        given.json.write_text(json.dumps({"set": given.set, "seed": given.seed, **found}, indent=1))


if __name__ == "__main__":
    main()
