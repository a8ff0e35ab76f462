"""A device that is not the CPU, without a GPU: its tensors keep their numbers on the CPU, and mix with none of its own.

`Elsewhere` tensors say that they are on `OTHER`. An operation on tensors of two devices raises, as CUDA's does; so a
program that runs here places all that it computes with. Only the copy between devices, numbers without axes and index
tensors may be mixed, as on CUDA. The numbers are the CPU's, so the results are the same but for rounding: torch chooses
some operations by the device.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from transformers import TrainingArguments

# The device type that torch computes nothing on by itself.
OTHER = torch.device("meta")
_ATEN = torch.ops.aten
_MAY_MIX = {
    _ATEN.copy_.default,
    _ATEN._to_copy.default,
    _ATEN.index.Tensor,
    _ATEN.index_put.default,
    _ATEN.index_put_.default,
    # In inference mode these come to the dispatcher whole.
    _ATEN.to.device,
    _ATEN.to.other,
}


class TwoDevices(RuntimeError):
    """An operation has tensors of two devices."""


class Elsewhere(Tensor):
    """A tensor on `OTHER`."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Elsewhere:
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=OTHER,
            requires_grad=inner.requires_grad,
        )
        made.inner = inner.detach() if inner.requires_grad else inner
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Elsewhere({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


class _Placing(TorchDispatchMode):
    """Makes what is asked for on `OTHER`, also without a tensor of it among the arguments."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


class _Python(TorchFunctionMode):
    """What never comes to the dispatcher, or asks whether a tensor is without numbers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu") == OTHER:
            return func(*args, **{**kwargs, "device": "cpu"}).to(OTHER)
        if args and isinstance(args[0], Elsewhere):
            if func == Tensor.is_meta.__get__:  # type: ignore[attr-defined]
                return False
            if func is Tensor.tolist:
                return args[0].inner.tolist()
            if func in (Tensor.__getitem__, Tensor.__setitem__):
                args = (args[0], as_index(args[1]), *args[2:])
        return func(*args, **kwargs)


def as_index(index: Any) -> Any:
    """Lists of numbers as tensors: torch would make them on `OTHER` without numbers."""
    if isinstance(index, tuple):
        return tuple(as_index(part) for part in index)
    return torch.tensor(index, dtype=torch.int64) if isinstance(index, list) else index


def compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation where its tensors are."""
    flat = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
    own = [tensor for tensor in flat if isinstance(tensor, Elsewhere)]
    of_cpu = [tensor for tensor in flat if tensor.dim() and not isinstance(tensor, Elsewhere)]
    if own and of_cpu and func not in _MAY_MIX:
        raise TwoDevices(f"{func}: {[(type(tensor).__name__, tuple(tensor.shape)) for tensor in flat]}")
    if func is _ATEN.copy_.default and own and not isinstance(args[0], Elsewhere):
        return args[0].copy_(args[1].inner)
    if func is _ATEN.index.Tensor and own and not isinstance(args[0], Elsewhere):
        raise TwoDevices("a tensor of the CPU is indexed by one of another device")
    there = bool(own)
    # In inference mode `to` has its device by position.
    asked = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.device)]
    if asked:
        there = asked[0] == OTHER
    by_inner = {id(tensor.inner): tensor for tensor in own}

    def on_cpu(value: Any) -> Any:
        if isinstance(value, Elsewhere):
            return value.inner
        return torch.device("cpu") if isinstance(value, torch.device) else value

    args, kwargs = tree_map(on_cpu, (args, kwargs))

    def placed(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        # An operation in place returns its own argument.
        argument = by_inner.get(id(value))
        return argument if argument is not None else Elsewhere(value) if there else value

    return tree_map(placed, func(*args, **kwargs))


def move(module: nn.Module) -> None:
    """Move parameters and buffers to `OTHER`."""
    for each in module.modules():
        for name, parameter in each._parameters.items():
            if parameter is not None:
                each._parameters[name] = nn.Parameter(Elsewhere(parameter.data), parameter.requires_grad)
        for name, buffer in each._buffers.items():
            if buffer is not None:
                each._buffers[name] = Elsewhere(buffer)


@contextmanager
def other_device() -> Iterator[None]:
    """Let torch know `OTHER`, and transformers' Trainer take it for its device."""
    with pytest.MonkeyPatch.context() as patch, _Placing(), _Python():
        patch.setattr("accelerate.Accelerator.device", OTHER)
        patch.setattr(TrainingArguments, "device", property(lambda self: (self._setup_devices, OTHER)[1]))
        yield


@contextmanager
def other_device_in_threads() -> Iterator[None]:
    """Let torch know `OTHER` in this thread, and in those that begin within the block: torch keeps that by thread."""
    original = threading.Thread.run

    def run(self: threading.Thread) -> None:
        with _Placing(), _Python():
            original(self)

    with pytest.MonkeyPatch.context() as patch, _Placing(), _Python():
        patch.setattr(threading.Thread, "run", run)
        # A tensor of inference mode has no version, which a subclass must have.
        patch.setattr(torch, "inference_mode", torch.no_grad)
        yield
