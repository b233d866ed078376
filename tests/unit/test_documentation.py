"""The documentation names everything that users meet, says it as the code does, and names nothing that is not there."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import typer.main
from typer.core import TyperGroup

from service.api import make_app
from service.api.problems import status_of
from service.cli import app
from service.client import DEFAULT_URL, KEY_VARIABLE, URL_VARIABLE
from service.errors import EdgeKilnError, RemoteError
from service.gates import NAMEABLE
from service.ledger.database import Database
from service.ledger.plan import RESOURCE_CLASSES, SHARED_KINDS
from service.ledger.states import TRANSITIONS, AttemptState, JobState, StepState, VariantState
from service.recipes import DEVICES, ENGINES, FORMATS, RECIPES
from service.requests import JobRequest
from service.settings import Settings
from service.storage import open_store

ROOT = Path(__file__).parents[2]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
}
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")

#: Defaults that differ from host to host: what the page says instead.
COMPUTED_DEFAULTS = {
    "data_dir": "the user's data folder, e.g. `~/.local/share/edgekiln`",
    "hub_endpoint": "`HF_ENDPOINT`, or empty",
    "hub_token": "`HF_TOKEN`, or empty",
    "light_slots": "the number of cores",
}
#: Variables that are no settings of the service.
CLIENT_VARIABLES = {URL_VARIABLE: f"`{DEFAULT_URL}`", KEY_VARIABLE: "empty"}
TEST_VARIABLES = {"EDGEKILN_TEST_POSTGRES_URL", "EDGEKILN_TEST_S3_URL", "EDGEKILN_TEST_SERIAL"}

Row = dict[str, str]


def read_tables(page: str) -> Iterator[list[Row]]:
    """Yield the tables of a page; a row maps a column's heading to the cell's text."""
    lines = page.splitlines()
    for start in range(1, len(lines)):
        if not re.fullmatch(r"\|( ?-+:? ?\|)+", lines[start]):
            continue
        columns = split_row(lines[start - 1])
        rows = []
        for line in lines[start + 1 :]:
            if not line.startswith("|"):
                break
            cells = split_row(line)
            assert len(cells) == len(columns), f"not as many cells as columns: {line}"
            rows.append(dict(zip(columns, cells, strict=True)))
        yield rows


def split_row(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().removeprefix("|").removesuffix("|").split("|")]


def rows_by(page: str, column: str) -> dict[str, Row]:
    """Return the rows of all tables with this first column, by the name in backquotes that each begins with."""
    found: dict[str, Row] = {}
    for table in read_tables(page):
        for row in table:
            if next(iter(row)) == column:
                name = re.match(r"`([^`]+)`", row[column])
                assert name is not None, f"no name in the row {row}"
                assert name[1] not in found, f"{name[1]} stands twice"
                found[name[1]] = row
    return found


def section(page: str, heading: str) -> str:
    """Return the text below a heading, up to the next heading of any level."""
    match = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", page, re.MULTILINE | re.DOTALL)
    assert match is not None, f"there is no section {heading!r}"
    return match[1]


def error_classes(root: type[EdgeKilnError] = EdgeKilnError) -> Iterator[type[EdgeKilnError]]:
    yield root
    for child in root.__subclasses__():
        if child.__module__ == "service.errors" and child is not RemoteError:
            yield from error_classes(child)


def say_default(name: str, value: Any) -> str:
    if name in COMPUTED_DEFAULTS:
        return COMPUTED_DEFAULTS[name]
    if value in ("", ()):
        return "empty"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def command_names(command: Any, words: tuple[str, ...] = ("edgekiln",)) -> Iterator[str]:
    if isinstance(command, TyperGroup):
        if command.invoke_without_command:
            yield " ".join(words)
        for name, child in command.commands.items():
            yield from command_names(child, (*words, name))
    else:
        yield " ".join(words)


COMMANDS = sorted(command_names(typer.main.get_command(app)))


def require_same(documented: Iterable[str], known: Iterable[str]) -> None:
    documented, known = set(documented), set(known)
    assert sorted(known - documented) == [], "not documented"
    assert sorted(documented - known) == [], "documented, but not there"


def test_every_setting_is_documented_with_its_default() -> None:
    rows = rows_by(PAGES["docs/configuration.md"], "variable")
    settings = {f"EDGEKILN_{name.upper()}": name for name in Settings.model_fields}
    require_same(rows, {*settings, *CLIENT_VARIABLES, *TEST_VARIABLES})
    stated = {variable: row["default"] for variable, row in rows.items() if variable not in TEST_VARIABLES}
    fields = Settings.model_fields
    assert stated == CLIENT_VARIABLES | {
        variable: say_default(name, fields[name].default) for variable, name in settings.items()
    }


def test_a_computed_default_is_really_computed() -> None:
    assert {name for name, field in Settings.model_fields.items() if field.default_factory} == set(COMPUTED_DEFAULTS)


def test_units_in_names_are_the_units_stated() -> None:
    for variable, row in rows_by(PAGES["docs/configuration.md"], "variable").items():
        for suffix, unit in (("_S", "seconds"), ("_BYTES", "bytes"), ("_URL", "URL")):
            assert variable.endswith(suffix) == (row["unit"] == unit) or unit == "URL", variable


def test_every_error_is_documented_as_it_is() -> None:
    rows = rows_by(PAGES["docs/errors.md"], "code")
    classes = {each.code: each for each in error_classes()}
    require_same(rows, classes)
    for code, each in classes.items():
        assert rows[code]["retried"] == ("yes" if each.retryable else "no"), code
        error = each("A sentence.")
        # An error that was given a status of its own is meant to answer requests.
        if rows[code]["status"] != "-" or each.http_status != EdgeKilnError.http_status:
            assert rows[code]["status"] == str(status_of(error)), code


@pytest.mark.parametrize(
    ("heading", "states"),
    [("Steps", StepState), ("Attempts", AttemptState), ("Variants", VariantState), ("Jobs", JobState)],
)
def test_every_state_is_documented(heading: str, states: type[StepState]) -> None:
    require_same(rows_by(section(PAGES["docs/architecture.md"], heading), "state"), list(states))


def test_the_documented_moves_are_the_possible_ones() -> None:
    rows = rows_by(section(PAGES["docs/architecture.md"], "Steps"), "state")
    stated = {(state, target) for state, row in rows.items() for target in re.findall(r"`(\w+)`", row["next"])}
    assert stated == {(str(state), str(target)) for (state, _), target in TRANSITIONS.items()}


def test_every_step_kind_is_documented_as_it_is() -> None:
    rows = rows_by(PAGES["docs/architecture.md"], "kind")
    require_same(rows, RESOURCE_CLASSES)
    assert {kind: row["class"] for kind, row in rows.items()} == RESOURCE_CLASSES
    assert {kind for kind, row in rows.items() if row["shared"] == "yes"} == SHARED_KINDS


def test_every_route_is_documented(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'ledger.db'}")
    document = make_app(Settings(data_dir=tmp_path), database, open_store(tmp_path.as_uri())).openapi()
    database.close()
    routes = {f"{method.upper()} {path}" for path, methods in document["paths"].items() for method in methods}
    require_same(rows_by(PAGES["docs/rest.md"], "route"), routes)


def test_every_field_of_a_request_is_documented_with_its_default() -> None:
    rows = rows_by(PAGES["docs/rest.md"], "field")
    require_same(rows, JobRequest.model_fields)
    request = JobRequest.model_validate({"source": {"kind": "folder", "path": "/"}}).model_dump_json()
    for name, row in rows.items():
        assert name == "source" or f'"{name}":{row["default"].strip("`")}' in request, name


def test_every_command_is_documented() -> None:
    rows = rows_by(PAGES["docs/cli.md"], "command")
    named = {re.match(r"edgekiln [a-z -]*[a-z]", name)[0] for name in rows}  # type: ignore[index]
    require_same(named, COMMANDS)


@pytest.mark.parametrize(
    ("page", "column", "known"),
    [
        ("README.md", "recipe", RECIPES),
        ("README.md", "format", FORMATS),
        ("README.md", "engine", ENGINES),
        ("docs/cli.md", "gate", NAMEABLE),
    ],
)
def test_every_name_that_may_be_asked_for_is_documented(page: str, column: str, known: Iterable[str]) -> None:
    require_same(rows_by(PAGES[page], column), known)


def test_every_device_is_documented() -> None:
    assert all(f"`{device}`" in PAGES["README.md"] for device in DEVICES)


def test_every_direct_dependency_has_its_reason() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    page = PAGES["docs/decisions/0008-dependencies.md"]
    assert [name for name in project["dependencies"] if f"`{name}`" not in page] == []


def test_every_decision_is_in_the_index() -> None:
    files = {path.name for path in (ROOT / "docs/decisions").glob("0*.md")}
    require_same(re.findall(r"\]\((0[^)]+\.md)\)", PAGES["docs/decisions/README.md"]), files)


def heading_anchors(page: str) -> set[str]:
    """Return the anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[name]):
        if re.match(r"[a-z]+://", target):
            continue
        path, _, anchor = unquote(target).partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), f"{name} links to {target}"
        assert not anchor or anchor in heading_anchors(file.read_text(encoding="utf-8")), f"{name} links to {target}"


