"""Children are given named variables and no others."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from workers.sandbox.environment import build_base_environment, build_child_environment

HOME = Path("/step/home")
SCRATCH = Path("/step/scratch")


@pytest.fixture(autouse=True)
def worker_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", "/bin")
    monkeypatch.setenv("TZ", "UTC")
    for name in ("AWS_SECRET_ACCESS_KEY", "EDGEKILN_DATABASE_URL", "HF_TOKEN", "HF_HOME", "SSH_AUTH_SOCK"):
        monkeypatch.setenv(name, "secret")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy")
    monkeypatch.setenv("HF_ENDPOINT", "https://hub")


@pytest.mark.parametrize("network", [False, True])
def test_secrets_stay_behind(network: bool) -> None:
    environment = build_child_environment(HOME, SCRATCH, 2, network=network)
    assert "secret" not in environment.values()
    assert environment["PATH"] == "/bin"
    assert (environment["HOME"], environment["TMPDIR"]) == (str(HOME), str(SCRATCH))
    assert environment["OMP_NUM_THREADS"] == "2"
    assert environment["PYTHONHASHSEED"] == "0"


def test_ways_out_are_given_with_the_network_only() -> None:
    granted = build_child_environment(HOME, SCRATCH, None, network=True)
    refused = build_child_environment(HOME, SCRATCH, None, network=False)
    assert (granted["HTTPS_PROXY"], granted["HF_ENDPOINT"]) == ("http://proxy", "https://hub")
    assert "HF_HUB_OFFLINE" not in granted
    assert refused["HF_HUB_OFFLINE"] == "1"
    assert not {"HTTPS_PROXY", "HF_ENDPOINT", "OMP_NUM_THREADS"} & set(refused)


def test_import_paths_are_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"more{os.pathsep}/abs")
    paths = build_base_environment(HOME, None)["PYTHONPATH"].split(os.pathsep)
    assert paths[-2:] == [str(tmp_path / "more"), "/abs"]
    assert all(Path(path).is_absolute() for path in paths)
