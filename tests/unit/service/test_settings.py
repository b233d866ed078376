"""Settings: what an operator writes is what every process gets, whatever the names hold."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from service.errors import InvalidSettings
from service.ledger.database import Database, migrate, ping
from service.settings import load_settings

#: What means something in a path list or in a URL.
ODD_NAMES = ["a:b", "a?b", "a#b", "a%20b", "a b", "a[b", "ä"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_subprocess_gets_the_same_settings(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_settings(
        {
            "data_dir": tmp_path / name,
            "source_roots": (tmp_path / name, tmp_path / "other"),
            "allowed_hosts": ("[::1]", "kiln"),
        }
    )
    for variable, value in settings.to_environment().items():
        monkeypatch.setenv(variable, value)
    assert load_settings() == settings


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", ()), ("one", ("one",)), ("one:two:", ("one", "two")), ('["[::1]", "two"]', ("[::1]", "two")), ("[]", ())],
)
def test_a_list_is_taken_from_people_and_programs(
    text: str, expected: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEKILN_ALLOWED_HOSTS", text)
    assert load_settings().allowed_hosts == expected


def test_a_list_that_is_no_json_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEKILN_ALLOWED_HOSTS", "[one")
    with pytest.raises(InvalidSettings, match="EDGEKILN_ALLOWED_HOSTS"):
        load_settings()


@pytest.mark.parametrize("name", ODD_NAMES)
def test_the_ledger_stands_in_the_data_directory(name: str, tmp_path: Path) -> None:
    settings = load_settings({"data_dir": tmp_path / name})
    migrate(settings.ledger_url)
    database = Database(settings.ledger_url)
    ping(database)
    database.close()
    assert [path.name for path in tmp_path.iterdir()] == [name]
    connection = sqlite3.connect(tmp_path / name / "ledger.db")
    assert connection.execute("SELECT count(*) FROM steps").fetchone() == (0,)
    connection.close()


@pytest.mark.parametrize(
    ("variable", "value", "sentence"),
    [
        ("EDGEKILN_PORT", "abc", "EDGEKILN_PORT=abc: "),
        ("EDGEKILN_LEASE_S", "1", "EDGEKILN_HEARTBEAT_S must be at most half of EDGEKILN_LEASE_S"),
    ],
)
def test_a_bad_setting_is_named_as_operators_know_it(
    variable: str, value: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(InvalidSettings) as caught:
        load_settings()
    assert sentence in caught.value.message
    assert "Value error" not in caught.value.message
