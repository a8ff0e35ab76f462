"""`sera-serve quotas`: what each tenant may hold and use."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.table import Table

from adapters_store import AdapterStore
from sera_serve.access import DEFAULT, QUOTA_FIELDS, Limit, Quotas, check_quota_tenant, checked_limit
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

quotas_app = typer.Typer(
    help="Set, show and clear the limits of tenants.\n\n"
    "The tenant * is every tenant without limits of its own; _base is requests to the base model without a key. "
    f"Limits: {', '.join(QUOTA_FIELDS)}. Limits that are set here come before those of the server's settings file. "
    "Running servers follow within a second.",
    no_args_is_help=True,
)

TenantOption = Annotated[str, typer.Option(help="Tenant, or * for every tenant without limits of its own.")]
_NONE = "none"


@quotas_app.command("set")
def set_limits(
    limits: Annotated[
        list[str],
        typer.Argument(help="Such as requests_per_minute=600 or max_priority=normal; none is no limit."),
    ],
    store: StoreOption,
    tenant: TenantOption,
    as_json: JsonOption = False,
) -> None:
    """Set limits of a tenant; the others stay as they are.

    Example: sera-serve quotas set --store store --tenant acme requests_per_minute=600 bytes=1073741824
    """
    with refusals():
        check_quota_tenant(tenant)
        asked: dict[str, Limit] = {}
        for field, limit in map(_limit, limits):
            if field in asked:
                raise InvalidConfiguration(f"{field} is given twice; give it once", param=field)
            asked[field] = limit
        Quotas(access_of(store, create=True)).set(tenant, asked)
        record(store, "quota.set", tenant=tenant, target=tenant, **asked)
        if as_json:
            print_json({"tenant": tenant, "set": asked})
            return
        for field, value in asked.items():
            typer.echo(f"{tenant}: {field} is {_NONE if value is None else value}")


@quotas_app.command()
def show(
    store: StoreOption,
    tenant: Annotated[str | None, typer.Option(help="Only this tenant, with what it holds.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show the limits that were set here; those of a server's settings file are not among them."""
    with refusals():
        quotas = Quotas(access_of(store))
        if tenant is not None:
            check_quota_tenant(tenant)
        names = quotas.tenants() if tenant is None else [tenant]
        found: list[dict[str, Any]] = []
        for name in names:
            shown: dict[str, Any] = {"tenant": name, "limits": asdict(quotas.of(name))}
            if tenant is not None and name != DEFAULT and not name.startswith("_"):
                held = AdapterStore(store, create=False).held(name)
                shown["usage"] = {"adapters": held.adapters, "bytes": held.nbytes}
            found.append(shown)
        if as_json:
            print_json({"quotas": found})
            return
        table = Table("tenant", *QUOTA_FIELDS)
        for each in found:
            table.add_row(each["tenant"], *(_cell(value) for value in each["limits"].values()))
        if found:
            show_table(console(), table)
        else:
            say(f"{store} has no quotas; set them with sera-serve quotas set")
        for each in found:
            if usage := each.get("usage"):
                typer.echo(f"{each['tenant']} holds {usage['adapters']:,} adapters of {usage['bytes']:,} bytes")


@quotas_app.command()
def clear(store: StoreOption, tenant: TenantOption, as_json: JsonOption = False) -> None:
    """Take back all limits that were set here for a tenant; those of the settings file and of * hold again."""
    with refusals():
        cleared = Quotas(access_of(store)).clear(tenant)
        if cleared:
            record(store, "quota.clear", tenant=tenant, target=tenant)
        text = f"cleared the limits of {tenant}" if cleared else f"{tenant} had no limits here"
        report(as_json, text, tenant=tenant, cleared=cleared)


def _limit(text: str) -> tuple[str, Limit]:
    field, equals, value = text.partition("=")
    if not equals:
        raise InvalidConfiguration(f"{text[:64]!r} is no limit; write one such as requests_per_minute=600", param=field)
    limit: Limit = value
    if value == _NONE:
        limit = None
    elif value.isascii() and value.isdecimal() and len(value) < 20:
        limit = int(value)
    return field, checked_limit(field, limit)


def _cell(value: Limit) -> str:
    if value is None:
        return _NONE
    return f"{value:,}" if isinstance(value, int) else value
