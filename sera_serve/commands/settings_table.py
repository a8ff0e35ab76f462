"""Writes docs/settings.md and docs/training/options.md: `python -m sera_serve.commands.settings_table`.

Tests hold the files and the code together. The tables are made of `ServeSettings` and `TrainSettings` alone: a
description is written once, and shown by `sera-serve serve --help` and `train_adapter --help` too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from sera_serve.config import RELOADED, ServeSettings
from sera_serve.trainer.settings import TrainSettings, group_of
from sera_serve.trainer.task_options import TASK_OPTIONS

_NAMES: dict[Any, str] = {
    bool: "true or false",
    int: "integer",
    float: "number",
    str: "text",
    Path: "path",
    dict: "mapping",
    list: "list",
    tuple: "names, comma-separated",
}
_SIGNS = {Ge: ("ge", "≥"), Gt: ("gt", ">"), Le: ("le", "≤"), Lt: ("lt", "<")}
_INTRODUCTION = """# Settings

`make settings` writes this file; change `sera_serve/config.py` instead.

Each setting is a flag of `sera-serve serve` (`--pool-mib 512`), a variable (`SERA_SERVE_POOL_MIB=512`), or a line of
the YAML file given with `--config` (`pool_mib: 512`). What is true or false has two flags: `--access-log` and
`--no-access-log`. A flag wins over a variable, and a variable over the file. A name that is not here is refused,
wherever it stands. Kubernetes makes such variables in each pod for a Service named `sera-serve`: set
`enableServiceLinks: false` in the pod's spec. An empty `watch` or `lora_path_root` is none. `sera-serve check-config`
reads them all as `serve` does, and says where each value comes from.

A running server reads the settings marked ↻ again when it gets SIGHUP; see [operators.md](operators.md).

| setting | default | values | meaning |
| --- | --- | --- | --- |
"""

_OPTIONS_INTRODUCTION = """# Options of train_adapter

`make settings` writes this file; change `sera_serve/trainer/settings.py` instead.

Each option is a flag (`--batch-size 32`) or a line of the YAML file given with `--config` (`batch_size: 32`). A flag
wins over the file. A name that is not here is refused. `train_adapter init FILE --task TASK` writes a YAML file with
the options of one task. `tasks` names the tasks that an option belongs to, where it does not belong to all.
"""
_OPTIONS_HEAD = "| option | default | values | tasks | meaning |\n| --- | --- | --- | --- | --- |\n"


def options_document() -> str:
    """Return the text of docs/training/options.md."""
    groups: dict[str, list[str]] = {}
    own = {name for names in TASK_OPTIONS.values() for name in names}
    for name, field in TrainSettings.model_fields.items():
        tasks = ", ".join(task for task, names in TASK_OPTIONS.items() if name in names) if name in own else "all"
        default = "required" if field.is_required() else _default(field)
        meaning = (field.description or "").replace("|", "\\|")
        row = f"| `{name}` | {default} | {_values(field)} | {tasks} | {meaning} |"
        groups.setdefault(group_of(field), []).append(row)
    tables = [f"\n## {group}\n\n{_OPTIONS_HEAD}" + "\n".join(rows) + "\n" for group, rows in groups.items()]
    return _OPTIONS_INTRODUCTION + "".join(tables)


def settings_document() -> str:
    """Return the text of docs/settings.md."""
    rows = []
    for name, field in ServeSettings.model_fields.items():
        shown = f"`{name}`" + (" ↻" if name in RELOADED else "")
        rows.append(f"| {shown} | {_default(field)} | {_values(field)} | {field.description} |")
    return _INTRODUCTION + "\n".join(rows) + "\n"


def main() -> None:
    """Write the files below the current directory."""
    Path("docs/settings.md").write_text(settings_document(), encoding="utf-8")
    Path("docs/training/options.md").write_text(options_document(), encoding="utf-8")


def _default(field: FieldInfo) -> str:
    default = field.get_default()
    if default is None or default in ({}, []):
        return "none"
    shown = str(default).lower() if isinstance(default, bool) else str(default)
    return f"`{shown}`".replace("|", "\\|")


def _values(field: FieldInfo) -> str:
    """The kind of the values, and their bounds."""
    # `str | tuple[...]` is a name, or several.
    kinds = [kind for kind in _members(field.annotation) if kind is not type(None)]
    kind = next((kind for kind in kinds if get_origin(kind) is tuple), kinds[0])
    if get_origin(kind) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(kind))
    # `metadata` also has the markers of pydantic-settings.
    bounds = [
        f"{sign} {getattr(bound, attribute):.15g}"
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
