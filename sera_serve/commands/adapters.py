"""`sera-serve adapters`: look at a store, and move adapters into and out of it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import JsonValue
from rich.console import Console
from rich.table import Table

from adapters_store import (
    HEAD_FILE,
    AdapterBundle,
    AdapterStore,
    StoreError,
    export_peft,
    load_combination,
    parse_adapter,
    write_head,
)
from sera_serve.commands.imports import MAX_ERROR, compress_and_show, parse_compress, read_adapter
from sera_serve.errors import InvalidConfiguration, SeraServeError

adapters_app = typer.Typer(
    help="List, inspect, import, combine, export, delete and alias adapters.", no_args_is_help=True
)

StoreOption = Annotated[Path, typer.Option("--store", help="Directory of the adapter store.", show_default=False)]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
RefArgument = Annotated[
    str,
    typer.Argument(help="tenant/name, or tenant/name@alias, @v3, @<digest>.", show_default=False),
]


class ExportFormat(StrEnum):
    """What `export` writes."""

    sera = "sera"
    peft = "peft"
    merged = "merged"


@adapters_app.command("list")
def list_adapters(
    store: StoreOption,
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show the latest version of every adapter."""
    with _refusals():
        infos = list(AdapterStore(store, create=False).iter_adapters(tenant))
        if as_json:
            _print_json({"adapters": [dataclasses.asdict(info) for info in infos]})
            return
        table = Table("adapter", "version", "task", "method", "base", "parameters", "bytes", "published", "aliases")
        for info in infos:
            table.add_row(
                info.adapter,
                f"v{info.version}",
                info.task,
                info.method,
                info.base,
                f"{info.parameters:,}",
                f"{info.nbytes:,}",
                info.created_at,
                ", ".join(f"{alias}=v{version}" for alias, version in info.aliases.items()),
            )
        _console().print(table if infos else f"{store} holds no adapters; import one, or train one")


@adapters_app.command()
def inspect(ref: RefArgument, store: StoreOption, as_json: JsonOption = False) -> None:
    """Show one version in full: identity, base, layers and training record."""
    with _refusals():
        opened = AdapterStore(store, create=False)
        info = opened.inspect(ref)
        config = opened.config(info.digest)
        if as_json:
            _print_json({**dataclasses.asdict(info), "config": config.model_dump(mode="json")})
            return
        facts = Table(show_header=False, box=None)
        for key, value in dataclasses.asdict(info).items():
            facts.add_row(key, _one_line(value))
        facts.add_row("base.architecture", config.base.architecture)
        facts.add_row("base.weights_digest", config.base.weights_digest)
        for key in ("pooling", "max_length", "training"):
            if value := getattr(config, key):
                facts.add_row(key, _one_line(value))
        if config.head is not None:
            facts.add_row("head", _one_line(config.head.model_dump()))
        layers = Table("layer", "d_in", "d_out", "rank", "split", "mixer", "scaling", "vectors", "parameters")
        for path, spec in config.modules.items():
            sizes = (spec.d_in, spec.d_out, spec.rank, spec.split)
            mixer = "yes" if spec.use_mixer else "no"
            vectors = ", ".join(["gain"] * spec.has_gain + ["offset"] * spec.has_offset) or "none"
            layers.add_row(path, *map(str, sizes), mixer, f"{spec.scaling:g}", vectors, f"{spec.parameters:,}")
        _console().print(facts, layers)


@adapters_app.command("import")
def import_adapter(
    source: Annotated[
        str,
        typer.Argument(
            help="A bundle or a PEFT checkpoint: directory, .safetensors, .tar or .zip; or a hub id, where no path of "
            "that name exists.",
            show_default=False,
        ),
    ],
    name: Annotated[str, typer.Option(help="tenant/name to publish it under.", show_default=False)],
    store: StoreOption,
    base: Annotated[
        str | None, typer.Option(help='The base it was trained on; a PEFT checkpoint needs it. As "serve --base".')
    ] = None,
    compress: Annotated[
        str | None,
        typer.Option(help="split=K or split=K,rank=R: publish the nearest SeRA instead.", show_default=False),
    ] = None,
    max_error: Annotated[
        float, typer.Option(help="With --compress: largest relative error of a layer's update that is accepted.")
    ] = MAX_ERROR,
    as_json: JsonOption = False,
) -> None:
    """Check a bundle or a PEFT checkpoint, and publish it as a new version."""
    with _refusals():
        parse_adapter(name)
        shape = None if compress is None else parse_compress(compress)
        bundle, warnings = read_adapter(source, base)
        for warning in warnings:
            typer.echo(f"sera-serve: {warning}", err=True)
        if shape is not None:
            bundle = compress_and_show(bundle, *shape, max_error, Console(stderr=True))
        published = AdapterStore(store).publish(bundle, name)
        fields = {**dataclasses.asdict(published), "warnings": list(warnings)}
        _report(as_json, f"published {name} v{published.version}", **fields)


@adapters_app.command()
def combine(
    parts: Annotated[
        list[str],
        typer.Argument(
            help="tenant/name=weight of each part; the reference may carry @alias, @v3.", show_default=False
        ),
    ],
    name: Annotated[str, typer.Option(help="tenant/name to publish the sum under.", show_default=False)],
    store: StoreOption,
    as_json: JsonOption = False,
) -> None:
    """Publish the exact weighted sum of adapters as an adapter of its own."""
    with _refusals():
        opened = AdapterStore(store, create=False)
        weighted = [_weighted(part) for part in parts]
        resolved = [opened.resolve(reference) for reference, _ in weighted]
        weights = [weight for _, weight in weighted]
        names = [f"{part.adapter}@v{part.version}" for part in resolved]
        record: list[JsonValue] = [
            {"adapter": named, "digest": part.digest, "weight": weight}
            for named, part, weight in zip(names, resolved, weights, strict=True)
        ]
        digests = [part.digest for part in resolved]
        bundle = load_combination(opened, list(zip(digests, weights, strict=True)), names, {"combination": record})
        published = opened.publish(bundle, name)
        text = f"published {name} v{published.version}, the sum of {len(parts)} adapters"
        _report(as_json, text, **dataclasses.asdict(published))


