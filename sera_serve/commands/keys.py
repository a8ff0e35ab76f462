"""`sera-serve keys`: keys of tenants."""

from __future__ import annotations

import re
from typing import Annotated

import typer
from rich.table import Table

from sera_serve.access import SCOPES, Keys
from sera_serve.commands.output import (
    JsonOption,
    StoreOption,
    access_of,
    console,
    print_json,
    record,
    refusals,
    report,
)
from sera_serve.errors import InvalidConfiguration
from sera_serve.terminal import say, show_table

keys_app = typer.Typer(
    help="Create, list and revoke the keys that requests carry.\n\n"
    "A key acts for one tenant. A server on a loopback address asks for keys as soon as one was made. Any other server "
    "always does. Scopes: infer (send requests), publish (change the tenant's adapters), train (files and jobs), admin "
    "(operate the server: every tenant's adapters, keys, quotas, metrics).",
    no_args_is_help=True,
)

_LIFETIME = re.compile(r"([1-9][0-9]{0,8})([mhd])", re.ASCII)
_SECONDS = {"m": 60, "h": 3600, "d": 86400}


@keys_app.command()
def create(
    store: StoreOption,
    tenant: Annotated[str, typer.Option(help="Tenant that the key acts for.", show_default=False)],
    scopes: Annotated[str, typer.Option(help=f"Some of {', '.join(SCOPES)}; commas between them.")] = "infer",
    expires: Annotated[
        str | None, typer.Option(help="Lifetime, such as 30m, 12h or 90d; by default the key does not expire.")
    ] = None,
    name: Annotated[str, typer.Option(help="A name for people.")] = "",
    as_json: JsonOption = False,
) -> None:
    """Make a key, and show its secret: once, for the store keeps only a hash.

    Example: sera-serve keys create --store store --tenant acme --scopes infer,publish --expires 90d
    """
    with refusals():
        lifetime_s = None if expires is None else _lifetime(expires)
        asked = [scope.strip() for scope in scopes.split(",") if scope.strip()]
        # Keys may be the first thing that a new store gets.
        created = Keys(access_of(store, create=True)).create(tenant, asked, name=name, lifetime_s=lifetime_s)
        record(store, "key.create", tenant=tenant, target=created.key.id, scopes=",".join(sorted(created.key.scopes)))
        if as_json:
            print_json({**created.key.described(), "secret": created.secret})
            return
        shown = console()
        shown.print(f"key {created.key.id} of tenant {tenant}: {', '.join(sorted(created.key.scopes))}")
        shown.print("Its secret is shown this once. Requests carry it in the header Authorization:", style="dim")
        # A wrapped secret could not be pasted.
        shown.print(created.secret, highlight=False, soft_wrap=True)


@keys_app.command("list")
def list_keys(
    store: StoreOption,
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show the keys, oldest first, revoked and expired ones too; never a secret."""
    with refusals():
        found = Keys(access_of(store)).all(tenant)
        if as_json:
            print_json({"keys": [key.described() for key in found]})
            return
        table = Table("id", "tenant", "scopes", "name", "created", "expires", "status")
        for key in found:
            fields = key.described()
            table.add_row(
                key.id,
                key.tenant,
                ", ".join(fields["scopes"]),
                key.name,
                fields["created_at"],
                fields["expires_at"] or "never",
                key.status,
            )
        if found:
            show_table(console(), table)
        else:
            whose = "" if tenant is None else f" of tenant {tenant}"
            say(f"{store} has no keys{whose}; make one with sera-serve keys create")


@keys_app.command()
def revoke(
    key: Annotated[str, typer.Argument(help="The key's id, as keys list shows it.", show_default=False)],
    store: StoreOption,
    tenant: Annotated[str | None, typer.Option(help="Refuse to revoke another tenant's key.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Refuse a key from now on; running servers follow within a quarter of a second."""
    with refusals():
        revoked = Keys(access_of(store)).revoke(key, tenant)
        record(store, "key.revoke", tenant=revoked.tenant, target=revoked.id)
        report(as_json, f"revoked {revoked.id} of tenant {revoked.tenant}", **revoked.described())


def _lifetime(text: str) -> int:
    match = _LIFETIME.fullmatch(text)
    if match is None:
        raise InvalidConfiguration(
            f"--expires is {text[:64]!r}; write a lifetime such as 30m, 12h or 90d", param="expires"
        )
    return int(match[1]) * _SECONDS[match[2]]
