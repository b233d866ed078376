"""litert-torch's own exporter, run once in a fresh process: what EdgeKiln is compared with."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from measured_command import CommandError, Measured, measure

#: EdgeKiln's recipes and the exporter's name for the same; the exporter knows no float16.
RECIPES = {
    "none": "none",
    "dynamic_int8": "dynamic_wi8_afp32",
    "weight_only_int8": "weight_only_wi8_afp32",
    "dynamic_int4": "dynamic_wi4_afp32",
    "weight_only_int4": "weight_only_wi4_afp32",
}
#: The exporter's own command, where TensorFlow is not installed: it names one generated module of it.
_COMMAND = """
import runpy
from workers.convert.toolfixes import schema_without_tensorflow
with schema_without_tensorflow():
    runpy.run_module("litert_torch.generative.export_hf", run_name="__main__", alter_sys=True)
"""


def export_bare(checkpoint: Path, lengths: tuple[int, int], recipe: str, work_dir: Path) -> Measured:
    """Make one `.litertlm` and remove it; `lengths` are prefill and context in tokens. Nothing is verified."""
    output_dir = work_dir / "bare"
    command = [
        *(sys.executable, "-c", _COMMAND, str(checkpoint), str(output_dir)),
        f"--prefill_lengths=[{lengths[0]}]",
        f"--cache_length={lengths[1]}",
        f"--quantization_recipe={RECIPES[recipe]}",
        "--bundle_litert_lm=True",
    ]
    measured = measure(command, work_dir / "bare.log")
    # The exporter may end with 0 and without a file.
    if not (output_dir / "model.litertlm").is_file():
        raise CommandError(f"{' '.join(command)} wrote no model.litertlm.")
    shutil.rmtree(output_dir)
    return measured
