"""The command line of `sera-serve`."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from typer.core import TyperCommand

from adapters_store import StoreError
from sera_serve import __version__
from sera_serve.commands.adapters import adapters_app
from sera_serve.commands.analyze import analyze_command
from sera_serve.commands.doctor import doctor_command
from sera_serve.commands.keys import keys_app
from sera_serve.commands.quotas import quotas_app
from sera_serve.commands.reload import hangup_noted
from sera_serve.config import ServeSettings, load_settings, load_with_sources
from sera_serve.errors import InvalidConfiguration, SeraServeError
from sera_serve.terminal import fail


def main() -> None:
    """Run the console script."""
    build_cli()()


def build_cli() -> typer.Typer:
    """Build the command-line application."""
    app = typer.Typer(
        help="Serve thousands of small SeRA adapters on one frozen base model.",
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
    )
    app.callback()(_common)
    app.command("serve", cls=_PlainHelp)(
        _with_settings(_serve, "Serve a frozen base model and the adapters of a store over HTTP.")
    )
    app.command("check-config", cls=_PlainHelp)(
        _with_settings(_check_config, "Check the settings as `serve` does, and print each with its source.")
    )
    app.command("doctor")(doctor_command)
    app.command("analyze")(analyze_command)
    app.add_typer(adapters_app, name="adapters")
    app.add_typer(keys_app, name="keys")
    app.add_typer(quotas_app, name="quotas")
    return app


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"sera-serve {__version__}")
        raise typer.Exit


_VersionOption = Annotated[
    bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
]


def _common(version: _VersionOption = False) -> None:
    """Take what no single command takes."""


class _PlainHelp(TyperCommand):
    """A command whose `--help` is no table: one would cut the long names of settings in a terminal of 80 columns."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **(options | {"rich_markup_mode": None}))


def _with_settings(run: Callable[[Path | None, dict[str, Any]], None], text: str) -> Any:
    """Build the function behind a command, with one option for each field of `ServeSettings`, and `--config`."""

    def command(config: Path | None, **flags: Any) -> None:
        try:
            run(config, flags)
        except InvalidConfiguration as error:
            fail("sera-serve", error.message, 2)

    command.__doc__ = text
    config = typer.Option(help="YAML file of settings by name; flags and SERA_SERVE_* variables win over the file.")
    parameters = [_keyword("config", Annotated[Path | None, config])]
    parameters += [_parameter(name, field) for name, field in ServeSettings.model_fields.items()]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _serve(config: Path | None, flags: dict[str, Any]) -> None:
    with hangup_noted() as hangup:
        settings = load_settings(config, flags)
        # transformers takes seconds to import, and --help does not need it.
        from sera_serve.commands.serve import run_server

        try:
            run_server(settings, partial(load_settings, config, flags), hangup.is_set)
        except (SeraServeError, StoreError) as error:
            fail("sera-serve", error.message, 1)


def _check_config(config: Path | None, flags: dict[str, Any]) -> None:
    settings, sources = load_with_sources(config, flags)
    # It takes seconds to import.
    from sera_serve.server import check_settings

    check_settings(settings)
    values = {name: json.dumps(value) for name, value in settings.model_dump(mode="json").items()}
    width = max(map(len, values))
    widest = min(40, max(map(len, values.values())))
    for name, value in values.items():
        typer.echo(f"{name:<{width}}  {value:<{widest}}  {sources[name]}")


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    # The default is None here, which means that the flag was not given. ServeSettings has the real default.
    # Not in brackets, which the help takes as markup and leaves out. Values are written as a settings file has them.
    value = field.default
    shown = str(value).lower() if isinstance(value, bool) else str(value)
    default = "" if value is None or value in ([], {}) else f". Default: {shown}"
    flag = name.replace("_", "-")
    # A switch needs a way to turn it off, too.
    flags = f"--{flag}/--no-{flag}" if field.annotation is bool else f"--{flag}"
    # A path stays text until it is checked: an empty one would become the current directory.
    is_path = Path in (field.annotation, *get_args(field.annotation))
    option = typer.Option(
        flags,
        help=f"{field.description}{default}",
        show_default=False,
        metavar="<path>" if is_path else None,
    )
    # The command line writes a mapping as "key=value,key=value".
    kind: Any = str if is_path or get_origin(field.annotation) is dict else field.annotation
    return _keyword(name, Annotated[kind | None, option])


def _keyword(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


if __name__ == "__main__":
    main()
