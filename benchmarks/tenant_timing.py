"""Can a tenant tell, by the time of a refusal, whether another tenant's adapter exists?

One tenant asks a server of its own process, through each endpoint, for another tenant's adapter that exists and for one
that does not, in turns of random order. From the two sets of latencies comes the area under the ROC curve: how likely
a refusal of the one takes longer than a refusal of the other. 0.5 is chance. The interval is that of the
Mann-Whitney statistic, made wider for the number of endpoints (Bonferroni), so that all of them stay within theirs 95
times in 100 where nothing can be told.

    python -m benchmarks.tenant_timing --samples 500
"""

from __future__ import annotations

import http.client
import json
import math
import random
import tempfile
import time
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist, median
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from adapters_store import AdapterStore
from benchmarks.fleet import Fleet
from benchmarks.last_line import tell
from benchmarks.server_process import ServerProcess
from sera_serve import SeraConfig
from sera_serve.access import AccessDatabase, Keys
from sera_serve.base import load_base

EXISTS, ABSENT, OWN_ABSENT = "acme/secret", "acme/absent", "zulu/absent"
OWN = "zulu/writer"
MESSAGES = [{"role": "user", "content": "a"}]
# By endpoint: method, path and body; REF is the adapter's reference.
REQUESTS: dict[str, tuple[str, str, Any]] = {
    "generate": ("POST", "/v1/generate", {"adapter": "REF", "prompt": "a"}),
    "generate, streamed": ("POST", "/v1/generate", {"adapter": "REF", "prompt": "a", "stream": True}),
    "generate, a version": ("POST", "/v1/generate", {"adapter": "REF@v1", "prompt": "a"}),
    "generate, an alias": ("POST", "/v1/generate", {"adapter": "REF@stable", "prompt": "a"}),
    "generate, a digest": ("POST", "/v1/generate", {"adapter": "REF@DIGEST", "prompt": "a"}),
    "generate, a sum": (
        "POST",
        "/v1/generate",
        {"adapter": [{"adapter": OWN, "weight": 1}, {"adapter": "REF", "weight": 1}], "prompt": "a"},
    ),
    "classify": ("POST", "/v1/classify", {"adapter": "REF", "inputs": ["a"]}),
    "classify by each": ("POST", "/v1/classify", {"adapters": [OWN, "REF"], "inputs": ["a"]}),
    "embeddings": ("POST", "/v1/embeddings", {"model": "REF", "input": "a"}),
    "completions": ("POST", "/v1/completions", {"model": "REF", "prompt": "a"}),
    "chat": ("POST", "/v1/chat/completions", {"model": "REF", "messages": MESSAGES}),
    "responses": ("POST", "/v1/responses", {"model": "REF", "input": "a"}),
    "tokenize": ("POST", "/tokenize", {"model": "REF", "prompt": "a"}),
    "tokenize a chat": ("POST", "/tokenize", {"model": "REF", "messages": MESSAGES}),
    "model": ("GET", "/v1/models/REF", None),
    "inspect": ("GET", "/v1/adapters/REF", None),
    "versions": ("GET", "/v1/adapters/REF/versions", None),
    "delete": ("DELETE", "/v1/adapters/REF", None),
    "pin": ("PUT", "/v1/adapters/REF/pin", None),
    "unpin": ("DELETE", "/v1/adapters/REF/pin", None),
    "set alias": ("PUT", "/v1/adapters/REF/aliases/x", {"version": 1}),
    "remove alias": ("DELETE", "/v1/adapters/REF/aliases/stable", None),
    "list shares": ("GET", "/v1/adapters/REF/shares", None),
    "share": ("PUT", "/v1/adapters/REF/shares/zulu", None),
    "end share": ("DELETE", "/v1/adapters/REF/shares/zulu", None),
    "unload": ("POST", "/v1/unload_lora_adapter", {"lora_name": "REF"}),
    "load": ("POST", "/v1/load_lora_adapter", {"lora_name": "REF", "lora_path": "x"}),
    "list after it": ("GET", "/v1/adapters?after=REF", None),
    "fine-tune": ("POST", "/v1/fine_tuning/jobs", {"model": "REF", "training_file": "file-none"}),
}


def area(first: Sequence[float], second: Sequence[float]) -> float:
    """The area under the ROC curve: how likely a value of `second` is above one of `first`; ties count half."""
    ordered = sorted(first)
    above = sum(bisect_left(ordered, value) + bisect_right(ordered, value) for value in second) / 2
    return above / (len(first) * len(second))


def chance_width(first: int, second: int, tests: int = 1) -> float:
    """How far an area may be from 0.5 by chance, in one of `tests` comparisons of so many values each.

    The deviation of the Mann-Whitney statistic is that of Mann and Whitney, 1947, equation 8, without ties.
    """
    deviation = math.sqrt((first + second + 1) / (12 * first * second))
    return NormalDist().inv_cdf(1 - 0.05 / (2 * tests)) * deviation


