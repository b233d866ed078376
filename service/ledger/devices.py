"""Devices as the ledger knows them: who follows which phone, how it is, what it runs, who may claim for it; and hosts.

A phone is leased by the step that runs on it: no lease of its own can outlive the step's, and nobody takes a phone from
a live run. Called by the device worker, `service.api`, and when a plan's devices are named.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from sqlalchemy import ColumnElement, Connection, and_, delete, select, update

from service.devices import HOST, PHONE_CLASS, PHONE_KINDS, parse_selector
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
#: What is known of a phone that has not answered yet: nothing.
_UNKNOWN: Mapping[str, Any] = {
    "kind": "unknown",
    **dict.fromkeys(("manufacturer", "model", "device", "soc", "android", "os", "abi", "cores", "ram_gib")),
}
_WORKER_ENDED = "Its device worker has ended."
_WORKER_SILENT = "Its device worker is silent."
_NO_HOST = (DeviceState.ABSENT, "None of its workers measures.")
#: What everybody is told.
_PUBLIC_REASONS: Mapping[str, str] = {
    DeviceState.ABSENT: "It is not attached.",
    DeviceState.OFFLINE: "It does not answer.",
    DeviceState.UNAUTHORIZED: "It waits for a person.",
    DeviceState.QUARANTINED: "It was given up, until an operator looks at it.",
}


@writes
def register_device(
    tx: Transaction,
    worker_id: str,
    device_id: str,
    record: Mapping[str, Any],
    connections: Sequence[str],
    state: DeviceState = DeviceState.READY,
) -> DeviceState | None:
    """Enter a phone that answers, in this state; return its state then, or None when another follows it.

    A phone that another live worker follows stays that worker's: it may be reached over two networks. One that was
    given up stays so until it was away or is released, whatever worker sees it next.
    """
    known = _hold_device(tx, device_id)
    if _is_anothers(tx.connection, known, worker_id):
        return None
    is_given_up = known.state == DeviceState.QUARANTINED
    state = DeviceState.QUARANTINED if is_given_up else state
    reason = known.reason if is_given_up else None
    _follow(tx, worker_id, device_id, record, connections, state, reason)
    return state


@writes
def enter_silent_device(tx: Transaction, worker_id: str, connection: str) -> Mapping[str, Any] | None:
    """Enter a phone that adb knows and that does not answer this worker; return what is known of it.

    Nobody knows its hardware's serial number yet, so it goes by adb's, which over a cable is the same. None when a
    worker that lives follows it by this connection already.
    """
    rows = tx.connection.execute(select(Device.__table__).where(Device.id != connection)).all()
    if any(connection in row.connections and _is_followed(tx.connection, row) for row in rows):
        return None
    known = _hold_device(tx, connection)
    if _is_anothers(tx.connection, known, worker_id):
        return None
    record = known.record or {**_UNKNOWN, "serial": connection, "name": connection}
    state = DeviceState.QUARANTINED if known.state == DeviceState.QUARANTINED else DeviceState.OFFLINE
    _follow(tx, worker_id, connection, record, [connection], state, known.reason)
    found: Mapping[str, Any] = record
    return found


@writes
def forget_silent_device(tx: Transaction, worker_id: str, device_id: str) -> None:
    """Take a phone away that has gone, or has told its own serial number, before it was known by this one."""
    _forget_unknown(tx, Device.id == device_id, Device.worker_id == worker_id)


def _forget_unknown(tx: Transaction, *which: ColumnElement[bool]) -> None:
    rows = tx.connection.execute(select(Device.id, Device.record).where(*which)).all()
    unknown = [row.id for row in rows if row.record.get("kind") == "unknown"]
    tx.connection.execute(delete(Device).where(Device.id.in_(unknown)))


def _hold_device(tx: Transaction, device_id: str) -> Any:
    """Return a device's row, locked; an empty one where there was none."""
    empty = {"record": {}, "tags": [], "state": DeviceState.ABSENT, "connections": []}
    tx.connection.execute(
        tx.insert(Device)
        .values(id=device_id, registered_at=now(), seen_at=now(), **empty)
        .on_conflict_do_nothing(index_elements=["id"])
    )
    locks.lock_device(tx, device_id)
    return tx.connection.execute(select(Device.__table__).where(Device.id == device_id)).one()


def _follow(
    tx: Transaction,
    worker_id: str,
    device_id: str,
    record: Mapping[str, Any],
    connections: Sequence[str],
    state: DeviceState,
    reason: str | None,
) -> None:
    values = {
        "record": dict(record),
        "connections": list(connections),
        "worker_id": worker_id,
        "state": state,
        "reason": reason,
        "seen_at": now(),
    }
    tx.connection.execute(update(Device).where(Device.id == device_id).values(**values))


@reads
def may_follow(connection: Connection, worker_id: str, device_id: str) -> bool:
    """Whether no other worker that lives follows a phone."""
    known = connection.execute(select(Device.__table__).where(Device.id == device_id)).one_or_none()
    return known is None or not _is_anothers(connection, known, worker_id)


def _is_anothers(connection: Connection, known: Any, worker_id: str) -> bool:
    return known.worker_id != worker_id and _is_followed(connection, known)


