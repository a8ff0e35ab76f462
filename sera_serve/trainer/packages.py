"""What training needs beside the server's own dependencies. This file imports none of it, so a server can ask first."""

from __future__ import annotations

from importlib.util import find_spec

from sera_serve.errors import InvalidConfiguration

# Module by package, of those packages of the extra `train` without which no run begins.
_MODULES = {"accelerate": "accelerate", "datasets": "datasets", "scikit-learn": "sklearn", "scipy": "scipy"}


def missing_packages() -> list[str]:
    """Return the packages that training needs and that are not installed, by their names in a registry."""
    return [package for package, module in _MODULES.items() if find_spec(module) is None]


def check_packages() -> None:
    """Check that the extra `train` is installed.

    Raises:
        InvalidConfiguration: It is not; the message names the packages and the remedy.
    """
    if missing := missing_packages():
        verb = "is" if len(missing) == 1 else "are"
        raise InvalidConfiguration(
            f"training needs packages that are not installed here ({', '.join(missing)} {verb} missing): "
            "pip install 'sera-serve[train]'"
        )
