"""The metrics that routers of requests read, under the names that vLLM gives them.

Two documents of the gateway-api inference extension define them: `docs/proposals/003-model-server-protocol/README.md`,
and the "Plugin Metric Protocol" of its endpoint picker. A router needs no settings for a server that has vLLM's names.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from sera_serve.engine import PAGE_SIZE, ServingEngine

# Of one label. A router parses the list at every scrape, several times a second.
MAX_NAMES_BYTES = 32 << 10


class RouterMetrics(Collector):
    """Reads everything at each scrape and keeps nothing: each family has exactly one series.

    `vllm:lora_requests_info` has as its value the time of the scrape: a router takes the series with the largest one.
    Its lists are separated by commas alone, because routers do not trim names. `running_lora_adapters` has the adapters
    on the device, in use or not: a request for one of them starts at once. An adapter on its way to the device is in
    `waiting_lora_adapters`, and in no list twice. The names are the references that requests used, such as
    `tenant/name` or `tenant/name@v3`: a router compares them with the `model` of the next request. A weighted sum has
    no such name. A label has at most `MAX_NAMES_BYTES` bytes, the adapters used last.
    """

    def __init__(self, engine: ServingEngine, clock: Callable[[], float] = time.time) -> None:
        """Read an engine. `clock` returns seconds since 1970."""
        self._engine = engine
        self._clock = clock

    def collect(self) -> Iterator[Metric]:
        """The metrics at this moment."""
        # An encoder has no cache, and 0 pages.
        pages = [load.cache_pages for load in self._engine.loads().values()]
        # As `/v1/models` has it.
        model_name = self._engine.base.name
        in_use, total = sum(page[0] for page in pages), sum(page[1] for page in pages)
        for name, text, value in (
            ("num_requests_waiting", "Sequences and parts of classifications that wait.", self._engine.waiting()),
            ("num_requests_running", "Sequences and parts of classifications in a batch.", self._engine.running()),
            ("kv_cache_usage_perc", "Share of the KV cache's pages in use, 0 to 1.", in_use / total if total else 0.0),
        ):
            gauge = GaugeMetricFamily(f"vllm:{name}", text, labels=["model_name"])
            gauge.add_metric([model_name], value)
            yield gauge
        config = GaugeMetricFamily(
            "vllm:cache_config_info",
            "Tokens of a page of the KV cache, and its pages.",
            labels=["block_size", "num_gpu_blocks", "model_name"],
        )
        config.add_metric([str(PAGE_SIZE), str(total), model_name], 1)
        yield config
        activity = self._engine.adapter_activity()
        adapters = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters that are on the device, and that are waited for; the value is the time of the scrape.",
            labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
        )
        adapters.add_metric(
            [str(activity.limit), joined(activity.running), joined(activity.waiting)],
            self._clock(),
        )
        yield adapters


def joined(names: Iterable[str], most: int = MAX_NAMES_BYTES) -> str:
    """Join names by commas alone, as many as fit into so many bytes. Names are ASCII and have no comma."""
    kept: list[str] = []
    length = -1
    for name in names:
        length += len(name) + 1
        if length > most:
            break
        kept.append(name)
    return ",".join(kept)
