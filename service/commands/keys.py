"""`edgekiln keys`: API keys of a tenant, for whoever holds the ledger."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from service.commands import options
from service.commands.output import format_time, print_json, print_table, say
from service.commands.server import open_ledger
from service.errors import InvalidRequest

if TYPE_CHECKING:
    from service.ledger.access import NewKey
    from service.ledger.database import Database

KEYS_EPILOG = """Examples:

\b
  edgekiln keys create laptop --expires-days 90
  edgekiln keys create dashboard --tenant team --scope read
  edgekiln keys create ops --operator
  edgekiln keys list --tenant team
  edgekiln keys rotate key_1f0c9a2b3c4d5e6f --overlap-hours 48
  edgekiln keys revoke key_1f0c9a2b3c4d5e6f
"""
_DAY_S = 24 * 3600.0
_HOUR_S = 3600.0

Tenant = Annotated[str, typer.Option("--tenant", metavar="NAME", help="Whose work the key gives access to.")]
KeyId = Annotated[str, typer.Argument(metavar="ID", help="The key's id, as `edgekiln keys list` shows it.")]

keys = typer.Typer(help="Make, list, rotate and end API keys.", no_args_is_help=True, epilog=KEYS_EPILOG)


@keys.command("create")
def create_key(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What the key is for.")],
    tenant: Tenant = "default",
    scope: Annotated[
        list[str] | None,
        typer.Option(
            "--scope", metavar="S", help="`read`, `write` or `operate`; may be repeated. [default: read, write]"
        ),
    ] = None,
    expires_days: Annotated[
        float | None, typer.Option("--expires-days", metavar="N", help="Valid for so long; for ever if not given.")
    ] = None,
    operator: Annotated[
        bool,
        typer.Option("--operator", help="All scopes: also see and drain workers, with all tenants' work on them."),
    ] = False,
    data_dir: options.DataDir = None,
    as_json: options.AsJson = False,
) -> None:
    """Make an API key and print it, this once."""
    from service.ledger import access

    if operator and scope:
        raise InvalidRequest("--operator means every scope; name --scope or --operator.")
    scopes = frozenset(access.Scope) if operator else access.parse_scopes(scope or access.DEFAULT_SCOPES)
    lifetime_s = _read_lifetime(expires_days)
    with open_ledger(data_dir) as ledger:
        access.ensure_tenant(ledger, tenant)
        key = access.create_key(ledger, tenant, name, lifetime_s, scopes=scopes)
        _show_new(ledger, tenant, key, as_json=as_json)


def _read_lifetime(expires_days: float | None) -> float | None:
    if expires_days is not None and not 0 < expires_days <= 36_500:
        raise InvalidRequest("--expires-days must be more than 0, and at most 36500.")
    return None if expires_days is None else expires_days * _DAY_S


def _show_new(ledger: Database, tenant: str, key: NewKey, *, as_json: bool) -> None:
    from service.ledger import access

    if as_json:
        print_json({**access.read_key(ledger, tenant, key.id), "tenant": tenant, "key": key.secret})
        return
    say(f"Key {key.id} for tenant {tenant}. It is shown only now:")
    print(key.secret)


@keys.command("list")
def list_keys(tenant: Tenant = "default", data_dir: options.DataDir = None, as_json: options.AsJson = False) -> None:
    """List a tenant's keys, without their secrets."""
    from service.ledger import access

    with open_ledger(data_dir) as ledger:
        found = access.list_keys(ledger, tenant)
    if as_json:
        print_json(found)
        return
    columns = ("id", "name", "prefix", "scopes", "created", "ends", "last used")
    print_table(columns, [_row(key) for key in found])


def _row(key: dict[str, Any]) -> list[str]:
    instants = (format_time(key[f"{what}_at"]) for what in ("created", "expires", "last_used"))
    created, ends, used = instants
    if key["revoked_at"]:
        ends = f"revoked {format_time(key['revoked_at'])}"
    return [key["id"], key["name"], key["prefix"], ", ".join(key["scopes"]), created, ends, used]


@keys.command("rotate")
def rotate_key(
    key_id: KeyId,
    overlap_hours: Annotated[
        float, typer.Option("--overlap-hours", metavar="N", min=0, help="How long the old key still holds.")
    ] = 24.0,
    expires_days: Annotated[
        float | None,
        typer.Option("--expires-days", metavar="N", help="Of the new key; as the old one was meant to if not given."),
    ] = None,
    tenant: Tenant = "default",
    data_dir: options.DataDir = None,
    as_json: options.AsJson = False,
) -> None:
    """Make a key with the same name and scopes and print it, this once; the old one ends after the overlap."""
    from service.ledger import access

    with open_ledger(data_dir) as ledger:
        key = access.rotate_key(
            ledger, tenant, key_id, overlap_s=overlap_hours * _HOUR_S, lifetime_s=_read_lifetime(expires_days)
        )
        if not as_json:
            say(f"Key {key_id} ends {format_time(access.read_key(ledger, tenant, key_id)['expires_at'])}.")
        _show_new(ledger, tenant, key, as_json=as_json)


@keys.command("revoke")
def revoke_key(
    key_id: KeyId, tenant: Tenant = "default", data_dir: options.DataDir = None, as_json: options.AsJson = False
) -> None:
    """End a key at once."""
    from service.ledger import access

    with open_ledger(data_dir) as ledger:
        access.revoke_key(ledger, tenant, key_id)
        if as_json:
            print_json(access.read_key(ledger, tenant, key_id))
    say(f"Key {key_id} is revoked.")
