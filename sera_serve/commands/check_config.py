"""`sera-serve check-config`: reads the settings as `serve` does, and says where each value comes from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sera_serve.config import ServeSettings, load_settings, setting_sources
from sera_serve.server import check_settings


def check_config(config: Path | None, flags: Mapping[str, Any]) -> list[str]:
    """Check the settings without starting anything, and return a line for each: name, value and source.

    Raises:
        InvalidConfiguration: As `serve` raises it.
    """
    settings = load_settings(config, flags)
    check_settings(settings)
    sources = setting_sources(config, flags)
    values = {name: json.dumps(value) for name, value in settings.model_dump(mode="json").items()}
    width = max(map(len, values))
    widest = min(40, max(map(len, values.values())))
    return [f"{name:<{width}}  {values[name]:<{widest}}  {sources[name]}" for name in ServeSettings.model_fields]
