"""Tools that measure on phones: which there are, of what files, and which one a phone gets.

Called by `service.api` for operators, and by the device worker.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, insert, select

from service.errors import Conflict, ToolMissing
from service.ledger import locks, uploads
from service.ledger.clock import now
from service.ledger.database import Transaction, reads, writes
from service.ledger.keys import new_id
from service.ledger.tables import Tool, ToolFile, Upload


@dataclass(frozen=True)
class ToolVersion:
    """One tool for one kind of machine code."""

    name: str
    version: str
    abi: str
    #: Name -> SHA-256; one of the names is the tool's own.
    files: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """Return it as documents name it."""
        return {"name": self.name, "version": self.version, "abi": self.abi, "files": dict(self.files)}


@writes
def add_tool(tx: Transaction, tenant_id: str, name: str, version: str, abi: str, files: Mapping[str, str]) -> None:
    """Register a tool of files that the tenant has uploaded; the same again changes nothing.

    Raises `UploadNotFound`, and `Conflict` when this version was registered with other bytes: a version names bytes.
    """
    is_it = Tool.name == name, Tool.version == version, Tool.abi == abi
    known = tx.connection.execute(select(Tool.id).where(*is_it)).scalar_one_or_none()
    if known is not None:
        if _read_files(tx.connection, known) != dict(files):
            raise Conflict(
                f"{name} {version} for {abi} is registered with other bytes. Give these a version of their own.",
                name=name,
                version=version,
                abi=abi,
            )
        return
    locks.lock_blobs(tx, files.values())
    uploads.require_uploads(tx.connection, tenant_id, files.values())
    tool_id = new_id("tool")
    tx.connection.execute(insert(Tool).values(id=tool_id, name=name, version=version, abi=abi, created_at=now()))
    sizes = dict(
        tx.connection.execute(
            select(Upload.digest, Upload.size_bytes).where(
                Upload.tenant_id == tenant_id, Upload.digest.in_(files.values())
            )
        ).all()
    )
    for file, digest in files.items():
        row = {"tool_id": tool_id, "name": file, "digest": digest, "size_bytes": sizes[digest]}
        tx.connection.execute(insert(ToolFile).values(**row))


@reads
def list_tools(connection: Connection) -> list[dict[str, Any]]:
    """Return every registered tool, by name and age."""
    rows = connection.execute(select(Tool.__table__).order_by(Tool.name, Tool.created_at, Tool.id))
    return [
        {
            "name": row.name,
            "version": row.version,
            "abi": row.abi,
            "files": _read_files(connection, row.id),
            "created_at": row.created_at.isoformat(),
        }
        for row in rows
    ]


@reads
def find_tool(connection: Connection, name: str, abis: Sequence[str]) -> ToolVersion:
    """Return the newest version of a tool for the first of `abis` that has one; raises `ToolMissing`."""
    for abi in abis:
        newest = select(Tool.__table__).where(Tool.name == name, Tool.abi == abi).order_by(Tool.created_at.desc())
        row = connection.execute(newest.limit(1)).one_or_none()
        if row is not None:
            return ToolVersion(row.name, row.version, row.abi, _read_files(connection, row.id))
    raise ToolMissing(
        f"No {name} is registered for {' or '.join(abis) or 'a device that names no ABI'}. An operator registers one: "
        f"`edgekiln tools add {name} --version V --abi {abis[0] if abis else 'ABI'} FILE`.",
        tool=name,
        abis=list(abis),
    )


def _read_files(connection: Connection, tool_id: str) -> dict[str, str]:
    rows = connection.execute(
        select(ToolFile.name, ToolFile.digest).where(ToolFile.tool_id == tool_id).order_by(ToolFile.name)
    )
    return {row.name: row.digest for row in rows}
