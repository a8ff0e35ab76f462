"""`train_adapter init`: a YAML file of the options of one task, with their help, that `--config` reads."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from sera_serve.errors import InvalidConfiguration
from sera_serve.trainer.settings import TrainSettings, group_of, load_options
from sera_serve.trainer.task_options import Task, options_of_others

_WIDTH = 100
# What a run cannot do without, until the user writes his own.
_EXAMPLES: dict[str, Any] = {"base": "embedded", "store": "store", "name": "acme/first", "train": "train.csv"}


def settings_yaml(task: Task, given: Mapping[str, Any]) -> str:
    """Write the options of a task as YAML. `load_options` reads the text back to the settings of `given`.

    Required options and those of `given` are lines of their own. The others are comments with their defaults: an option
    that is not given takes the default of its method or of its base.

    Args:
        task: The task. Options of other tasks are left out.
        given: Values by name of the field; None means that the option was not given.

    Raises:
        InvalidConfiguration: The values do not fit each other.
    """
    values = {"task": task, **_EXAMPLES, **{name: value for name, value in given.items() if value is not None}}
    settings = load_options(None, values)
    foreign = options_of_others(task)
    lines = [
        f"# Options of a training run, task {task}. Train with: train_adapter --config FILE",
        "# A line that begins with '#' and a name is an option at its default: remove the '# ' to change the value.",
    ]
    group = None
    for name, field in TrainSettings.model_fields.items():
        if name in foreign:
            continue
        if (own := group_of(field)) != group:
            group = own
            lines += ["", f"# ---- {group} ----"]
        lines += ["", *_comment(field)]
        # Not the field's default: that of `target_modules` depends on the task.
        line = _line(name, getattr(settings, name))
        lines.append(line if name in values else f"# {line}")
    return "\n".join(lines) + "\n"


def write_settings(path: Path, text: str) -> None:
    """Write the file.

    Raises:
        InvalidConfiguration: It exists, or cannot be written.
    """
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise InvalidConfiguration(f"{path} exists; name another file, or remove it", param="file") from error
    except OSError as error:
        raise InvalidConfiguration(f"{path} cannot be written: {error.strerror}", param="file") from error


def _comment(field: FieldInfo) -> list[str]:
    return textwrap.wrap(str(field.description), _WIDTH, initial_indent="# ", subsequent_indent="# ")


def _line(name: str, value: Any) -> str:
    text: str = yaml.safe_dump(to_jsonable_python(value), default_flow_style=True, width=10**6, allow_unicode=True)
    # A scalar is a document of its own, with its end mark.
    return f"{name}: {text.strip().removesuffix('...').strip()}"
