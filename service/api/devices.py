"""Routes of phones and of the tools that measure on them; changing them is the operators'."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, field_validator

from service.api.context import ContextOf, OperatorOf, ReaderOf, ReadTenant
from service.api.schemas import DeviceList, NewTool, ToolList, answers, problem_responses
from service.devices import TOOLS
from service.errors import InvalidRequest
from service.ledger import devices, tools
from service.ledger.access import Scope
from service.ledger.rebenchmarks import start_rebenchmarks
from service.recipes import require_known
from service.requests import UploadDigest

router = APIRouter(prefix="/v1", tags=["fleet"])

DeviceId = Annotated[str, Path(description="A device's id: its hardware's serial number.", max_length=100)]
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,63}$"
Name = Annotated[str, Field(pattern=_NAME)]


class ToolRequest(BaseModel):
    """A tool to register: uploaded files, one of which has the tool's own name."""

    model_config = ConfigDict(extra="forbid")
    name: str = Field(description=f"One of {', '.join(sorted(set(TOOLS.values())))}.")
    version: Name
    abi: Name = Field(examples=["arm64-v8a"])
    files: dict[Name, UploadDigest] = Field(min_length=1, max_length=32, description="File name -> SHA-256.")
    rebenchmark: bool = Field(
        default=False, description="Measure with it what older versions have measured, on the same phones."
    )

    @field_validator("name")
    @classmethod
    def _known(cls, value: str) -> str:
        return require_known("tool", value, sorted(set(TOOLS.values())))


class TagRequest(BaseModel):
    """The names that a phone is to have."""

    model_config = ConfigDict(extra="forbid")
    tags: list[Name] = Field(max_length=32)


@router.get(
    "/devices",
    summary="List devices",
    response_model=None,
    responses=answers(DeviceList, "Every phone that was ever attached, and every host that measures, by id."),
)
def list_devices(context: ContextOf, reader: ReaderOf) -> JSONResponse:
    """Return the devices: what each is, how it is, how it can be selected; why and where, to operators."""
    for_operator = Scope.OPERATE in reader.scopes
    return JSONResponse({"devices": devices.list_devices(context.database, for_operator=for_operator)})


@router.put(
    "/devices/{device_id}/tags",
    summary="Name a device",
    response_model=None,
    responses={**answers(DeviceList, "All devices."), **problem_responses(403, 404)},
)
def tag_device(context: ContextOf, _operator: OperatorOf, device_id: DeviceId, wanted: TagRequest) -> JSONResponse:
    """Give a phone tags that jobs can select it by, in place of those it had."""
    devices.tag_device(context.database, device_id, wanted.tags)
    return JSONResponse({"devices": devices.list_devices(context.database)})


@router.post(
    "/devices/{device_id}/release",
    summary="Release a quarantined device",
    response_model=None,
    responses={**answers(DeviceList, "All devices."), **problem_responses(403, 404)},
)
def release_device(context: ContextOf, _operator: OperatorOf, device_id: DeviceId) -> JSONResponse:
    """Let a device worker look anew at a phone that was given up."""
    devices.release_device(context.database, device_id)
    return JSONResponse({"devices": devices.list_devices(context.database)})


@router.get(
    "/tools",
    summary="List tools",
    response_model=None,
    responses=answers(ToolList, "What measures on phones, by name and age."),
)
def list_tools(context: ContextOf, _tenant: ReadTenant) -> JSONResponse:
    """Return the registered tools; a phone gets the newest one for its ABI."""
    return JSONResponse({"tools": tools.list_tools(context.database)})


@router.post(
    "/tools",
    summary="Register a tool",
    response_model=None,
    responses={**answers(NewTool, "All tools."), **problem_responses(403, 409)},
)
def add_tool(context: ContextOf, operator: OperatorOf, wanted: ToolRequest) -> JSONResponse:
    """Register a version of a tool for an ABI, of uploaded files; the same again changes nothing.

    With `rebenchmark` the answer counts what was `started`, `known` already, `away` with its phone, and `refused` by a
    tenant's quota.
    """
    if wanted.name not in wanted.files:
        raise InvalidRequest(f"One of the files must be the tool itself, called {wanted.name!r}.")
    tools.add_tool(context.database, operator.tenant_id, wanted.name, wanted.version, wanted.abi, wanted.files)
    begun = None
    if wanted.rebenchmark:
        begun = start_rebenchmarks(
            context.database,
            wanted.name,
            wanted.version,
            wanted.abi,
            processes=context.settings.benchmark_processes,
        ).to_json()
    return JSONResponse({"tools": tools.list_tools(context.database), "rebenchmarks": begun})
