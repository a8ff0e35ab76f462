"""The routes: what a key must be allowed to do for each, and how it refuses. What is not listed needs `admin`."""

from __future__ import annotations

from typing import Literal

from sera_serve.access import Scope

Needed = Scope | Literal["key", "nothing"]
"""`key`: any key. `nothing`: no key."""

# By method and route: what a key must have, and the statuses of refusals beside those that every route may answer.
ROUTES: dict[tuple[str, str], tuple[Needed, tuple[int, ...]]] = {
    ("POST", "/v1/generate"): ("infer", (404, 504)),
    ("POST", "/v1/classify"): ("infer", (404, 504)),
    ("POST", "/v1/completions"): ("infer", (404, 504)),
    ("POST", "/v1/chat/completions"): ("infer", (404, 504)),
    ("POST", "/v1/responses"): ("infer", (404, 504)),
    ("POST", "/v1/embeddings"): ("infer", (404, 504)),
    ("POST", "/tokenize"): ("infer", (404,)),
    ("POST", "/detokenize"): ("infer", (404,)),
    ("GET", "/v1/models"): ("key", ()),
    ("GET", "/v1/models/{model:path}"): ("key", (404,)),
    ("DELETE", "/v1/models/{model:path}"): ("publish", (404, 409, 507)),
    ("GET", "/v1/adapters"): ("key", ()),
    ("GET", "/v1/adapters/{tenant}/{name}"): ("key", (404,)),
    ("POST", "/v1/adapters"): ("publish", (507,)),
    ("DELETE", "/v1/adapters/{tenant}/{name}"): ("publish", (404, 409, 507)),
    ("PUT", "/v1/adapters/{tenant}/{name}/pin"): ("publish", (404, 409)),
    ("DELETE", "/v1/adapters/{tenant}/{name}/pin"): ("publish", (404,)),
    ("GET", "/v1/adapters/{tenant}/{name}/versions"): ("key", (404,)),
    ("PUT", "/v1/adapters/{tenant}/{name}/aliases/{alias}"): ("publish", (404, 507)),
    ("DELETE", "/v1/adapters/{tenant}/{name}/aliases/{alias}"): ("publish", (404, 507)),
    ("GET", "/v1/adapters/{tenant}/{name}/shares"): ("publish", (404,)),
    ("PUT", "/v1/adapters/{tenant}/{name}/shares/{with}"): ("publish", (404,)),
    ("DELETE", "/v1/adapters/{tenant}/{name}/shares/{with}"): ("publish", (404,)),
    ("POST", "/v1/load_lora_adapter"): ("publish", (507,)),
    ("POST", "/v1/unload_lora_adapter"): ("publish", (404, 409, 507)),
    ("GET", "/v1/me"): ("key", ()),
    ("GET", "/v1/keys"): ("admin", ()),
    ("POST", "/v1/keys"): ("admin", ()),
    ("DELETE", "/v1/keys/{id}"): ("admin", (404,)),
    ("GET", "/v1/quotas"): ("admin", ()),
    ("GET", "/v1/quotas/{tenant}"): ("key", ()),
    ("PUT", "/v1/quotas/{tenant}"): ("admin", ()),
    ("DELETE", "/v1/quotas/{tenant}"): ("admin", ()),
    ("POST", "/v1/files"): ("train", (507,)),
    ("GET", "/v1/files"): ("train", (404,)),
    ("GET", "/v1/files/{file_id}"): ("train", (404,)),
    ("DELETE", "/v1/files/{file_id}"): ("train", (404, 409)),
    ("GET", "/v1/files/{file_id}/content"): ("train", (404, 507)),
    ("POST", "/v1/fine_tuning/jobs"): ("train", (404,)),
    ("GET", "/v1/fine_tuning/jobs"): ("train", (404,)),
    ("GET", "/v1/fine_tuning/jobs/{job_id}"): ("train", (404,)),
    ("POST", "/v1/fine_tuning/jobs/{job_id}/cancel"): ("train", (404, 409)),
    ("GET", "/v1/fine_tuning/jobs/{job_id}/events"): ("train", (404,)),
    ("GET", "/v1/fine_tuning/jobs/{job_id}/checkpoints"): ("train", (404,)),
    ("GET", "/v1/stats"): ("admin", ()),
    ("GET", "/metrics"): ("admin", ()),
}
# They tell nothing of any tenant.
_OPEN = ("/healthz", "/readyz", "/openapi.json", "/docs", "/console")


def needed_scope(method: str, route: str) -> Needed:
    """Return what a route needs."""
    if method == "GET" and is_open(route):
        return "nothing"
    needed, _ = ROUTES.get((method, route), ("admin", ()))
    return needed


def is_open(path: str) -> bool:
    """Whether GET of a path needs no key."""
    return path in _OPEN or path.startswith(("/docs/", "/console/"))
