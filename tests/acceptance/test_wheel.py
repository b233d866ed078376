"""The wheel, installed alone into an empty environment: it holds all that it needs, and serves from another folder."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from tests.kiln import ROOT, Kiln, find_processes

PACKAGES = ("service", "workers", "migrations")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from this checkout."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)], cwd=ROOT, check=True)
    (path,) = folder.iterdir()
    return path


@pytest.fixture(scope="module")
def environment_dir(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Path:
    """A virtual environment with the wheel; it borrows the dependencies of this one, but not its EdgeKiln."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    install = ["install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), *install], check=True)
    # A line of a .pth file adds a folder, and ignores the .pth files in it: an editable installation stays unseen.
    borrowed = sysconfig.get_path("purelib")
    (site_packages(folder) / "borrowed.pth").write_text(f"{borrowed}\n")
    return folder


def site_packages(environment_dir: Path) -> Path:
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return environment_dir / "lib" / version / "site-packages"


@pytest.fixture
def kiln(environment_dir: Path, tmp_path: Path) -> Iterator[Kiln]:
    """A server of the installed wheel, in a folder of its own."""
    (tmp_path / "models").mkdir()
    kiln = Kiln(tmp_path, tmp_path / "models")
    kiln.program = [str(environment_dir / "bin" / "edgekiln")]
    del kiln.environment["PYTHONPATH"]
    try:
        kiln.start()
        yield kiln
    finally:
        kiln.close()


def read_import_path(pid: int) -> list[str]:
    """Return a process's PYTHONPATH."""
    variables = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return [path for line in variables if line.startswith("PYTHONPATH=") for path in line[11:].split(":")]


def test_the_wheel_holds_every_module_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    listed = subprocess.run(["git", "ls-files", "--", *PACKAGES], cwd=ROOT, capture_output=True, text=True, check=False)
    expected = set(listed.stdout.split()) or {
        path.relative_to(ROOT).as_posix() for name in PACKAGES for path in (ROOT / name).rglob("*.py")
    }
    assert expected <= held
    assert {name.split("/")[0] for name in held} == set(PACKAGES)
    assert any(name.startswith("migrations/versions/0001") for name in held)


def test_the_installed_command_serves_from_another_folder(kiln: Kiln, environment_dir: Path) -> None:
    installed = site_packages(environment_dir)
    code = f"import {', '.join(PACKAGES)}; print({', '.join(f'{name}.__file__' for name in PACKAGES)})"
    python = [str(environment_dir / "bin" / "python"), "-c", code]
    imported = subprocess.run(python, env=kiln.environment, cwd=kiln.folder, capture_output=True, text=True, check=True)
    assert imported.stdout.split() == [str(installed / name / "__init__.py") for name in PACKAGES]

    readiness = kiln.client.readiness()
    assert readiness["ready"], readiness
    with kiln.database.engine.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM alembic_version")).scalar_one() == 1
    paths = [read_import_path(pid) for pid in find_processes(kiln.folder)]
    assert any(str(installed) in path for path in paths)
    assert not any(str(ROOT) in path for path in paths)

    # Its zygotes find their modules: a step runs, and refuses a folder without a checkpoint.
    empty = kiln.folder / "models" / "empty"
    empty.mkdir()
    job = kiln.finished(kiln.submit(empty))
    assert job["variants"][0]["error"]["code"] == "checkpoint_invalid"
    kiln.stop()
