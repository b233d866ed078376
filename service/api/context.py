"""What every handler gets: settings, ledger, store and the tenant. Nothing else is global."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Annotated, cast

from fastapi import Depends, Request

from service.api.guards import TENANT
from service.errors import Unauthorized
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


def get_tenant(request: Request) -> str:
    """Return whose request this is; `KeyGuard` has found out."""
    tenant_id = getattr(request.state, TENANT, None)
    if tenant_id is None:
        raise Unauthorized("This needs an API key: send `Authorization: Bearer ek_...`.")
    return str(tenant_id)


ContextOf = Annotated[Context, Depends(get_context)]
TenantOf = Annotated[str, Depends(get_tenant)]
