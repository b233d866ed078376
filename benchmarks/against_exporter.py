"""EdgeKiln against the bare exporter, as ratios of wall times in one run of this script.

    python benchmarks/against_exporter.py

The yardstick is litert-torch's own command in a fresh process: one checkpoint, one recipe (`dynamic_int8`), one
`.litertlm`. It is run `--bare-runs` times, between EdgeKiln's runs, and counts with the median. Every contender gets
checkpoints of one shape, with equal prefill length and context. EdgeKiln is measured three times:

- `one_cold`: `edgekiln convert` with one recipe, fresh processes and a fresh data directory;
- `one_warm`: one recipe on a running server that has converted another, tiny model, so that its libraries are loaded
  and nothing of this checkpoint or shape was seen before;
- `six_cold`: `edgekiln convert` with six recipes; its yardstick is six bare runs.

Each has two times. `verified` is the whole: from the start of the command (warm: of the request) to its end (warm: of
the job), with proof and publication, which the exporter does not do. `converted` ends when the last bundle is in the
store, by the ledger's record; proofs that run before that, beside it, are not taken off. A ratio is a time over its
yardstick; below 1 EdgeKiln is faster. `phases` are the steps' own durations, summed by kind, and what the step
`convert` of `one_warm` says in its log about when each of its tasks began; steps run side by side.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from bare_exporter import export_bare
from measured_command import CommandError, measure, say
from shapes import SHAPES, write_checkpoint

SIX = ("none", "float16", "dynamic_int8", "weight_only_int8", "dynamic_int4", "weight_only_int4")
ONE = ("dynamic_int8",)

#: A tiny checkpoint to warm the server with.
_EXAMPLE_DIR = Path(__file__).parents[1] / "examples" / "addition"
_LOG_LINE = re.compile(r"^\[ *([\d.]+) s\] (.+)$", re.MULTILINE)

Figures = dict[str, Any]


class Comparison:
    """One run of the script: a shape, an engine, a folder for files and logs."""

    def __init__(self, shape: str, engine: str, work_dir: Path) -> None:
        self._engine, self._work_dir = engine, work_dir
        self._prefill, self._context = SHAPES[shape].prefill_length, SHAPES[shape].context_length
        say(f"writing checkpoints of shape {shape}")
        self._checkpoint, self._second = (
            write_checkpoint(work_dir / f"checkpoint-{seed}", SHAPES[shape], seed) for seed in range(2)
        )

    def run_bare(self) -> Figures:
        """Export once in a fresh process."""
        (recipe,) = ONE
        return export_bare(self._checkpoint, (self._prefill, self._context), recipe, self._work_dir).to_json()

    def run_cold(self, recipes: Sequence[str]) -> Figures:
        """Run `edgekiln convert` in a fresh data directory."""
        for folder in ("data", "out"):
            shutil.rmtree(self._work_dir / folder, ignore_errors=True)
        started_at_s = time.time()
        measured = measure(
            [
                *(str(Path(sys.executable).with_name("edgekiln")), "convert", str(self._checkpoint), "--json"),
                *("-o", str(self._work_dir / "out"), "--engine", self._engine, "--format", "litertlm"),
                *("--prefill", str(self._prefill), "--context", str(self._context)),
                *(word for recipe in recipes for word in ("--recipe", recipe)),
            ],
            self._work_dir / "edgekiln.log",
            {"EDGEKILN_DATA_DIR": str(self._work_dir / "data")},
            # 1: some variant did not succeed. A gate may refuse random weights; the work was done all the same.
            statuses=(0, 1),
        )
        return {**measured.to_json(), **describe_job(json.loads(measured.stdout), started_at_s, measured.wall_s)}

    def run_warm(self, recipes: Sequence[str]) -> Figures:
        """Convert the second checkpoint on a running server that has converted the example."""
        from service.client import Client
        from service.settings import load_settings
        from service.supervisor import Supervisor

        data_dir = self._work_dir / "warm"
        shutil.rmtree(data_dir, ignore_errors=True)
        roots = (_EXAMPLE_DIR, self._second)
        settings = load_settings({"data_dir": data_dir, "port": 0, "host": "127.0.0.1", "source_roots": roots})
        with Supervisor(settings, report=say) as supervisor, Client(supervisor.url) as client:

            def convert(checkpoint: Path, lengths: Mapping[str, Any]) -> Figures:
                request = {"source": {"kind": "folder", "path": str(checkpoint)}, "recipes": list(recipes), **lengths}
                job = client.submit(**request, formats=["litertlm"], engines=[self._engine])
                return client.wait(job["id"])

            convert(_EXAMPLE_DIR, {"prefill_lengths": [16], "context_length": 64})
            started_at_s = time.time()
            job = convert(self._second, {"prefill_lengths": [self._prefill], "context_length": self._context})
            wall_s = time.time() - started_at_s
            (log,) = (log["text"] for log in client.logs(job["id"], kind="convert"))
        return {"wall_s": wall_s, **describe_job(job, started_at_s, wall_s), "convert_tasks": list_tasks(log)}


def describe_job(job: Figures, started_at_s: float, wall_s: float) -> Figures:
    """Return both times of a job and the durations of its steps; raises `CommandError` if something was not made."""
    unfinished = [variant for variant in job["variants"] if variant["state"] not in ("succeeded", "refused")]
    if unfinished:
        raise CommandError(
            f"Not every variant was made, so there is nothing to compare: {json.dumps(unfinished)[:2000]}"
        )
    bundled_at_s = max(
        datetime.fromisoformat(step["finalized_at"]).timestamp() for step in job["steps"] if step["kind"] == "bundle"
    )
    phases: dict[str, Figures] = {}
    for step in job["steps"]:
        phase = phases.setdefault(step["kind"], {"steps": 0, "duration_s": 0.0, "peak_anon_bytes": 0})
        phase["steps"] += 1
        phase["duration_s"] += step["duration_s"] or 0.0
        phase["peak_anon_bytes"] = max(phase["peak_anon_bytes"], step["peak_anon_bytes"] or 0)
    return {
        "recipes": len(job["variants"]),
        "variants": {variant["name"]: variant["state"] for variant in job["variants"]},
        "converted_s": bundled_at_s - started_at_s,
        "verified_s": wall_s,
        "phases": phases,
    }


def list_tasks(log: str) -> list[Figures]:
    """Return what a step's log says it did, and the second at which each began."""
    return [{"begun_s": float(second), "task": task} for second, task in _LOG_LINE.findall(log)]


