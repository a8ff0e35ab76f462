"""A server of its own process, as an operator starts it, and what its metrics say."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

REPOSITORY = Path(__file__).resolve().parents[1]
TIERS = ("device", "host", "store")


@dataclass(frozen=True)
class Surroundings:
    """What a server process is started in.

    Attributes:
        checkout: The repository whose code it runs.
        variables: Environment variables beside those of this process.
        descriptors: Most files that it may have open; None is this process's own limit.
    """

    checkout: Path = REPOSITORY
    variables: Mapping[str, str] = field(default_factory=dict)
    descriptors: int | None = None


class ServerProcess:
    """`sera-serve serve` on a free port, from its start to its graceful end; a context manager."""

    def __init__(
        self, base: Path, store: Path, log: Path, surroundings: Surroundings | None = None, **settings: int | float
    ) -> None:
        """Start it without waiting; `settings` are fields of `ServeSettings`."""
        self.host, self.port = "127.0.0.1", _free_port()
        self.log = log
        around = surroundings or Surroundings()
        options = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
        # -P: the current folder may be another checkout.
        command = [sys.executable, "-P", "-c", "from sera_serve.cli import main; main()", "serve", f"--base={base}"]
        command += [f"--store={store}", f"--port={self.port}", *options]
        paths = [str(around.checkout), str(around.checkout / "kernels")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | dict(around.variables)
        with log.open("wb") as output:
            self._process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        if around.descriptors is not None:
            limit = (around.descriptors, around.descriptors)
            psutil.Process(self.pid).rlimit(psutil.RLIMIT_NOFILE, limit)

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def url(self) -> str:
        """Address without a path."""
        return f"http://{self.host}:{self.port}"

    def wait_until_ready(self, seconds: float = 120) -> None:
        """Return once `/readyz` is 200.

        Raises:
            RuntimeError: The process ended, or is not ready in time; with the end of its log.
        """
        deadline = time.monotonic() + seconds
        while self._process.poll() is None and time.monotonic() < deadline:
            try:
                if httpx.get(f"{self.url}/readyz").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        raise RuntimeError(f"the server did not become ready: {self.log.read_text()[-2000:]}")

    def wait(self, seconds: float) -> int | None:
        """Exit status of the process, negative for a signal; None where it still runs after so many seconds."""
        try:
            return self._process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return None

    def stop(self) -> int:
        """End the process with SIGTERM, or with SIGKILL after 30 seconds, and return its exit status."""
        self._process.terminate()
        status = self.wait(30)
        if status is None:
            self._process.kill()
            status = self._process.wait()
        return status

    def metrics(self) -> dict[str, float]:
        """Value of every metric, by name and labels as they are written."""
        return values_of(httpx.get(f"{self.url}/metrics", timeout=30).text)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def values_of(text: str) -> dict[str, float]:
    """Value of every metric in Prometheus' text, by name and labels as they are written."""
    values = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f'{key}="{value}"' for key, value in sorted(sample.labels.items()))
            values[sample.name + (f"{{{labels}}}" if labels else "")] = sample.value
    return values


def adapter_figures(before: dict[str, float], after: dict[str, float]) -> dict[str, float | None]:
    """Where the adapters of the requests between two readings were found, and how long loads took.

    Returns:
        `hit_rate`: share of requests whose adapter was on the device; `host_rate` and `store_rate` likewise;
        `loads`, and `load_mean_s`, the mean time of a load. None where the server does not say.
    """

    def grown(name: str) -> float:
        return after.get(name, 0.0) - before.get(name, 0.0)

    hits = {tier: grown(f'sera_adapter_hits_total{{tier="{tier}"}}') for tier in TIERS}
    total = sum(hits.values())
    loads, seconds = (
        sum(grown(f'sera_adapter_load_seconds_{part}{{tier="{tier}"}}') for tier in TIERS) for part in ("count", "sum")
    )
    rates = {tier: round(hits[tier] / total, 4) if total else None for tier in TIERS}
    return {
        "hit_rate": rates["device"],
        "host_rate": rates["host"],
        "store_rate": rates["store"],
        "loads": loads if total else None,
        "load_mean_s": round(seconds / loads, 5) if loads else None,
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
