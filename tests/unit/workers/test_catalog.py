"""A step's revision covers the code that decides its outputs."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from service.ledger.plan import RESOURCE_CLASSES
from workers import catalog
from workers.catalog import CATALOG, MEASURE_PHONE, PRELOADS, PREPARE_PHONE, StepCode, read_toolchain

ROOT = Path(catalog.__file__).parents[1]
#: What every step shares and what decides no output byte.
NEUTRAL = {
    "workers/steps.py",
    "workers/__init__.py",
    # What a step refuses and how recipes and formats are called enter keys as parameters.
    *(f"service/{name}.py" for name in ("__init__", "errors", "recipes", "recipe_schema", "recipe_settings")),
}


def path_of(module: str) -> Path | None:
    """The file of a module of ours, if it is one."""
    base = ROOT.joinpath(*module.split("."))
    for candidate in (base.with_suffix(".py"), base / "__init__.py"):
        if candidate.exists():
            return candidate
    return None


def imported_files(path: Path, seen: set[Path]) -> set[Path]:
    """All files of ours that a file imports, however deep."""
    if path in seen:
        return seen
    seen.add(path)
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    for name in names:
        if name.startswith(("workers.", "service.")) and (found := path_of(name)):
            imported_files(found, seen)
    return seen


@pytest.mark.parametrize("kind", CATALOG)
def test_a_revision_covers_every_module_that_the_step_imports(kind: str) -> None:
    code = CATALOG[kind]
    covered = {path for pattern in code.sources for path in ROOT.glob(pattern)}
    target = path_of(code.target.split(":")[0])
    assert target
    missing = imported_files(target, set()) - covered
    assert {str(path.relative_to(ROOT)) for path in missing} - NEUTRAL - {
        f"workers/{room}/__init__.py" for room in ("convert", "devices", "fetch", "verify")
    } == set()


def test_every_kind_but_publish_is_in_the_catalog() -> None:
    assert set(RESOURCE_CLASSES) - set(CATALOG) == {"publish"}
    every = [*CATALOG.values(), PREPARE_PHONE, MEASURE_PHONE]
    assert {code.pool for code in every} == set(PRELOADS)


def test_a_changed_byte_changes_the_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "workers" / "convert").mkdir(parents=True)
    source = tmp_path / "workers" / "convert" / "quantize.py"
    monkeypatch.setattr(catalog, "_ROOT", tmp_path)
    code = StepCode("workers.convert.quantize:run", "light", ("workers/convert/quantize.py",))
    revisions = set()
    for text in ("x = 1", "x = 2"):
        source.write_text(text)
        revisions.add(code.revision)
    assert len(revisions) == 2


def test_the_toolchain_names_real_versions() -> None:
    toolchain = read_toolchain()
    assert toolchain.versions["torch"].startswith("2.")
    assert set(toolchain.revisions) == set(CATALOG) | {"publish"}