def compare(comparison: Comparison, bare_runs: int) -> Figures:
    """Run all contenders, a bare run before each of EdgeKiln's as far as they go."""
    contenders: dict[str, Callable[[], Figures]] = {
        "one_cold": lambda: comparison.run_cold(ONE),
        "one_warm": lambda: comparison.run_warm(ONE),
        "six_cold": lambda: comparison.run_cold(SIX),
    }
    bare: list[Figures] = []
    edgekiln: dict[str, Figures] = {}
    for name, run in contenders.items():
        for _ in range(bare_runs * (len(edgekiln) + 1) // len(contenders) - len(bare)):
            say(f"bare exporter, {len(bare) + 1} of {bare_runs}")
            bare.append(comparison.run_bare())
        say(f"edgekiln, {name}")
        edgekiln[name] = run()
    bare_s = statistics.median(run["wall_s"] for run in bare)
    for figures in edgekiln.values():
        yardstick_s = bare_s * figures["recipes"]
        figures["converted_ratio"] = figures["converted_s"] / yardstick_s
        figures["verified_ratio"] = figures["verified_s"] / yardstick_s
    return {"bare_median_s": bare_s, "bare": bare, "edgekiln": edgekiln}


def describe(result: Figures) -> str:
    """Return the figures as tables in Markdown."""
    lines = [
        f"Bare exporter: {result['bare_median_s']:.1f} s a run, median of {len(result['bare'])}; "
        f"shape {result['shape']}, engine {result['engine']}, {result['cores']} cores.",
        "",
        "| | conversion only | ratio | with verification | ratio |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, run in result["edgekiln"].items():
        lines.append(
            f"| {name} | {run['converted_s']:.1f} s | {run['converted_ratio']:.2f} "
            f"| {run['verified_s']:.1f} s | {run['verified_ratio']:.2f} |"
        )
    kinds = list(result["edgekiln"]["six_cold"]["phases"])
    lines += ["", f"| seconds in steps | {' | '.join(kinds)} |", "| --- |" + " --- |" * len(kinds)]
    for name, run in result["edgekiln"].items():
        cells = [f"{run['phases'][kind]['duration_s']:.1f}" for kind in kinds]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "| `convert`, warm | begun at |", "| --- | --- |"]
    for task in result["edgekiln"]["one_warm"]["convert_tasks"]:
        lines.append(f"| {task['task']} | {task['begun_s']:.1f} s |")
    return "\n".join(lines)


def main() -> int:
    """Compare and print; the exit code is 1 when a contender fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="smollm135m", help="which checkpoint")
    parser.add_argument("--engine", choices=("traced", "reauthored", "auto"), default="auto", help="EdgeKiln's engine")
    parser.add_argument("--bare-runs", type=int, default=3, metavar="N", help="runs of the bare exporter (3)")
    parser.add_argument("--work-dir", type=Path, help="where to put files and logs; default: a temporary folder")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    if arguments.bare_runs < 1:
        parser.error("--bare-runs must be at least 1")
    if arguments.work_dir is not None:
        arguments.work_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="against-exporter-", dir=arguments.work_dir) as name:
        try:
            figures = compare(Comparison(arguments.shape, arguments.engine, Path(name)), arguments.bare_runs)
        except CommandError as error:
            say(str(error))
            return 1
    cores = len(os.sched_getaffinity(0))
    result = {"shape": arguments.shape, "engine": arguments.engine, "cores": cores, **figures}
    print(json.dumps(result, indent=2) if arguments.json else describe(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
