"""What a key must be allowed to do for each route. A route that is not listed needs `admin`."""

from __future__ import annotations

from typing import Literal

from sera_serve.access import Scope

Needed = Scope | Literal["key", "nothing"]
"""`key`: any key. `nothing`: no key."""

# By method and route.
_NEEDED: dict[tuple[str, str], Needed] = {
    ("POST", "/v1/generate"): "infer",
    ("POST", "/v1/classify"): "infer",
    ("POST", "/v1/completions"): "infer",
    ("POST", "/v1/chat/completions"): "infer",
    ("POST", "/v1/responses"): "infer",
    ("POST", "/v1/embeddings"): "infer",
    ("POST", "/tokenize"): "infer",
    ("POST", "/detokenize"): "infer",
    ("GET", "/v1/models"): "key",
    ("GET", "/v1/models/{model:path}"): "key",
    ("DELETE", "/v1/models/{model:path}"): "publish",
    ("GET", "/v1/adapters"): "key",
    ("GET", "/v1/adapters/{tenant}/{name}"): "key",
    ("POST", "/v1/adapters"): "publish",
    ("DELETE", "/v1/adapters/{tenant}/{name}"): "publish",
    ("PUT", "/v1/adapters/{tenant}/{name}/pin"): "publish",
    ("DELETE", "/v1/adapters/{tenant}/{name}/pin"): "publish",
    ("GET", "/v1/adapters/{tenant}/{name}/versions"): "key",
    ("PUT", "/v1/adapters/{tenant}/{name}/aliases/{alias}"): "publish",
    ("DELETE", "/v1/adapters/{tenant}/{name}/aliases/{alias}"): "publish",
    ("GET", "/v1/adapters/{tenant}/{name}/shares"): "publish",
    ("PUT", "/v1/adapters/{tenant}/{name}/shares/{with}"): "publish",
    ("DELETE", "/v1/adapters/{tenant}/{name}/shares/{with}"): "publish",
    ("POST", "/v1/load_lora_adapter"): "publish",
    ("POST", "/v1/unload_lora_adapter"): "publish",
    ("GET", "/v1/me"): "key",
    ("GET", "/v1/keys"): "admin",
    ("POST", "/v1/keys"): "admin",
    ("DELETE", "/v1/keys/{id}"): "admin",
    ("GET", "/v1/quotas"): "admin",
    ("GET", "/v1/quotas/{tenant}"): "key",
    ("PUT", "/v1/quotas/{tenant}"): "admin",
    ("DELETE", "/v1/quotas/{tenant}"): "admin",
    ("POST", "/v1/files"): "train",
    ("GET", "/v1/files"): "train",
    ("GET", "/v1/files/{file_id}"): "train",
    ("DELETE", "/v1/files/{file_id}"): "train",
    ("GET", "/v1/files/{file_id}/content"): "train",
    ("POST", "/v1/fine_tuning/jobs"): "train",
    ("GET", "/v1/fine_tuning/jobs"): "train",
    ("GET", "/v1/fine_tuning/jobs/{job_id}"): "train",
    ("POST", "/v1/fine_tuning/jobs/{job_id}/cancel"): "train",
    ("GET", "/v1/fine_tuning/jobs/{job_id}/events"): "train",
    ("GET", "/v1/fine_tuning/jobs/{job_id}/checkpoints"): "train",
    ("GET", "/v1/stats"): "admin",
    ("GET", "/metrics"): "admin",
}
# They tell nothing of any tenant.
_OPEN = ("/healthz", "/readyz", "/openapi.json", "/docs", "/docs/{file}", "/console")


def needed_scope(method: str, route: str) -> Needed:
    """Return what a route needs."""
    if method == "GET" and is_open(route):
        return "nothing"
    return _NEEDED.get((method, route), "admin")


def is_open(path: str) -> bool:
    """Whether GET of a path needs no key."""
    return path in _OPEN or path.startswith(("/docs/", "/console/"))


def listed_routes() -> set[tuple[str, str]]:
    """Return the routes of the table."""
    return set(_NEEDED)
