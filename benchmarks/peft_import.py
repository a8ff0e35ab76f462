"""What an import of a PEFT checkpoint costs: `python -m benchmarks.peft_import [CHECKPOINTS]`.

1. Time from an upload of 20 MB to its answer, and to the first token of a new and of a known adapter, over HTTP.
2. Relative error of the nearest SeRA of public checkpoints; CHECKPOINTS has a folder with safetensors for each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import httpx
import safetensors.torch
import torch

from adapters_store import AdapterStore
from adapters_store.convert.compress import nearest_sera
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


def time_import() -> None:
    """Print the times of uploads and of first tokens."""
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
        print(f"base of {sum(p.numel() for p in base.model.parameters()):,} parameters; {len(weights):,} bytes")
        for kind, values in times.items():
            print(f"{kind}: median {statistics.median(values):.3f} s, {min(values):.3f} to {max(values):.3f}")


def compress(folder: Path) -> None:
    """Print the errors of the nearest SeRA of each layer of a checkpoint."""
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
        print(
            f"| {folder.name} | {left.shape[1]} | {split} | {rank} | {after / before:.2f} | "
            f"{statistics.median(errors):.3f} | {max(errors):.3f} |",
            flush=True,
        )


def main() -> None:
    """Print both measurements, or without a folder of checkpoints the first."""
    parser = argparse.ArgumentParser(description="Time the import of a PEFT checkpoint, and compress checkpoints.")
    parser.add_argument("checkpoints", type=Path, nargs="?", help="folder with a folder for each checkpoint")
    checkpoints: Path | None = parser.parse_args().checkpoints
    # Looked for at the beginning: the first measurement takes a minute.
    folders = sorted({path.parent for path in checkpoints.glob("*/*.safetensors")}) if checkpoints else []
    if checkpoints and not folders:
        parser.error(f"{checkpoints} has no folder with a .safetensors file")
    time_import()
    for folder in folders:
        compress(folder)


if __name__ == "__main__":
    main()
