"""What the faults are injected into: a tiny checkpoint, and a data directory where it has been converted once.

Most faults concern what comes after a conversion. They start from a copy of that directory and ask for a recipe that
is not in it, so that only light steps run.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.checkpoints import write_checkpoint
from tests.kiln import Kiln, fired_up, kill_all

Fire = Callable[..., Kiln]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Llama of one layer, whose embeddings make its files larger than what a ledger writes."""
    config = {"num_hidden_layers": 1, "max_position_embeddings": 64, "vocab_size": 16384}
    return write_checkpoint(tmp_path_factory.mktemp("models") / "tiny", config=config)


@pytest.fixture(scope="session")
def converted_dir(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    """A data directory that holds one finished conversion of `checkpoint`; copy it."""
    with fired_up(tmp_path_factory.mktemp("converted"), checkpoint.parent) as kiln:
        job = kiln.finished(kiln.submit(checkpoint, recipes=["none"], formats=["tflite", "litertlm"]))
        assert job["state"] == "succeeded", job
        kiln.stop()
        return kiln.data_dir


@pytest.fixture
def converted(tmp_path: Path, converted_dir: Path) -> Path:
    """A folder for a kiln whose data directory is a copy of `converted_dir`."""
    shutil.copytree(converted_dir, tmp_path / "data")
    return tmp_path


@pytest.fixture
def fire(converted: Path, checkpoint: Path) -> Iterator[Fire]:
    """Start kilns on the copy; none outlives the test."""
    kilns = []

    def start(**settings: object) -> Kiln:
        kiln = Kiln(converted, checkpoint.parent, **settings)
        kilns.append(kiln)
        kiln.start()
        return kiln

    yield start
    for kiln in kilns:
        kiln.close()
    kill_all(converted)
