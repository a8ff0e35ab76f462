"""One decode step as the engine's graphs hold it, without the choice of tokens: pages, fused layers, adapters."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.gpu.setting import Setting
from benchmarks.gpu.timing import capture
from sera_kernels import AdapterBatch
from sera_serve.engine.loop.attention import KeyValuePool, StepContext
from sera_serve.engine.loop.attention_backend import RowKeys, choose_backend
from sera_serve.engine.loop.fused_attention import fuse_attention
from sera_serve.engine.loop.fused_layer import fuse_layers
from sera_serve.engine.loop.hugging_face import PagedModel
from sera_serve.engine.loop.pages import PAGE_SIZE
from sera_serve.layers import AdapterContext


class EngineStep:
    """A new token for each of some sequences of one length, over random keys and values."""

    def __init__(self, model: PreTrainedModel, context: AdapterContext, sequences: int, length: int) -> None:
        """Prepare a model with serving layers attached; it runs such steps alone from now on."""
        device = model.device
        self.context = context
        self._paged = PagedModel(model)
        backend = choose_backend("auto", device)
        if backend.has_paged_decode:
            from sera_kernels.norm import add_norm
            from sera_kernels.rotary import rotate_and_write

            fuse_attention(self._paged, backend, rotate_and_write)
            fuse_layers(self._paged, backend, add_norm)
        pages = -(-(length + 1) // PAGE_SIZE)
        self._pool = KeyValuePool(self._paged.shapes, sequences * pages, self._paged.dtype, device, backend)
        for store in (*self._pool.keys, *self._pool.values):
            store.normal_()
        self._table = (1 + torch.arange(sequences * pages, dtype=torch.int32, device=device)).view(sequences, pages)
        self._owners = torch.arange(sequences, dtype=torch.int32, device=device)
        self._ids = torch.randint(model.config.vocab_size, (sequences,), device=device)
        self._at = torch.full((sequences,), length, device=device)
        self.kv_bytes = sequences * (length + 1) * sum(self._paged.layer_bytes)

    def run(self, slots: Tensor | None, logits: Tensor) -> None:
        """Run a step with the context's adapters of these slots, or of the base model alone, and copy the logits."""
        at = self._at
        page = self._table.gather(1, (at // PAGE_SIZE)[:, None])[:, 0].long()
        keys = RowKeys(self._table, at + 1, self._owners)
        step = StepContext(self._pool, page * PAGE_SIZE + at % PAGE_SIZE, rows=keys)
        with torch.inference_mode(), self.context.run(None if slots is None else AdapterBatch(slots)):
            logits.copy_(self._paged.logits(self._ids[None], at[None], step, 0))

    def ready(self, setting: Setting, slots: Tensor | None) -> tuple[Callable[[], None], Tensor]:
        """The step as the replay of a graph, or itself on the CPU; and where it leaves its logits.

        It keeps the context's present adapters, and goes on reading them when the context gets others.
        """
        logits = torch.empty(len(self._ids), self._paged.model.config.vocab_size, device=self._ids.device)
        # What the host knows of the adapters is read from the device once, which a capture may not do.
        _ = self.context.tables.classes
        adapters = self.context.pool, self.context.tables

        def run() -> None:
            self.context.pool, self.context.tables = adapters
            self.run(slots, logits)

        return (capture(run).replay if setting.on_gpu else run), logits
