"""Where tests run what must not depend on the CPU: the fake device, always, and a GPU wherever torch sees one."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.backends import cudnn

from sera_serve.base import FrozenBase
from support.other_device import Elsewhere, move, other_device, other_device_in_threads


@dataclass(frozen=True)
class Place:
    """The fake device of `support.other_device`.

    Attributes:
        device: What the settings of engines and runs call it. They know no fake, which a base alone says.
        engine_settings: Further settings of engines.
        draws_as_cpu: Whether seeded random numbers are those of the CPU.
    """

    device: str = "cpu"
    engine_settings: dict[str, Any] = field(default_factory=dict)
    draws_as_cpu: bool = True

    def moved(self, base: FrozenBase) -> FrozenBase:
        """A copy of a base model here."""
        model = copy.deepcopy(base.model)
        move(model)
        return replace(base, model=model)

    def has(self, tensor: Tensor) -> bool:
        """Whether a tensor is here."""
        return isinstance(tensor, Elsewhere)

    def serving(self) -> AbstractContextManager[None]:
        """A block in which engines run here, with all of their threads."""
        return other_device_in_threads()

    def training(self) -> AbstractContextManager[None]:
        """A block in which transformers' Trainer trains here."""
        return other_device()


class Gpu(Place):
    """The GPU that torch takes first. Convolutions are in float32 too, for which torch's default is TF32.

    So the bounds of the fake device do for it. Noise of 5e-7 in every product there, which is more than the rounding of
    another order of additions, changes no result beyond them. With TF32 the first layer of a ViT differs by 1e-3.
    """

    def moved(self, base: FrozenBase) -> FrozenBase:
        """A copy of a base model on the GPU."""
        return replace(base, model=copy.deepcopy(base.model).to(self.device))

    def has(self, tensor: Tensor) -> bool:
        """Whether a tensor is on a GPU."""
        return tensor.is_cuda

    def serving(self) -> AbstractContextManager[None]:
        """A block in which convolutions are in float32."""
        return cudnn.flags(enabled=True, allow_tf32=False)

    def training(self) -> AbstractContextManager[None]:
        """Likewise."""
        return self.serving()


def _on_gpu(name: str, **engine_settings: Any) -> Any:
    """A GPU as a parameter of tests."""
    place = Gpu("cuda", engine_settings, draws_as_cpu=False)
    # Said once in a process, where a thread uses cuBLAS before anything else of CUDA; torch then does what is needed.
    return pytest.param(place, id=name, marks=pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS"))


PLACES = [pytest.param(Place(), id="fake")]
PLACES_AND_GRAPHS = [*PLACES]
if torch.cuda.is_available():
    PLACES.append(_on_gpu("cuda", cuda_graphs=False))
    # An engine then takes some seconds more to start, for about a hundred graphs.
    PLACES_AND_GRAPHS += [PLACES[-1], _on_gpu("cuda-graphs")]
