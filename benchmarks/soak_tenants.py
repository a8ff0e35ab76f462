"""Tenants of the soak that change their adapters under traffic: upload, alias, delete, and check what is told."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import dataclass, field, replace

import httpx

from adapters_store import AdapterStore
from benchmarks.fleet import Fleet
from benchmarks.http_load import Answer, LoadClient
from benchmarks.reference import wrong_answers
from benchmarks.workload import TimedRequest


@dataclass
class Ledger:
    """What happened in the soak, and what should not have."""

    done: Counter[str] = field(default_factory=Counter)
    intended: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def expect(self, what: str, condition: bool, found: object) -> None:
        """Count one thing done; note it where it did not come out as it must."""
        self.done[what] += 1
        if not condition:
            self.wrong.append(f"{what}: {found}")


class ChangingTenant:
    """One tenant whose adapter goes through its whole life again and again.

    Each round uploads two versions, asks for them by `latest`, by an alias and by number while the alias moves, pins
    the second, and deletes one version, then all: what is asked for next must be of the weights that the name stood
    for, or be refused. The alias is set by another process first, and moved by a request.
    """

    def __init__(self, url: str, client: LoadClient, fleet: Fleet, store: AdapterStore, tenant: int) -> None:
        self._http = httpx.AsyncClient(base_url=url, timeout=60)
        self._url = url
        self._client = client
        self._fleet = fleet
        self._store = store
        self._random = random.Random(tenant)
        self._name = f"changing-{tenant}/main"
        # Weights that no other adapter has; each content is used again by every eighth round.
        self._contents = [1_000_000 + 100 * tenant + i for i in range(8)]
        # Of everything that it ever uploaded; it ends with nothing published.
        self.digests: set[str] = set()

    async def run(self, ledger: Ledger, end: asyncio.Event) -> None:
        """Live until `end`, in full rounds."""
        async with self._http:
            while not end.is_set():
                await self._round(ledger)

    async def _round(self, ledger: Ledger) -> None:
        old, new = self._random.sample(self._contents, 2)
        first = await self._upload(ledger, old)
        await self._check(ledger, "latest after upload", self._name, old)
        await asyncio.to_thread(self._store.set_alias, self._name, "stable", f"{self._name}@v{first}")
        # Under way while everything changes beneath it: it must end with what it began with.
        long = asyncio.ensure_future(self._ask(f"{self._name}@stable", 48, old))
        second = await self._upload(ledger, new)
        switched = await self._http.put(f"/v1/adapters/{self._name}/aliases/stable", json={"version": second})
        ledger.expect("alias switched", switched.status_code == 200, switched.text)
        pinned = await self._http.put(f"/v1/adapters/{self._name}/pin")
        ledger.expect("pinned", pinned.status_code == 200, pinned.text)
        await self._check(ledger, "alias after its switch", f"{self._name}@stable", new)
        await self._check(ledger, "version by number", f"{self._name}@v{first}", old)
        deleted = await self._http.delete(f"/v1/adapters/{self._name}@v{first}")
        ledger.expect("version deleted", deleted.status_code == 200, deleted.text)
        await self._check_gone(ledger, "404 of a deleted version", f"{self._name}@v{first}")
        await self._check(ledger, "latest after a delete", self._name, new)
        answer = await long
        # A busy server may have looked the alias up after its switch.
        content = new if answer.version == second else old
        answer.request = replace(answer.request, adapter=content)
        self._judge(ledger, "request across changes", answer)
        deleted = await self._http.delete(f"/v1/adapters/{self._name}")
        ledger.expect("adapter deleted", deleted.status_code == 200, deleted.text)
        await self._check_gone(ledger, "404 of a deleted adapter", self._name)

    async def _upload(self, ledger: Ledger, content: int) -> int:
        bundle = self._fleet.bundle(content)
        data = await asyncio.to_thread(bundle.to_bytes)
        answer = await self._http.post(
            "/v1/adapters", files={"bundle": ("b.safetensors", data)}, data={"name": self._name}
        )
        ledger.expect("uploaded", answer.status_code == 201, answer.text)
        self.digests.add(answer.json()["digest"])
        return int(answer.json()["version"])

    async def _check(self, ledger: Ledger, what: str, name: str, content: int) -> None:
        self._judge(ledger, what, await self._ask(name, 4, content))

    async def _check_gone(self, ledger: Ledger, what: str, name: str) -> None:
        answer = await self._ask(name, 4, self._contents[0])
        ledger.intended[f"{answer.status} {answer.error}"] += 1
        # A full server may refuse before it looks the name up.
        if answer.status not in (429, 503):
            ledger.expect(what, (answer.status, answer.error) == (404, "adapter_not_found"), answer.error)

    def _judge(self, ledger: Ledger, what: str, answer: Answer) -> None:
        if answer.status in (429, 503):
            ledger.intended[f"{answer.status} {answer.error}"] += 1
            return
        wrong = wrong_answers(self._fleet, [answer])
        ledger.expect(what, not wrong, wrong)

    async def _ask(self, name: str, new_tokens: int, content: int) -> Answer:
        prompt = tuple(self._random.choices(range(3, 4096), k=16))
        request = TimedRequest(0.0, content, prompt, new_tokens)
        # An answer names its adapter without the version.
        answer = await self._client.ask(request, name=name)
        answer.adapter = self._name
        return answer
