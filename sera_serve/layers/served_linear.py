"""The serving layer: a base linear layer that adds, for each token, the update of the token's own adapter.

Layers that read the same input (q, k and v; gate and up) form a `SharedInputGroup`. One grouped call updates the
outputs of all layers of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sera_kernels import AdapterBatch, add_updates
from sera_serve.layers.attach import replace_module
from sera_serve.layers.context import AdapterContext
from sera_serve.layers.gpu_layers import JoinedProducts, fuse_norms, join_products
from sera_serve.layers.served_mlp import find_silu_mlp, fuse_silu_mlp
from sera_serve.layers.targets import adaptable_linears, linear_widths


class ServedLinear(nn.Module):
    """base(x), plus the update of each token's adapter from the device pool."""

    def __init__(self, base: nn.Module, group: SharedInputGroup) -> None:
        super().__init__()
        self.base = base
        # Plain attributes are found faster than submodules. The tuple hides the group from torch, which would else
        # register the group's layers as children of this layer.
        self._forward = base.forward
        self._shared = (group, group.context, group.join(base.forward, linear_widths(base)[1]))

    @property
    def group(self) -> SharedInputGroup:
        """The layers that share this layer's input."""
        return self._shared[0]

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d_in) to (..., d_out)."""
        group, context, index = self._shared
        if context.batch is None and group.joined is None:
            y: Tensor = self._forward(x)
            return y
        return group.output(index, x)


class SharedInputGroup:
    """Layers that the base model calls one after the other with the same tensor.

    The first call computes the outputs of all layers of the group. The later calls fetch their outputs. A call with
    another tensor computes all outputs again. A model that behaves differently than at attach time is therefore served
    correctly, but slower.
    """

    def __init__(self, context: AdapterContext, modules: list[int], side_stream: SideStream | None = None) -> None:
        """Make a group without layers.

        Args:
            context: Pool, tables and batch.
            modules: The row of each layer in the adapter tables. The layers must join in the same order.
            side_stream: Where the first phase of updates runs, beside the base layers, in captured CUDA graphs.
        """
        self.context = context
        self._side_stream = side_stream
        self.modules = tuple(modules)
        self._bases: list[Callable[[Tensor], Tensor]] = []
        self._widths: list[int] = []
        self.joined: JoinedProducts | None = None
        """One product for all layers, where there is one: also in a pass of the base model alone."""
        self._input: Tensor | None = None
        self._batch: AdapterBatch | None = None
        self._outputs: list[Tensor | None] = []

    def join(self, base: Callable[[Tensor], Tensor], width: int) -> int:
        """Add the forward function of the next layer, and its d_out. Returns the layer's index for `output`."""
        self._bases.append(base)
        self._widths.append(width)
        return len(self._bases) - 1

    def holds(self, layers: Sequence[nn.Module]) -> bool:
        """Return whether these are the layers of this group, all of them and in order."""
        same = len(layers) == len(self._bases) and all(isinstance(layer, ServedLinear) for layer in layers)
        return same and all(layer._shared[0::2] == (self, i) for i, layer in enumerate(layers))  # type: ignore[index]

    def computed(self, x: Tensor) -> tuple[list[Tensor], list[Tensor] | None]:
        """Compute the outputs of all layers of the group for `x`.

        Returns:
            One (..., d_out) tensor for each layer: a new tensor, which may be changed in place. Then what is still to
            be added to each, (tokens, d_out); or None if the outputs are complete. A caller with a kernel that reads
            the outputs anyway adds it there.
        """
        context, batch, side = self.context, self.context.batch, self._side_stream
        if batch is None or not _reads(batch, x):
            return self.products(x), None
        if side is None or self.is_updated_in_place(x):
            outputs = self.products(x)
            add_updates(x.contiguous(), outputs, self.modules, batch, context.pool, context.tables)
            return outputs, None
        # Imported here, because the import of Triton takes as long as the rest of a small server's start.
        from sera_kernels.triton_path import updates_of

        rows = x.reshape(-1, x.shape[-1]).contiguous()
        ready = side.mark()
        # What is captured first gets the multiprocessors that it wants. The large products of several layers leave
        # enough of them to small updates, and go first. Elsewhere the updates go first.
        classes = batch.classes_in(context.tables)
        products_first = len(self.modules) > 1 and not (classes.segmented or classes.whole)
        outputs = self.products(x) if products_first else []
        try:
            with side.fork(ready):
                updates = updates_of(rows, self._widths, self.modules, batch, context.pool, context.tables)
            if not products_first:
                outputs = self.products(x)
        finally:
            # A capture with a stream that has not come back cannot even be ended.
            side.join()
        return outputs, updates

    def is_updated_in_place(self, x: Tensor) -> bool:
        """Return whether `computed` adds updates to complete outputs for `x`: not beside the products."""
        batch, side = self.context.batch, self._side_stream
        if batch is None or not _reads(batch, x):
            return False
        if side is None or not side.can_fork():
            return True
        from sera_kernels.triton_path import PREFILL_TOKENS

        return batch.classes_in(self.context.tables).vectors or batch.token_slots.numel() > PREFILL_TOKENS

    def output(self, index: int, x: Tensor) -> Tensor:
        """Return the output of layer `index` for `x`, with the updates of the current batch's adapters, if any."""
        y = self._outputs[index] if x is self._input and self.context.batch is self._batch else None
        if y is None:
            y = self._compute(index, x)
        # Each output is handed out once. The last layer releases x.
        self._outputs[index] = None
        if index == len(self._bases) - 1:
            self._input = None
        return y

    def _compute(self, index: int, x: Tensor) -> Tensor:
        outputs, updates = self.computed(x)
        if updates is not None:
            for y, update in zip(outputs, updates, strict=True):
                y += update.view(y.shape)
        self._input, self._batch = x, self.context.batch
        self._outputs = list(outputs)
        return outputs[index]

    def products(self, x: Tensor) -> list[Tensor]:
        """The outputs of the base layers: new tensors, which may be changed in place."""
        return [base(x) for base in self._bases] if self.joined is None else self.joined(x)


