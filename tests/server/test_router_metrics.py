"""The metrics that routers read, parsed as the model-server protocol of the gateway-api inference extension says."""

from __future__ import annotations

import time
from dataclasses import dataclass
from types import SimpleNamespace

import httpx
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from sera_serve.engine import AdapterActivity, RunnerLoad, Task
from sera_serve.server.router_metrics import MAX_NAMES_BYTES, RouterMetrics, joined
from support.stub_engine import StubEngine


@dataclass
class ModelServer:
    """What an endpoint picker knows of a server after a scrape."""

    waiting_queue: int
    running: int
    kv_cache_usage: float
    block_size: int
    num_blocks: int
    max_active: int | None = None
    active: frozenset[str] = frozenset()
    waiting: frozenset[str] = frozenset()


class ScrapeError(Exception):
    """The picker gives this server's metrics up."""


def scrape(text: str) -> ModelServer:
    """Read a scrape.

    Written from the documents `docs/proposals/003-model-server-protocol/README.md` of
    kubernetes-sigs/gateway-api-inference-extension, and the endpoint picker's "Plugin Metric Protocol": the families
    and their types; the adapters' value is the time of the last update, "so the EPP can find the latest"; the lists
    are comma separated, and nothing says that names are trimmed.
    """
    families = {family.name: family for family in text_string_to_metric_families(text)}

    def gauge(name: str) -> float:
        if name not in families:
            raise ScrapeError(f"no family {name}")
        assert families[name].type == "gauge"
        (sample,) = families[name].samples
        return float(sample.value)

    if "vllm:lora_requests_info" not in families:
        raise ScrapeError("no family vllm:lora_requests_info")
    (config,) = families["vllm:cache_config_info"].samples
    server = ModelServer(
        int(gauge("vllm:num_requests_waiting")),
        int(gauge("vllm:num_requests_running")),
        gauge("vllm:kv_cache_usage_perc"),
        int(config.labels["block_size"]),
        int(config.labels["num_gpu_blocks"]),
    )
    latest = 0.0
    for sample in families["vllm:lora_requests_info"].samples:
        running, waiting = sample.labels["running_lora_adapters"], sample.labels["waiting_lora_adapters"]
        # Nothing runs and nothing waits: the picker keeps what it knew.
        if not running and not waiting:
            continue
        if sample.value > latest:
            latest = sample.value
            server.max_active = int(sample.labels["max_lora"])
            server.active = frozenset(filter(None, running.split(",")))
            server.waiting = frozenset(filter(None, waiting.split(",")))
    return server


class Engine:
    """An engine whose figures a test sets."""

    base = SimpleNamespace(name="base")

    def __init__(self) -> None:
        self.pages = (3, 12)
        self.activity = AdapterActivity((), (), 4)

    def waiting(self) -> int:
        return 5

    def running(self) -> int:
        return 6

    def loads(self) -> dict[Task, RunnerLoad]:
        return {"classify": RunnerLoad(0, 0), "generate": RunnerLoad(0, 0, 0, self.pages)}

    def adapter_activity(self) -> AdapterActivity:
        return self.activity


def exposition(engine: Engine, clock: float = 1000.0) -> str:
    registry = CollectorRegistry()
    registry.register(RouterMetrics(engine, lambda: clock))
    return generate_latest(registry).decode()


def test_a_picker_reads_the_server(client: httpx.Client) -> None:
    text = client.get("/metrics").text
    found = scrape(text)
    assert (found.waiting_queue, found.running, found.kv_cache_usage) == (3, 2, 0.625)
    assert (found.block_size, found.num_blocks, found.max_active) == (32, 8, 8)
    assert found.active == {"demo/writer", "demo/sorter"}
    assert found.waiting == {"demo/late@v2"}
    families = {family.name: family for family in text_string_to_metric_families(text)}
    (sample,) = families["vllm:lora_requests_info"].samples
    assert time.time() - 5 < sample.value <= time.time()
    for name in ("num_requests_waiting", "num_requests_running", "kv_cache_usage_perc", "cache_config_info"):
        assert families[f"vllm:{name}"].samples[0].labels["model_name"]


def test_each_scrape_has_exactly_one_series_of_the_adapters() -> None:
    engine = Engine()
    for activity in (
        AdapterActivity(("acme/a",), (), 4),
        AdapterActivity(("acme/a", "acme/b"), ("acme/c",), 4),
        AdapterActivity((), (), 4),
    ):
        engine.activity = activity
        text = exposition(engine)
        assert text.count("\nvllm:lora_requests_info{") == 1
        assert scrape(text).active == set(activity.running)
        assert scrape(text).waiting == set(activity.waiting)


def test_without_a_cache_nothing_is_divided_by_zero() -> None:
    engine = Engine()
    engine.pages = (0, 0)
    assert scrape(exposition(engine)).kv_cache_usage == 0


def test_the_parser_refuses_a_server_without_the_family() -> None:
    text = "\n".join(line for line in exposition(Engine()).splitlines() if "lora_requests_info" not in line) + "\n"
    with pytest.raises(ScrapeError):
        scrape(text)


def test_a_list_of_names_is_bounded_and_ends_with_a_whole_name() -> None:
    names = [f"tenant-{number}/adapter" for number in range(5000)]
    text = joined(names)
    assert MAX_NAMES_BYTES - 30 < len(text) <= MAX_NAMES_BYTES
    assert text.split(",") == names[: text.count(",") + 1]
    assert joined(["a/b", "c/d"], 7) == "a/b,c/d"
    assert joined(["a/b", "c/d"], 6) == "a/b"
    assert joined([], 6) == ""


def test_the_stub_has_no_name_with_a_blank(engine: StubEngine) -> None:
    activity = engine.adapter_activity()
    assert not any(set(name) & {" ", ","} for name in (*activity.running, *activity.waiting))
