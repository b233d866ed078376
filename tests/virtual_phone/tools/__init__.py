"""The virtual phone's tools: they really run the model, in this machine's runtime, and print as the real tools do."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from tests.kiln import ROOT

_MEETING_POLL_S = 0.02
#: Tool -> the module that is it.
TOOLS = {
    "benchmark_model": "tests.virtual_phone.tools.benchmark_model",
    "litert_lm_advanced_main": "tests.virtual_phone.tools.litert_lm_advanced_main",
}


def write_tool(folder: Path, name: str, meeting: Path | None = None) -> Path:
    """Write a tool's program into a folder and return its path; it can be pushed and run like a binary.

    While the folder `meeting` is there, a tool waits in it until another phone's has come too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        f"from tests.virtual_phone.tools import meet\nmeet({str(meeting or '')!r})\n"
        f"from {TOOLS[name]} import main\nraise SystemExit(main(sys.argv[1:]))\n"
    )
    path.chmod(0o755)
    return path


def meet(meeting: str) -> None:
    """Wait until the tools of two phones have come."""
    folder = Path(meeting)
    if meeting and folder.is_dir():
        (folder / Path(os.environ["PHONE_ROOT"]).name).touch()
        while len(list(folder.iterdir())) < 2:
            time.sleep(_MEETING_POLL_S)
