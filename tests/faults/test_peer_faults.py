"""Faults that users report of other servers of adapters, each a test of this one. docs/peer_faults.md has the table."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import LlamaForCausalLM

from adapters_store import AdapterBundle, AdapterConfig, AdapterStore, ModuleSpec
from sera_kernels import numba_path
from sera_serve import SeraConfig
from sera_serve.base import FrozenBase
from sera_serve.config import ServeSettings
from sera_serve.engine import ServingEngine
from sera_serve.engine.loop import cpu_decode
from sera_serve.layers import served_linear
from sera_serve.server import build_app
from support.answers import refused
from support.engine import collect, settled
from support.factories import encoded, greedy, merged, random_adapter
from support.faulty_serving import NEW_TOKENS, PROMPT, WRITERS, Serving, body, name
from support.graph_recorder import Replayed, static_add_updates
from support.live_server import live_server, wait_until
from support.peft_checkpoints import CONFIG, WEIGHTS, edit_tensors, save_checkpoint
from support.peft_pickle import pickled_checkpoint
from support.standstill import standstill

Serve = Callable[..., Serving]
# Three pages of the prefix cache, and what follows them.
LONG = "Once upon a time there was a sailor who told every child of the harbour the same story again and again. "
LAYER_INPUTS = 4  # Of a layer: those of q, k, v; of o; of gate and up; of down.


@pytest.fixture
def serving(serve: Serve) -> Serving:
    return serve()


def upload(serving: Serving, adapter: str, bundle: AdapterBundle) -> int:
    files = {"bundle": ("a.safetensors", bundle.to_bytes())}
    answer = serving.client.post("/v1/adapters", files=files, data={"name": adapter})
    assert answer.status_code == 201, answer.text
    return int(answer.json()["version"])


def answer_of(base: FrozenBase, bundle: AdapterBundle, prompt: str = PROMPT, tokens: int = NEW_TOKENS) -> list[int]:
    return greedy(merged(base, bundle), base.tokenizer(prompt)["input_ids"], tokens)


def tokens_of(response: httpx.Response) -> list[int]:
    assert response.status_code == 200, response.text
    return list(response.json()["token_ids"])


def cached_tokens(serving: Serving) -> int:
    """Tokens of prompts that were found in the prefix cache so far."""
    registry = serving.app.state.metrics.registry
    return int(registry.get_sample_value("sera_tokens_total", {"kind": "cached_prompt"}) or 0)


@contextmanager
def streaming(serving: Serving, adapter: str | None, new_tokens: int) -> Iterator[list[int]]:
    """A generation whose first tokens are read before the block, and the rest after it."""
    tokens: list[int] = []
    request = body(adapter, max_new_tokens=new_tokens, stream=True)
    with (
        httpx.Client(base_url=serving.url, timeout=60) as client,
        client.stream("POST", "/v1/generate", json=request) as stream,
    ):
        lines = (json.loads(line.removeprefix("data: ")) for line in stream.iter_lines() if line.startswith("data: {"))
        tokens += next(lines)["token_ids"]
        yield tokens
        for line in lines:
            assert "error" not in line, line
            tokens += line["token_ids"]


class Counter:
    """Counts forward passes, and the grouped calls that add adapters' updates in them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.passes = self.calls = 0
        grouped = served_linear.add_updates

        def counted(*values: Any) -> None:
            self.calls += 1
            grouped(*values)

        monkeypatch.setattr(served_linear, "add_updates", counted)
        self._hook = register_module_forward_pre_hook(self._count)

    def _count(self, module: nn.Module, inputs: Any) -> None:
        self.passes += isinstance(module, LlamaForCausalLM)

    def take(self) -> tuple[int, int]:
        taken, self.passes, self.calls = (self.passes, self.calls), 0, 0
        return taken

    def close(self) -> None:
        self._hook.remove()


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter]:
    counter = Counter(monkeypatch)
    yield counter
    counter.close()


def all_at_once(serving: Serving, adapters: list[str | None], **fields: Any) -> list[httpx.Response]:
    """Send requests that enter one batch."""
    with ThreadPoolExecutor(len(adapters)) as clients:
        with standstill():
            asked = [clients.submit(serving.ask, adapter, **fields) for adapter in adapters]
            wait_until(lambda: serving.engine.in_flight() == len(adapters))
        return [one.result(60) for one in asked]


