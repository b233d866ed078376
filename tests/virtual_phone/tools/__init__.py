"""The virtual phone's tools: they really run the model, in this machine's runtime, and print as the real tools do."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.kiln import ROOT

#: Tool -> the module that is it.
TOOLS = {
    "benchmark_model": "tests.virtual_phone.tools.benchmark_model",
    "litert_lm_advanced_main": "tests.virtual_phone.tools.litert_lm_advanced_main",
}


def write_tool(folder: Path, name: str) -> Path:
    """Write a tool's program into a folder and return its path; it can be pushed and run like a binary."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        f"from {TOOLS[name]} import main\nraise SystemExit(main(sys.argv[1:]))\n"
    )
    path.chmod(0o755)
    return path