@pytest.mark.parametrize("name", PAGES)
def test_named_files_exist(name: str) -> None:
    pattern = r"`((?:service|workers|tests|docs|examples|migrations|benchmarks)/[\w./-]*)`"
    missing = [path for path in re.findall(pattern, PAGES[name]) if not (ROOT / path).exists()]
    assert missing == []


@pytest.mark.parametrize("name", PAGES)
def test_nothing_is_named_that_is_not_there(name: str) -> None:
    variables = {f"EDGEKILN_{field.upper()}" for field in Settings.model_fields}
    variables |= {*CLIENT_VARIABLES, *TEST_VARIABLES}
    assert set(re.findall(r"EDGEKILN_[A-Z0-9_]+", PAGES[name])) <= variables
    targets = set(re.findall(r"^([a-z-]+):.*##", MAKEFILE, re.MULTILINE))
    assert set(re.findall(r"`make ([a-z-]+)`", PAGES[name])) <= targets
    # What is typed: in backquotes or at the beginning of a line of a code block.
    typed = re.findall(
        r"(?:^|`|\$\()edgekiln ((?:devices |keys |schedules |tenants |tokens |tools |workers )?[a-z]+(?:-[a-z]+)*)",
        PAGES[name],
        re.MULTILINE,
    )
    assert {f"edgekiln {words}" for words in typed} <= {*COMMANDS}


def test_a_missing_row_would_be_seen() -> None:
    """Control: the comparison is not blind, whichever side lacks a name."""
    rows = rows_by(PAGES["docs/errors.md"], "code")
    with pytest.raises(AssertionError, match="not documented"):
        require_same(rows.keys() - {"parked"}, rows)
    with pytest.raises(AssertionError, match="not there"):
        require_same({*rows, "out_of_clay"}, rows)


def test_a_row_taken_out_of_a_page_is_missed() -> None:
    """Control: names count only where they are explained, not where the text happens to use them."""
    page = PAGES["docs/configuration.md"]
    line = next(line for line in page.splitlines() if line.startswith("| `EDGEKILN_MAX_FAILURES`"))
    assert "EDGEKILN_MAX_FAILURES" in rows_by(page, "variable")
    assert "EDGEKILN_MAX_FAILURES" not in rows_by(page.replace(line + "\n", ""), "variable")
