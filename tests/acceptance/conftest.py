"""The example, converted once with a single command; every test of this folder starts from that."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.kiln import ROOT, clean_environment, find_processes

EXAMPLE = ROOT / "examples" / "addition"
RECIPES = ("none", "dynamic_int8", "dynamic_int4")
FORMATS = ("tflite", "task", "litertlm")

Document = dict[str, Any]


def repeat(option: str, values: tuple[str, ...]) -> list[str]:
    """Return an option once for each value."""
    return [word for value in values for word in (option, value)]


@dataclass(frozen=True)
class Conversion:
    """What the command was, where it ran and what it printed."""

    folder: Path
    arguments: list[str]
    job: Document

    @property
    def data_dir(self) -> Path:
        """Where everything is kept."""
        return self.folder / "data"


def run_edgekiln(folder: Path, *arguments: str) -> Document:
    """Run a command with `--json` and return what it prints; it must end well and leave no process."""
    command = [sys.executable, "-m", "service.cli", *arguments, "--json"]
    environment = clean_environment(folder, {"data_dir": folder / "data"})
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert find_processes(folder) == {}
    document: Document = json.loads(done.stdout)
    return document


@pytest.fixture(scope="session")
def conversion(tmp_path_factory: pytest.TempPathFactory) -> Conversion:
    """Three recipes in three formats."""
    folder = tmp_path_factory.mktemp("convert")
    asked = [*repeat("--recipe", RECIPES), *repeat("--format", FORMATS)]
    arguments = ["convert", str(EXAMPLE), "-o", str(folder / "out"), *asked]
    return Conversion(folder, arguments, run_edgekiln(folder, *arguments))
