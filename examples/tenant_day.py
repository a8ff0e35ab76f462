"""A tenant's first day: a key, a model of its own, another version of it, a limit, and the end of the key.

sera-serve keys create --store demo-store --tenant operators --scopes admin     # prints the operator's key
make serve                                                                      # in another terminal
python examples/tenant_day.py --admin-key sk-sera-...

The tenant uses OpenAI's own client (`pip install openai`), and plain HTTP where OpenAI has no such call. The operator's
key makes the tenant's key, its limit, and its end. Each step is timed. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import httpx
import openai
import torch

from adapters_store import AdapterBundle, AdapterConfig, expected_shapes

ANIMALS = ("cat", "dog", "cow", "hen", "pig", "owl", "fox", "bee")
SOUNDS = ("meow", "woof", "moo", "cluck", "oink", "hoot", "yap", "buzz")
ROWS = [
    {"prompt": f"The {animal} says", "completion": f" {sound}."}
    for animal, sound in zip(ANIMALS, SOUNDS, strict=True)
    for _ in range(3)
]
QUESTION = "The cow says"


class Day:
    """The steps, and how long each took."""

    def __init__(self, url: str, admin_key: str, tenant: str, epochs: int) -> None:
        self.operator = httpx.Client(base_url=url, headers=bearer(admin_key), timeout=60)
        self.url, self.tenant, self.epochs = url, tenant, epochs
        self.seconds: dict[str, float] = {}
        self.opened: list[httpx.Client | openai.OpenAI] = [self.operator]

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time a step."""
        began = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - began
        print(f"{name:<28}{self.seconds[name]:8.3f} s", flush=True)

    def close(self) -> None:
        """Close the connections."""
        for client in self.opened:
            client.close()

    def make_key(self) -> None:
        """The operator makes a key for the tenant; its secret is shown this once."""
        body = {"tenant": self.tenant, "scopes": ["infer", "publish", "train"], "expires_in_s": 86_400}
        made = self.operator.post("/v1/keys", json=body).raise_for_status().json()
        self.key_id = made["id"]
        self.http = httpx.Client(base_url=self.url, headers=bearer(made["secret"]), timeout=60)
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=made["secret"], max_retries=0)
        self.opened += [self.http, self.client]

    def upload(self) -> None:
        """Upload the rows to learn."""
        content = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)
        self.file = self.client.files.create(file=("animals.jsonl", content), purpose="fine-tune")

    def train(self, base: str) -> None:
        """Create a job, which may wait for others first."""
        self.job = self.client.fine_tuning.jobs.create(
            model=base,
            training_file=self.file.id,
            suffix="animals",
            seed=1,
            method={
                "type": "supervised",
                "supervised": {"hyperparameters": {"n_epochs": self.epochs, "learning_rate_multiplier": 3}},
            },
            extra_body={"adapter": {"method": "sera", "rank": 16, "split": 8}},
        )

    def watch(self) -> list[float]:
        """The losses of the job, step by step as they come."""
        losses = []
        path = f"/v1/fine_tuning/jobs/{self.job.id}/events?stream=true"
        with self.http.stream("GET", path, timeout=600) as events:
            events.raise_for_status()
            for line in events.iter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    if event["type"] == "metrics" and "train_loss" in event["data"]:
                        losses.append(float(event["data"]["train_loss"]))
        job = self.client.fine_tuning.jobs.retrieve(self.job.id)
        if job.fine_tuned_model is None:
            raise SystemExit(f"the job has {job.status}: {job.error and job.error.message}")
        self.model = job.fine_tuned_model.partition("@")[0]
        return losses

    def ask(self, model: str) -> str:
        """What a model answers."""
        answer = self.client.completions.create(model=model, prompt=QUESTION, max_tokens=8, temperature=0)
        return str(answer.choices[0].text)

    def publish_untrained(self) -> int:
        """Publish a second version that was never trained: the mistake of the day."""
        detail = self.http.get(f"/v1/adapters/{self.model}").raise_for_status().json()
        config = AdapterConfig(**detail["config"])
        bundle = AdapterBundle(config, {name: torch.zeros(shape) for name, shape in expected_shapes(config).items()})
        answer = self.http.post("/v1/adapters", files={"bundle": bundle.to_bytes()}, data={"name": self.model})
        return int(answer.raise_for_status().json()["version"])

    def set_alias(self, version: int) -> None:
        """Let the alias `stable` stand for a version."""
        path = f"/v1/adapters/{self.model}/aliases/stable"
        self.http.put(path, json={"version": version}).raise_for_status()

    def delete(self) -> None:
        """Delete the adapter with all versions; it is gone at once."""
        self.http.delete(f"/v1/adapters/{self.model}").raise_for_status()
        try:
            self.ask(self.model)
        except openai.NotFoundError:
            return
        raise SystemExit("a deleted adapter answered")

    def hit_quota(self, base: str) -> str | None:
        """The operator limits the tenant to three requests a minute; one of the next four is refused."""
        self.operator.put(f"/v1/quotas/{self.tenant}", json={"requests_per_minute": 3}).raise_for_status()
        try:
            for _ in range(4):
                self.ask(base)
        except openai.RateLimitError as error:
            return error.response.headers.get("retry-after")
        finally:
            self.operator.delete(f"/v1/quotas/{self.tenant}").raise_for_status()
        raise SystemExit("the limit was not kept")

    def revoke(self) -> None:
        """The operator revokes the key; it is refused at once."""
        self.operator.delete(f"/v1/keys/{self.key_id}").raise_for_status()
        try:
            self.client.models.list()
        except openai.AuthenticationError:
            return
        raise SystemExit("a revoked key was accepted")


