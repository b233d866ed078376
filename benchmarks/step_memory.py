"""Every step of a job: its time, its memory, and how far off the prediction was; beside the bare exporter.

Owns two claims: that memory is predicted within a quarter, and that a checkpoint of a billion parameters becomes proven
`.litertlm` and `.task` files with less memory than the exporter alone needs. Each shape is converted by
`edgekiln convert` in a fresh data directory, with verification, through the default gates.

    python benchmarks/step_memory.py --shape tinyllama1b --bare
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bare_exporter import RECIPES, export_bare
from measured_command import CommandError, measure, say
from shapes import SHAPES, write_checkpoint

_MIB = 1 << 20
EXAMPLE_DIR = Path(__file__).parents[1] / "examples" / "addition"
#: Prefill length and context of the example checkpoint, in tokens.
_EXAMPLE_LENGTHS = (64, 128)


def convert(checkpoint: Path, lengths: tuple[int, int], asked: argparse.Namespace, work_dir: Path) -> dict[str, Any]:
    """Run one job in a fresh data directory; return it, with the time and memory of the whole command."""
    words = [
        *(str(Path(sys.executable).with_name("edgekiln")), "convert", str(checkpoint)),
        *("-o", str(work_dir / "out"), "--json", "--prefill", str(lengths[0]), "--context", str(lengths[1])),
        *(word for recipe in asked.recipe for word in ("--recipe", recipe)),
        *(word for each in asked.format for word in ("--format", each)),
        *(word for engine in asked.engine for word in ("--engine", engine)),
        *(("--benchmark", "host") if asked.benchmark else ()),
    ]
    environment = {"EDGEKILN_DATA_DIR": str(work_dir / "data")}
    # 1: some variant was refused by a gate, which is shown.
    measured = measure(words, work_dir / "edgekiln.log", environment, statuses=(0, 1))
    try:
        job: dict[str, Any] = json.loads(measured.stdout)
    except ValueError as error:
        raise CommandError((work_dir / "edgekiln.log").read_text(errors="replace")[-2000:]) from error
    return {"measured": measured.to_json(), "job": job, "disk": _measure_disk(work_dir)}


def _measure_disk(work_dir: Path) -> dict[str, int]:
    """Return what is left on disk: in the store, and in step folders, which must be nothing."""
    folders = {"store_bytes": work_dir / "data" / "store", "step_folders_bytes": work_dir / "data" / "work"}
    return {
        name: sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        for name, folder in folders.items()
    }


def list_steps(job: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what each step cost; `error` is the prediction's, relative to what was used."""
    steps = []
    for step in job["steps"]:
        used, predicted = step["peak_anon_bytes"], step.get("predicted_peak_anon_bytes")
        error = None if not used or predicted is None else (predicted - used) / used
        label = " ".join(filter(None, [step["kind"], "+".join(step["variants"][:1]), step["format"]]))
        figures = {name: step[name] for name in ("kind", "state", "duration_s", "peak_rss_bytes", "peak_anon_bytes")}
        steps.append({"step": label, **figures, "predicted_peak_anon_bytes": predicted, "error": error})
    return steps


