"""Options as people write them: flags and YAML files, and what is said of options that cannot be."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from sera_serve.errors import InvalidConfiguration
from sera_serve.strict_yaml import load_yaml


def flag(field: str) -> str:
    """Return the command line's spelling of a field."""
    return "--" + field.replace("_", "-")


def param_of(error: ValidationError) -> str | None:
    """Return the field of the first fault, or None if it is of no single field."""
    location = error.errors(include_url=False)[0]["loc"]
    return str(location[0]) if location else None


def readable(error: ValidationError) -> str:
    """Say every fault in one line, by the flag that it is of."""
    missing = [flag(str(e["loc"][0])) for e in error.errors() if e["type"] == "missing"]
    parts = [f"missing {', '.join(missing)}; give it as a flag or in --config"] if missing else []
    for item in error.errors(include_url=False):
        if item["type"] == "missing":
            continue
        text = item["msg"].removeprefix("Value error, ")
        text = text[0].lower() + text[1:] if text.startswith("Input") else text
        given = str(item["input"]) if isinstance(item["input"], Path) else repr(item["input"])
        where = f"{flag(str(item['loc'][0]))} {given}: " if item["loc"] else ""
        parts.append(where + text)
    return "; ".join(dict.fromkeys(parts))


def read_yaml(path: Path, known: Collection[str]) -> dict[str, Any]:
    """Read the options of a YAML file.

    Raises:
        InvalidConfiguration: It cannot be read, or has an option that is not one of `known`.
    """
    try:
        value = load_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidConfiguration(f"--config {path} cannot be read: {error}", param="config") from error
    except yaml.YAMLError as error:
        where = " ".join(str(error).split())
        raise InvalidConfiguration(f"--config {path} is not valid YAML: {where}", param="config") from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InvalidConfiguration(f"--config {path} must hold `option: value` lines", param="config")
    for key in value:
        if key not in known:
            near = difflib.get_close_matches(str(key).replace("-", "_"), known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; the options are {', '.join(known)}"
            raise InvalidConfiguration(f"--config {path}: unknown option {key!r}{hint}", param=str(key))
    return value
