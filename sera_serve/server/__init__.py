"""The HTTP interface: an app factory over an engine and a store."""

from sera_serve.server.app import build_app, check_settings

__all__ = ["build_app", "check_settings"]