@adapters_app.command()
def export(
    ref: RefArgument,
    output: Annotated[Path, typer.Option(help="Path to write; must not exist.", show_default=False)],
    store: StoreOption,
    format: Annotated[
        ExportFormat,
        typer.Option(
            help="sera: our bundle, one file if the path ends in .safetensors. peft: a LoRA checkpoint. "
            "merged: the base with the adapter in its weights."
        ),
    ] = ExportFormat.sera,
    base: Annotated[str | None, typer.Option(help="Base model, for --format merged.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Write one version outside the store."""
    if (format is ExportFormat.merged) != (base is not None):
        raise typer.BadParameter("--format merged needs --base, and no other format takes it", param_hint="--base")
    with _refusals():
        opened = AdapterStore(store, create=False)
        if output.exists():
            raise InvalidConfiguration(f"{output} exists; name a path that does not", param="output")
        resolved = opened.resolve(ref)
        bundle = opened.load(resolved.digest)
        output.parent.mkdir(parents=True, exist_ok=True)
        if _write(bundle, output, format, base):
            typer.echo(
                f"sera-serve: this format has no place for the classifier's head; it is in {output}/{HEAD_FILE}",
                err=True,
            )
        _report(
            as_json,
            f"wrote {resolved.adapter} v{resolved.version} as {format} to {output}",
            adapter=resolved.adapter,
            version=resolved.version,
            digest=resolved.digest,
            format=str(format),
            output=str(output),
        )


@adapters_app.command()
def delete(ref: RefArgument, store: StoreOption, as_json: JsonOption = False) -> None:
    """Delete an adapter (tenant/name), or one version of it (tenant/name@v3)."""
    with _refusals():
        opened = AdapterStore(store, create=False)
        freed = opened.delete(ref)
        _report(
            as_json,
            f"deleted {ref}; {freed.nbytes:,} bytes freed",
            deleted=ref,
            bundles_freed=freed.bundles,
            bytes_freed=freed.nbytes,
        )


@adapters_app.command("collect-garbage")
def collect_garbage(store: StoreOption, as_json: JsonOption = False) -> None:
    """Remove what killed writers left behind, and repair the store's indexes; `delete` needs no collection."""
    with _refusals():
        freed = AdapterStore(store, create=False).collect_garbage()
        _report(
            as_json,
            f"{freed.bundles} bundles removed; {freed.nbytes:,} bytes freed",
            bundles_freed=freed.bundles,
            bytes_freed=freed.nbytes,
        )


@adapters_app.command()
def alias(
    ref: RefArgument,
    alias: Annotated[str, typer.Argument(help="The alias, such as stable.", show_default=False)],
    store: StoreOption,
    remove: Annotated[bool, typer.Option("--remove", help="Remove the alias of tenant/name instead.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Point an alias to a version; requests that name the alias follow at once."""
    with _refusals():
        opened = AdapterStore(store, create=False)
        name = ref.partition("@")[0]
        if remove:
            opened.remove_alias(ref, alias)
        else:
            opened.set_alias(name, alias, ref)
        aliases = opened.aliases(name)
        shown = ", ".join(f"{held}=v{version}" for held, version in aliases.items())
        _report(as_json, f"{name}: {shown}", adapter=name, aliases=aliases)


def _write(bundle: AdapterBundle, output: Path, format: ExportFormat, base: str | None) -> bool:
    """Write the export; True if a head was written beside a model that has no place for it."""
    if base is not None:
        # transformers takes seconds to import, and only this format needs it.
        from sera_serve.base import load_base, merge_adapter

        loaded = load_base(base)
        merge_adapter(loaded, bundle)
        loaded.model.save_pretrained(output)
        loaded.tokenizer.save_pretrained(output)
        return write_head(bundle, output)
    if format is ExportFormat.peft:
        return export_peft(bundle, output)
    if output.suffix == ".safetensors":
        bundle.save_file(output)
    else:
        bundle.save(output)
    return False


def _weighted(part: str) -> tuple[str, float]:
    """The reference and the weight of `tenant/name=weight`."""
    reference, equals, weight = part.rpartition("=")
    try:
        return reference, float(weight if equals else "")
    except ValueError:
        raise InvalidConfiguration(
            f"{part!r} is not a part of a sum; write tenant/name=weight, such as acme/support=0.5", param="parts"
        ) from None


@contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except (StoreError, SeraServeError) as error:
        typer.echo(f"sera-serve: {error.message}", err=True)
        raise typer.Exit(1) from error
    except OSError as error:
        typer.echo(f"sera-serve: {error.strerror or error} ({error.filename})", err=True)
        raise typer.Exit(1) from error


def _report(as_json: bool, text: str, **fields: Any) -> None:
    if as_json:
        _print_json(fields)
    else:
        typer.echo(text)


def _print_json(value: dict[str, Any]) -> None:
    typer.echo(json.dumps(value, ensure_ascii=False))


def _one_line(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _console() -> Console:
    console = Console()
    # A pipe has no width to fold to; cut ids would be of no use to the next program.
    return console if console.is_terminal else Console(width=200)
