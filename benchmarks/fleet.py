"""Thousands of adapters of mixed shapes, each with weights of its own, and stores that hold the first so many."""

from __future__ import annotations

from pathlib import Path

import torch

from adapters_store import AdapterBundle, AdapterConfig, AdapterStore, ModuleSpec
from benchmarks.llama_bases import llama_base
from sera_serve import SeraConfig, attach_adapter
from sera_serve.base import FrozenBase, load_base
from sera_serve.layers import adapter_tensors, module_specs

# In turn: as many as the smallest fleet has adapters, so that every fleet has the same mix.
SHAPES = (
    SeraConfig(16, 16, 32.0, "all-linear"),
    SeraConfig(64, 64, 128.0, ("q_proj", "v_proj")),
    SeraConfig(8, 1, 16.0, ("q_proj", "v_proj"), use_mixer=False),
    SeraConfig(32, 8, 64.0, ("q_proj", "k_proj", "v_proj", "o_proj")),
    SeraConfig(64, 32, 128.0, "all-linear"),
)
# About 1 MB on the embedded base, for the cold start.
MEGABYTE = SeraConfig(64, 16, 128.0, "all-linear")


def adapter_name(index: int) -> str:
    """Each adapter is of a tenant of its own."""
    return f"t{index:05d}/main"


class Fleet:
    """Makes adapter number i of one base, always the same."""

    def __init__(self, base: FrozenBase, shapes: tuple[SeraConfig, ...] = SHAPES, strength: float = 0.2) -> None:
        """Make a template of each shape; an adapter's update is about `strength` of each layer's weight."""
        self.base = base
        # The deviations are drawn: those of every process are the same.
        torch.manual_seed(0)
        self._templates = [_template(base, shape, strength) for shape in shapes]

    def bundle(self, index: int) -> AdapterBundle:
        """Adapter `index`: its shape is that of `index` modulo the number of shapes, its weights are its own."""
        config, deviations = self._templates[index % len(self._templates)]
        generator = torch.Generator().manual_seed(index)
        tensors = {
            name: torch.randn(shape, generator=generator) * deviation for name, (shape, deviation) in deviations.items()
        }
        return AdapterBundle(config, tensors)

    def publish(self, folder: Path, count: int) -> AdapterStore:
        """A store of the adapters 0 to `count - 1`; each is durable, as an upload is."""
        store = AdapterStore(folder)
        for index in range(count):
            store.publish(self.bundle(index), adapter_name(index))
        return store


def _template(
    base: FrozenBase, shape: SeraConfig, strength: float
) -> tuple[AdapterConfig, dict[str, tuple[torch.Size, float]]]:
    """Configuration, and shape and standard deviation of every tensor."""
    shared = base.share_weights()
    layers = attach_adapter(shared.model, shape)
    with torch.no_grad():
        for layer in layers.values():
            for factor in (layer.sera_a, layer.sera_c, layer.sera_b):
                if factor is not None:
                    factor.normal_()
            layer.sera_b.mul_(strength * layer.base.get_parameter("weight").norm() / layer.delta_weight().norm())
    config = AdapterConfig(
        task="generate",
        method="sera" if shape.use_mixer else "lora",
        base=base.info,
        modules={path: ModuleSpec(**spec) for path, spec in module_specs(shared.model).items()},
    )
    return config, {name: (tensor.shape, float(tensor.std())) for name, tensor in adapter_tensors(shared.model).items()}


def save_endless_base(folder: Path, width: int | None = None) -> FrozenBase:
    """A base without an end token, saved to `folder`: answers are as long as the trace asks.

    Args:
        folder: Where to.
        width: Of a Llama of eight layers with random weights; the embedded base if None.
    """
    base = load_base("embedded") if width is None else llama_base(width, 8)
    base.model.generation_config.eos_token_id = None
    base.model.config.eos_token_id = None
    base.tokenizer.eos_token = None
    base.model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    return load_base(str(folder))
