"""`sera-serve check-config`: reads the settings as `serve` does, and says where each value comes from."""

from __future__ import annotations

import json
from collections.abc import Mapping

from sera_serve.config import ServeSettings
from sera_serve.server import check_settings


def check_config(settings: ServeSettings, sources: Mapping[str, str]) -> list[str]:
    """Check the settings without starting anything, and return a line for each: name, value and source.

    Args:
        settings: All of them.
        sources: By setting, where its value is from.

    Raises:
        InvalidConfiguration: The settings do not fit each other, as `serve` raises it.
    """
    check_settings(settings)
    values = {name: json.dumps(value) for name, value in settings.model_dump(mode="json").items()}
    width = max(map(len, values))
    widest = min(40, max(map(len, values.values())))
    return [f"{name:<{width}}  {values[name]:<{widest}}  {sources[name]}" for name in ServeSettings.model_fields]
