"""The command line of `train_adapter`. Its flags are the fields of `TrainSettings`."""

from __future__ import annotations

import inspect
import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from typer.core import TyperCommand, TyperGroup

from adapters_store import StoreError
from sera_serve.errors import InvalidConfiguration, SeraServeError
from sera_serve.terminal import PlainConsole, fail
from sera_serve.trainer.compare.command import compare_command
from sera_serve.trainer.init_file import settings_yaml, write_settings
from sera_serve.trainer.option_text import flag
from sera_serve.trainer.packages import check_packages
from sera_serve.trainer.pattern_options import PATTERN_OPTIONS
from sera_serve.trainer.settings import RUN, WHAT, TrainSettings, group_of, load_options
from sera_serve.trainer.task_options import Task

# Types of flags whose fields have a wider type.
_FLAG_TYPES: dict[str, Any] = dict.fromkeys(("target_modules", "train_factors", *PATTERN_OPTIONS), str)
_WIDEST_CHOICE = 20
_GOES_ON = "the same command continues from the last checkpoint"


def main() -> None:
    """Run the console script."""
    # A table would cut the long names of options in a terminal of 80 columns.
    app = typer.Typer(cls=_Group, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.callback(invoke_without_command=True)(_with_flags(_train))
    app.command("compare")(compare_command)
    app.command("init", cls=_Command)(_with_flags(_init))
    app()


class _Command(TyperCommand):
    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options in their groups."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if (record := parameter.get_help_record(ctx)) is not None:
                own = getattr(parameter, "rich_help_panel", None) or f"{parameter.param_type_name}s".capitalize()
                groups.setdefault(own, []).append(record)
        for name, records in groups.items():
            with formatter.section(name):
                formatter.write_dl(records)


class _Group(TyperGroup):
    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options in their groups, and the commands."""
        _Command.format_options(self, ctx, formatter)  # type: ignore[arg-type]
        self.format_commands(ctx, formatter)


def _with_flags(command: Any) -> Any:
    """Give a command a flag for each field of `TrainSettings`, in place of its `options`.

    They come before the command's own keyword-only parameters. A field that is a parameter of its own is left out.
    """
    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.kind is not p.VAR_KEYWORD]
    names = {parameter.name for parameter in own}
    last = [parameter for parameter in own if parameter.kind is parameter.KEYWORD_ONLY]
    first = [parameter for parameter in own if parameter not in last]
    fields = [_parameter(name, field) for name, field in TrainSettings.model_fields.items() if name not in names]
    parameters = [*first, *fields, *last]
    command.__signature__ = inspect.Signature(parameters)
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _train(
    ctx: typer.Context,
    *,
    config: Annotated[
        Path | None,
        typer.Option(
            help="YAML file with the same options (underscores); flags win over the file.", rich_help_panel=WHAT
        ),
    ] = None,
    jobs: Annotated[
        Path | None,
        typer.Option(
            help="YAML plan of several adapters to train at once over one base: `defaults`, and a list `jobs` of "
            "options; flags win over the file.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Last line of stdout: the result as one JSON object.", rich_help_panel=RUN)
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Read and check the rows, and tell parameters, memory and time; train and publish nothing.",
            rich_help_panel=RUN,
        ),
    ] = False,
    **options: Any,
) -> None:
    """Train a SeRA adapter on a frozen base and publish it to a store.

    Example: `train_adapter --base embedded --store store --name acme/spam --task classify --train spam.csv
    --text-column text --label-column label`

    `--dry-run` tells first what the run will need. After a kill, the same command continues from the last checkpoint.
    """
    if ctx.invoked_subcommand is not None:
        own = {"config": config, "jobs": jobs, "json": as_json, "dry_run": dry_run}
        if given := [name for name, value in {**options, **own}.items() if value not in (None, False)]:
            fail(
                "train_adapter",
                f"{flag(given[0])} belongs to a training run; put the options of {ctx.invoked_subcommand} after it",
                2,
            )
        return
    try:
        check_packages()
        if jobs is None:
            settings = load_options(config, options)
    except InvalidConfiguration as error:
        fail("train_adapter", error.message, 2)
    if jobs is None:
        run(settings, as_json=as_json, dry=dry_run)
    elif dry_run:
        fail("train_adapter", "--dry-run looks at one run; give the options of one job in place of --jobs", 2)
    else:
        _run_jobs(jobs, config, options, as_json=as_json)


def _init(
    file: Annotated[
        Path, typer.Argument(help="The file to write, which must not exist; - writes to stdout.", show_default=False)
    ],
    task: Annotated[
        Task,
        typer.Option("--task", help="The task to write the options of.", show_default=False, rich_help_panel=WHAT),
    ],
    **options: Any,
) -> None:
    """Write a YAML file with every option of a task, its help and its default.

    Example: `train_adapter init spam.yaml --task classify`. Flags that are given become lines of the file.
    """
    try:
        text = settings_yaml(task, options)
        if str(file) == "-":
            typer.echo(text, nl=False)
            return
        write_settings(file, text)
    except InvalidConfiguration as error:
        fail("train_adapter", error.message, 2)
    typer.echo(f"wrote {file}; edit it, and train with: train_adapter --config {shlex.quote(str(file))}")


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    kind: Any = _FLAG_TYPES.get(name, field.annotation)
    is_switch = kind is bool
    # The default is None here, which means that the flag was not given. TrainSettings has the real default.
    if field.is_required():
        default = " Required."
    else:
        default = "" if field.default is None or is_switch else f" Default: {field.default}."
    values = _long_choice(kind)
    option = typer.Option(
        f"{flag(name)}/{flag('no-' + name)}" if is_switch else flag(name),
        help=f"{field.description}{f' One of {values}.' if values else ''}{default}",
        metavar="<choice>" if values else None,
        rich_help_panel=group_of(field),
        show_default=False,
    )
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def _long_choice(kind: Any) -> str:
    """The values of a choice too long for the column of types, which would leave no room for names and help."""
    members = [kind, *get_args(kind)]
    values = next((get_args(member) for member in members if get_origin(member) is Literal), ())
    text = ", ".join(map(str, values))
    return text if len(text) > _WIDEST_CHOICE else ""


def run(settings: TrainSettings, *, as_json: bool, dry: bool = False) -> None:
    """Train, or with `dry` tell what training would need, and print the result on stdout. Progress goes to stderr."""
    # These imports are slow, and --help does not need them.
    from transformers.utils.logging import disable_progress_bar

    from sera_serve.trainer.dry_run import DryRun, dry_run
    from sera_serve.trainer.dry_run_report import show_dry_run
    from sera_serve.trainer.parallel import end_process, join_processes
    from sera_serve.trainer.run import TrainResult, train_adapter

    # A small base loads at once, so a progress bar would only clutter the terminal.
    disable_progress_bar()
    progress = PlainConsole(stderr=True)
    with _told(settings.store, "nothing was written" if dry else _GOES_ON):
        result: TrainResult | DryRun = (dry_run if dry else train_adapter)(settings, console=progress)
    processes = join_processes(settings.device)
    if processes.is_main:
        if as_json:
            typer.echo(json.dumps(asdict(result)))
        elif isinstance(result, DryRun):
            show_dry_run(result, PlainConsole(highlight=False))
        else:
            _summarise(settings, result)
    end_process(processes)


def _run_jobs(path: Path, config: Path | None, flags: dict[str, Any], *, as_json: bool) -> None:
    """Train the jobs of a plan, and print one line for each on stdout; the exit status is 1 if one failed."""
    from transformers.utils.logging import disable_progress_bar

    from sera_serve.trainer.together.jobs import train_jobs
    from sera_serve.trainer.together.plan import load_plan

    if config is not None:
        fail("train_adapter", "--jobs excludes --config; put the options of all jobs under `defaults` of the plan", 2)
    try:
        plan = load_plan(path, flags)
    except InvalidConfiguration as error:
        fail("train_adapter", error.message, 2)
    disable_progress_bar()
    with _told(plan.jobs[0].store):
        results = train_jobs(plan, console=PlainConsole(stderr=True))
    failed = [result for result in results if result.result is None]
    if as_json:
        typer.echo(json.dumps({"jobs": [result.as_json() for result in results], "failed": len(failed)}))
    else:
        for result in results:
            found = result.result or {}
            scores = "  ".join(f"{name} {value:.4f}" for name, value in found.get("metrics", {}).items())
            typer.echo(f"{result.name}  {result.status}  " + (f"version {found['version']}  {scores}" if found else ""))
    if failed:
        reasons = "; ".join(f"{result.name}: {(result.error or {}).get('message')}" for result in failed)
        fail("train_adapter", f"{len(failed)} of {len(results)} jobs failed: {reasons}", 1)


@contextmanager
def _told(store: Path, stopped: str = _GOES_ON) -> Iterator[None]:
    """End the command with a message where the work in the block fails, or is interrupted: then `stopped`."""
    try:
        yield
    except (SeraServeError, StoreError) as error:
        fail("train_adapter", error.message, 1)
    except OSError as error:
        fail("train_adapter", f"{error.filename or store}: {error.strerror or error}", 1)
    except KeyboardInterrupt:
        fail("train_adapter", f"stopped; {stopped}", 130)


def _summarise(settings: TrainSettings, result: Any) -> None:
    lines = {
        "store": result.store,
        "digest": result.digest,
        "parameters": f"{result.parameters:,} in the adapter, {result.head_parameters:,} in the head",
        **{name: f"{value:.4f}" for name, value in result.metrics.items()},
        "train seconds": f"{result.train_seconds:.1f}",
    }
    PlainConsole(highlight=False).print(f"{result.adapter} version {result.version} is published", style="bold")
    width = max(map(len, lines))
    for name, text in lines.items():
        typer.echo(f"  {name:<{width}}  {text}")
    typer.echo("Serve it:")
    quantized = "" if settings.quantize == "none" else f" --quantize {settings.quantize}"
    base, store = shlex.quote(settings.base), shlex.quote(str(settings.store))
    typer.echo(f"  sera-serve serve --base {base}{quantized} --store {store}")
    # A server that needs no key does not read the header.
    typer.echo("Ask it, with a key in SERA_KEY where the server needs keys:")
    typer.echo(f'  curl -H "Authorization: Bearer $SERA_KEY" http://localhost:8000/v1/{_request(settings, result)}')


def _request(settings: TrainSettings, result: Any) -> str:
    """The rest of a curl command that asks the adapter."""
    adapter = result.adapter
    if settings.task == "image-classify":
        return f"classify -F adapter={adapter} -F image=@photo.jpg"
    example: Any = {"text": "some text", "text_pair": "another"} if settings.text_pair_column else "some text"
    chat = {"model": adapter, "messages": [{"role": "user", "content": "some text"}]}
    path, body = {
        "generate": ("chat/completions", chat)
        if result.is_chat
        else ("generate", {"adapter": adapter, "prompt": "some text"}),
        "retrieve": ("embeddings", {"model": adapter, "input": ["some text"]}),
    }.get(settings.task, ("classify", {"adapter": adapter, "inputs": [example]}))
    return f"{path} -H 'Content-Type: application/json' -d '{json.dumps(body)}'"


if __name__ == "__main__":
    main()