def _is_followed(connection: Connection, known: Any) -> bool:
    if known.state == DeviceState.ABSENT:
        return False
    return connection.execute(select(Worker.id).where(Worker.id == known.worker_id, is_live())).first() is not None


@writes
def enter_host(tx: Transaction, worker_id: str, device_id: str, record: Mapping[str, Any]) -> None:
    """Enter the host of a worker that measures on it; whether it can be measured on, its workers' lives say."""
    _hold_device(tx, device_id)
    _follow(tx, worker_id, device_id, record, [], DeviceState.READY, None)


@writes
def tell_state(
    tx: Transaction, worker_id: str, device_id: str, state: DeviceState, reason: str | None, connections: Sequence[str]
) -> None:
    """Say how a phone is that this worker follows; nothing happens to another's, or to one that never answered.

    Every tenant's operator reads the reason: it must not tell whose work was on the phone, or which.
    """
    tx.connection.execute(
        update(Device)
        .where(Device.id == device_id, Device.worker_id == worker_id)
        .values(state=state, reason=reason, connections=list(connections), seen_at=now())
    )


@writes
def see_device(tx: Transaction, worker_id: str, device_id: str) -> bool:
    """Note that a phone has just answered; return whether it still is this worker's and ready."""
    is_it = Device.id == device_id, Device.worker_id == worker_id, Device.state == DeviceState.READY
    return tx.connection.execute(update(Device).where(*is_it).values(seen_at=now())).rowcount == 1


@writes
def leave_devices(tx: Transaction, worker_id: str) -> None:
    """Say that a worker follows its phones no more."""
    _forget_unknown(tx, Device.worker_id == worker_id)
    gone = {"state": DeviceState.ABSENT, "reason": _WORKER_ENDED, "connections": []}
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
def list_devices(connection: Connection, *, for_operator: bool = True) -> list[dict[str, Any]]:
    """Return every device that was ever registered, and whether something runs on it, by name.

    Whoever is no operator is told what devices are and how, not where they hang and why they fail: both may tell of
    others' work and of the operator's network.
    """
    holds = and_(Step.device_id == Device.id, is_running(), Step.lease_expires_at > now())
    rows = connection.execute(
        select(Device.__table__, Worker.host_id, is_live().label("is_live"), Step.id.label("step_id"))
        .outerjoin(Worker, Worker.id == Device.worker_id)
        .outerjoin(Step, holds)
        .order_by(Device.id)
    ).all()
    hosts = _read_hosts(connection)
    found = []
    for row in rows:
        is_host = row.record.get("kind") == HOST
        # What never answered goes by adb's name for it, which may be an address of the operator's network.
        is_shown = row.record.get("kind") != "unknown" or (row.is_live and for_operator)
        if not row.record or not is_shown:
            continue
        state, reason = hosts.get(row.host_id, _NO_HOST) if is_host else _find_state(row)
        document = _describe(row, state, reason)
        found.append(document if for_operator else {**document, **_conceal(state)})
    return found


def _read_hosts(connection: Connection) -> dict[str, tuple[str, str | None]]:
    """Return host id -> state of the hosts that have a live worker which measures there."""
    rows = connection.execute(select(Worker.host_id, Worker.slots).where(is_live()))
    measuring = {row.host_id for row in rows if row.slots.get("device", 0) > 0}
    is_measured = is_running(), Step.resource_class == "device", Step.lease_expires_at > now()
    busy = connection.execute(select(Worker.host_id).join(Step, Step.worker_id == Worker.id).where(*is_measured))
    taken = set(busy.scalars())
    return {host_id: ("busy" if host_id in taken else DeviceState.READY, None) for host_id in measuring}


def _find_state(row: Any) -> tuple[str, str | None]:
    """How a phone is; what was said of it by a worker that is silent now does not count."""
    if not row.is_live and row.state not in (DeviceState.ABSENT, DeviceState.QUARANTINED):
        return DeviceState.ABSENT, _WORKER_SILENT
    return ("busy" if row.step_id and row.state == DeviceState.READY else row.state), row.reason


def _describe(row: Any, state: str, reason: str | None) -> dict[str, Any]:
    record = {name: value for name, value in row.record.items() if name != "boot_id"}
    return {
        **record,
        "id": row.id,
        "state": state,
        "reason": reason,
        "tags": row.tags,
        "connections": row.connections,
        "host": row.host_id,
        "registered_at": row.registered_at.isoformat(),
        "seen_at": row.seen_at.isoformat(),
    }


def _conceal(state: str) -> dict[str, Any]:
    return {"reason": _PUBLIC_REASONS.get(state), "connections": [], "host": None}


def name_devices(connection: Connection, asked: Sequence[str]) -> list[str]:
    """Return what a job asks for with each `all` as the phones there are; none there: any, when one comes."""
    named: dict[str, None] = {}
    for text in asked:
        found: list[str] = []
        if text != HOST and parse_selector(text).is_all:
            present = (
                select(Device.__table__)
                .join(Worker, Worker.id == Device.worker_id)
                .where(Device.state == DeviceState.READY, is_live())
                .order_by(Device.id)
            )
            selector = parse_selector(text)
            phones = [row for row in connection.execute(present) if row.record.get("kind") in PHONE_KINDS]
            found = [f"serial={row.id}" for row in phones if selector.fits(describe_offer(row))]
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
