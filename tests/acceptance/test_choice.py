"""Choosing among six recipes of the example, measured on this host, two of them refused by a strict gate."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.acceptance.conftest import EXAMPLE, Conversion, Document, repeat
from tests.kiln import clean_environment

RECIPES = ("none", "float16", "dynamic_int8", "weight_only_int8", "dynamic_int4", "weight_only_int4")
REFUSED = {"dynamic_int4", "weight_only_int4"}
#: Nats: between what int8 and what int4 loses on the example.
MAX_KL = 0.01
FIGURES = {
    "quality": "parity.kl_mean",
    "size": "size_bytes",
    "speed": "benchmark.decode_tokens_per_s",
    "memory": "benchmark.peak_anon_bytes",
}


@dataclass(frozen=True)
class Shop:
    """A data directory with one job; no server runs."""

    folder: Path
    job: Document

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command about the job."""
        command, *options = arguments
        return run_command(self.folder, command, str(self.job["id"]), *options, "--data-dir", str(self.folder / "data"))

    def read(self, *arguments: str) -> Document:
        """Run a command with `--json`; return what it prints."""
        document: Document = json.loads(self.run(*arguments, "--json").stdout)
        return document


def run_command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    settings = {"data_dir": folder / "data", "benchmark_processes": 3}
    command = [sys.executable, "-m", "service.cli", *arguments]
    return subprocess.run(
        command, env=clean_environment(folder, settings), cwd=folder, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, conversion: Conversion) -> Shop:
    """The job; what the three recipes of `conversion` need is done already."""
    folder = tmp_path_factory.mktemp("choice")
    shutil.copytree(conversion.data_dir, folder / "data")
    options = [
        *repeat("--recipe", RECIPES),
        "--format",
        "litertlm",
        "--benchmark",
        "host",
        "--gate",
        f"max_kl={MAX_KL}",
    ]
    done = run_command(folder, "convert", str(EXAMPLE), "-o", str(folder / "out"), *options, "--json")
    assert done.returncode == 1, done.stderr
    job: Document = json.loads(done.stdout)
    assert job["state"] == "partial", done.stderr
    for recipe in REFUSED:
        assert f"variant {recipe}: refused: max_kl: 0.03" in done.stderr
        assert f"at most {MAX_KL}" in done.stderr
    return Shop(folder, job)


def test_a_refused_variant_has_figures_and_no_file(shop: Shop) -> None:
    refused = [variant for variant in shop.job["variants"] if variant["state"] == "refused"]
    assert {variant["name"] for variant in refused} == REFUSED
    for variant in refused:
        assert variant["artifacts"] == []
        (missed,) = variant["error"]["details"]["missed"]
        assert (missed["gate"], missed["threshold"], missed["passed"]) == ("max_kl", MAX_KL, False)
        assert missed["figure"] == variant["parity"]["kl_mean"] > MAX_KL
        assert not list((shop.folder / "out").glob(f"*{variant['name']}*"))


def test_the_comparison_holds_every_figure_and_the_front(shop: Shop) -> None:
    (front,) = shop.read("compare")["formats"]
    assert (front["format"], front["axes"], front["missing"]) == ("litertlm", list(FIGURES), {})
    assert [each["variant"] for each in front["candidates"]] == list(RECIPES)
    published = [each for each in front["candidates"] if each["artifact"]]
    assert {each["variant"] for each in published} == set(RECIPES) - REFUSED
    for each in front["candidates"]:
        for figure in (*FIGURES.values(), "parity.top1_agreement", "quality.exact_match", "benchmark.ttft_s"):
            assert each["figures"][figure] >= 0, (each["variant"], figure)
        assert (each["is_pareto"] is None) == (each["variant"] in REFUSED)
        # A busy machine slows down while it measures, too.
        assert each["measurement"] in ("stable", "noisy", "hot")
    for each in published:
        path = shop.folder / "out" / each["artifact"]["name"]
        assert path.stat().st_size == each["figures"]["size_bytes"]
        beaten_by = [
            other["variant"] for other in published if all(cost(other, axis) <= cost(each, axis) for axis in FIGURES)
        ]
        assert set(beaten_by) - {each["variant"]} == set(each["dominated_by"])
        assert each["is_pareto"] == (not each["dominated_by"])


def cost(candidate: Document, axis: str) -> float:
    """Return what is lower for the better one; what float graphs round is no difference."""
    figure = float(candidate["figures"][FIGURES[axis]])
    return {"speed": -figure, "quality": max(figure, 1e-6)}.get(axis, figure)


def test_the_table_and_the_picture_show_all_six(shop: Shop) -> None:
    done = shop.run("compare", "--plot", "front.svg")
    assert done.returncode == 0
    assert max(map(len, done.stdout.splitlines())) <= 100
    picture = (shop.folder / "front.svg").read_text()
    for recipe in RECIPES:
        row = next(line for line in done.stdout.splitlines() if f" {recipe} " in line)
        assert row.startswith("✗") == (recipe in REFUSED)
        assert picture.count(f">{recipe}<") == 3, "once for each of size, speed and memory"


def test_the_pick_is_the_closest_to_the_source_that_fits_and_it_adds(shop: Shop) -> None:
    done = shop.run("pick", "--max-size", "2MB", "--min-top1", "0.95")
    assert done.returncode == 0, done.stderr
    # Eight bits fit; without rounding activations as well the loss is smaller.
    assert done.stdout == "addition-weight_only_int8.litertlm\n"
    assert "'weight_only_int8' has the lowest KL divergence" in done.stderr
    assert "✗ none max_size_bytes: 5.1 MB, at most 2.0 MB" in done.stderr
    assert "✗ dynamic_int4 refused: max_kl: 0.03" in done.stderr
    asked = run_command(shop.folder, "run", f"out/{done.stdout.strip()}", "12+7=")
    assert asked.stdout.strip() == "19"


@pytest.mark.parametrize("axis", FIGURES)
def test_the_preferred_axis_decides(shop: Shop, axis: str) -> None:
    document = shop.read("pick", "--prefer", axis)
    (front,) = shop.read("compare")["formats"]
    published = [each for each in front["candidates"] if each["artifact"]]
    assert cost(document["picked"], axis) == min(cost(each, axis) for each in published)
    if axis == "quality":
        assert document["picked"]["variant"] == "float16", "as close as float32, in half the bytes"


def test_none_fits_and_the_nearest_is_named(shop: Shop) -> None:
    done = shop.run("pick", "--max-size", "1MB", "--min-exact-match", "0.5")
    assert (done.returncode, done.stdout) == (1, "")
    # The refused would fit, and are not for choosing.
    assert done.stderr.startswith("None fits. The nearest is 'dynamic_int8': max_size_bytes: 1.6 MB, at most 1.0 MB\n")