class Attacker:
    """One connection of one tenant."""

    def __init__(self, host: str, port: int, secret: str, digest: str) -> None:
        self._connection = http.client.HTTPConnection(host, port, timeout=60)
        self._headers = {"Authorization": f"Bearer {secret}", "Content-Type": "application/json"}
        self._digest = digest[:12]

    def ask(self, request: tuple[str, str, Any], reference: str) -> tuple[int, float]:
        """Status and seconds of one request."""
        method, path, body = request
        content = None
        if body is not None:
            content = json.dumps(body).replace("REF", reference).replace("DIGEST", self._digest)
        headers = self._headers if content else {"Authorization": self._headers["Authorization"]}
        began = time.perf_counter()
        self._connection.request(method, path.replace("REF", reference), content, headers)
        response = self._connection.getresponse()
        response.read()
        return response.status, time.perf_counter() - began

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def compare(
        self, request: tuple[str, str, Any], names: tuple[str, str], samples: int, rng: random.Random
    ) -> tuple[list[set[int]], list[list[float]]]:
        """Statuses and latencies of both names, in turns."""
        statuses: list[set[int]] = [set(), set()]
        seconds: list[list[float]] = [[], []]
        for turn in range(samples + 5):
            for which in rng.sample((0, 1), 2):
                status, took = self.ask(request, names[which])
                statuses[which].add(status)
                # The first ones warm both paths up.
                if turn >= 5:
                    seconds[which].append(took)
        return statuses, seconds


def measure(attacker: Attacker, samples: int, seed: int) -> tuple[list[dict[str, Any]], float]:
    """Compare through every endpoint, and once where there is a difference to be seen: its area comes second."""
    rng = random.Random(seed)
    width = chance_width(samples, samples, len(REQUESTS))
    rows = []
    for name, request in REQUESTS.items():
        statuses, seconds = attacker.compare(request, (EXISTS, ABSENT), samples, rng)
        value = area(*seconds)
        rows.append(
            {
                "endpoint": name,
                "statuses": sorted(statuses[0]),
                "same_statuses": statuses[0] == statuses[1],
                "auc": round(value, 4),
                "at_chance": abs(value - 0.5) <= width,
                "median_ms": [round(1e3 * median(each), 3) for each in seconds],
            }
        )
    # An own adapter that does not exist is looked for in the store: that takes longer, and must be seen.
    _, seconds = attacker.compare(REQUESTS["inspect"], (ABSENT, OWN_ABSENT), samples, rng)
    return rows, round(area(*seconds), 4)


def main(
    samples: Annotated[int, typer.Option(help="Requests for each of the two names, by endpoint.", min=10)] = 500,
    seed: Annotated[int, typer.Option(help="Of the order of the requests.")] = 0,
) -> None:
    """Measure, and print a table and a line of JSON."""
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as folder:
        store = AdapterStore(Path(folder, "store"))
        fleet = Fleet(load_base("embedded"), (SeraConfig(16, 16, 32.0, "all-linear"),))
        published = [store.publish(fleet.bundle(index), name) for index, name in enumerate((EXISTS, OWN))]
        store.set_alias(EXISTS, "stable", f"{EXISTS}@v1")
        database = AccessDatabase(store.root)
        secret = Keys(database).create("zulu", ["infer", "publish", "train"]).secret
        database.close()
        variables = {"lora_path_root": folder}
        with ServerProcess(Path("embedded"), store.root, Path(folder, "log"), None, **variables) as server:  # type: ignore[arg-type]
            server.wait_until_ready()
            attacker = Attacker(server.host, server.port, secret, published[0].digest)
            rows, control = measure(attacker, samples, seed)
            attacker.close()
        # What was attacked is whole.
        unchanged = AdapterStore(store.root).inspect(EXISTS).aliases == {"latest": 1, "stable": 1}
    table = Table("endpoint", "status", "AUC", "at chance", "median, ms: exists", "does not")
    for row in rows:
        status, at_chance = ", ".join(map(str, row["statuses"])), "yes" if row["at_chance"] else "NO"
        table.add_row(row["endpoint"], status, f"{row['auc']:.3f}", at_chance, *map(str, row["median_ms"]))
    console.print(table)
    width = chance_width(samples, samples, len(REQUESTS))
    chance = [round(0.5 - width, 4), round(0.5 + width, 4)]
    console.print(f"chance: {chance[0]:.3f} to {chance[1]:.3f}; an own adapter that does not exist: {control:.3f}")
    untold = all(row["at_chance"] and row["same_statuses"] for row in rows)
    correct = untold and unchanged and abs(control - 0.5) > width
    facts = {"samples": samples, "chance": chance, "control_auc": control, "store_unchanged": unchanged}
    tell("tenant_timing", rows, correct=correct, is_check=True, **facts)


if __name__ == "__main__":
    typer.run(main)
