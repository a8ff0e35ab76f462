"""The project's own HTTP interface: /v1/generate, /v1/classify, /v1/adapters, /v1/keys and /v1/quotas."""

from sera_serve.server.native import adapters, image_form, inference, keys, lora_paths, quotas, shares, versions

ROUTERS = (
    # Before the route of the same path that reads JSON.
    image_form.router,
    inference.router,
    adapters.router,
    versions.router,
    shares.router,
    lora_paths.router,
    keys.router,
    quotas.router,
)

__all__ = ["ROUTERS"]
