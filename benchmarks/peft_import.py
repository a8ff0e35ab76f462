"""What an import of a PEFT checkpoint costs: `python -m benchmarks.peft_import [CHECKPOINTS]`.

1. Time from an upload of 20 MB to its answer, and to the first token of a new and of a known adapter, over HTTP.
2. Relative error of the nearest SeRA of public checkpoints; CHECKPOINTS has a folder with safetensors for each.

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import safetensors.torch
import torch

from adapters_store import AdapterStore
from adapters_store.convert.compress import nearest_sera
from benchmarks.last_line import tell
from benchmarks.llama_bases import llama_base
from benchmarks.server_process import ServerProcess
from sera_serve.base import FrozenBase

WIDTH, LAYERS, RANK, ROUNDS = 512, 8, 64, 5
PROMPT = list(range(1, 33))


def checkpoint(base: FrozenBase, seed: int) -> tuple[bytes, bytes]:
    """(configuration, weights) of a float32 LoRA on every linear layer."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for path, (d_in, d_out) in base.module_shapes().items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = 0.01 * torch.randn(RANK, d_in, generator=generator)
        tensors[f"base_model.model.{path}.lora_B.weight"] = 0.01 * torch.randn(d_out, RANK, generator=generator)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK}
    return json.dumps(config).encode(), safetensors.torch.save(tensors)


def time_import() -> list[dict[str, Any]]:
    """Return the times of uploads and first tokens. The server itself compares each import with PEFT's arithmetic."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        base = llama_base(WIDTH, LAYERS)
        base.model.save_pretrained(folder / "base")
        base.tokenizer.save_pretrained(folder / "base")
        AdapterStore(folder / "store")
        times: dict[str, list[float]] = {"upload to 201": [], "first token, new": [], "first token, known": []}
        server = ServerProcess(folder / "base", folder / "store", folder / "log")
        with server, httpx.Client(base_url=server.url, timeout=120) as client:
            server.wait_until_ready(300)
            body = {"adapter": None, "token_ids": PROMPT, "max_new_tokens": 1}
            client.post("/v1/generate", json=body).raise_for_status()
            for round_ in range(ROUNDS):
                config, weights = checkpoint(base, round_)
                name = f"acme/imported-{round_}"
                began = time.perf_counter()
                files = {"bundle": weights, "config": config}
                client.post("/v1/adapters", files=files, data={"name": name}).raise_for_status()
                times["upload to 201"].append(time.perf_counter() - began)
                for kind in ("new", "known"):
                    began = time.perf_counter()
                    client.post("/v1/generate", json=body | {"adapter": name}).raise_for_status()
                    times[f"first token, {kind}"].append(time.perf_counter() - began)
    sizes = {"parameters": sum(p.numel() for p in base.model.parameters()), "bytes": len(weights)}
    return [
        {
            "kind": kind,
            **sizes,
            "median_s": round(statistics.median(values), 3),
            "least_s": round(min(values), 3),
            "most_s": round(max(values), 3),
        }
        for kind, values in times.items()
    ]


def compress(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the errors of the nearest SeRA of each layer of a checkpoint."""
    tensors = safetensors.torch.load_file(next(folder.glob("*.safetensors")))
    pairs = []
    for name, tensor in tensors.items():
        if "lora_A" in name:
            pairs.append((tensor.double().T, tensors[name.replace("lora_A", "lora_B")].double().T))
    for split, times in ((2, 1), (4, 1), (4, 2), (8, 1), (8, 4)):
        before = after = 0
        errors = []
        for left, right in pairs:
            rank = times * left.shape[1]
            errors.append(nearest_sera(left, right, split, rank).errors[-1])
            widths = left.shape[0] + right.shape[1]
            before += widths * left.shape[1]
            after += widths * rank // split + rank * rank
        yield {
            "checkpoint": folder.name,
            "rank before": left.shape[1],
            "split": split,
            "rank": rank,
            "parameters, of before": round(after / before, 2),
            "median error": round(statistics.median(errors), 3),
            "largest error": round(max(errors), 3),
        }


def main() -> None:
    """Print both measurements, or without a folder of checkpoints the first, and then one JSON line."""
    parser = argparse.ArgumentParser(description="Time the import of a PEFT checkpoint, and compress checkpoints.")
    parser.add_argument("checkpoints", type=Path, nargs="?", help="folder with a folder for each checkpoint")
    checkpoints: Path | None = parser.parse_args().checkpoints
    # Looked for at the beginning: the first measurement takes a minute.
    folders = sorted({path.parent for path in checkpoints.glob("*/*.safetensors")}) if checkpoints else []
    if checkpoints and not folders:
        parser.error(f"{checkpoints} has no folder with a .safetensors file")
    rows = time_import()
    rows += [row for folder in folders for row in compress(folder)]
    for row in rows:
        print(", ".join(f"{key} {value}" for key, value in row.items()), file=sys.stderr)
    # The server refuses an import that does not compute what PEFT does.
    tell("peft_import", rows)


if __name__ == "__main__":
    main()
