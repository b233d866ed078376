"""The demonstration: the example checkpoint becomes proven artifacts, and one of them answers a question.

Three recipes, three formats, measured on this host; everything that is started is stopped. Run again, it costs what
was not reused: the source is looked at afresh and the benchmarks measure anew. Called by `make demo`.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

CHECKPOINT = Path(__file__).resolve().parent / "addition"
RECIPES = ("none", "dynamic_int8", "float16")
FORMATS = ("tflite", "task", "litertlm")
PROMPT = "12+7="
ANSWER = "19"
#: Fewer than the default: nine artifacts are measured, and a demonstration is watched.
BENCHMARK_PROCESSES = "3"


def convert(output: Path, data_dir: Path) -> int:
    """Run the job; return its exit code."""
    arguments = ["convert", str(CHECKPOINT), "-o", str(output), "--data-dir", str(data_dir), "--benchmark", "host"]
    for recipe in RECIPES:
        arguments += ["--recipe", recipe]
    for kind in FORMATS:
        arguments += ["--format", kind]
    return run_edgekiln(arguments).returncode


def ask(artifact: Path) -> str:
    """Ask a published artifact the demonstration's question; return its answer."""
    done = run_edgekiln(["run", str(artifact), PROMPT], stdout=subprocess.PIPE)
    if done.returncode != 0:
        sys.exit(done.returncode)
    return str(done.stdout).strip()


def run_edgekiln(arguments: list[str], stdout: int | None = None) -> subprocess.CompletedProcess[str]:
    """Show a command and run it."""
    print(f"$ edgekiln {shlex.join(arguments)}", file=sys.stderr, flush=True)
    environment = {"EDGEKILN_BENCHMARK_PROCESSES": BENCHMARK_PROCESSES, **os.environ}
    process = subprocess.Popen(
        [sys.executable, "-m", "service.cli", *arguments], stdout=stdout, text=True, env=environment
    )
    while True:
        try:
            output, _ = process.communicate()
            return subprocess.CompletedProcess(arguments, process.returncode, output)
        except KeyboardInterrupt:
            # The command hears Ctrl-C too, and stops what it started.
            continue


def main(argv: list[str] | None = None) -> int:
    """Convert, then ask; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("out/demo"), help="folder for the artifacts")
    parser.add_argument("--data-dir", type=Path, help="ledger, store and logs; OUTPUT-data if not given")
    arguments = parser.parse_args(argv)
    data_dir = arguments.data_dir or arguments.output.with_name(f"{arguments.output.name}-data")
    code = convert(arguments.output, data_dir)
    if code != 0:
        return code
    answer = ask(arguments.output / "addition-dynamic_int8.litertlm")
    print(f"{PROMPT} {answer}")
    if answer != ANSWER:
        print(f"The artifact should have answered {ANSWER}.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
