"""What two tenants of a server have that requests may name: adapters, files, training jobs and keys."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import httpx

from benchmarks.api_fuzzing import Target

# A row of training data.
_ROW = json.dumps({"prompt": "Once upon a time", "completion": " there was a sailor."}).encode()


class Things:
    """Adapters, files, jobs and keys of two tenants, made over HTTP, and made again where requests have deleted them.

    The tenants' names are of equal length, so that answers about one are as long as answers about the other.

    Attributes:
        target: What requests may name; `restore` changes it in place.
    """

    def __init__(
        self,
        url: str,
        keys: Mapping[str, str],
        base: str,
        adapters: Sequence[str],
        private: Mapping[str, str],
        bundle: bytes,
        publish: Callable[[], None],
    ) -> None:
        """Make what is not there.

        Args:
            url: Address of the server.
            keys: Secrets of the two tenants' keys, and last that of the operator's, by name.
            base: Name of the base model.
            adapters: References that requests may name.
            private: Adapters that the other tenant must not learn of, each with a name of its length that nobody has.
            bundle: A bundle for uploads.
            publish: Publishes and shares the adapters that are not there.
        """
        self._clients = {
            who: httpx.Client(base_url=url, headers={"Authorization": f"Bearer {secret}"}, timeout=60)
            for who, secret in keys.items()
        }
        self._tenants = [who for who in keys if who != "admin"]
        self._private = private
        self._base = base
        self._publish = publish
        self._held: dict[str, dict[str, str]] = {tenant: {} for tenant in self._tenants}
        self._names: dict[str, list[str]] = {
            "tenant": [*self._tenants, "nobody"],
            "name": sorted({name.partition("/")[2] for name in adapters}),
            "alias": ["latest", "stable"],
            "with": [*self._tenants, "*"],
            "model": [*adapters, base],
            "after": list(adapters),
            "file_id": [],
            "job_id": [],
            "id": [],
        }
        self._hidden: dict[str, dict[str, str]] = {tenant: {} for tenant in self._tenants}
        self.target = Target(url, keys, self._names, self._bodies(adapters, bundle), self._hidden)
        self.restore()

    def restore(self) -> None:
        """Make again what is gone, and take back shares and limits that requests have made."""
        self._publish()
        # What was shared is hidden no more.
        for name in self._private:
            shares = self._clients["admin"].get(f"/v1/adapters/{name}/shares").json()
            for other in shares["shared_with"]:
                self._clients["admin"].delete(f"/v1/adapters/{name}/shares/{other}").raise_for_status()
        for tenant in self._tenants:
            self._clients["admin"].delete(f"/v1/quotas/{tenant}")
            held = self._held[tenant]
            if self._gone(tenant, "/v1/files/", held.get("file_id")):
                files = {"file": ("rows.jsonl", b"\n".join([_ROW] * 12))}
                made = self._clients[tenant].post("/v1/files", files=files, data={"purpose": "fine-tune"})
                held["file_id"] = made.raise_for_status().json()["id"]
            if self._gone(tenant, "/v1/fine_tuning/jobs/", held.get("job_id")):
                body = {"model": self._base, "training_file": held["file_id"]}
                made = self._clients[tenant].post("/v1/fine_tuning/jobs", json=body)
                if made.status_code == 200:
                    held["job_id"] = made.json()["id"]
        if not self._names["id"]:
            made = self._clients["admin"].post("/v1/keys", json={"tenant": "nobody", "scopes": ["infer"]})
            self._names["id"] = [made.raise_for_status().json()["id"]]
        for field in ("file_id", "job_id"):
            self._names[field][:] = [held[field] for held in self._held.values() if field in held]
        for tenant, other in zip(self._tenants, reversed(self._tenants), strict=True):
            self._hidden[tenant].clear()
            owned = {name: twin for name, twin in self._private.items() if name.startswith(f"{other}/")}
            self._hidden[tenant].update(owned)
            self._hidden[tenant].update({held: _twin(held) for held in self._held[other].values()})

    def close(self) -> None:
        """Close the connections."""
        for client in self._clients.values():
            client.close()

    def _gone(self, tenant: str, path: str, identifier: str | None) -> bool:
        return identifier is None or self._clients[tenant].get(f"{path}{identifier}").status_code == 404

    def _bodies(self, adapters: Sequence[str], bundle: bytes) -> dict[str, Callable[[random.Random], dict[str, Any]]]:
        """Bodies of requests that can be served, by the label of the operation."""
        text = "Once upon a time"

        def asking(field: str, **others: Any) -> Callable[[random.Random], dict[str, Any]]:
            return lambda chance: {field: chance.choice(adapters), **others}

        def job(chance: random.Random) -> dict[str, Any]:
            return {"model": self._base, "training_file": chance.choice(self._names["file_id"])}

        return {
            "POST /v1/generate": asking("adapter", prompt=text, max_new_tokens=4),
            "POST /v1/classify": asking("adapter", inputs=[text]),
            "POST /v1/completions": asking("model", prompt=text, max_tokens=4),
            "POST /v1/chat/completions": asking("model", messages=[{"role": "user", "content": text}], max_tokens=4),
            "POST /v1/responses": asking("model", input=text, max_output_tokens=16),
            "POST /v1/embeddings": asking("model", input=text),
            "POST /tokenize": asking("model", prompt=text),
            "POST /detokenize": asking("model", tokens=[1, 2, 3]),
            "POST /v1/adapters": asking("name", bundle=bundle),
            "POST /v1/load_lora_adapter": asking("lora_name", lora_path="somewhere"),
            "POST /v1/unload_lora_adapter": asking("lora_name"),
            "PUT /v1/adapters/{tenant}/{name}/aliases/{alias}": lambda chance: {"version": chance.choice((1, 1, 2))},
            "POST /v1/keys": lambda chance: {"tenant": "nobody", "scopes": ["infer"]},
            "PUT /v1/quotas/{tenant}": lambda chance: {"adapters": chance.randrange(50)},
            "POST /v1/files": lambda chance: {"file": _ROW, "purpose": "fine-tune"},
            "POST /v1/fine_tuning/jobs": job,
        }


def _twin(identifier: str) -> str:
    """An id of the same form that nobody has."""
    return identifier[:-8] + identifier[-8:].translate(str.maketrans("0123456789abcdef", "fedcba9876543210"))
