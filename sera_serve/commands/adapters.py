"""`sera-serve adapters`: look at a store, and move adapters into and out of it."""

from __future__ import annotations

import dataclasses
import os
import shutil
import stat
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from pydantic import JsonValue
from rich.table import Table

from adapters_store import (
    HEAD_FILE,
    AdapterBundle,
    AdapterNotFound,
    AdapterStore,
    Published,
    export_peft,
    load_combination,
    parse_adapter,
    write_head,
)
from adapters_store.card import run_card
from sera_serve.access import AccessDatabase, Action, Shares
from sera_serve.commands.imports import MAX_ERROR, compress_and_show, load_named_base, parse_compress, read_adapter
from sera_serve.commands.output import (
    JsonOption,
    StoreOption,
    console,
    one_line,
    print_json,
    record,
    refusals,
    report,
)
from sera_serve.errors import InvalidConfiguration
from sera_serve.terminal import facts_table, say, show_table

adapters_app = typer.Typer(
    help="List, inspect, import, combine, export, delete, alias and share adapters.", no_args_is_help=True
)

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
    with refusals():
        infos = list(AdapterStore(store, create=False).iter_adapters(tenant))
        if as_json:
            print_json({"adapters": [dataclasses.asdict(info) for info in infos]})
            return
        table = Table("adapter", "version", "task", "method", "base", "parameters", "bytes", "published", "aliases")
        for info in infos:
            table.add_row(
                info.adapter,
                f"v{info.version}",
                info.task,
                info.method,
                one_line(info.base),
                f"{info.parameters:,}",
                f"{info.nbytes:,}",
                info.created_at,
                ", ".join(f"{alias}=v{version}" for alias, version in info.aliases.items()),
            )
        if infos:
            show_table(console(), table)
        else:
            whose = "" if tenant is None else f" of tenant {tenant}"
            say(f"{store} holds no adapters{whose}; import one, or train one")


@adapters_app.command()
def inspect(ref: RefArgument, store: StoreOption, as_json: JsonOption = False) -> None:
    """Show one version in full: identity, base, layers, training record, and the tenants that share the adapter."""
    with refusals():
        opened = AdapterStore(store, create=False)
        info = opened.inspect(ref)
        config = opened.config(info.digest)
        shared = Shares(AccessDatabase(opened.root)).of(info.adapter)
        if as_json:
            print_json({**dataclasses.asdict(info), "shared_with": shared, "config": config.model_dump(mode="json")})
            return
        facts = facts_table()
        for key, value in dataclasses.asdict(info).items():
            facts.add_row(key, one_line(value))
        facts.add_row("shared_with", ", ".join(shared) or "nobody")
        facts.add_row("base.architecture", one_line(config.base.architecture))
        facts.add_row("base.weights_digest", config.base.weights_digest)
        for key in ("pooling", "max_length", "multi_label"):
            if value := getattr(config, key):
                facts.add_row(key, one_line(value))
        for title, text in run_card(config).items():
            facts.add_row(f"training: {title}", text)
        if config.head is not None:
            facts.add_row("head", one_line(config.head.model_dump()))
        if config.image is not None:
            facts.add_row("image", one_line(config.image.model_dump()))
        layers = Table(box=None, padding=(0, 1, 0, 0))
        layers.add_column("layer", overflow="fold")
        for name in ("d_in", "d_out", "rank", "split", "mixer", "scaling", "vectors", "parameters"):
            layers.add_column(name, no_wrap=True)
        for path, spec in config.modules.items():
            sizes = (spec.d_in, spec.d_out, spec.rank, spec.split)
            mixer = "yes" if spec.use_mixer else "no"
            vectors = ", ".join(["gain"] * spec.has_gain + ["offset"] * spec.has_offset) or "none"
            layers.add_row(path, *map(str, sizes), mixer, f"{spec.scaling:g}", vectors, f"{spec.parameters:,}")
        console().print(facts, layers)


