"""Makes the stores and the bundles of a siege with the code of the checkout that will serve them.

    python -P benchmarks/siege/stores.py FOLDER ADAPTERS

It runs as a script, with the checkout in PYTHONPATH: the store's format is the checkout's own. The folder gets

* `small`: a store of two generators and a classifier, and a few adapters that an attack may delete;
* `large`: a store of so many adapters more;
* `bundles`: files to upload: `good`, and the finite but harmful `large_values` and `large_scaling`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from adapters_store import AdapterBundle, AdapterConfig, AdapterStore
from benchmarks.fleet import Fleet
from sera_serve import SeraConfig
from sera_serve.base import load_base

SPARE = 24
LAYERS = SeraConfig(64, 16, 128.0, "all-linear")
# Publishing thousands takes minutes; these are small.
SMALL_LAYERS = SeraConfig(8, 1, 16.0, ("q_proj", "v_proj"), use_mixer=False)
LABELS = ["billing", "delivery", "other"]


def make(folder: Path, adapters: int) -> None:
    """Make whatever is missing; a folder appears under its name when it is complete."""
    base = load_base("embedded")
    fleet = Fleet(base, (LAYERS,))
    writer, other = fleet.bundle(0), fleet.bundle(1)
    small = Fleet(base, (SMALL_LAYERS,)).bundle(0)
    config = AdapterConfig(
        task="classify",
        method="head-only",
        base=base.info,
        modules={},
        labels=LABELS,
        pooling="last_token",
        max_length=64,
    )
    head = torch.randn(len(LABELS), base.hidden_size, generator=torch.Generator().manual_seed(2))
    sorter = AdapterBundle(config, {"head.weight": head, "head.bias": torch.zeros(len(LABELS))})
    for name, count in (("small", 0), ("large", adapters)):
        if (folder / name).exists():
            continue
        store = AdapterStore(folder / f"{name}.partial")
        store.publish(writer, "siege/writer")
        store.publish(other, "siege/other")
        store.publish(sorter, "siege/sorter")
        for index in range(SPARE):
            store.publish(small, f"spare/{index:02d}")
        for index in range(count):
            store.publish(small, f"crowd-{index // 5:05d}/adapter-{index % 5}")
        (folder / f"{name}.partial").rename(folder / name)
    bundles = folder / "bundles"
    bundles.mkdir(exist_ok=True)
    loud = {path: spec.model_copy(update={"scaling": 1e308}) for path, spec in writer.config.modules.items()}
    harmful = {name: torch.full_like(tensor, 1e30) for name, tensor in writer.tensors.items()}
    for name, bundle in (
        ("good", fleet.bundle(2)),
        ("large_values", AdapterBundle(writer.config, harmful)),
        ("large_scaling", AdapterBundle(writer.config.model_copy(update={"modules": loud}), writer.tensors)),
    ):
        (bundles / f"{name}.safetensors").write_bytes(bundle.to_bytes())


if __name__ == "__main__":
    make(Path(sys.argv[1]), int(sys.argv[2]))