def test_ranks_are_not_padded_in_memory(serving: Serving, base: FrozenBase) -> None:
    """vLLM #22782: every adapter took the memory of the largest rank that the server allows."""
    serving.assert_right(name(0))
    for rank, seed in ((4, 90), (64, 91)):
        bundle = random_adapter(base, SeraConfig(rank, 1, 8.0, "all-linear", use_mixer=False), seed)
        upload(serving, f"rank/r{rank}", bundle)
        before = serving.engine.stats().device_bytes
        serving.ask(f"rank/r{rank}").raise_for_status()
        taken = serving.engine.stats().device_bytes - before
        exact = sum(tensor.nbytes for tensor in bundle.tensors.values())
        # Each factor begins at a multiple of 16 bytes.
        assert exact <= taken < exact + 32 * len(bundle.config.modules)


def test_ranks_are_not_padded_in_the_computation(serving: Serving, base: FrozenBase) -> None:
    """SGLang #31305: beside one adapter of a large rank, the kernel computed that rank for all of them."""
    serving.engine.residency.pool.data.fill_(float("nan"))
    small = random_adapter(base, SeraConfig(2, 1, 8.0, "all-linear", use_mixer=False), 92, strength=0.5)
    upload(serving, "rank/small", small)
    wide = name(2)
    # What no factor of an adapter fills is not a number. Reading it would end a request.
    answers = all_at_once(serving, ["rank/small", wide, "rank/small", None])
    assert tokens_of(answers[0]) == tokens_of(answers[2]) == answer_of(base, small)
    serving.assert_right(wide, answers[1])
    serving.assert_right(None, answers[3])


def test_more_adapters_are_no_more_calls_of_the_kernel(serving: Serving, counter: Counter, base: FrozenBase) -> None:
    """vLLM #10062, LoRAX #670: one adapter took half of the throughput, and each further one took more."""
    layers = len(base.model.model.layers)
    for adapters in ([name(0)], [name(i) for i in range(WRITERS)]):
        # On the device already: who waits for a load has passes of its own.
        for adapter in adapters:
            serving.ask(adapter).raise_for_status()
        counter.take()
        answers = all_at_once(serving, list(adapters))
        passes, calls = counter.take()
        assert calls == passes * layers * LAYER_INPUTS
        assert passes < 2 * NEW_TOKENS + len(adapters)
        for adapter, answer in zip(adapters, answers, strict=True):
            serving.assert_right(adapter, answer)


def test_base_requests_compute_nothing_for_adapters(serving: Serving, counter: Counter) -> None:
    """vLLM #10898: requests to the base model became slower when adapters were enabled."""
    serving.assert_right(name(0))
    counter.take()
    for answer in all_at_once(serving, [None, None, None]):
        serving.assert_right(None, answer)
    passes, calls = counter.take()
    assert passes >= NEW_TOKENS and calls == 0


def test_a_name_that_was_given_to_other_weights_finds_no_old_cache(
    serving: Serving, base: FrozenBase, writers: dict[str, AdapterBundle]
) -> None:
    """vLLM #30931: the prefix cache returned the keys and values of another adapter of the same name."""
    for content in (name(0), name(1), name(0)):
        upload(serving, "same/name", writers[content])
        for _ in range(2):
            got = tokens_of(serving.ask("same/name", prompt=LONG))
            assert got == answer_of(base, writers[content], LONG)
        serving.client.delete("/v1/adapters/same/name").raise_for_status()
    # The second request of each pair, and the first of the last pair, whose content was there before.
    assert cached_tokens(serving) >= 3 * 32


def test_a_deleted_adapter_leaves_the_memory(serving: Serving) -> None:
    """vLLM #54839: unloading told the front end alone; the engine kept the adapter."""
    serving.assert_right(name(0))
    before = serving.engine.stats()
    serving.client.delete(f"/v1/adapters/{name(0)}").raise_for_status()
    refused(serving.client.post("/v1/generate", json=body(name(0))), 404, "adapter_not_found")
    after = serving.engine.stats()
    assert (before.resident, after.resident) == (1, 0)
    assert before.device_bytes > 0 == after.device_bytes == after.host_bytes


