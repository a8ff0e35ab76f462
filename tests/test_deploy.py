"""The files in deploy/: each query of dashboard and alerts has its metric; unit, compose file and settings agree."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import promql_parser
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from adapters_store import AdapterStore
from sera_serve import SeraConfig
from sera_serve.config import ServeSettings
from sera_serve.engine import ServingEngine
from sera_serve.server import build_app
from sera_serve.server.graceful import ENDING_S
from sera_serve.server.metrics_address import parse_address
from support.factories import random_adapter, random_decoder
from support.live_server import live_server

DEPLOY = Path(__file__).resolve().parents[1] / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana" / "sera-serve.json").read_text(encoding="utf-8"))
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [(panel["title"], target["expr"]) for panel in PANELS for target in panel["targets"]]
SCRAPE = yaml.safe_load((DEPLOY / "prometheus.yml").read_text(encoding="utf-8"))
(RULES,) = yaml.safe_load((DEPLOY / "alerts.yml").read_text(encoding="utf-8"))["groups"]
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
UNIT = (DEPLOY / "sera-serve.service").read_text(encoding="utf-8")
# Grafana puts values in the place of these.
VARIABLES = {"$__rate_interval": "5m", "$tenant": ".*"}


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """Every series of a server that has served and refused requests."""
    base = random_decoder()
    store = AdapterStore(tmp_path_factory.mktemp("deploy") / "store")
    store.publish(random_adapter(base, SeraConfig(4, 2, 8.0, ("q_proj",)), seed=1), "demo/writer")
    labeler = random_adapter(base, SeraConfig(4, 2, 8.0, ("q_proj",)), seed=2, labels=["no", "yes"])
    store.publish(labeler, "demo/sorter")
    settings = ServeSettings(store=store.root, pool_mib=4, kv_cache_tokens=2048)
    app = build_app(ServingEngine(base, store, settings), store, settings)
    with live_server(app) as url, httpx.Client(base_url=url, timeout=30) as client:
        body = {"adapter": "demo/writer", "prompt": "Once", "max_new_tokens": 2}
        assert client.post("/v1/generate", json=body).status_code == 200
        assert client.post("/v1/generate", json=body | {"timeout_s": 1e-6}).status_code == 504
        rows = {"adapter": "demo/sorter", "inputs": ["a"]}
        assert client.post("/v1/classify", json=rows).status_code == 200
        assert client.post("/v1/embeddings", json={"model": base.name, "input": "a"}).status_code == 200
        with app.state.loop_watch.step("a test"):
            time.sleep(0.11)
        text = client.get("/metrics").text
    return [sample for family in text_string_to_metric_families(text) for sample in family.samples]


@pytest.fixture(scope="module")
def labels(samples: list[Sample]) -> dict[str, set[str]]:
    """The labels of every series, by its name."""
    found: dict[str, set[str]] = {}
    for sample in samples:
        found.setdefault(sample.name, set()).update(sample.labels)
    return found


def parsed(query: str) -> Any:
    for name, value in VARIABLES.items():
        query = query.replace(name, value)
    assert "$" not in query
    return promql_parser.parse(query)


def nodes(expression: Any) -> list[Any]:
    found: list[Any] = []
    promql_parser.walk(expression, lambda node: found.append(node))
    return found


def wrong_names(query: str, labels: dict[str, set[str]]) -> list[str]:
    """What a query names and no series has."""
    expression = parsed(query)
    wrong: list[str] = []

    def known(node: Any) -> set[str]:
        """The labels of all series below a node."""
        return set().union(*(labels.get(one.name, set()) for one in nodes(node) if is_selector(one)))

    for node in nodes(expression):
        if is_selector(node):
            if node.name not in labels:
                wrong.append(node.name)
            wrong += [one.name for one in node.matchers.matchers if one.name not in labels.get(node.name, set())]
        elif isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None:
            wrong += [label for label in node.modifier.labels if label not in known(node.expr)]
    return wrong


def is_selector(node: Any) -> bool:
    return isinstance(node, promql_parser.VectorSelector)


@pytest.mark.parametrize(("title", "query"), QUERIES, ids=[f"{title}-{i}" for i, (title, _) in enumerate(QUERIES)])
def test_every_query_names_series_and_labels_of_the_real_metrics(
    title: str, query: str, labels: dict[str, set[str]]
) -> None:
    assert wrong_names(query, labels) == [], title


@pytest.mark.parametrize("rule", RULES["rules"], ids=lambda rule: rule["alert"])
def test_every_alert_names_series_and_labels_of_the_real_metrics(
    rule: dict[str, Any], labels: dict[str, set[str]]
) -> None:
    # Prometheus adds these labels, and the series that tells whether a scrape succeeded.
    added = {"instance", "job"}
    known = {name: own | added for name, own in labels.items()} | {"up": added}
    assert wrong_names(rule["expr"], known) == []
    kept = set().union(*(known[node.name] for node in nodes(parsed(rule["expr"])) if is_selector(node)))
    for node in nodes(parsed(rule["expr"])):
        if isinstance(node, promql_parser.AggregateExpr):
            kept &= set(node.modifier.labels)
    texts = rule["annotations"]
    assert set(re.findall(r"\$labels\.(\w+)", texts["summary"] + texts["description"])) <= kept
    assert rule["labels"]["severity"] in ("warning", "critical")
    for job in re.findall(r'job="([^"]*)"', rule["expr"]):
        assert job in [one["job_name"] for one in SCRAPE["scrape_configs"]]


def test_the_values_that_alerts_ask_for_occur(samples: list[Sample]) -> None:
    # With a value that no series has, an alert would be silent for ever. The server has answered 200 and 504 alone.
    text = "\n".join(rule["expr"] for rule in RULES["rules"])
    asked = set(re.findall(r'(\w+)!?="([^"]*)"', text)) - {("job", "sera-serve"), ("status", "500"), ("status", "503")}
    assert asked
    assert asked <= {item for sample in samples for item in sample.labels.items()}


def test_prometheus_finds_its_alerts() -> None:
    mounted = [volume.split(":")[1] for volume in COMPOSE["services"]["prometheus"]["volumes"]]
    assert set(SCRAPE["rule_files"]) <= set(mounted)
    assert len({rule["alert"] for rule in RULES["rules"]}) == len(RULES["rules"])


def test_a_legend_names_labels_that_its_query_keeps(labels: dict[str, set[str]]) -> None:
    for panel in PANELS:
        for target in panel["targets"]:
            named = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            kept = set()
            for node in nodes(parsed(target["expr"])):
                if isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None:
                    kept |= set(node.modifier.labels)
                elif is_selector(node) and "sum" not in target["expr"]:
                    kept |= labels[node.name]
            assert named <= kept, panel["title"]


def test_the_check_finds_what_is_wrong(labels: dict[str, set[str]]) -> None:
    assert wrong_names("rate(sera_nothing_total[5m])", labels) == ["sera_nothing_total"]
    assert wrong_names('sera_waiting{tenant="a"}', labels) == ["tenant"]
    assert wrong_names("sum by (adapter) (sera_tenant_requests_total)", labels) == ["adapter"]
    assert wrong_names("histogram_quantile(0.9, sum by (le, color) (sera_wait_seconds_bucket))", labels) == ["color"]


def test_the_variable_of_the_dashboard_is_a_label(labels: dict[str, set[str]]) -> None:
    (query,) = [one["query"]["query"] for one in DASHBOARD["templating"]["list"] if one["type"] == "query"]
    metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", query).groups()  # type: ignore[union-attr]
    assert label in labels[metric]
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells


def test_the_compose_file_fits_the_settings_and_the_other_files() -> None:
    server = COMPOSE["services"]["sera-serve"]
    settings = {}
    for name, value in server["environment"].items():
        assert name.startswith("SERA_SERVE_")
        settings[name.removeprefix("SERA_SERVE_").lower()] = re.sub(r"\$\{\w+:-(.*)\}", r"\1", value)
    read = ServeSettings(**settings)
    assert read.metrics_address is not None
    port = parse_address(read.metrics_address)[1]
    # The address without keys is for the other containers alone.
    assert not any(str(port) in one for one in server["ports"])
    assert all(
        one.startswith("127.0.0.1:") for service in COMPOSE["services"].values() for one in service.get("ports", ())
    )
    assert SCRAPE["scrape_configs"][0]["static_configs"][0]["targets"] == [f"sera-serve:{port}"]
    assert int(server["stop_grace_period"].removesuffix("s")) > read.drain_s + read.shutdown_grace_s + ENDING_S
    for service in COMPOSE["services"].values():
        assert service["cap_drop"] == ["ALL"]
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert (DEPLOY / source).exists() if source.startswith(".") else source in COMPOSE["volumes"]
        assert re.search(r":v?\d+\.\d+", service["image"]) or "build" in service


def test_grafana_finds_its_data_source_and_its_dashboard() -> None:
    provisioning = DEPLOY / "grafana" / "provisioning"
    source = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text(encoding="utf-8"))
    assert source["datasources"][0]["url"] == "http://prometheus:9090"
    provider = yaml.safe_load((provisioning / "dashboards" / "sera-serve.yaml").read_text(encoding="utf-8"))
    folder = provider["providers"][0]["options"]["path"]
    mounted = [volume.split(":")[1] for volume in COMPOSE["services"]["grafana"]["volumes"]]
    assert f"{folder}/sera-serve.json" in mounted


def test_the_unit_stops_after_the_drain_and_reloads_by_sighup() -> None:
    lines = dict(line.split("=", 1) for line in UNIT.splitlines() if "=" in line and not line.startswith("#"))
    assert lines["ExecReload"] == "/bin/kill -HUP $MAINPID"
    assert lines["KillSignal"] == "SIGTERM"
    defaults = ServeSettings()
    assert int(lines["TimeoutStopSec"]) > defaults.drain_s + defaults.shutdown_grace_s + ENDING_S
    assert int(lines["LimitNOFILE"]) > defaults.max_connections
    assert lines["ExecStart"].replace(" serve ", " check-config ") == lines["ExecStartPre"]
    # With `stop`, a training job that the system ends for want of memory would take the server with it.
    assert lines["OOMPolicy"] == "continue"


def test_the_unit_names_what_an_installation_makes() -> None:
    """`pip install` makes the program alone. `systemctl status` shows what the unit names as its documentation."""
    assert set(re.findall(r"/opt/sera/[^\s,)]+", UNIT)) == {"/opt/sera/bin/sera-serve"}


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="this machine has no systemd")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    # The program is not installed here.
    unit = tmp_path / "sera-serve.service"
    unit.write_text(UNIT.replace("/opt/sera/bin/sera-serve", "/bin/true"))
    result = subprocess.run(
        ["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")
