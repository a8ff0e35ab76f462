"""A GPU without a GPU: the device of `support.other_device`, which says that it is CUDA, so that CUDA's code runs.

Triton's kernels run under its interpreter. A CUDA graph keeps the operations of its capture and runs them again; what a
capture refuses, raises. Everything runs at once, and `support.stream_order` says what a GPU might run in another order.
It sees the operations of torch and the very addresses that kernels read and write. Of the host it sees what is copied
from and to page-locked memory, and `numpy` and `tolist` of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

from support import other_device
from support.fake_device import GPU, Event, FakeGpu, Graph, Stream
from support.other_device import OTHER, Elsewhere

__all__ = ["GPU", "FakeGpu", "Graph", "fake_gpu"]
_GIB = 1 << 30
_PROPERTIES = SimpleNamespace(
    name="NVIDIA H200", multi_processor_count=132, total_memory=3 * _GIB, L2_cache_size=1 << 14, major=9, minor=0
)


class _Operations(TorchDispatchMode):
    def __init__(self, gpu: FakeGpu) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._gpu.compute(func, args, kwargs or {})


class _Python(TorchFunctionMode):
    """What never comes to the dispatcher."""

    def __init__(self, gpu: FakeGpu) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.device:
            return func(*args, **kwargs or {})
        first = args[0] if args else None
        if isinstance(first, Elsewhere):
            answers = {
                Tensor.device.__get__: GPU,  # type: ignore[attr-defined]
                Tensor.is_cuda.__get__: True,  # type: ignore[attr-defined]
                Tensor.is_meta.__get__: False,  # type: ignore[attr-defined]
                Tensor.get_device: 0,
            }
            if func in answers:
                return answers[func]
            if func in (Tensor.data_ptr, Tensor.untyped_storage):
                return func(first.inner)
            if func is Tensor.tolist:
                self._gpu.read_by_host(first)
                return first.inner.tolist()
            if func in (Tensor.__getitem__, Tensor.__setitem__):
                args = (first, other_device.as_index(args[1]), *args[2:])
        elif func in (Tensor.numpy, Tensor.tolist):
            self._gpu.accessed_by_host(first, func is Tensor.numpy, func.__name__)
        kwargs = {name: _translated(value) for name, value in (kwargs or {}).items()}
        args = tuple(map(_translated, args))
        is_pinned = kwargs.pop("pin_memory", False)
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") == OTHER:
            return func(*args, **{**kwargs, "device": "cpu"}).to(OTHER)
        result = func(*args, **kwargs)
        return self._gpu.pin(result) if is_pinned else result


class _Memory:
    """Triton's interpreter, whose loads and stores are noted."""

    def __init__(self, module: ModuleType, gpu: FakeGpu) -> None:
        self._module, self._gpu = module, gpu

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def load(self, pointers: Any, mask: Any, other: Any, dtype: Any) -> Any:
        self._gpu.accessed_by_kernel(pointers, mask, np.dtype(dtype).itemsize, False)
        return self._module.load(pointers, mask, other, dtype)

    def store(self, pointers: Any, values: Any, mask: Any) -> Any:
        self._gpu.accessed_by_kernel(pointers, mask, values.dtype.itemsize, True)
        return self._module.store(pointers, values, mask)


class _OnDevice:
    """In place of `torch.cuda.device_of` and `torch.cuda.device`: there is one device."""

    def __init__(self, device: object) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


@contextmanager
def fake_gpu() -> Iterator[FakeGpu]:
    """Let torch and Triton have the device, in this thread and in those that begin within the block.

    Tensors come to it by `support.other_device.move`, or where they are made on "cuda".
    """
    gpu = FakeGpu()
    functions = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_name": _PROPERTIES.name,
        "get_device_capability": (9, 0),
        "get_device_properties": _PROPERTIES,
        "mem_get_info": (2 * _GIB, 3 * _GIB),
        "memory_reserved": 0,
        "memory_allocated": 0,
        "max_memory_reserved": 0,
        "max_memory_allocated": 0,
        "init": None,
        "empty_cache": None,
        "reset_peak_memory_stats": None,
        "graph_pool_handle": (0, 1),
        "get_sync_debug_mode": 0,
    }
    run_thread, new = threading.Thread.run, Elsewhere.__new__
    run_kernel = interpreter.InterpretedFunction.run

    def run_in_thread(thread: threading.Thread) -> None:
        with _Operations(gpu), _Python(gpu):
            run_thread(thread)

    def compute(cls: type[Elsewhere], func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return gpu.compute(func, args, kwargs or {})

    def make(cls: type[Elsewhere], inner: Tensor) -> Elsewhere:
        made = new(cls, inner)
        gpu.count(made)
        return made

    with pytest.MonkeyPatch.context() as patch:
        for name, answer in functions.items():
            patch.setattr(torch.cuda, name, lambda *args, _answer=answer: _answer)
        patch.setattr(torch.cuda, "Stream", lambda device=None, priority=0: Stream(gpu))
        patch.setattr(torch.cuda, "Event", lambda enable_timing=False: Event(gpu))
        patch.setattr(torch.cuda, "CUDAGraph", lambda: Graph(gpu))
        patch.setattr(torch.cuda, "current_stream", lambda device=None: gpu.stream)
        patch.setattr(torch.cuda, "stream", gpu.on_stream)
        patch.setattr(torch.cuda, "synchronize", gpu.synchronize)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: gpu.graph is not None)
        patch.setattr(torch.cuda, "set_sync_debug_mode", gpu.watch_waits)
        patch.setattr(torch.cuda, "device_of", _OnDevice)
        patch.setattr(torch.cuda, "device", _OnDevice)
        generator = torch.Generator
        patch.setattr(torch, "Generator", lambda device=None: generator())
        # A tensor of inference mode has no version, which a subclass must have.
        patch.setattr(torch, "inference_mode", torch.no_grad)
        patch.setattr(threading.Thread, "run", run_in_thread)
        patch.setattr(Elsewhere, "__new__", staticmethod(make))
        patch.setattr(
            Elsewhere, "__torch_dispatch__", classmethod(lambda cls, f, t, a=(), k=None: gpu.compute(f, a, k or {}))
        )
        patch.setattr(interpreter, "_interpreter", _Memory(interpreter._interpreter, gpu))
        patch.setattr(interpreter, "_patch_lang", _patched_once(interpreter._patch_lang))
        patch.setattr(
            interpreter.InterpretedFunction,
            "run",
            lambda kernel, *args, **kwargs: gpu.launch(kernel, args, kwargs, run_kernel),
        )
        with _Operations(gpu), _Python(gpu):
            yield gpu
        # What the modes have kept is not needed any more: its end is of no interest.
        gpu._tensors.clear()


def _patched_once(patch: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`interpreter._patch_lang`, which replaces Triton's functions anew for every call of one kernel by another."""
    known: dict[frozenset[int], Any] = {}

    def patch_once(function: Any) -> Any:
        modules = [value for value in function.__globals__.values() if value in (tl, tl.core)]
        key = frozenset(map(id, modules))
        if key not in known:
            known[key] = patch(function)
        return SimpleNamespace(restore=lambda: None)

    return patch_once


def _translated(value: Any) -> Any:
    """A device as `other_device` knows it."""
    if isinstance(value, torch.device | str) and str(value).startswith("cuda"):
        return OTHER
    return value
