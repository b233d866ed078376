"""Routes of tokens: what a tenant's private sources are read with. They are written, and never shown again."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from service.api.context import ContextOf, ReadTenant, WriteTenant
from service.api.schemas import TokenList, answers, problem_responses
from service.ledger import tokens
from service.recipes import require_known
from service.sealing import Seal

router = APIRouter(prefix="/v1", tags=["tokens"])

TokenKind = Annotated[str, Path(description="The kind of source: `hub`.", examples=["hub"], max_length=64)]


class TokenRequest(BaseModel):
    """A token to store."""

    model_config = ConfigDict(extra="forbid")
    token: str = Field(pattern=r"^[\x21-\x7e]{1,1024}$", description="As the source's owner gave it.")


@router.get(
    "/tokens",
    summary="List tokens",
    response_model=None,
    responses={**answers(TokenList, "Which tokens there are, by fingerprint."), **problem_responses(403)},
)
def list_tokens(context: ContextOf, tenant_id: ReadTenant) -> JSONResponse:
    """Return which kinds of sources the tenant has a token for."""
    return JSONResponse({"tokens": tokens.list_tokens(context.database, tenant_id)})


@router.put(
    "/tokens/{kind}",
    summary="Set a token",
    response_model=None,
    responses={**answers(TokenList, "It is stored, sealed."), **problem_responses(403, 503)},
)
def set_token(context: ContextOf, tenant_id: WriteTenant, kind: TokenKind, request: TokenRequest) -> JSONResponse:
    """Store what the tenant's private sources are read with from now on, in place of an earlier one."""
    require_known("token", kind, tokens.TOKEN_KINDS)
    tokens.set_token(context.database, Seal(context.settings.token_keys), tenant_id, kind, request.token)
    return JSONResponse({"tokens": tokens.list_tokens(context.database, tenant_id)})


@router.delete(
    "/tokens/{kind}",
    status_code=204,
    summary="Remove a token",
    response_class=Response,
    responses={204: {"description": "The token is forgotten."}, **problem_responses(403, 404)},
)
def remove_token(context: ContextOf, tenant_id: WriteTenant, kind: TokenKind) -> Response:
    """Forget a token; steps that run keep what they were given."""
    tokens.remove_token(context.database, tenant_id, kind)
    return Response(status_code=204)