def _reads(batch: AdapterBatch, x: Tensor) -> bool:
    """Return whether the rows of `x` are the batch's tokens.

    A layer may read other rows: an encoder's pooler reads the first token of each text. No state that is served goes
    through it, so it gets no update, which would be written beyond its outputs.
    """
    return x.numel() == batch.token_slots.numel() * x.shape[-1]


class SideStream:
    """A CUDA stream beside the current one, for work that a CUDA graph runs in parallel.

    Outside of a capture, the events of a fork would cost the host more time than the GPU wins.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def can_fork(self) -> bool:
        """Return whether a CUDA graph is being captured."""
        return torch.cuda.is_current_stream_capturing()

    def mark(self) -> torch.cuda.Event:
        """Return an event after what the current stream holds already."""
        event: torch.cuda.Event = torch.cuda.current_stream(self._stream.device).record_event()
        return event

    @contextmanager
    def fork(self, ready: torch.cuda.Event) -> Iterator[None]:
        """Run what the block launches on this stream, after an event.

        Memory allocated in the block is used again only by a later block, and so after the current stream's work.
        """
        self._stream.wait_event(ready)
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """Let the current stream wait for the last block."""
        torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)


@torch.no_grad()
def find_shared_inputs(model: PreTrainedModel) -> list[list[str]]:
    """Group the adaptable layers of `model` by their input tensor, as one small forward pass shows it.

    A group has layers of one parent module only, so that each update is used soon after its computation. A layer that
    the forward pass does not call forms a group of its own.

    Returns:
        Groups of paths. Every adaptable layer is in exactly one group. Groups and paths are in the model's order.
    """
    inputs: dict[str, Tensor] = {}

    def watch(path: str) -> Any:
        # The dictionary keeps the tensors alive, so that no two of them have the same identity.
        return lambda module, args: inputs.__setitem__(path, args[0])

    linears = adaptable_linears(model)
    with ExitStack() as hooks:
        for path, linear in linears.items():
            hooks.enter_context(linear.register_forward_pre_hook(watch(path)))
        model(**{name: value.to(model.device) for name, value in _dummy_inputs(model).items()})
    groups: dict[object, list[str]] = {}
    for path in linears:
        parent = path.rpartition(".")[0]
        key = (parent, id(inputs[path])) if path in inputs else path
        groups.setdefault(key, []).append(path)
    return list(groups.values())


def _dummy_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Inputs of a forward pass; transformers' own are tokens, whatever a model reads."""
    vision = getattr(model.config, "vision_config", model.config if model.main_input_name == "pixel_values" else None)
    tokens: dict[str, Tensor] = model.dummy_inputs
    if vision is None:
        return tokens
    size = [vision.image_size] * 2 if isinstance(vision.image_size, int) else list(vision.image_size)
    inputs = {"pixel_values": torch.zeros(1, vision.num_channels, *size, dtype=model.dtype)}
    return inputs if vision is model.config else inputs | tokens


def attach_serving(
    model: nn.Module, context: AdapterContext, groups: list[list[str]], side_stream: SideStream | None = None
) -> None:
    """Replace every adaptable linear layer of `model` by a `ServedLinear`, in place.

    Row m of the adapter tables belongs to the m-th adaptable layer. On a GPU, MLPs of the form of `served_mlp` get a
    forward function that adds updates and applies the activation in one pass.

    Args:
        model: A base model that one engine uses alone.
        context: Pool, tables and batch that the layers read.
        groups: The result of `find_shared_inputs` for the same architecture.
        side_stream: Where the first phase of updates runs, beside the base layers, in captured CUDA graphs.
    """
    rows = {path: row for row, path in enumerate(adaptable_linears(model))}
    # Decided before the layers are replaced: a module is compared with its own forward function.
    found = [find_silu_mlp(model, paths) for paths in groups]
    for paths in groups:
        group = SharedInputGroup(context, [rows[path] for path in paths], side_stream if len(paths) <= 4 else None)
        layers = [model.get_submodule(path) for path in paths]
        for path in paths:
            replace_module(model, path, ServedLinear(model.get_submodule(path), group))
        group.joined = join_products(layers)
    for mlp in found:
        if mlp is not None:
            fuse_silu_mlp(mlp)
    if isinstance(model, PreTrainedModel) and model.device.type == "cuda":
        fuse_norms(model)
