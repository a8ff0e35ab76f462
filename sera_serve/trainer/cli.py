"""The command line of `train_adapter`. Its flags are the fields of `TrainSettings`."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from pydantic.fields import FieldInfo
from rich.console import Console

from adapters_store import StoreError
from sera_serve.errors import InvalidConfiguration, SeraServeError
from sera_serve.trainer.settings import RUN, WHAT, TrainSettings, flag, load_options

# Types of flags whose fields have a wider type.
_FLAG_TYPES: dict[str, Any] = {"target_modules": str, "train_factors": str}


def main() -> None:
    """Run the console script."""
    app = typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False)
    app.command()(_command())
    app()


def _command() -> Any:
    """Build the command function, with one parameter for each field of `TrainSettings`."""

    def command(**options: Any) -> None:
        config, as_json = options.pop("config"), options.pop("json")
        try:
            settings = load_options(config, options)
        except InvalidConfiguration as error:
            _fail(error.message, 2)
        run(settings, as_json=as_json)

    command.__doc__ = """Train a SeRA adapter on a frozen base and publish it to a store.

    Example: `train_adapter --base embedded --store store --name acme/spam --task classify --train spam.csv
    --text-column text --label-column label`

    After a kill, the same command continues from the last checkpoint.
    """
    parameters = [_parameter(name, field) for name, field in TrainSettings.model_fields.items()]
    parameters += [
        _keyword(
            "config",
            Annotated[
                Path | None,
                typer.Option(
                    help="YAML file with the same options (underscores); flags win over the file.", rich_help_panel=WHAT
                ),
            ],
            None,
        ),
        _keyword(
            "json",
            Annotated[
                bool,
                typer.Option("--json", help="Last line of stdout: the result as one JSON object.", rich_help_panel=RUN),
            ],
            False,
        ),
    ]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    extra = field.json_schema_extra
    assert isinstance(extra, dict)
    kind: Any = _FLAG_TYPES.get(name, field.annotation)
    is_switch = kind is bool
    # The default is None here, which means that the flag was not given. TrainSettings has the real default.
    if field.is_required():
        default = " **Required.**"
    else:
        default = "" if field.default is None or is_switch else f" Default: {field.default}."
    option = typer.Option(
        f"{flag(name)}/{flag('no-' + name)}" if is_switch else flag(name),
        help=f"{field.description}{default}",
        rich_help_panel=str(extra["group"]),
        show_default=False,
    )
    return _keyword(name, Annotated[kind | None, option], None)


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def run(settings: TrainSettings, *, as_json: bool) -> None:
    """Train, and print the result on stdout. Progress goes to stderr."""
    # These imports are slow, and --help does not need them.
    from transformers.utils.logging import disable_progress_bar

    from sera_serve.trainer.run import TrainResult, train_adapter

    # A small base loads at once, so a progress bar would only clutter the terminal.
    disable_progress_bar()
    progress = Console(stderr=True)
    try:
        result: TrainResult = train_adapter(settings, console=progress)
    except (SeraServeError, StoreError) as error:
        _fail(error.message, 1)
    except OSError as error:
        _fail(f"{error.filename or settings.store}: {error.strerror}", 1)
    except KeyboardInterrupt:
        _fail("stopped; the same command continues from the last checkpoint", 130)
    if as_json:
        typer.echo(json.dumps(result.as_json()))
    else:
        _summarise(settings, result)


def _summarise(settings: TrainSettings, result: Any) -> None:
    lines = {
        "store": result.store,
        "digest": result.digest,
        "parameters": f"{result.parameters:,} in the adapter, {result.head_parameters:,} in the head",
        **{name: f"{value:.4f}" for name, value in result.metrics.items()},
        "train seconds": f"{result.train_seconds:.1f}",
    }
    Console(highlight=False).print(f"[bold]{result.adapter}[/bold] version {result.version} is published")
    for name, text in lines.items():
        typer.echo(f"  {name:<15}{text}")
    typer.echo("Serve it:")
    path = "classify" if settings.task == "classify" else "generate"
    body: dict[str, Any] = {"adapter": result.adapter}
    body |= {"inputs": ["some text"]} if settings.task == "classify" else {"prompt": "some text"}
    typer.echo(f"  sera-serve serve --base {settings.base} --store {settings.store}")
    typer.echo(f"  curl http://localhost:8000/v1/{path} -H 'Content-Type: application/json' -d '{json.dumps(body)}'")


def _fail(message: str, status: int) -> NoReturn:
    typer.echo(f"train_adapter: {message}", err=True)
    raise typer.Exit(status)