def bearer(key: str) -> dict[str, str]:
    """The header of a key."""
    return {"Authorization": f"Bearer {key}"}


def spend(day: Day) -> dict[str, Any]:
    """All steps in turn."""
    with day.step("key"):
        day.make_key()
    base = str(day.http.get("/v1/me").raise_for_status().json()["base"]["name"])
    with day.step("upload of a file"):
        day.upload()
    with day.step("job created"):
        day.train(base)
    with day.step("job trained, loss by API"):
        losses = day.watch()
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f} in {len(losses)} steps: {day.model}")
    with day.step("first answer"):
        answer = day.ask(day.model)
    print(f"{QUESTION}{answer!r}; the base: {day.ask(base)!r}")
    with day.step("alias set"):
        day.set_alias(1)
    with day.step("second version published"):
        second = day.publish_untrained()
    with day.step("alias switched, and asked"):
        day.set_alias(second)
        mistaken = day.ask(f"{day.model}@stable")
    with day.step("rollback, and asked"):
        day.set_alias(1)
        restored = day.ask(f"{day.model}@stable")
    if restored != answer or mistaken == answer:
        raise SystemExit(f"the versions answer {answer!r}, {mistaken!r} and {restored!r}")
    with day.step("quota hit"):
        retry_after = day.hit_quota(base)
    with day.step("deleted"):
        day.delete()
    with day.step("key revoked"):
        day.revoke()
    return {
        "tenant": day.tenant,
        "steps": len(losses),
        "loss": [round(losses[0], 4), round(losses[-1], 4)],
        "answer": answer,
        "retry_after": retry_after,
        "seconds": {name: round(value, 3) for name, value in day.seconds.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://localhost:8000")
    parser.add_argument("--admin-key", required=True, help="a key with the scope admin")
    parser.add_argument("--tenant", default="acme")
    parser.add_argument("--epochs", type=int, default=8)
    options = parser.parse_args()
    with closing(Day(options.url, options.admin_key, options.tenant, options.epochs)) as day:
        print(json.dumps(spend(day)))


if __name__ == "__main__":
    main()
