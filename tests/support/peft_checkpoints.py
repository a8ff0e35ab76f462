"""PEFT checkpoints of small models, and the states that PEFT itself computes with them."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from adapters_store import AdapterBundle, BundleLimits, PeftFiles, PeftImport, import_peft, peft_from_path
from sera_serve.base import FrozenBase, import_base

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TOKENS = torch.arange(3, 43).view(2, 20)


def save_checkpoint(
    model: nn.Module, folder: Path, seed: int = 1, dtype: torch.dtype | None = None, **fields: Any
) -> Path:
    """Save a LoRA of a model by PEFT, with random factors; `fields` are those of `LoraConfig`. The model is copied."""
    peft = peft_model(model, seed, **fields)
    if dtype is not None:
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(dtype)
    with quiet():
        peft.save_pretrained(str(folder))
    return folder


def peft_model(model: nn.Module, seed: int = 1, **fields: Any) -> PeftModel:
    """A copy of a model with a LoRA whose factors are random, and large enough to change every output."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]} | fields)
    with quiet():
        peft = get_peft_model(copy.deepcopy(model), config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in peft.named_parameters():
        if "lora_magnitude_vector" in name:
            parameter.data *= 1 + 0.3 * torch.randn(parameter.shape, generator=generator)
        elif "lora_" in name or "modules_to_save" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return peft


def peft_states(model: nn.Module, folder: Path, run: Callable[[nn.Module], Tensor]) -> Tensor:
    """What `run` gives for a copy of `model`, in float64, with the checkpoint loaded by PEFT."""
    with quiet(), torch.no_grad():
        loaded = PeftModel.from_pretrained(copy.deepcopy(model), str(folder)).double().eval()
        return run(loaded)


def bundle_states(model: nn.Module, bundle: AdapterBundle, run: Callable[[nn.Module], Tensor]) -> Tensor:
    """What `run` gives for a copy of `model`, in float64, with a bundle applied as FORMAT.md defines it."""
    adapted = copy.deepcopy(model).double().eval()
    for path, spec in bundle.config.modules.items():
        assert spec.split == 1
        assert not spec.use_mixer
        a, b = (bundle.tensors[f"{path}.{name}"].double() for name in ("sera_a", "sera_b"))
        gain = bundle.tensors[f"{path}.gain"].double() if spec.has_gain else torch.ones(spec.d_out)
        offset = bundle.tensors[f"{path}.offset"].double() if spec.has_offset else torch.zeros(spec.d_out)

        def hook(
            layer: nn.Module,
            inputs: tuple[Tensor, ...],
            output: Tensor,
            a: Tensor = a,
            b: Tensor = b,
            gain: Tensor = gain,
            offset: Tensor = offset,
            scaling: float = spec.scaling,
        ) -> Tensor:
            return gain * (output + scaling * (inputs[0] @ a @ b)) + offset

        adapted.get_submodule(path).register_forward_hook(hook)
    with torch.no_grad():
        return run(adapted)


def logits(model: nn.Module) -> Tensor:
    """The logits of a decoder for `TOKENS`."""
    return model(input_ids=TOKENS).logits


def read(folder: Path) -> PeftFiles:
    """The files of a checkpoint, which must be PEFT's."""
    files = peft_from_path(str(folder), BundleLimits())
    assert files is not None
    return files


def imported(folder: Path, base: FrozenBase) -> PeftImport:
    """Import a checkpoint for a base."""
    return import_peft(read(folder), import_base(base))


def edit_config(folder: Path, **fields: Any) -> None:
    """Change fields of a checkpoint's configuration."""
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Write the tensors of a checkpoint anew."""
    tensors = change(safetensors.torch.load_file(folder / WEIGHTS))
    safetensors.torch.save_file({name: t.contiguous() for name, t in tensors.items()}, folder / WEIGHTS)


@contextmanager
def quiet() -> Any:
    """Ignore PEFT's warnings: they are about training, or about names of transformers that changed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
