"""Thousands of generated requests over every route of the OpenAPI document, with the keys of two tenants.

    python -m benchmarks.api_fuzz [--requests 5000] [--seed 0] [--seconds S] [--quick]

schemathesis makes valid and invalid requests of every operation, and sequences in which answers give names to later
requests. They go to a server process with the embedded base and keys. The callers are two tenants and an operator, in
turn. No answer may be an error of the server or differ from the document, and no answer may tell one tenant what the
other has: see `benchmarks.api_fuzzing`. The last line is one JSON object; the exit status is 1 if there is a fault.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from adapters_store import AdapterBundle, AdapterStore
from benchmarks.api_fuzz_things import Things
from benchmarks.api_fuzzing import Fuzzer, Outcome
from benchmarks.fleet import Fleet, save_endless_base
from benchmarks.last_line import tell
from benchmarks.server_process import ServerProcess
from sera_serve.access import AccessDatabase, Keys, Shares

# Of equal length, so that answers about one are as long as answers about the other.
TENANTS = ("alpha", "beta-")
PRIVATE, ABSENT = "secret", "secrex"


class Platform:
    """A store with two tenants' adapters and keys, for a server in another process."""

    def __init__(self, folder: Path) -> None:
        """Make the base `folder/base` and the store `folder/store`."""
        base = save_endless_base(folder / "base")
        fleet = Fleet(base)
        self.base = base.name
        self.store = AdapterStore(folder / "store")
        names = [f"{tenant}/{name}" for tenant in TENANTS for name in (PRIVATE, "shared")]
        self.bundles: dict[str, AdapterBundle] = {name: fleet.bundle(i) for i, name in enumerate(names)}
        self._database = AccessDatabase(self.store.root)
        keys = Keys(self._database)
        made = {tenant: keys.create(tenant, ["infer", "publish", "train"]) for tenant in TENANTS}
        made["admin"] = keys.create("operators", ["admin"])
        self.secrets = {who: created.secret for who, created in made.items()}
        self.publish()

    def publish(self) -> None:
        """Publish and share what is not there."""
        for name, bundle in self.bundles.items():
            self.store.publish(bundle, name)
        for tenant in TENANTS:
            Shares(self._database).add(f"{tenant}/shared", "*")

    def things(self, url: str) -> Things:
        """What requests may name."""
        private = {f"{tenant}/{PRIVATE}": f"{tenant}/{ABSENT}" for tenant in TENANTS}
        bundle = next(iter(self.bundles.values())).to_bytes()
        return Things(url, self.secrets, self.base, list(self.bundles), private, bundle, self.publish)


def run(fuzzer: Fuzzer, requests: int, seconds: float, console: Console) -> None:
    """Send so many requests: some of them alone, the rest in sequences. Faults are told as they come.

    Args:
        fuzzer: Sends them.
        requests: How many, at least, where the time allows.
        seconds: No sequence begins later.
        console: For people.
    """
    told, deadline = 0, time.monotonic() + seconds

    def tell() -> None:
        nonlocal told
        console.print(f"{fuzzer.outcome.total()} requests, {len(fuzzer.outcome.findings)} faults")
        for finding in fuzzer.outcome.findings[told:]:
            text = f"{finding.operation} by {finding.caller}: {finding.fault}\n{finding.request}\n{finding.answer}\n"
            console.print(text, markup=False)
        told = len(fuzzer.outcome.findings)

    operations = len(list(fuzzer.operations()))
    fuzzer.run_each(max(2, requests // (25 * operations)))
    tell()
    while fuzzer.outcome.total() < requests and time.monotonic() < deadline:
        fuzzer.run_stateful(scenarios=20, steps=12)
        tell()


def figures_of(outcome: Outcome, operations: int, seconds: float) -> dict[str, Any]:
    """Figures of a run."""
    statuses: Counter[str] = Counter()
    for (_, status), count in outcome.requests.items():
        statuses[f"{status // 100}xx"] += count
    return {
        "requests": outcome.total(),
        "compared": outcome.compared.total(),
        "operations": operations,
        "operations_sent": len({label for label, _ in outcome.requests}),
        "statuses": dict(sorted(statuses.items())),
        "overloaded": outcome.overloaded,
        "seconds": round(seconds, 1),
        "findings": [vars(finding) for finding in outcome.findings],
    }


def main(
    requests: Annotated[int, typer.Option(help="How many requests, at least.", min=1)] = 5000,
    seed: Annotated[int, typer.Option(help="Of the requests.")] = 0,
    seconds: Annotated[float, typer.Option(help="The most time for all of them.")] = 3600,
    quick: Annotated[bool, typer.Option("--quick", help="Some hundred requests.")] = False,
) -> None:
    """Run, and print a line of JSON."""
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as folder:
        platform = Platform(Path(folder))
        # Jobs are made, and wait: training is the work of other processes.
        waiting = {"max_training_jobs": 0}
        with ServerProcess(Path(folder, "base"), platform.store.root, Path(folder, "log"), **waiting) as server:
            server.wait_until_ready()
            things = platform.things(server.url)
            fuzzer = Fuzzer(things.target, things.restore, seed)
            began = time.perf_counter()
            run(fuzzer, 300 if quick else requests, seconds, console)
            taken = time.perf_counter() - began
            operations = len(list(fuzzer.operations()))
            figures = figures_of(fuzzer.outcome, operations, taken)
    correct = not figures["findings"] and figures["operations_sent"] == operations
    tell("api_fuzz", [figures], correct=correct, is_check=True)


if __name__ == "__main__":
    typer.run(main)
