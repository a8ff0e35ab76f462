"""The linear layers of a prefill: the base's products, and the same layers with adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from benchmarks.gpu.decode_model import adapt, random_llama
from benchmarks.gpu.operands import spread
from benchmarks.gpu.setting import Row, Setting
from benchmarks.gpu.timing import Timed, interleaved
from sera_kernels import AdapterBatch
from sera_serve.layers import AdapterContext

# All layers are alike: a few of them hold more weights than the cache.
LAYERS = 4
TOKENS = (512, 2048)
ADAPTERS = (1, 8, 64)
# In the order in which a pass runs them.
_LINEARS = tuple(f"self_attn.{name}_proj" for name in "qkvo") + tuple(
    f"mlp.{name}_proj" for name in ("gate", "up", "down")
)


def time_prefill(setting: Setting) -> Iterator[Row]:
    """Microseconds of all linear layers of one decoder layer, by tokens and adapters in the pass."""
    layers = 1 if setting.small else LAYERS
    model = random_llama(setting, layers, torch.bfloat16 if setting.on_gpu else torch.float32)
    most = 2 if setting.small else max(ADAPTERS)
    context = adapt(model, most, model.dtype)
    for tokens in (32,) if setting.small else TOKENS:
        inputs = {
            width: torch.randn(tokens, width, device=setting.device, dtype=model.dtype)
            for width in (model.config.hidden_size, model.config.intermediate_size)
        }
        cases = {"0": Timed(_pass(model, context, inputs, None), 1)}
        for adapters in (1, 2) if setting.small else ADAPTERS:
            slots = spread(tokens, adapters, setting.device)
            cases[str(adapters)] = Timed(_pass(model, context, inputs, slots), 1)
        times = interleaved(setting, cases)
        for name, us in times.items():
            row = {"tokens": tokens, "adapters": name, "us_per_layer": us / layers}
            yield row | {"ratio": us / times["0"]}


def _pass(
    model: nn.Module, context: AdapterContext, inputs: dict[int, Tensor], slots: Tensor | None
) -> Callable[[int], None]:
    """All linear layers of the decoder layers, in the order in which a pass runs them."""

    layers = [
        [(layer.get_submodule(path), path) for path in _LINEARS]
        for layer in model.get_submodule("model.layers").children()
    ]
    narrow, wide = inputs.values()

    def run(_: int) -> None:
        with nullcontext() if slots is None else context.run(AdapterBatch(slots)):
            for linears in layers:
                for linear, path in linears:
                    linear(wide if path == "mlp.down_proj" else narrow)

    return run
