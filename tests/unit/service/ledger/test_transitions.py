"""Every pair of state and event, generated from the table: allowed ones move, all others change nothing."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import select, update

from service.ledger.clock import now
from service.ledger.database import Database, Transaction, migrate
from service.ledger.moves import move_step
from service.ledger.states import (
    FINAL_STEP_STATES,
    TRANSITIONS,
    StepEvent,
    StepState,
    sources_of,
    target_of,
)
from service.ledger.tables import Step
from tests.ledger_play import Play


@pytest.fixture(scope="module")
def play(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Play]:
    url = f"sqlite:///{Path(tmp_path_factory.mktemp('ledger')) / 'ledger.db'}"
    migrate(url)
    database = Database(url)
    yield Play(database)
    database.close()


@pytest.mark.parametrize(("state", "event"), list(itertools.product(StepState, StepEvent)))
def test_a_step_moves_only_as_the_table_says(play: Play, state: StepState, event: StepEvent) -> None:
    step_id = play.job(play.submit())["steps"][0]["id"]

    def force(tx: Transaction) -> None:
        values = {
            "state": state,
            "lease_expires_at": now(30) if state is StepState.RUNNING else None,
            "finalized_at": now() if state in FINAL_STEP_STATES else None,
        }
        tx.connection.execute(update(Step).where(Step.id == step_id).values(**values))

    def move(tx: Transaction) -> bool:
        lease = {"lease_expires_at": now(30)} if event is StepEvent.CLAIM else {}
        return move_step(tx, step_id, event, **lease)

    play.database.write(force)
    moved = play.database.write(move)
    after = play.database.read(
        lambda connection: connection.execute(select(Step.state).where(Step.id == step_id)).scalar_one()
    )
    assert moved == ((state, event) in TRANSITIONS)
    assert after == TRANSITIONS.get((state, event), state)


def test_final_states_are_left_by_nothing() -> None:
    assert not [state for (state, _) in TRANSITIONS if state in FINAL_STEP_STATES]


def test_each_event_has_one_target() -> None:
    assert {event: target_of(event) for event in StepEvent}
    assert all(sources_of(event) for event in StepEvent)
