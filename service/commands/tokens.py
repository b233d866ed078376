"""`edgekiln tokens`: what a tenant's private sources are read with; and the keys that seal it, for operators."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from service.commands import options
from service.commands.output import format_time, print_json, print_table, say
from service.commands.server import open_ledger
from service.errors import InvalidRequest

TOKENS_EPILOG = """Examples:

\b
  edgekiln tokens set < token.txt
  edgekiln tokens list
  edgekiln tokens remove
  EDGEKILN_TOKEN_KEYS=$(edgekiln tokens key) edgekiln up
  EDGEKILN_TOKEN_KEYS=$NEW:$OLD edgekiln tokens reseal
"""

Kind = Annotated[str, typer.Argument(metavar="KIND", help="The kind of source.")]

tokens = typer.Typer(
    help="Set, list and remove the tokens that your private sources are read with.",
    no_args_is_help=True,
    epilog=TOKENS_EPILOG,
)


@tokens.command("set")
def set_token(
    kind: Kind = "hub", as_json: options.AsJson = False, url: options.Url = None, api_key: options.ApiKey = None
) -> None:
    """Store a token, read from standard input, or asked for without showing it.

    It is sealed with the operator's key, and opened for your own fetches alone.
    """
    token = typer.prompt("Token", hide_input=True, err=True) if sys.stdin.isatty() else sys.stdin.read()
    if not token.strip():
        raise InvalidRequest("There is no token on standard input.")
    with options.connect(url, api_key) as client:
        found = client.set_token(token.strip(), kind)
    if as_json:
        print_json(found)
        return
    say(f"The token {found['fingerprint']} is stored for sources of the kind {kind}.")


@tokens.command("list")
def list_tokens(as_json: options.AsJson = False, url: options.Url = None, api_key: options.ApiKey = None) -> None:
    """List your tokens by fingerprint: the beginning of SHA-256."""
    with options.connect(url, api_key) as client:
        found = client.tokens()
    if as_json:
        print_json(found)
        return
    rows = [[each["kind"], each["fingerprint"], format_time(each["created_at"])] for each in found]
    print_table(("kind", "fingerprint", "set"), rows)


@tokens.command("remove")
def remove_token(kind: Kind = "hub", url: options.Url = None, api_key: options.ApiKey = None) -> None:
    """Forget a token."""
    with options.connect(url, api_key) as client:
        client.remove_token(kind)
    say(f"The token for sources of the kind {kind} is forgotten.")


@tokens.command("key")
def make_key() -> None:
    """Print a new key for EDGEKILN_TOKEN_KEYS."""
    from service.sealing import make_sealing_key

    print(make_sealing_key())


@tokens.command("reseal")
def reseal_tokens(data_dir: options.DataDir = None, as_json: options.AsJson = False) -> None:
    """Seal every stored token with the first of EDGEKILN_TOKEN_KEYS; the others are not needed any more then.

    A token that none of the keys opens is named and left as it is, and the command ends with 1.
    """
    from service.ledger import tokens as ledger_tokens
    from service.sealing import Seal

    seal = Seal(options.read_settings(data_dir=data_dir).token_keys)
    with open_ledger(data_dir) as ledger:
        count, lost = ledger_tokens.reseal_tokens(ledger, seal)
    if as_json:
        print_json({"resealed": count, "lost": lost})
    else:
        say(f"{count} token{'' if count == 1 else 's'} sealed with the first key.")
    for each in lost:
        say(
            f"The token of the tenant {each['tenant']} for sources of the kind {each['kind']} opens with none of the "
            "keys. Add the key that it was sealed with, or let the tenant set the token again."
        )
    if lost:
        raise typer.Exit(1)