@adapters_app.command("import")
def import_adapter(
    context: typer.Context,
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
    """Check a bundle or a PEFT checkpoint, and publish it as a new version.

    Example: sera-serve adapters import my-lora --base embedded --store store --name acme/mine
    """
    source_of_error = context.get_parameter_source("max_error")
    if compress is None and source_of_error is not None and source_of_error.name != "DEFAULT":
        raise typer.BadParameter("only --compress reads it; give --compress, or leave it out", param_hint="--max-error")
    if not max_error >= 0:
        raise typer.BadParameter(f"it is {max_error:g}; give a number from 0 to 1", param_hint="--max-error")
    with refusals():
        parse_adapter(name)
        shape = None if compress is None else parse_compress(compress)
        bundle, warnings = read_adapter(source, base)
        for warning in warnings:
            say(f"sera-serve: {warning}", err=True)
        if shape is not None:
            bundle = compress_and_show(bundle, *shape, max_error, console(stderr=True))
        published = _publish(AdapterStore(store), bundle, name)
        fields = {**dataclasses.asdict(published), "warnings": list(warnings)}
        report(as_json, f"published {name} v{published.version}", **fields)


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
    """Publish the exact weighted sum of adapters as an adapter of its own.

    Example: sera-serve adapters combine acme/formal=0.7 acme/brief@v2=0.3 --name acme/house --store store
    """
    with refusals():
        opened = AdapterStore(store, create=False)
        weighted = [_weighted(part) for part in parts]
        resolved = [opened.resolve(reference) for reference, _ in weighted]
        weights = [weight for _, weight in weighted]
        names = [f"{part.adapter}@v{part.version}" for part in resolved]
        said: list[JsonValue] = [
            {"adapter": named, "digest": part.digest, "weight": weight}
            for named, part, weight in zip(names, resolved, weights, strict=True)
        ]
        digests = [part.digest for part in resolved]
        bundle = load_combination(opened, list(zip(digests, weights, strict=True)), names, {"combination": said})
        published = _publish(opened, bundle, name)
        text = f"published {name} v{published.version}, the sum of {len(parts)} adapters"
        report(as_json, text, **dataclasses.asdict(published))


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
    card: Annotated[
        Path | None,
        typer.Option(help="Also write a model card in Hugging Face's form; outside a bundle.", show_default=False),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write one version outside the store.

    Example: sera-serve adapters export acme/mine --store store --format peft --output mine
    """
    if (format is ExportFormat.merged) != (base is not None):
        raise typer.BadParameter("--format merged needs --base, and no other format takes it", param_hint="--base")
    with refusals():
        opened = AdapterStore(store, create=False)
        _check_new(output, "output", opened)
        if card is not None:
            _check_new(card, "card", opened)
            _check_card(card, output, format)
        resolved = opened.resolve(ref)
        bundle = opened.load(resolved.digest)
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            beside = _write(bundle, output, format, base)
            if card is not None:
                # Not the name of a file of the export, either.
                _check_new(card, "card", opened)
        except BaseException:
            # Half of an export would pass for one, and stop the next attempt.
            _remove(output)
            raise
        if beside:
            typer.echo(
                f"sera-serve: this format has no place for the classifier's head; it is in {output}/{HEAD_FILE}",
                err=True,
            )
        if format is ExportFormat.peft and len({spec.scaling for spec in bundle.config.modules.values()}) > 1:
            typer.echo(
                "sera-serve: the layers differ in scaling, which PEFT reads as alpha_pattern; vLLM scales all layers "
                "alike: give it --format merged",
                err=True,
            )
        if card is not None:
            # huggingface_hub takes a while to import, and only a card needs it.
            from sera_serve.commands.model_card import model_card

            card.parent.mkdir(parents=True, exist_ok=True)
            model_card(resolved.adapter, resolved.version, resolved.digest, bundle.config).save(card)
        report(
            as_json,
            f"wrote {resolved.adapter} v{resolved.version} as {format} to {output}",
            adapter=resolved.adapter,
            version=resolved.version,
            digest=resolved.digest,
            format=str(format),
            output=str(output),
            **({} if card is None else {"card": str(card)}),
        )


@adapters_app.command()
def delete(ref: RefArgument, store: StoreOption, as_json: JsonOption = False) -> None:
    """Delete an adapter (tenant/name), or one version of it (tenant/name@v3)."""
    with refusals():
        opened = AdapterStore(store, create=False)
        name = ref.partition("@")[0]
        shares = Shares(AccessDatabase(opened.root))
        try:
            freed = opened.delete(ref)
        except AdapterNotFound:
            # An earlier deletion may have been stopped before the end of its shares.
            if ref == name:
                shares.remove_all(name)
            raise
        _audit(opened, "adapter.delete", ref)
        if freed.adapter_gone:
            shares.remove_all(name)
        report(
            as_json,
            f"deleted {ref}; {freed.nbytes:,} bytes freed",
            deleted=ref,
            bundles_freed=freed.bundles,
            bytes_freed=freed.nbytes,
        )


@adapters_app.command("collect-garbage")
def collect_garbage(store: StoreOption, as_json: JsonOption = False) -> None:
    """Remove what killed writers left behind, and repair the store's indexes; `delete` needs no collection."""
    with refusals():
        freed = AdapterStore(store, create=False).collect_garbage()
        report(
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
    """Point an alias to a version; requests that name the alias follow at once.

    Example: sera-serve adapters alias acme/mine@v3 stable --store store
    """
    with refusals():
        opened = AdapterStore(store, create=False)
        name = ref.partition("@")[0]
        if remove:
            opened.remove_alias(ref, alias)
            _audit(opened, "alias.remove", name, alias=alias)
        else:
            version = opened.set_alias(name, alias, ref)
            _audit(opened, "alias.set", name, alias=alias, version=version)
        # What was asked for is done, whatever else is damaged.
        aliases, damaged = opened.aliases(name)
        for damage in damaged:
            say(f"sera-serve: {damage.message}", err=True)
        shown = ", ".join(f"{held}=v{version}" for held, version in aliases.items())
        report(as_json, f"{name}: {shown}", adapter=name, aliases=aliases)


@adapters_app.command()
def share(
    adapter: Annotated[str, typer.Argument(help="tenant/name; all of its versions.", show_default=False)],
    store: StoreOption,
    tenant: Annotated[str, typer.Option("--with", help="A tenant, or * for every tenant.", show_default=False)],
    remove: Annotated[bool, typer.Option("--remove", help="End the share instead.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Let another tenant use an adapter; it can list and call the adapter, and change nothing.

    Example: sera-serve adapters share acme/mine --with globex --store store
    """
    with refusals():
        parse_adapter(adapter)
        opened = AdapterStore(store, create=False)
        shares = Shares(AccessDatabase(opened.root))
        if not remove:
            opened.resolve(adapter)
            shares.add(adapter, tenant)
        elif not shares.remove(adapter, tenant):
            raise InvalidConfiguration(f"{adapter} is not shared with {tenant}; see adapters inspect", param="with")
        _audit(opened, "share.remove" if remove else "share.add", adapter, **{"with": tenant})
        shared = shares.of(adapter)
        report(as_json, f"{adapter}: {', '.join(shared) or 'shared with nobody'}", adapter=adapter, shared_with=shared)


def _check_new(path: Path, param: str, store: AdapterStore) -> None:
    if os.path.lexists(path):
        raise InvalidConfiguration(f"{path} exists; name a path that does not", param=param)
    if path.resolve().is_relative_to(store.root.resolve()):
        raise InvalidConfiguration(
            f"{path} is inside the store, which would take it for its own; name a path outside", param=param
        )


def _remove(output: Path) -> None:
    if output.is_dir():
        shutil.rmtree(output, ignore_errors=True)
    else:
        output.unlink(missing_ok=True)


def _check_card(card: Path, output: Path, format: ExportFormat) -> None:
    if format is ExportFormat.sera and card.absolute().is_relative_to(output.absolute()):
        raise InvalidConfiguration(
            f"{card} is inside the bundle, where an import allows no other file; write it beside {output}", param="card"
        )


def _publish(store: AdapterStore, bundle: AdapterBundle, name: str) -> Published:
    if store.has_content(name, bundle.digest) is None:
        # A kill may have come between the deletion of an older adapter of this name and the end of its shares.
        Shares(AccessDatabase(store.root)).remove_all(name)
    published = store.publish(bundle, name)
    _audit(store, "adapter.publish", name, version=published.version, digest=published.digest)
    return published


def _audit(store: AdapterStore, action: Action, target: str, **details: str | int) -> None:
    record(store.root, action, tenant=target.partition("/")[0], target=target, **details)


def _write(bundle: AdapterBundle, output: Path, format: ExportFormat, base: str | None) -> bool:
    """Write the export; True if a head was written beside a model that has no place for it."""
    if base is not None:
        # transformers takes seconds to import, and only this format needs it.
        from sera_serve.base import merge_adapter, save_image_spec

        loaded = load_named_base(base)
        merge_adapter(loaded, bundle)
        loaded.model.save_pretrained(output)
        # safetensors leaves them to this account alone.
        mode = stat.S_IMODE((output / "config.json").stat().st_mode)
        for weights in output.glob("*.safetensors"):
            weights.chmod(mode)
        if loaded.reads_text:
            if bundle.config.chat_template is not None:
                loaded.tokenizer.chat_template = bundle.config.chat_template
            loaded.tokenizer.save_pretrained(output)
        if (image := bundle.config.image or loaded.image_spec) is not None:
            save_image_spec(image, loaded.model.config.model_type, output)
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
