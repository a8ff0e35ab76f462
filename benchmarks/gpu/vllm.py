"""Loads vLLM's Triton LoRA kernels from the folder of an unpacked vLLM wheel, without vLLM's other thousand modules.

Read against vLLM 0.33.0. `unzip vllm-*.whl 'vllm/lora/ops/triton_ops/*' -d DIR` unpacks all that is needed. What the
kernels import from the rest of vLLM is stood in for by the few names below; a version that imports others is refused,
and the message names the missing one.
"""

from __future__ import annotations

import importlib
import os
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

from benchmarks.gpu.setting import SectionSkipped

PACKAGE = "vllm.lora.ops.triton_ops"
FOLDER = Path("vllm", "lora", "ops", "triton_ops")
FILES = ("lora_shrink_op.py", "lora_expand_op.py", "lora_kernel_metadata.py")


@dataclass(frozen=True)
class VllmKernels:
    """vLLM's functions.

    Attributes:
        shrink: `_lora_shrink`.
        expand: `_lora_expand`.
        meta_class: Sorts tokens by adapter.
        known_addresses: Shapes that vLLM remembers by the address of their weights.
    """

    shrink: Callable[..., None]
    expand: Callable[..., None]
    meta_class: Any
    known_addresses: tuple[dict[Any, Any], ...]


class _Logger:
    """Says nothing: vLLM tells its users which kernel configurations it takes."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments, **options: None


class _Platform:
    """What the kernels ask of `vllm.platforms.current_platform`."""

    def is_cuda(self) -> bool:
        return torch.cuda.is_available()

    def has_device_capability(self, capability: int) -> bool:
        return self.is_cuda() and self._capability() >= capability

    def is_device_capability(self, capability: int) -> bool:
        return self.is_cuda() and self._capability() == capability

    def _capability(self) -> int:
        major, minor = torch.cuda.get_device_capability()
        return major * 10 + minor


def _to_device(data: Any, device: Any = None, dtype: Any = None) -> torch.Tensor:
    return torch.tensor(data, dtype=dtype, device=device)


def _stand_ins() -> dict[str, dict[str, Any]]:
    """Names by module; a module of vLLM that has no entry cannot be imported, nor a name that is not listed."""
    # Without registration as a custom operation the modules fall back to the plain functions.
    utils = {
        "async_tensor_h2d": _to_device,
        "next_power_of_2": triton.next_power_of_2,
        "cdiv": triton.cdiv,
    }
    environment = {
        # vLLM's defaults.
        "VLLM_BATCH_INVARIANT": False,
        "VLLM_LORA_DISABLE_PDL": False,
        "VLLM_LORA_ENABLE_DUAL_STREAM": False,
        "VLLM_TUNED_CONFIG_FOLDER": os.environ.get("VLLM_TUNED_CONFIG_FOLDER"),
    }
    return {
        "vllm": {},
        "vllm.lora": {},
        "vllm.lora.ops": {},
        PACKAGE: {},
        "vllm.envs": environment,
        "vllm.logger": {"init_logger": lambda name: _Logger()},
        "vllm.platforms": {"current_platform": _Platform()},
        "vllm.triton_utils": {"tl": tl, "triton": triton},
        "vllm.utils": {"direct_register_custom_op": _unregistered},
        "vllm.utils.math_utils": utils,
        "vllm.utils.torch_utils": utils | {"direct_register_custom_op": _unregistered},
    }


def _unregistered(**unused: Any) -> None:
    raise AttributeError("not registered")


def load_vllm_kernels(folder: Path) -> VllmKernels:
    """Import the kernels from `folder`.

    Raises:
        SectionSkipped: Nothing of vLLM is there, or a version whose imports or functions are not those expected.
    """
    for name in FILES:
        if not (folder / FOLDER / name).is_file():
            raise SectionSkipped(
                f"--peer-kernels: {folder / FOLDER / name} is not there; name the unpacked wheel's folder"
            )
    loaded = [name for name in sys.modules if name == "vllm" or name.startswith("vllm.")]
    if loaded:
        raise SectionSkipped("--peer-kernels: vllm is already imported in this process")
    for name, contents in _stand_ins().items():
        module = types.ModuleType(name)
        module.__dict__.update(contents)
        # Of all packages, only the kernels' own has files.
        module.__path__ = [str(folder / FOLDER)] if name == PACKAGE else []
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    try:
        shrink = importlib.import_module(f"{PACKAGE}.lora_shrink_op")
        expand = importlib.import_module(f"{PACKAGE}.lora_expand_op")
        metadata = importlib.import_module(f"{PACKAGE}.lora_kernel_metadata")
        utils = importlib.import_module(f"{PACKAGE}.utils")
        known = (utils._LORA_A_PTR_DICT, utils._LORA_B_PTR_DICT)
        return VllmKernels(shrink._lora_shrink, expand._lora_expand, metadata.LoRAKernelMeta, known)
    except (ImportError, AttributeError) as error:
        raise SectionSkipped(f"--peer-kernels: this vLLM does not fit, 0.33.0 is known to: {error}") from error
    finally:
        for name in [name for name in sys.modules if name == "vllm" or name.startswith("vllm.")]:
            del sys.modules[name]
