"""Phones as the ledger knows them: who follows which, how it is, what it runs, and who may claim for it.

A phone is leased by the step that runs on it: no lease of its own can outlive the step's, and nobody takes a phone from
a live run. Called by the device worker, `service.api`, and when a plan's devices are named.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from sqlalchemy import Connection, and_, select, update

from service.devices import HOST, PHONE_CLASS, parse_selector
from service.errors import NotFound
from service.ledger import locks
from service.ledger.clock import now
from service.ledger.database import Transaction, reads, writes
from service.ledger.due import find_tenants_in_turn, is_running, select_due
from service.ledger.fleet import is_live
from service.ledger.states import DeviceState
from service.ledger.tables import Device, Step, Worker

#: How many steps that fit are offered for a tenant's turn: others may take the first ones meanwhile.
_OFFERED = 20


@writes
def register_device(
    tx: Transaction, worker_id: str, device_id: str, record: Mapping[str, Any], connections: Sequence[str]
) -> bool:
    """Enter a phone that answers, or that it answers again; return whether this worker follows it.

    A phone that another live worker follows stays that worker's: it may be reached over two networks. One that was
    given up stays so until it was away or is released, whatever worker sees it next.
    """
    locks.lock_device(tx, device_id)
    known = tx.connection.execute(
        select(Device.worker_id, Device.state, Device.reason).where(Device.id == device_id)
    ).one_or_none()
    if known is not None and known.worker_id != worker_id and _is_followed(tx.connection, known):
        return False
    given_up = known if known is not None and known.state == DeviceState.QUARANTINED else None
    values = {
        "record": dict(record),
        "connections": list(connections),
        "worker_id": worker_id,
        "state": DeviceState.QUARANTINED if given_up else DeviceState.READY,
        "reason": given_up.reason if given_up else None,
        "seen_at": now(),
    }
    tx.connection.execute(
        tx.insert(Device)
        .values(id=device_id, tags=[], registered_at=now(), **values)
        .on_conflict_do_update(index_elements=["id"], set_=values)
    )
    return True


def _is_followed(connection: Connection, known: Any) -> bool:
    if known.state == DeviceState.ABSENT:
        return False
    return connection.execute(select(Worker.id).where(Worker.id == known.worker_id, is_live())).first() is not None


@writes
def tell_state(
    tx: Transaction, worker_id: str, device_id: str, state: DeviceState, reason: str | None, connections: Sequence[str]
) -> None:
    """Say how a phone is that this worker follows; nothing happens to another's, or to one that never answered."""
    tx.connection.execute(
        update(Device)
        .where(Device.id == device_id, Device.worker_id == worker_id)
        .values(state=state, reason=reason, connections=list(connections), seen_at=now())
    )


@writes
def leave_devices(tx: Transaction, worker_id: str) -> None:
    """Say that a worker follows its phones no more."""
    gone = {"state": DeviceState.ABSENT, "reason": "Its device worker has ended.", "connections": []}
    mine = Device.worker_id == worker_id, Device.state != DeviceState.QUARANTINED
    tx.connection.execute(update(Device).where(*mine).values(**gone))


@writes
def tag_device(tx: Transaction, device_id: str, tags: Iterable[str]) -> None:
    """Give a phone these names in place of those it had; raises `NotFound`."""
    changed = tx.connection.execute(
        update(Device).where(Device.id == device_id).values(tags=sorted(set(tags))).returning(Device.id)
    )
    if changed.first() is None:
        raise _not_found(device_id)


@writes
def release_device(tx: Transaction, device_id: str) -> None:
    """Take a phone out of quarantine: its worker looks at it anew; raises `NotFound`."""
    found = tx.connection.execute(select(Device.state).where(Device.id == device_id)).one_or_none()
    if found is None:
        raise _not_found(device_id)
    released = {"state": DeviceState.ABSENT, "reason": "Released; its device worker looks at it anew."}
    is_held = Device.id == device_id, Device.state == DeviceState.QUARANTINED
    tx.connection.execute(update(Device).where(*is_held).values(**released))


def _not_found(device_id: str) -> NotFound:
    return NotFound(f"There is no device {device_id!r}. `edgekiln devices` lists those there are.", device=device_id)


@reads
def read_states(connection: Connection, worker_id: str) -> dict[str, str]:
    """Return device id -> state of the phones that a worker follows."""
    rows = connection.execute(select(Device.id, Device.state).where(Device.worker_id == worker_id))
    return {row.id: row.state for row in rows}


@reads
def list_devices(connection: Connection) -> list[dict[str, Any]]:
    """Return every phone that was ever registered, and what runs on it, by name."""
    holds = and_(Step.device_id == Device.id, is_running(), Step.lease_expires_at > now())
    rows = connection.execute(
        select(Device.__table__, Worker.host_id, Step.id.label("step_id"))
        .outerjoin(Worker, Worker.id == Device.worker_id)
        .outerjoin(Step, holds)
        .order_by(Device.id)
    )
    return [_describe(row) for row in rows]


def _describe(row: Any) -> dict[str, Any]:
    record = {name: value for name, value in row.record.items() if name != "boot_id"}
    return {
        **record,
        "id": row.id,
        "state": "busy" if row.step_id and row.state == DeviceState.READY else row.state,
        "reason": row.reason,
        "tags": row.tags,
        "connections": row.connections,
        "host": row.host_id,
        "registered_at": row.registered_at.isoformat(),
        "seen_at": row.seen_at.isoformat(),
    }


def name_devices(connection: Connection, asked: Sequence[str]) -> list[str]:
    """Return what a job asks for with each `all` as the phones there are; none there: any, when one comes."""
    named: dict[str, None] = {}
    for text in asked:
        found: list[str] = []
        if text != HOST and parse_selector(text).is_all:
            present = select(Device.__table__).where(Device.state == DeviceState.READY).order_by(Device.id)
            selector = parse_selector(text)
            found = [f"serial={row.id}" for row in connection.execute(present) if selector.fits(describe_offer(row))]
        named.update(dict.fromkeys(found or [text]))
    return list(named)


def describe_offer(row: Any) -> dict[str, Any]:
    """What a selector is held against."""
    return {**row.record, "serial": row.id, "tags": row.tags}


def find_steps_for_device(tx: Transaction, device: Any) -> list[str]:
    """Return the due steps that a phone fits, the next one first."""
    offer = describe_offer(device)
    found: list[str] = []
    for tenant_id in find_tenants_in_turn(tx, PHONE_CLASS):
        due = select_due(PHONE_CLASS, Step.tenant_id == tenant_id).add_columns(Step.params)
        rows = tx.connection.execute(due)
        fitting = (step_id for step_id, params in rows if parse_selector(params["device"]).fits(offer))
        found.extend(islice(fitting, _OFFERED))
    return found
