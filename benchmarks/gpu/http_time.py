"""The HTTP server under load: `sera-serve serve` on a saved base with random weights, and clients that stream."""

from __future__ import annotations

import asyncio
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.gpu.bases import large_base, random_bundles, store_of
from benchmarks.gpu.operands import Member
from benchmarks.gpu.setting import Row, Setting
from benchmarks.http_load import Answer, LoadClient
from benchmarks.workload import WorkloadSpec, make_trace

# Half of Llama-3-8B's: the weights are written and read once.
MOST_LAYERS = 16
ADAPTERS = 64
CLIENTS = 64
# Of each load; before the first, so long a load that is not reported.
SECONDS, SMALL_SECONDS, WARM_UP_SECONDS = 20.0, 1.0, 3.0
_READY_S = 120.0


def time_server(setting: Setting) -> Iterator[Row]:
    """Tokens a second and waiting times with 64 clients: of the base model, of one adapter, of an adapter for each."""
    layers = 1 if setting.small else min(setting.layers, MOST_LAYERS)
    adapters = 4 if setting.small else ADAPTERS
    member = Member(8, 8) if setting.small else Member(64, 64)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        began = time.monotonic()
        # The server calls the base by its folder's name.
        base = large_base(setting, layers, "base")
        base.model.save_pretrained(folder / "base")
        base.tokenizer.save_pretrained(folder / "base")
        saved = time.monotonic()
        bundles = random_bundles(base, member, adapters)
        store_of(folder / "store", {f"acme/a{i}": bundle for i, bundle in enumerate(bundles)})
        published = time.monotonic()
        del base
        if setting.on_gpu:
            torch.cuda.empty_cache()
        settings: dict[str, int | str] = {
            "device": setting.device.type,
            "max_sequences": 4 if setting.small else CLIENTS,
            "max_resident": 2 * adapters,
            "kv_cache_tokens": 2048 if setting.small else 64 * 512,
            "pool_mib": 16 if setting.small else 1024,
            "max_queue": 4096,
        }
        with served(folder / "base", folder / "store", folder / "server.log", settings) as port:
            yield {
                "layers": layers,
                "save_s": saved - began,
                "publish_s": published - saved,
                "start_s": time.monotonic() - published,
            }
            yield from _loads(setting, port, adapters)


@contextmanager
def served(base: Path, store: Path, log: Path, settings: dict[str, int | str]) -> Iterator[int]:
    """A server process on a free port, which is given; it is ended at the end of the block.

    Raises:
        RuntimeError: It does not become ready, or has not ended well; with the end of its log.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    options = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    command = [sys.executable, "-c", "from sera_serve.cli import main; main()", "serve", f"--base={base}"]
    command += [f"--store={store}", f"--port={port}", *options]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=dict(os.environ))
    try:
        _wait_until_ready(process, port, log)
        yield port
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    if process.returncode != 0:
        raise RuntimeError(f"the server ended with {process.returncode}: {log.read_text()[-1500:]}")


def _wait_until_ready(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + _READY_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5) as response:
                if response.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            pass
        time.sleep(0.1)
    raise RuntimeError(f"the server did not become ready: {log.read_text()[-1500:]}")


def _loads(setting: Setting, port: int, adapters: int) -> Iterator[Row]:
    """The mixes one after the other, each with prompts that no load before had."""
    mixes: dict[str, Sequence[str | None]] = {
        "base": [None],
        "1 adapter": ["acme/a0"],
        "own adapters": [f"acme/a{i}" for i in range(adapters)],
    }
    clients = 4 if setting.small else CLIENTS
    rounds = [(name, SMALL_SECONDS if setting.small else SECONDS) for name in mixes]
    for place, (name, seconds) in enumerate([("own adapters", min(WARM_UP_SECONDS, rounds[0][1])), *rounds]):
        names = mixes[name]
        spec = WorkloadSpec(
            adapters=len(names),
            rate=100 if setting.small else 400,
            duration=4 if setting.small else 60,
            alpha=1.0,
            input_range=(4, 8) if setting.small else (16, 64),
            output_range=(2, 4) if setting.small else (32, 96),
            vocabulary=250,
            prompts=place,
        )
        client = LoadClient("127.0.0.1", port, names.__getitem__)  # type: ignore[arg-type]
        answers = asyncio.run(client.closed_loop(cycle(make_trace(spec)), clients, seconds))
        if place:
            yield {"case": name, "clients": clients} | _figures(answers, seconds)
    yield from ({"metric": name, "value": value} for name, value in _metrics(port).items())


def _figures(answers: list[Answer], seconds: float) -> Row:
    """Of one load; answers that were cut short at its end count by the tokens that they got."""
    whole = [answer for answer in answers if answer.complete]
    first = [answer.ttft * 1e3 for answer in answers if answer.times]
    gaps = [
        (answer.times[-1] - answer.times[0]) / sum(answer.counts[1:]) * 1e3 for answer in whole if answer.counts[1:]
    ]
    refused = Counter(answer.error for answer in answers if answer.error is not None)
    return {
        "seconds": seconds,
        "answers": len(whole),
        "tokens_per_s": sum(len(answer.tokens) for answer in answers) / seconds,
        "requests_per_s": len(whole) / seconds,
        "first_token_median_ms": statistics.median(first) if first else None,
        "first_token_p99_ms": float(np.percentile(first, 99)) if first else None,
        "per_token_median_ms": statistics.median(gaps) if gaps else None,
        "wrong": sum(not answer.right_length for answer in whole),
        "refused": str(dict(refused)) if refused else None,
    }


def _metrics(port: int) -> dict[str, float]:
    """The server's own figures about its adapters, all together."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
        text = response.read().decode()
    return {
        sample.name + "".join(f" {value}" for value in sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if "adapter" in sample.name and "adapter" not in sample.labels and not sample.name.endswith("_bucket")
    }
