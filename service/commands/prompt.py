"""`edgekiln run`: one prompt through a downloaded artifact, in the runtime that phones use.

The runtime is a program of its own here: this package must not load it.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from service.errors import InvalidRequest, ServiceUnavailable, VerificationFailed

EPILOG = """Examples:

\b
  edgekiln run out/addition-dynamic_int8.litertlm "12+7="
  edgekiln run out/SmolLM2-135M-Instruct-dynamic_int8.litertlm "Name a colour." --chat
"""
_SUFFIXES = (".litertlm", ".task")
#: The runtime's command says this on standard output, among the answer.
_NOISE = "Failed to inspect model metadata:"
_TRACE = "Traceback (most recent call last)"


def run(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A .litertlm or .task artifact.")],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to ask.")],
    chat: Annotated[
        bool, typer.Option("--chat", help="Apply the model's chat template; without it the prompt goes in as it is.")
    ] = False,
) -> None:
    """Ask an artifact one question.

    Runs it in LiteRT-LM on this host and prints the answer alone.
    """
    print(ask(file, prompt, chat))


def ask(file: Path, prompt: str, chat: bool = False) -> str:
    """Return the greedy answer; raises `InvalidRequest` and `VerificationFailed` with the runtime's last lines."""
    if file.suffix not in _SUFFIXES:
        raise InvalidRequest(f"{file} is neither a .litertlm nor a .task artifact; a bare .tflite has no tokenizer.")
    if not file.is_file():
        raise InvalidRequest(f"There is no file {file}.")
    command = [_find_runtime(), "run", str(file.resolve()), "--prompt", prompt, "--backend", "cpu"]
    # Greedy, so that the answer is always the same; no cache, so that no file is left beside the artifact.
    command += ["--temperature", "0", "--top-k", "1", "--cache", "no"]
    if not chat:
        command.append("--no-template")
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    # The runtime's command exits with 0 whatever happens.
    if done.returncode != 0 or _TRACE in done.stderr:
        words = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise VerificationFailed(f"{file.name} does not run in LiteRT-LM. Its last words: {words}", file=str(file))
    return "\n".join(line for line in done.stdout.splitlines() if not line.startswith(_NOISE)).strip()


def _find_runtime() -> str:
    beside = Path(sys.executable).with_name("litert-lm")
    found = str(beside) if beside.is_file() else shutil.which("litert-lm")
    if found is None:
        raise ServiceUnavailable("The command litert-lm is not installed. Install it with `pip install litert-lm`.")
    return found