@pytest.mark.parametrize("target", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
def test_an_adapter_of_any_layer_is_applied(target: str, serving: Serving, base: FrozenBase) -> None:
    """vLLM #55193: an adapter of layers that the server did not serve loaded, and the base model answered."""
    bundle = random_adapter(base, SeraConfig(8, 2, 8.0, (target,)), 93, strength=3.0)
    upload(serving, "one/layer", bundle)
    got = tokens_of(serving.ask("one/layer"))
    assert got == answer_of(base, bundle) != serving.expected[None]


def test_an_adapter_of_a_layer_that_is_not_served_is_refused(serving: Serving, base: FrozenBase) -> None:
    """vLLM #55193: the same, where no layer of the adapter is one of the base."""
    bundle = random_adapter(base, SeraConfig(8, 2, 8.0, ("q_proj",)), 93)
    modules: dict[str, ModuleSpec] = {}
    tensors = {}
    for path, spec in bundle.config.modules.items():
        other = path.replace("q_proj", "query_key_value")
        modules[other] = spec
        tensors |= {key.replace(path, other): value for key, value in bundle.tensors.items() if key.startswith(path)}
    fields = {key: value for key, value in dict(bundle.config).items() if key != "format_version"}
    odd = AdapterBundle(AdapterConfig(**{**fields, "modules": modules}), tensors)
    files = {"bundle": ("a.safetensors", odd.to_bytes())}
    answer = serving.client.post("/v1/adapters", files=files, data={"name": "odd/layer"})
    error = refused(answer, 422, "unknown_module")
    assert "query_key_value" in error["message"]


@pytest.mark.parametrize(
    "model",
    ["../outside/x", "/etc/passwd", "t0/../x", "..", "t0/..", "t0/writer/../../x", "t0/writer@../../x", "%2e%2e/x"],
)
def test_a_models_name_is_no_path(model: str, serving: Serving, writers: dict[str, AdapterBundle]) -> None:
    """vLLM #46287: a model's name led out of the adapters' directory."""
    writers[name(0)].save(serving.store.root.parent / "outside" / "x")
    writers[name(0)].save(serving.store.root.parent / "x")
    for path, field in (("/v1/generate", "adapter"), ("/v1/completions", "model")):
        answer = serving.client.post(path, json={field: model, "prompt": PROMPT})
        assert answer.status_code in (404, 422), answer.text
        assert str(serving.store.root.parent) not in answer.text
    # httpx would resolve the dots itself.
    listed = httpx.get(f"{serving.url}/v1/models/{quote(model, safe='')}")
    assert listed.status_code in (404, 422), listed.text


def test_a_path_is_loaded_from_the_allowed_directory_alone(serve: Serve, base: FrozenBase, tmp_path: Path) -> None:
    """LoRAX #798: a request named a local path, and the server read it."""
    checkpoint = save_checkpoint(base.model, tmp_path / "elsewhere" / "adapter")
    allowed = tmp_path / "allowed"
    shutil.copytree(checkpoint, allowed / "adapter")
    (allowed / "out").symlink_to(checkpoint)

    def load(serving: Serving, path: object) -> httpx.Response:
        request = {"lora_name": "path/adapter", "lora_path": str(path)}
        return serving.client.post("/v1/load_lora_adapter", json=request)

    refused(load(serve(), checkpoint), 403, "loading_by_path_disabled")
    serving = serve(lora_path_root=allowed)
    for path in (checkpoint, "../elsewhere/adapter", "out", "adapter/../../elsewhere/adapter"):
        refused(load(serving, path), 403, "path_not_allowed")
    refused(serving.client.post("/v1/generate", json=body("path/adapter")), 404, "adapter_not_found")
    load(serving, "adapter").raise_for_status()
    assert tokens_of(serving.ask("path/adapter")) != serving.expected[None]


def test_pickled_weights_are_not_read(serve: Serve, base: FrozenBase, tmp_path: Path) -> None:
    """TensorRT-LLM #13391: weights were unpickled, which runs what their author wrote."""
    checkpoint = save_checkpoint(base.model, tmp_path / "allowed" / "adapter")
    witness = tmp_path / "it ran"
    packed = pickled_checkpoint(checkpoint, witness)
    serving = serve(lora_path_root=checkpoint.parent)
    for files in (
        {"bundle": packed},
        {"bundle": (checkpoint / "adapter_model.bin").read_bytes(), "config": (checkpoint / CONFIG).read_bytes()},
    ):
        answer = serving.client.post("/v1/adapters", files=files, data={"name": "bad/pickle"})
        assert answer.status_code == 422, answer.text
    request = {"lora_name": "bad/pickle", "lora_path": "adapter"}
    refused(serving.client.post("/v1/load_lora_adapter", json=request), 422, "pickled_checkpoint")
    assert not witness.exists()


def test_as_many_adapters_as_slots_and_a_base_request(serve: Serve) -> None:
    """SGLang #23141: as many adapters as a batch may have, and one request to the base model, ended the scheduler."""
    serving = serve(max_resident=3)
    adapters: list[str | None] = [name(0), name(1), name(2), None, name(3), None, name(4)]
    for adapter, answer in zip(adapters, all_at_once(serving, adapters), strict=True):
        serving.assert_right(adapter, answer)
    serving.assert_right(name(0))


def test_a_recorded_step_serves_more_adapters_than_it_was_recorded_with(
    base: FrozenBase, writers: dict[str, AdapterBundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang #28371: a graph that was captured with one adapter gave wrong tokens for a batch of several."""
    store = AdapterStore(tmp_path / "store")
    alike = [adapter for i, adapter in enumerate(writers) if i % 3 == 1][:3]
    for adapter in alike:
        store.publish(writers[adapter], adapter)
    # A graph holds Triton's launches; on a CPU, torch's operations stand in for them.
    monkeypatch.setattr(served_linear, "add_updates", static_add_updates(8))
    engine = ServingEngine(base, store, ServeSettings(store=store.root, pool_mib=4, kv_cache_tokens=4096))
    engine.start()
    replayed = Replayed(engine)

    async def batch(adapters: list[str]) -> list[list[int]]:
        asked = [collect(engine, adapter=each, prompt=PROMPT, max_new_tokens=NEW_TOKENS) for each in adapters]
        results = await asyncio.gather(*asked)
        await settled(engine)
        return [result.token_ids for result in results]

    try:
        for adapters in ([alike[0]] * 4, [*alike, alike[0]], [alike[2]] * 3):
            expected = [answer_of(base, writers[adapter]) for adapter in adapters]
            assert asyncio.run(batch(adapters)) == expected
    finally:
        engine.stop()
    replayed.check()
    # One for each size, whatever adapters a batch has.
    assert len(replayed.recordings) == len({key.tokens for key in replayed.recordings})
    assert replayed.replays > NEW_TOKENS


def test_a_slow_load_delays_no_other_request(serving: Serving) -> None:
    """vLLM #31941: while one adapter loaded, every request stood still."""
    slow = serving.store.resolve(name(8)).digest
    proceed = threading.Event()
    serving.store.before_load = lambda digest: (digest == slow and proceed.wait(30)) and None
    with ThreadPoolExecutor(1) as client:
        waiting = client.submit(serving.ask, name(8))
        wait_until(lambda: serving.engine.stats().loading == 1)
        for adapter in (name(0), None, name(1)):
            serving.assert_right(adapter)
        assert not waiting.done()
        proceed.set()
        serving.assert_right(name(8), waiting.result(30))


def test_metrics_say_where_adapters_are(serve: Serve) -> None:
    """vLLM #45325: routers could not see which server had which adapters in memory."""
    serving = serve(max_resident=2, host_cache_mib=1)

    def values() -> dict[str, float]:
        families = text_string_to_metric_families(serving.client.get("/metrics").text)
        samples = (sample for family in families for sample in family.samples)
        return {sample.name + "".join(sample.labels.values()): sample.value for sample in samples}

    for adapter in (name(0), name(0), name(1), name(4), name(0)):
        serving.assert_right(adapter)
    seen = values()
    assert seen["sera_adapters_resident"] == 2 and seen["sera_adapter_evictions_total"] == 2
    assert seen["sera_adapter_hits_totalstore"] == 3
    assert seen["sera_adapter_hits_totaldevice"] + seen["sera_adapter_hits_totalhost"] == 2
    assert seen["sera_adapter_device_bytes"] == serving.engine.stats().device_bytes > 0


def test_a_restart_forgets_no_adapter(serving: Serving, base: FrozenBase, writers: dict[str, AdapterBundle]) -> None:
    """vLLM #12174: adapters that were loaded while the server ran were gone after its restart."""
    upload(serving, "new/one", writers[name(3)])
    store = AdapterStore(serving.store.root)
    engine = ServingEngine(base, store, serving.engine.settings)
    with live_server(build_app(engine, store, engine.settings)) as url:
        answer = httpx.post(f"{url}/v1/generate", json=body("new/one"), timeout=30)
    assert tokens_of(answer) == answer_of(base, writers[name(3)])


def test_adapters_that_are_added_change_no_request_under_way(
    serve: Serve, base: FrozenBase, writers: dict[str, AdapterBundle]
) -> None:
    """vLLM #47724: after an adapter was added, a request under way was served with another tenant's weights."""
    serving = serve(max_resident=2, host_cache_mib=0)
    expected = answer_of(base, writers[name(0)], tokens=200)
    with streaming(serving, name(0), 200) as tokens:
        for number in range(3):
            upload(serving, f"hot/added{number}", random_adapter(base, SeraConfig(8, 4, 8.0, "all-linear"), number))
            serving.ask(f"hot/added{number}", max_new_tokens=2).raise_for_status()
            serving.assert_right(name(number + 1))
        assert serving.engine.stats().evictions >= 3
    assert tokens == expected


@pytest.mark.parametrize("prefix", ["base_model.model.decoder.block.", "text_model.encoder.", "model.visual."])
def test_a_checkpoint_whose_keys_match_no_layer_is_refused(
    prefix: str, serving: Serving, base: FrozenBase, tmp_path: Path
) -> None:
    """vLLM #34186: an adapter whose keys had another prefix loaded, and the base model answered."""
    checkpoint = save_checkpoint(base.model, tmp_path / "adapter")
    edit_tensors(checkpoint, lambda all_: {re.sub(r"^.*model\.layers\.", prefix, key): t for key, t in all_.items()})
    files = {"bundle": (checkpoint / WEIGHTS).read_bytes(), "config": (checkpoint / CONFIG).read_bytes()}
    answer = serving.client.post("/v1/adapters", files=files, data={"name": "bad/prefix"})
    assert answer.status_code == 422, answer.text
    refused(serving.client.post("/v1/generate", json=body("bad/prefix")), 404, "adapter_not_found")


def test_a_checkpoint_of_a_model_within_another_is_applied(serving: Serving, base: FrozenBase, tmp_path: Path) -> None:
    """vLLM #48019: where the text model is a part of another one, an adapter loaded and did nothing."""
    checkpoint = save_checkpoint(base.model, tmp_path / "adapter")
    config = (checkpoint / CONFIG).read_bytes()

    def send(adapter: str) -> list[int]:
        files = {"bundle": (checkpoint / WEIGHTS).read_bytes(), "config": config}
        serving.client.post("/v1/adapters", files=files, data={"name": adapter}).raise_for_status()
        return tokens_of(serving.ask(adapter))

    plain = send("text/plain")
    edit_tensors(
        checkpoint, lambda all_: {k.replace("model.layers", "language_model.layers"): t for k, t in all_.items()}
    )
    assert send("text/within") == plain != serving.expected[None]


def test_no_salt_leads_to_another_adapters_cache(serving: Serving, base: FrozenBase) -> None:
    """SGLang #24638: a base request with an adapter's id as its cache key read the adapter's keys and values."""
    digest = serving.store.resolve(name(0)).digest
    adapted = tokens_of(serving.ask(name(0), prompt=LONG))
    expected = greedy(base, base.tokenizer(LONG)["input_ids"], NEW_TOKENS)
    assert adapted != expected
    for salt in (digest, digest[:32], name(0), "t0", f"t0/{digest}"[:64], f"{name(0)}@v1", "/", "0 0 t0"):
        assert tokens_of(serving.ask(None, prompt=LONG, cache_salt=salt)) == expected
        assert cached_tokens(serving) == 0


def test_an_older_version_is_served_after_a_newer_one(
    serving: Serving, base: FrozenBase, writers: dict[str, AdapterBundle]
) -> None:
    """TRL #7017: a newer version of an adapter made requests for the older one end with 404."""
    old, new = writers[name(0)], writers[name(1)]
    with streaming(serving, name(0), 100) as tokens:
        assert upload(serving, name(0), new) == 2
        assert tokens_of(serving.ask(name(0))) == answer_of(base, new)
        assert tokens_of(serving.ask(f"{name(0)}@v1")) == answer_of(base, old)
    assert tokens == answer_of(base, old, tokens=100)


def test_a_load_does_no_more_work_where_many_are_loaded(
    serve: Serve, writers: dict[str, AdapterBundle], base: FrozenBase
) -> None:
    """PEFT #981: each load of an adapter took longer than the one before it."""
    work = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal work
        work += event in ("call", "c_call") and threading.current_thread().name.startswith("adapter-loader")

    # Threads that begin from now on are counted: those that load adapters.
    threading.setprofile(count)
    try:
        serving = serve(host_cache_mib=0)
        for number in range(24):
            serving.store.publish(
                random_adapter(base, SeraConfig(4, 2, 8.0, ("q_proj",)), number), f"many/a{number:02}"
            )
        loads = []
        for number in range(24):
            before = work
            serving.ask(f"many/a{number:02}", max_new_tokens=1).raise_for_status()
            loads.append(work - before)
    finally:
        threading.setprofile(None)  # type: ignore[arg-type]
    assert serving.engine.stats().resident == 24
    # The first two start threads. Later ones differ by the numbers of waits.
    assert 0 < max(loads[12:]) <= 1.25 * min(loads[2:12]), loads


def test_a_rank_of_256_is_one_call_of_its_true_size(serving: Serving, counter: Counter, base: FrozenBase) -> None:
    """vLLM #14435: an adapter of rank 256 was four times slower than one of rank 64."""
    sizes, calls = [], []
    for rank in (64, 256):
        bundle = random_adapter(base, SeraConfig(rank, 8, 8.0, ("q_proj", "down_proj"), use_mixer=False), 95)
        upload(serving, f"rank/r{rank}", bundle)
        before = serving.engine.stats().device_bytes
        counter.take()
        assert tokens_of(serving.ask(f"rank/r{rank}")) == answer_of(base, bundle)
        sizes.append(serving.engine.stats().device_bytes - before)
        calls.append(counter.take())
    assert sizes[1] == pytest.approx(4 * sizes[0], rel=0.01)
    assert calls[0] == calls[1]


def test_the_first_requests_compile_nothing(serving: Serving) -> None:
    """vLLM #43009, #55967: the first request with an adapter waited for a compiler."""
    kernels = [
        value
        for module in (numba_path, cpu_decode)
        for value in vars(module).values()
        if hasattr(value, "signatures") and hasattr(value, "py_func")
    ]
    before = [len(kernel.signatures) for kernel in kernels]
    # What another kernel calls is compiled with it, and has no signature of its own.
    assert len(kernels) >= 4 and sum(before) >= 2
    for adapter, answer in zip([name(0), name(1), None], all_at_once(serving, [name(0), name(1), None]), strict=True):
        serving.assert_right(adapter, answer)
    serving.ask(name(2), prompt=LONG, temperature=0.8, top_k=5, logprobs=2).raise_for_status()
    assert [len(kernel.signatures) for kernel in kernels] == before


def test_deleting_after_several_answers_to_one_prompt_returns(serving: Serving) -> None:
    """SGLang #36894: after parallel sampling, unloading an adapter never returned, and the server hung."""
    for _ in range(3):
        answer = serving.ask(name(0), n=16, temperature=1.0, max_new_tokens=20)
        assert len(answer.json()["choices"]) == 16
    began = time.monotonic()
    serving.client.delete(f"/v1/adapters/{name(0)}", timeout=5).raise_for_status()
    assert time.monotonic() - began < 5
    wait_until(lambda: serving.engine.stats().resident == 0)
    serving.assert_right(name(1))


def test_a_request_that_was_given_up_keeps_no_adapter(serving: Serving) -> None:
    """SGLang #34205: an aborted request kept its reference, so that the adapter could not be unloaded any more."""
    for _ in range(3):
        with httpx.stream(
            "POST", f"{serving.url}/v1/generate", json=body(name(0), max_new_tokens=230, stream=True)
        ) as r:
            lines = r.iter_lines()
            assert next(lines).startswith("data: {")
            assert serving.engine.residency.leases() == 1
        wait_until(lambda: serving.engine.residency.leases() == 0)
    serving.client.delete(f"/v1/adapters/{name(0)}").raise_for_status()
    assert serving.engine.stats().device_bytes == 0


def test_several_weighted_adapters_in_one_request(
    serving: Serving, base: FrozenBase, writers: dict[str, AdapterBundle]
) -> None:
    """vLLM #51940, LoRAX #429: one request could not name several adapters with weights."""
    first, second = writers[name(0)], writers[name(3)]
    upload(serving, "sum/one", first)
    upload(serving, "sum/two", second)
    parts = [{"adapter": "sum/one", "weight": 0.5}, {"adapter": "sum/two", "weight": -0.75}]
    whole = merged(base, first)
    other = merged(base, second)
    for (path, weight), start, far in zip(
        whole.model.named_parameters(), base.model.parameters(), other.model.parameters(), strict=True
    ):
        exact = start.double() + 0.5 * (weight.double() - start.double()) - 0.75 * (far.double() - start.double())
        weight.data.copy_(exact.to(weight.dtype)), path
    expected = greedy(whole, base.tokenizer(PROMPT)["input_ids"], NEW_TOKENS)
    request = body(None) | {"adapter": parts}
    assert tokens_of(serving.client.post("/v1/generate", json=request)) == expected
    assert expected not in (serving.expected[name(0)], serving.expected[name(3)], serving.expected[None])


def test_adapters_share_a_cache_where_their_contents_are_equal_alone(
    serving: Serving, base: FrozenBase, writers: dict[str, AdapterBundle]
) -> None:
    """TensorRT-LLM #11874, vLLM #19710: adapters shared no computed prompt, even where it would have been right."""
    for adapter, content in {"share/a": name(0), "share/copy": name(0), "share/other": name(1)}.items():
        upload(serving, adapter, writers[content])
    pages = len(LONG) // 32 * 32
    found = []
    for adapter, content in (("share/a", name(0)), ("share/copy", name(0)), ("share/other", name(1))):
        before = cached_tokens(serving)
        assert tokens_of(serving.ask(adapter, prompt=LONG)) == answer_of(base, writers[content], LONG)
        found.append(cached_tokens(serving) - before)
    assert found == [0, pages, 0]


def test_heads_of_different_sizes_in_one_batch(serving: Serving, base: FrozenBase) -> None:
    """PEFT #2136: classifiers of one base had to have heads of one size."""
    heads = {}
    for count in (2, 3, 7):
        labels = [f"label{number}" for number in range(count)]
        heads[f"heads/of{count}"] = random_adapter(base, SeraConfig(8, 2, 8.0, "all-linear"), count, labels=labels)
    for adapter, bundle in heads.items():
        upload(serving, adapter, bundle)
    text = "Once upon a time there was a sailor"
    answer = serving.client.post("/v1/classify", json={"adapters": list(heads), "inputs": [text]})
    assert answer.status_code == 200, answer.text
    ids, mask = encoded(base, [text], 64)
    for (adapter, bundle), got in zip(heads.items(), answer.json()["adapters"], strict=True):
        assert bundle.config.pooling is not None
        states = merged(base, bundle).pooled_states(ids, mask, bundle.config.pooling)
        logits = states @ bundle.tensors["head.weight"].T + bundle.tensors["head.bias"]
        assert got["adapter"] == adapter
        probabilities = torch.tensor(list(got["results"][0]["probabilities"].values()))
        torch.testing.assert_close(probabilities, logits[0].softmax(0), rtol=1e-4, atol=1e-5)
