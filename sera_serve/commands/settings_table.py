"""Writes docs/settings.md: `python -m sera_serve.commands.settings_table`. A test holds the file and the code together.

The table is made of `ServeSettings` alone: a description is written once, and shown by `sera-serve serve --help` too.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from sera_serve.config import RELOADED, ServeSettings

_PATH = Path("docs") / "settings.md"
_NAMES: dict[Any, str] = {
    bool: "true or false",
    int: "integer",
    float: "number",
    str: "text",
    Path: "path",
    dict: "mapping",
    list: "list",
}
_SIGNS = {Ge: ("ge", "≥"), Gt: ("gt", ">"), Le: ("le", "≤"), Lt: ("lt", "<")}
_INTRODUCTION = """# Settings

`make settings` writes this file; change `sera_serve/config.py` instead.

Each setting is a flag of `sera-serve serve` (`--pool-mib 512`), a variable (`SERA_SERVE_POOL_MIB=512`), or a line of
the YAML file given with `--config` (`pool_mib: 512`). A flag wins over a variable, and a variable over the file. A name
that is not here is refused, wherever it stands. `sera-serve check-config` reads them all as `serve` does, and says
where each value comes from.

A running server reads the settings marked ↻ again when it gets SIGHUP; see [operators.md](operators.md).

| setting | default | values | meaning |
| --- | --- | --- | --- |
"""


def settings_document() -> str:
    """Return the text of docs/settings.md."""
    rows = []
    for name, field in ServeSettings.model_fields.items():
        shown = f"`{name}`" + (" ↻" if name in RELOADED else "")
        rows.append(f"| {shown} | {_default(field)} | {_values(field)} | {field.description} |")
    return _INTRODUCTION + "\n".join(rows) + "\n"


def main() -> None:
    """Write the file, below the current directory or at the path given."""
    parser = argparse.ArgumentParser(description="Write the table of settings.")
    parser.add_argument("--output", type=Path, default=_PATH)
    parser.parse_args().output.write_text(settings_document(), encoding="utf-8")


def _default(field: FieldInfo) -> str:
    default = field.get_default()
    if default is None or default in ({}, []):
        return "none"
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"


def _values(field: FieldInfo) -> str:
    """The kind of the values, and their bounds."""
    kind = next(kind for kind in _members(field.annotation) if kind is not type(None))
    if get_origin(kind) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(kind))
    # `metadata` also has the markers of pydantic-settings.
    bounds = [
        f"{sign} {getattr(bound, attribute):g}"
        for bound in field.metadata
        for marker, (attribute, sign) in _SIGNS.items()
        if isinstance(bound, marker)
    ]
    return " ".join([_NAMES[get_origin(kind) or kind], ", ".join(bounds)]).strip()


def _members(annotation: Any) -> tuple[Any, ...]:
    # X | None is a types.UnionType.
    return get_args(annotation) if get_origin(annotation) in (Union, type(int | None)) else (annotation,)


if __name__ == "__main__":
    main()
