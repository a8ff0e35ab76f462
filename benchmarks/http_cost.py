"""What HTTP costs: classifications of one input from 48 clients, against the same engine driven in process.

    python -m benchmarks.http_cost [--width N] [--layers N] [--rounds N] [--seconds S] [--quick]

The base is an encoder of MiniLM's shape with random weights, and a SeRA classifier. One process has the engine and
the HTTP server. In turns, 48 coroutines on the server's event loop call the engine, and 48 connections of a small
program in C ask over HTTP. So both ways have the same engine, threads and machine. The program is compiled by `cc`.
The last line is one JSON object; `ratio` is the median over rounds of HTTP's requests a second over those in process.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Annotated, Any

import httpx
import torch
import typer
import uvicorn
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from adapters_store import AdapterStore
from benchmarks.last_line import tell
from benchmarks.random_classifiers import random_classifier
from sera_serve.base import FrozenBase, freeze_base
from sera_serve.commands.serve import bound_socket, http_config
from sera_serve.config import ServeSettings
from sera_serve.engine import Principal, ServingEngine
from sera_serve.server import build_app

CLIENT = Path(__file__).with_name("http_cost_client.c")
CLIENTS = 48
WORDS = 4096
TEXTS = 64
LABELS = ["billing", "delivery", "account", "other"]
NAME = "acme/tickets"


def encoder(width: int, layers: int) -> FrozenBase:
    """A BERT with heads of 32 and an MLP four times as wide."""
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 32),
        vocab_size=WORDS,
        max_position_embeddings=512,
    )
    backend = Tokenizer(models.WordLevel({f"w{index}": index for index in range(WORDS)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w0", model_max_length=512)
    return freeze_base(BertModel(config, add_pooling_layer=False), tokenizer, "encoder", "encoder")


def texts() -> list[str]:
    """Texts of 12 to 28 tokens."""
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(12, 29, (TEXTS,), generator=generator).tolist()
    return [" ".join(f"w{index}" for index in torch.randint(1, WORDS, (n,), generator=generator)) for n in lengths]


def compiled(folder: Path) -> Path:
    """Compile the client. Raises RuntimeError without a C compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        raise RuntimeError("no C compiler: install gcc or clang")
    program = folder / "http_cost_client"
    subprocess.run([compiler, "-O2", "-o", program, CLIENT], check=True)
    return program


def http_requests(port: int) -> bytes:
    """The requests, as the client reads them."""
    whole = b""
    for text in texts():
        body = json.dumps({"adapter": NAME, "inputs": [text]}).encode()
        head = f"POST /v1/classify HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        whole += f"{len(request)}\n".encode() + request
    return whole


@dataclass
class Running:
    """A server with its engine in this process."""

    engine: ServingEngine
    loop: asyncio.AbstractEventLoop
    port: int

    def in_process(self, seconds: float) -> float:
        """Classifications a second by coroutines on the server's event loop."""
        return asyncio.run_coroutine_threadsafe(self._drive(seconds), self.loop).result()

    async def _drive(self, seconds: float) -> float:
        inputs, turn, done = texts(), count(), 0
        principal = Principal("acme")
        began = time.perf_counter()
        until = began + seconds

        async def client() -> None:
            nonlocal done
            while True:
                await self.engine.classify(NAME, [inputs[next(turn) % TEXTS]], principal)
                if time.perf_counter() >= until:
                    return
                done += 1

        await asyncio.gather(*(client() for _ in range(CLIENTS)))
        return done / seconds

    def over_http(self, program: Path, seconds: float) -> dict[str, Any]:
        """What the client measured."""
        command = [program, str(self.port), str(CLIENTS), str(seconds)]
        output = subprocess.run(command, input=http_requests(self.port), stdout=subprocess.PIPE, check=True).stdout
        figures: dict[str, Any] = json.loads(output)
        return figures

    def agrees(self) -> bool:
        """Whether HTTP answers what the engine does."""
        principal = Principal("acme")
        for text in texts()[:8]:
            work = self.engine.classify(NAME, [text], principal)
            (mine,) = asyncio.run_coroutine_threadsafe(work, self.loop).result().results
            url = f"http://127.0.0.1:{self.port}/v1/classify"
            response = httpx.post(url, json={"adapter": NAME, "inputs": [text]})
            (theirs,) = response.raise_for_status().json()["results"]
            if any(abs(mine.probabilities[label] - theirs["probabilities"][label]) > 1e-4 for label in LABELS):
                return False
        return True


@contextmanager
def running(base: FrozenBase, store: AdapterStore, settings: ServeSettings) -> Iterator[Running]:
    """Run a server on a free port."""
    engine = ServingEngine(base, store, settings)
    app = build_app(engine, store, settings)
    config = http_config(app, settings, lambda code: None, log_level="warning")
    server = uvicorn.Server(config)
    started: Future[asyncio.AbstractEventLoop] = Future()
    with bound_socket("127.0.0.1", 0) as listener:

        async def serve() -> None:
            started.set_result(asyncio.get_running_loop())
            await server.serve([listener])

        def run() -> None:
            with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
                runner.run(serve())

        thread = threading.Thread(target=run)
        thread.start()
        loop = started.result()
        while not server.started:
            time.sleep(0.01)
        # As `run_server` does: a collection that visits modules and models stops every thread.
        gc.collect()
        gc.freeze()
        try:
            yield Running(engine, loop, listener.getsockname()[1])
        finally:
            gc.unfreeze()
            server.should_exit = True
            thread.join()


def main(
    width: Annotated[int, typer.Option(help="Hidden size of the encoder.")] = 384,
    layers: Annotated[int, typer.Option(help="Layers of the encoder.")] = 6,
    rounds: Annotated[int, typer.Option(help="Turns of both ways.")] = 5,
    seconds: Annotated[float, typer.Option(help="Seconds of each turn.")] = 4.0,
    quick: Annotated[bool, typer.Option(help="One short round on a small encoder.")] = False,
) -> None:
    """Measure, and print one JSON line."""
    if quick:
        width, layers, rounds, seconds = 64, 2, 1, 0.5
    rows: list[dict[str, Any]] = []
    base = encoder(width, layers)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        store = AdapterStore(folder / "store")
        store.publish(random_classifier(base, 1, LABELS, ("query", "value"), "cls"), NAME)
        server = stack.enter_context(running(base, store, ServeSettings(store=store.root, pool_mib=64)))
        program = compiled(folder)
        correct = server.agrees()
        server.in_process(seconds / 2)
        server.over_http(program, seconds / 2)
        for _ in range(rounds):
            row: dict[str, Any] = {"in_process_per_s": round(server.in_process(seconds), 1)}
            before = time.process_time()
            figures = server.over_http(program, seconds)
            correct = correct and not figures["failed"]
            row["http_per_s"] = round(figures["answers"] / figures["seconds"], 1)
            row["server_cpu_s"] = round((time.process_time() - before) / figures["answers"], 6)
            row |= {"p50_s": figures["p50_s"], "p99_s": figures["p99_s"]}
            row["ratio"] = round(row["http_per_s"] / row["in_process_per_s"], 3)
            rows.append(row)
            print(row, file=sys.stderr)
    ratio = round(statistics.median(row["ratio"] for row in rows), 3)
    for row in rows:
        print("  ".join(f"{key} {value:>9}" for key, value in row.items()))
    facts = {"width": width, "layers": layers, "clients": CLIENTS, "cores": os.cpu_count(), "ratio": ratio}
    tell("http_cost", rows, correct=correct, **facts)


if __name__ == "__main__":
    typer.run(main)
