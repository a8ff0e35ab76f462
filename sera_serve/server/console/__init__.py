"""The console: one page at `/console`, for a person with a key. Its data come from the API, with that key."""

from sera_serve.server.console.pages import router

__all__ = ["router"]
