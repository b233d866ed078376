"""What every handler gets: settings, ledger, store and the tenant. Nothing else is global."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Annotated, cast

from fastapi import Depends, Request

from service.api.guards import CALLER
from service.errors import OperatorRequired, Unauthorized
from service.ledger.access import Caller
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


def get_caller(request: Request) -> Caller:
    """Return whose request this is; `KeyGuard` has found out."""
    caller: Caller | None = getattr(request.state, CALLER, None)
    if caller is None:
        raise Unauthorized("This needs an API key: send `Authorization: Bearer ek_...`.")
    return caller


def get_tenant(request: Request) -> str:
    """Return the tenant whose request this is."""
    return get_caller(request).tenant_id


def get_operator(request: Request) -> Caller:
    """Return the operator whose request this is; raises `OperatorRequired`."""
    caller = get_caller(request)
    if not caller.is_operator:
        raise OperatorRequired(
            "The fleet is the operators' to see and manage. `edgekiln keys create NAME --operator` on the server makes "
            "a key for it."
        )
    return caller


ContextOf = Annotated[Context, Depends(get_context)]
TenantOf = Annotated[str, Depends(get_tenant)]
OperatorOf = Annotated[Caller, Depends(get_operator)]
