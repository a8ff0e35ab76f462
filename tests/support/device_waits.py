"""Counts where a program on the fake device makes the host wait, as it would wait for a GPU."""

from __future__ import annotations

import sys
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from support.other_device import Elsewhere

_ATEN = torch.ops.aten
_INDEXED = {_ATEN.index.Tensor, _ATEN.index_put.default, _ATEN.index_put_.default}
# The host reads a number of the device, or how many there are.
_READS = {
    _ATEN._local_scalar_dense.default,
    _ATEN.equal.default,
    _ATEN.nonzero.default,
    _ATEN.masked_select.default,
    _ATEN.repeat_interleave.Tensor,
}
# On the fake device layers run the kernels' reference, which reads the device as no kernel of a GPU does. What
# transformers' models do is not of this project.
_NOT_OURS = ("sera_kernels.", "transformers.")


class DeviceWaits:
    """Within the block, notes each wait of this thread in `found`, by the name of the operation.

    A wait is a copy between the devices that is not told otherwise, an index that is on the CPU, a mask as an index,
    and whatever reads numbers of the device. The block stands within one of `support.other_device`.
    """

    def __init__(self) -> None:
        self.found: list[str] = []
        self._modes = [_Operations(self.found), _Methods(self.found)]

    def __enter__(self) -> DeviceWaits:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(kind, error, trace)


class _Operations(TorchDispatchMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if waits(func, args, kwargs or {}, result) and _is_ours():
            self._found.append(str(func))
        return result


class _Methods(TorchFunctionMode):
    """What the fake device does without the dispatcher."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.tolist and isinstance(args[0], Elsewhere) and _is_ours():
            self._found.append("tolist")
        return func(*args, **(kwargs or {}))


def waits(func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> bool:
    """Whether the host waits for the device in an operation."""
    if func in (_ATEN._to_copy.default, _ATEN.copy_.default):
        source = args[1] if func is _ATEN.copy_.default else args[0]
        # What goes to ordinary memory of the host is waited for in any case.
        to_device = isinstance(result, Elsewhere)
        told = kwargs.get("non_blocking") or args[2:] == (True,)
        return isinstance(source, Elsewhere) != to_device and not (to_device and told)
    if not any(isinstance(value, Elsewhere) for value in tree_flatten((args, kwargs))[0]):
        return False
    if func in _INDEXED:
        indices = [index for index in args[1] if index is not None]
        return any(not isinstance(index, Elsewhere) or index.dtype == torch.bool for index in indices)
    return func in _READS


def _is_ours() -> bool:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith(_NOT_OURS):
            return False
        frame = frame.f_back
    return True
