"""What an unexpected exception tells, and what it keeps to itself."""

from __future__ import annotations

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.exc import DBAPIError, StatementError

from service.errors import describe_bug


def test_a_bug_is_told_with_its_type_and_text() -> None:
    document = describe_bug(KeyError("no such thing"))
    assert document["code"] == "internal_error"
    assert document["message"] == "Unexpected KeyError: 'no such thing'"
    assert document["retryable"] is False


def test_a_database_error_tells_neither_statement_nor_parameters() -> None:
    engine = create_engine("sqlite://")
    with engine.connect() as connection, pytest.raises(DBAPIError) as refused:
        connection.execute(text("INSERT INTO nowhere VALUES (:word)"), {"word": "secret"})
    engine.dispose()
    assert "secret" in str(refused.value), "control: the error itself tells"
    assert describe_bug(refused.value)["message"] == "Unexpected OperationalError: no such table: nowhere"


def test_a_statement_that_never_reached_the_database_is_not_told() -> None:
    engine = create_engine("sqlite://")
    with engine.connect() as connection, pytest.raises(StatementError) as refused:
        connection.execute(text("SELECT :secret, :other"), {"secret": 1})
    engine.dispose()
    assert "SELECT" in str(refused.value), "control: the error itself tells"
    message = describe_bug(refused.value)["message"]
    assert message.startswith("Unexpected StatementError: A value is required")
    assert "SELECT" not in message


def test_what_follows_the_drivers_first_line_is_not_told() -> None:
    error = DBAPIError("UPDATE", {}, Exception("duplicate key\nDETAIL: Key (name)=(secret) already exists."))
    assert describe_bug(error)["message"] == "Unexpected DBAPIError: duplicate key"
