"""What every handler gets: settings, ledger, store, and whose request it is. Nothing else is global.

A handler declares the scope that it demands by how it asks for the tenant: `ReadTenant` and `ReaderOf`,
`WriteTenant`, `OperatorOf`.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Annotated, cast

from fastapi import Depends, Request
from fastapi.dependencies.models import Dependant

from service.api.guards import CALLER
from service.errors import OperatorRequired, ScopeRequired, Unauthorized
from service.ledger.access import Caller, Scope
from service.ledger.database import Database
from service.settings import Settings
from service.storage import ObjectStore


@dataclass(frozen=True)
class Context:
    """The parts that an app was made of."""

    settings: Settings
    database: Database
    store: ObjectStore
    #: Set when the server is about to stop: endless answers end.
    stopping: threading.Event = field(default_factory=threading.Event)


def get_context(request: Request) -> Context:
    """Return the app's parts."""
    return cast(Context, request.app.state.context)


def get_reader(request: Request) -> str:
    """Return the tenant whose work may be read."""
    return _find_caller(request, Scope.READ).tenant_id


def get_reading_caller(request: Request) -> Caller:
    """Return whose request this is, who may read."""
    return _find_caller(request, Scope.READ)


def get_writer(request: Request) -> str:
    """Return the tenant whose work may be changed."""
    return _find_caller(request, Scope.WRITE).tenant_id


def get_operator(request: Request) -> Caller:
    """Return the operator whose request this is."""
    return _find_caller(request, Scope.OPERATE)


def _find_caller(request: Request, scope: Scope) -> Caller:
    """Return whose request this is (`KeyGuard` has found out) if its key has the scope."""
    caller: Caller | None = getattr(request.state, CALLER, None)
    if caller is None:
        raise Unauthorized("This needs an API key: send `Authorization: Bearer ek_...`.")
    if scope in caller.scopes:
        return caller
    if scope is Scope.OPERATE:
        raise OperatorRequired(
            "Fleet and keys are the operators' to see and manage. `edgekiln keys create NAME --operator` on the server "
            "makes a key for it."
        )
    raise ScopeRequired(
        f"This needs a key with the scope {scope!s}; this one has {', '.join(sorted(caller.scopes))}. `edgekiln keys "
        f"create NAME --scope {scope!s}` on the server makes one.",
        scope=str(scope),
    )


#: What a handler depends on -> the scope that it thereby demands.
_DEMANDS = {
    get_reader: Scope.READ,
    get_reading_caller: Scope.READ,
    get_writer: Scope.WRITE,
    get_operator: Scope.OPERATE,
}


def find_scopes(dependant: Dependant) -> set[Scope]:
    """Return the scopes that a route demands."""
    own = {scope for demand, scope in _DEMANDS.items() if dependant.call is demand}
    return own.union(*(find_scopes(each) for each in dependant.dependencies))


ContextOf = Annotated[Context, Depends(get_context)]
ReadTenant = Annotated[str, Depends(get_reader)]
ReaderOf = Annotated[Caller, Depends(get_reading_caller)]
WriteTenant = Annotated[str, Depends(get_writer)]
OperatorOf = Annotated[Caller, Depends(get_operator)]
