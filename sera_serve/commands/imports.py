"""What `sera-serve adapters import` reads: a path or a hub id, a bundle or a PEFT checkpoint; and its compression."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from adapters_store import (
    AdapterBundle,
    BundleLimits,
    InvalidBundle,
    PeftFiles,
    check_base,
    compress_bundle,
    peft_from_path,
)
from sera_serve.errors import InvalidConfiguration

if TYPE_CHECKING:
    from sera_serve.base import FrozenBase

# A layer's update then points within 6 degrees of the original's, and keeps 99.5% of its length.
MAX_ERROR = 0.1
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
# What an import reads. Others, such as optimizer states, may be larger than the base.
_HUB_FILES = ("adapter_config.json", "adapter_model.safetensors", "added_tokens.json", "config.json")
_HUB_TEMPLATES = ("chat_template.jinja", "tokenizer_config.json")
_COMPRESS = re.compile(r"split=([1-9]\d{0,6})(?:,rank=([1-9]\d{0,6}))?", re.ASCII)


def read_adapter(source: str, base: str | None) -> tuple[AdapterBundle, tuple[str, ...]]:
    """Read a bundle or a PEFT checkpoint, and tell by its content what it is.

    Args:
        source: A path; or, where no path of that name exists, a hub id.
        base: The base, as of `load_base`. A PEFT checkpoint needs it; a bundle is checked against it.

    Returns:
        The bundle, and what an import had to say.

    Raises:
        InvalidBundle, SeraServeError: It is refused.
    """
    path = source
    if not os.path.lexists(source):
        if not HUB_ID.fullmatch(source):
            raise InvalidConfiguration(
                f"{source} is not a regular file, a directory or a hub id such as owner/name", param="source"
            )
        path = _downloaded(source)
    limits = BundleLimits()
    files = peft_from_path(path, limits)
    if files is not None:
        return _imported(files, base)
    bundle = AdapterBundle.load(path, limits)
    if base is not None:
        from sera_serve.base import check_length, check_task
        from sera_serve.residency.bundle_check import check_ranks

        loaded = load_named_base(base)
        check_base(bundle.config, loaded.info, loaded.module_shapes())
        # As every server of this base does.
        check_ranks(bundle.config)
        check_task(bundle.config, loaded)
        check_length(bundle.config, loaded)
    return bundle, ()


def load_named_base(base: str) -> FrozenBase:
    """Load the base of an option `--base`. transformers shows its progress bar only on a terminal."""
    # transformers takes seconds to import, and most commands do not need it.
    from transformers.utils.logging import disable_progress_bar

    from sera_serve.base import load_base

    if not sys.stderr.isatty():
        disable_progress_bar()
    return load_base(base)


def parse_compress(text: str) -> tuple[int, int | None]:
    """Read `split=K` or `split=K,rank=R`; raises InvalidConfiguration."""
    found = _COMPRESS.fullmatch(text)
    if found is None:
        raise InvalidConfiguration(f"--compress is {text!r}; write split=4 or split=4,rank=16", param="compress")
    return int(found[1]), None if found[2] is None else int(found[2])


def compress_and_show(
    bundle: AdapterBundle, split: int, rank: int | None, max_error: float, console: Console
) -> AdapterBundle:
    """Compress an adapter, with a progress bar and a table of the layers' errors.

    Raises:
        TooLossy, UnsupportedAdapter: See `compress_bundle`. The table is shown all the same.
    """
    table = Table("layer", "rank", "relative error")
    errors: list[float] = []

    def on_layer(path: str, layer_rank: int, error: float) -> None:
        errors.append(error)
        table.add_row(path, str(layer_rank), f"{error:.4f}")
        bar.advance(task)

    try:
        with Progress(console=console, transient=True) as bar:
            task = bar.add_task("compressing", total=len(bundle.config.modules))
            smaller = compress_bundle(bundle, split, rank, max_error, on_layer)
    finally:
        if errors:
            console.print(table)
    before, after = bundle.config.parameters, smaller.config.parameters
    console.print(f"{before:,} parameters became {after:,}; largest relative error {max(errors):.4f}")
    return smaller


def _imported(files: PeftFiles, base: str | None) -> tuple[AdapterBundle, tuple[str, ...]]:
    if base is None:
        named = files.config.get("base_model_name_or_path")
        raise InvalidConfiguration(
            f"this is a PEFT checkpoint; give --base, the base that it was trained on (it names {named!r})",
            param="base",
        )
    from sera_serve.base import import_base
    from sera_serve.residency.import_probe import import_checkpoint

    loaded = load_named_base(base)
    imported = import_checkpoint(files, import_base(loaded), loaded.dtype)
    return imported.bundle, imported.warnings


def _downloaded(hub_id: str) -> str:
    """A local folder with the files of a hub's repository that an import reads."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    names = (*_HUB_FILES, *_HUB_TEMPLATES)
    try:
        folder: str = snapshot_download(hub_id, allow_patterns=list(names))
        # A pattern matches at any depth: the folders of a training run may hold many checkpoints that nothing reads.
        if not (Path(folder) / _HUB_FILES[0]).is_file():
            folder = snapshot_download(hub_id, allow_patterns=[f"*/{name}" for name in names])
    # Not every text of the form owner/name is an id: `a--b/c` is none.
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise InvalidConfiguration(
            f"{hub_id} is neither a path nor a repository of the hub that you may read", param="source"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InvalidConfiguration(
            f"{hub_id} is no path here, and could not be downloaded ({reason}); download it with "
            f"'hf download {hub_id}' where there is a network, and name its folder",
            param="source",
        ) from error
    if not any(Path(folder).rglob("adapter_config.json")):
        raise InvalidBundle(f"{hub_id} has no adapter_config.json; name a repository with an adapter", param="source")
    return folder
