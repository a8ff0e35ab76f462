"""The project's own HTTP interface: /v1/generate, /v1/classify and /v1/adapters."""

from sera_serve.server.native import adapters, inference, lora_paths

ROUTERS = (inference.router, adapters.router, lora_paths.router)

__all__ = ["ROUTERS"]
