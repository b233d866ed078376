"""Routes of API keys: make, list, rotate, end; for operators, and for keys of their own tenant.

Whoever holds the ledger makes a tenant's first key (`edgekiln keys`). No key makes one that may do more than itself.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body, Path
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from service.api.context import ContextOf, OperatorOf
from service.api.schemas import KeyList, NewKeyDocument, answers, problem_responses
from service.errors import ScopeRequired
from service.ledger import access
from service.ledger.access import DEFAULT_SCOPES, Scope
from service.requests import PLAIN

router = APIRouter(prefix="/v1", tags=["keys"])

KeyId = Annotated[str, Path(description="A key's id.", examples=["key_1f0c9a2b3c4d5e6f"], max_length=64)]
_DAY_S = 24 * 3600.0
_NO_STORE = {"Cache-Control": "no-store"}
#: A century: the ledger's clock reaches further, and nobody's key should.
_Days = Annotated[float, Field(gt=0, le=36_500, allow_inf_nan=False)]


class KeyRequest(BaseModel):
    """What a new key shall be."""

    model_config = ConfigDict(extra="forbid")
    name: str = Field(min_length=1, max_length=200, pattern=PLAIN, description="What the key is for.")
    scopes: list[Scope] = Field(default=list(DEFAULT_SCOPES), min_length=1, description="What its holder may do.")
    expires_days: _Days | None = Field(default=None, description="Valid for so long; for ever when absent.")


class RotationRequest(BaseModel):
    """How one key takes the place of another."""

    model_config = ConfigDict(extra="forbid")
    overlap_hours: float = Field(
        default=24.0, ge=0, le=24 * 365, allow_inf_nan=False, description="How long the old key still holds."
    )
    expires_days: _Days | None = Field(default=None, description="As long as the old key was meant to when absent.")


@router.get(
    "/keys",
    summary="List keys",
    response_model=None,
    responses={**answers(KeyList, "The tenant's keys, without their secrets."), **problem_responses(403)},
)
def list_keys(context: ContextOf, operator: OperatorOf) -> JSONResponse:
    """Return the keys of the operator's own tenant: scopes, when they end, when they were last used."""
    return JSONResponse({"keys": access.list_keys(context.database, operator.tenant_id)})


@router.post(
    "/keys",
    status_code=201,
    summary="Make a key",
    response_model=None,
    responses={**answers(NewKeyDocument, "The key, this once.", 201), **problem_responses(403)},
)
def create_key(context: ContextOf, operator: OperatorOf, request: KeyRequest) -> JSONResponse:
    """Make a key for the operator's own tenant; `key` is shown only now."""
    scopes = frozenset(request.scopes)
    if not scopes <= operator.scopes:
        missing = ", ".join(sorted(scopes - operator.scopes))
        raise ScopeRequired(f"Your own key has not the scope {missing}, so it cannot give it.", scope=missing)
    lifetime_s = None if request.expires_days is None else request.expires_days * _DAY_S
    new = access.create_key(context.database, operator.tenant_id, request.name, lifetime_s, scopes=scopes)
    return _answer_new(context, operator, new)


@router.post(
    "/keys/{key_id}/rotate",
    status_code=201,
    summary="Rotate a key",
    response_model=None,
    responses={
        **answers(NewKeyDocument, "The new key, this once; the old one ends after the overlap.", 201),
        **problem_responses(403, 404, 409),
    },
)
def rotate_key(
    context: ContextOf,
    operator: OperatorOf,
    key_id: KeyId,
    request: Annotated[RotationRequest | None, Body()] = None,
) -> JSONResponse:
    """Make a key with the same name and scopes, and let the old one end after the overlap."""
    asked = request or RotationRequest()
    new = access.rotate_key(
        context.database,
        operator.tenant_id,
        key_id,
        overlap_s=asked.overlap_hours * 3600,
        lifetime_s=None if asked.expires_days is None else asked.expires_days * _DAY_S,
        granted=operator.scopes,
    )
    return _answer_new(context, operator, new)


@router.delete(
    "/keys/{key_id}",
    status_code=204,
    summary="Revoke a key",
    response_class=Response,
    responses={204: {"description": "The key has ended."}, **problem_responses(403, 404)},
)
def revoke_key(context: ContextOf, operator: OperatorOf, key_id: KeyId) -> Response:
    """End a key at once."""
    access.revoke_key(context.database, operator.tenant_id, key_id)
    return Response(status_code=204)


def _answer_new(context: ContextOf, operator: OperatorOf, new: access.NewKey) -> JSONResponse:
    document: dict[str, Any] = access.read_key(context.database, operator.tenant_id, new.id)
    return JSONResponse({**document, "key": new.secret}, status_code=201, headers=_NO_STORE)
