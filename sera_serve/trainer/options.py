"""Filling in `TrainSettings` from a YAML file and flags, with errors a person can act on."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from sera_serve.errors import InvalidConfiguration
from sera_serve.trainer.settings import TrainSettings, flag


def load_options(config: Path | None, flags: Mapping[str, Any]) -> TrainSettings:
    """Settings from a YAML file, overridden by the flags that were given.

    Args:
        config: File with the same keys as the flags, with underscores; or None.
        flags: Values by field name; None means not given.

    Raises:
        InvalidConfiguration: The file cannot be read, or an option is unknown, missing or has an impossible value.
    """
    options = _read_yaml(config) if config is not None else {}
    options.update({name: value for name, value in flags.items() if value is not None})
    try:
        return TrainSettings.model_validate(options)
    except ValidationError as error:
        raise InvalidConfiguration(_readable(error), param=_param(error)) from error


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidConfiguration(f"--config {path} cannot be read: {error}", param="config") from error
    except yaml.YAMLError as error:
        where = " ".join(str(error).split())
        raise InvalidConfiguration(f"--config {path} is not valid YAML: {where}", param="config") from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InvalidConfiguration(f"--config {path} must hold `option: value` lines", param="config")
    known = TrainSettings.model_fields
    for key in value:
        if key not in known:
            near = difflib.get_close_matches(str(key).replace("-", "_"), known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; the options are {', '.join(known)}"
            raise InvalidConfiguration(f"--config {path}: unknown option {key!r}{hint}", param=str(key))
    return value


def _param(error: ValidationError) -> str | None:
    location = error.errors(include_url=False)[0]["loc"]
    return str(location[0]) if location else None


def _readable(error: ValidationError) -> str:
    missing = [flag(str(e["loc"][0])) for e in error.errors() if e["type"] == "missing"]
    parts = [f"missing {', '.join(missing)}; give it as a flag or in --config"] if missing else []
    for item in error.errors(include_url=False):
        if item["type"] == "missing":
            continue
        text = item["msg"].removeprefix("Value error, ")
        text = text[0].lower() + text[1:] if text.startswith("Input") else text
        where = f"{flag(str(item['loc'][0]))} {item['input']!r}: " if item["loc"] else ""
        parts.append(where + text)
    return "; ".join(dict.fromkeys(parts))