def describe(shape: str, result: Mapping[str, Any]) -> str:
    """Return one shape's figures as a Markdown table."""
    lines = [
        f"### {shape}",
        "",
        "| step | s | peak RSS MiB | peak anonymous MiB | predicted MiB | error |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for step in result["steps"]:
        if step["peak_anon_bytes"] is None:
            continue
        predicted, error = step["predicted_peak_anon_bytes"], step["error"]
        cells = [
            step["step"],
            f"{step['duration_s']:.1f}",
            f"{step['peak_rss_bytes'] / _MIB:,.0f}",
            f"{step['peak_anon_bytes'] / _MIB:,.0f}",
            "" if predicted is None else f"{predicted / _MIB:,.0f}",
            "" if error is None else f"{error:+.0%}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    lines += [f"- {name}: {_describe_run(result[name])}" for name in ("edgekiln", "bare") if result[name] is not None]
    lines += [f"- variant {variant['name']}: {variant['state']}" for variant in result["variants"]]
    disk = result["disk"]
    lines.append(
        f"- left on disk: {disk['store_bytes'] / _MIB:,.0f} MiB in the store, "
        f"{disk['step_folders_bytes'] / _MIB:,.0f} MiB in step folders"
    )
    return "\n".join(lines)


def _describe_run(run: Mapping[str, Any]) -> str:
    anon = run["peak_anon_bytes"]
    text = "not readable" if anon is None else f"{anon / _MIB:,.0f} MiB"
    return (
        f"{run['wall_s']:.0f} s wall, {run['cpu_s']:.0f} s processor, largest process "
        f"{run['peak_rss_bytes'] / _MIB:,.0f} MiB resident, all together {text} anonymous, "
        f"load before {run['load_average_1m']:.1f}"
    )


def measure_shape(name: str, asked: argparse.Namespace, work_dir: Path) -> dict[str, Any]:
    """Write the checkpoint, convert it, and run the bare exporter if asked to."""
    checkpoint, lengths = EXAMPLE_DIR, _EXAMPLE_LENGTHS
    if name != "example":
        shape = SHAPES[name]
        checkpoint, lengths = work_dir / "checkpoint", (shape.prefill_length, shape.context_length)
        say(f"writing a checkpoint of shape {name}")
        write_checkpoint(checkpoint, shape)
    say(f"edgekiln convert, {name}")
    result = convert(checkpoint, lengths, asked, work_dir)
    bare = None
    if asked.bare:
        say(f"bare exporter, {name}, {asked.recipe[0]}")
        bare = export_bare(checkpoint, lengths, asked.recipe[0], work_dir).to_json()
    variants = [{key: each[key] for key in ("name", "state", "error")} for each in result["job"]["variants"]]
    return {
        "steps": list_steps(result["job"]),
        "variants": variants,
        "edgekiln": result["measured"],
        "bare": bare,
        "disk": result["disk"],
        "cores": len(os.sched_getaffinity(0)),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; the exit code is 1 when a variant did not succeed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", action="append", choices=["example", *SHAPES], help="repeatable; default: example")
    parser.add_argument("--recipe", action="append", choices=sorted(RECIPES), help="repeatable; dynamic_int8")
    parser.add_argument("--format", action="append", help="repeatable; litertlm and task")
    parser.add_argument("--engine", action="append", help="repeatable; auto")
    parser.add_argument("--benchmark", action="store_true", help="measure the artifacts on this host too")
    parser.add_argument("--bare", action="store_true", help="run the bare exporter too, with the first recipe")
    parser.add_argument("--work-dir", type=Path, help="where to put files and logs; default: a temporary folder")
    parser.add_argument("--json", action="store_true", help="print JSON")
    asked = parser.parse_args(arguments)
    asked.recipe = asked.recipe or ["dynamic_int8"]
    asked.format = asked.format or ["litertlm", "task"]
    asked.engine = asked.engine or ["auto"]
    if asked.work_dir is not None:
        asked.work_dir.mkdir(parents=True, exist_ok=True)
    results = {}
    for name in asked.shape or ["example"]:
        with tempfile.TemporaryDirectory(prefix=f"step-memory-{name}-", dir=asked.work_dir) as folder:
            try:
                results[name] = measure_shape(name, asked, Path(folder))
            except CommandError as error:
                say(str(error))
                return 1
        if not asked.json:
            print(describe(name, results[name]), flush=True)
    if asked.json:
        print(json.dumps(results, indent=2))
    states = [variant["state"] for result in results.values() for variant in result["variants"]]
    return 0 if all(state == "succeeded" for state in states) else 1


if __name__ == "__main__":
    raise SystemExit(main())
