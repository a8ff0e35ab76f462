"""The linear layers of a prefill and the activation between them: the base's, and the same with adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from benchmarks.gpu.decode_model import adapt, random_llama
from benchmarks.gpu.operands import spread
from benchmarks.gpu.setting import Row, Setting
from benchmarks.gpu.timing import Timed, interleaved
from sera_kernels import AdapterBatch, triton_path
from sera_kernels.shape_classes import OUTPUTS_PER_LAUNCH
from sera_serve.layers import AdapterContext

# All layers are alike: a few of them hold more weights than the cache.
LAYERS = 4
TOKENS = (512, 2048, 320, 1024)
ADAPTERS = (1, 8, 64)
# In the order in which a pass runs them: with the activation, which adapters of the MLP may be computed with.
_MODULES = (*(f"self_attn.{name}_proj" for name in "qkvo"), "mlp")


def time_prefill(setting: Setting) -> Iterator[Row]:
    """Microseconds of all linear layers of one decoder layer, by tokens and adapters in the pass.

    `over_products` is what adapters add, relative to the matrix products alone.
    """
    layers = 1 if setting.small else LAYERS
    model = random_llama(setting, layers, torch.bfloat16 if setting.on_gpu else torch.float32)
    most = 2 if setting.small else max(ADAPTERS)
    context = adapt(model, most, model.dtype)
    for tokens in (32,) if setting.small else TOKENS:
        inputs = {
            width: torch.randn(tokens, width, device=setting.device, dtype=model.dtype)
            for width in (model.config.hidden_size, model.config.intermediate_size)
        }
        cases = {
            "products": Timed(_products(model, inputs), 1),
            "0": Timed(_pass(model, context, inputs, None), 1),
        }
        for adapters in (1, 2) if setting.small else ADAPTERS:
            slots = spread(tokens, adapters, setting.device)
            cases[str(adapters)] = Timed(_pass(model, context, inputs, slots), 1)
        # A step of decodes, each with an adapter of its own, beside a prompt of another one.
        beside = torch.arange(tokens, dtype=torch.int32, device=setting.device).clamp(max=most - 1)
        cases[f"{most} decodes"] = Timed(_pass(model, context, inputs, beside), 1)
        for name in ("1", f"{most} decodes"):
            # What each size of blocks would give, wherever the boundary between them is.
            for blocks, rows in (("large", 0), ("small", tokens * OUTPUTS_PER_LAUNCH)):
                cases[f"{name}, {blocks} blocks"] = Timed(_with_blocks(cases[name].launch, rows), 1)
        times = interleaved(setting, cases)
        for name, us in times.items():
            row = {"tokens": tokens, "adapters": name, "us_per_layer": us / layers}
            yield row | {"ratio": us / times["0"], "over_products": (us - times["0"]) / times["products"]}


def _with_blocks(run: Callable[[int], object], rows: int) -> Callable[[int], object]:
    """The same with small blocks in launches of at most so many rows."""

    def run_with_blocks(i: int) -> None:
        before, triton_path.RUN_ROWS = triton_path.RUN_ROWS, rows
        try:
            run(i)
        finally:
            triton_path.RUN_ROWS = before

    return run_with_blocks


def _products(model: nn.Module, inputs: dict[int, Tensor]) -> Callable[[int], None]:
    """The matrix products alone, those of one input joined."""
    joined = []
    for layer in model.get_submodule("model.layers").children():
        for names in ("qkv", "o", ("gate", "up"), ("down",)):
            prefix = "mlp" if isinstance(names, tuple) else "self_attn"
            linears = [layer.get_submodule(f"{prefix}.{name}_proj").base for name in names]
            joined.append(torch.cat([linear.get_parameter("weight") for linear in linears]))  # type: ignore[union-attr]

    def run(_: int) -> None:
        for weight in joined:
            nn.functional.linear(inputs[weight.shape[1]], weight)

    return run


def _pass(
    model: nn.Module, context: AdapterContext, inputs: dict[int, Tensor], slots: Tensor | None
) -> Callable[[int], None]:
    """All linear layers of the decoder layers with the activation, in the order in which a pass runs them."""

    layers = [
        [layer.get_submodule(path) for path in _MODULES] for layer in model.get_submodule("model.layers").children()
    ]
    x = inputs[model.config.hidden_size]  # type: ignore[index, union-attr]

    def run(_: int) -> None:
        with nullcontext() if slots is None else context.run(AdapterBatch(slots)):
            for modules in layers:
                for module in modules:
                    module(x)

    return run
