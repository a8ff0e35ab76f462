"""Options as people write them: flags and YAML files, and what is said of options that cannot be."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sera_serve.errors import InvalidConfiguration
from sera_serve.strict_yaml import NotYaml, load_yaml


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


def read_yaml(path: Path, option: str, param: str) -> Any:
    """Read a YAML file of plain values.

    Args:
        path: The file.
        option: What messages call it, such as `--config`.
        param: The option of a refusal.

    Raises:
        InvalidConfiguration: It cannot be read, or is no YAML.
    """
    try:
        return load_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidConfiguration(f"{option} {path} cannot be read: {error}", param=param) from error
    except NotYaml as error:
        where = " ".join(str(error).split())
        raise InvalidConfiguration(f"{option} {path} is not valid YAML: {where}", param=param) from error


def check_options(value: Any, where: str, param: str, known: Collection[str]) -> dict[str, Any]:
    """Return the options that a YAML file has at one place.

    Raises:
        InvalidConfiguration: The value is no mapping, or has an option that is not one of `known`.
    """
    if not isinstance(value, dict):
        raise InvalidConfiguration(f"{where} must hold `option: value` lines", param=param)
    for key in value:
        if key not in known:
            near = difflib.get_close_matches(str(key).replace("-", "_"), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the options are {', '.join(known)}"
            raise InvalidConfiguration(f"{where}: unknown option {key!r}; {hint}", param=str(key))
    return value
