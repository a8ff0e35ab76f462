"""The state of every random generator that training uses: each of several runs in one process has its own."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class GeneratorStates:
    """States of Python's, numpy's and torch's global generators."""

    python: Any
    numpy: Any
    torch: Tensor
    cuda: Tensor | None

    @classmethod
    def current(cls) -> GeneratorStates:
        """Copy the states."""
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda)

    def restore(self) -> None:
        """Put the states back."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)
