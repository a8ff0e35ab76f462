"""The trainable layer: a frozen linear layer plus scaling * A C B."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn

from sera_serve.layers.block_update import add_update
from sera_serve.layers.targets import linear_widths
from sera_serve.sera_config import SeraConfig


class SeraLinear(nn.Module):
    """h = base(x) + scaling * ((x A) C) B, with A and B block-diagonal (paper, section 3.2).

    Only the elements of the blocks are stored, in the layout of the adapter format:

    * `sera_a` (d_in, segment_rank): the rows from `i * d_in / split` on are block A_i;
    * `sera_c` (rank, rank), or None if C is the identity;
    * `sera_b` (segment_rank, d_out): the columns from `i * d_out / split` on are block B_i.

    A and C start from LoRA's Kaiming-uniform distribution (fan-in of a block, a = sqrt 5). B starts at zero, so the
    update is exactly zero at first. If B does not train, B starts as A does (section 4.6), because with B = 0 the
    update would stay zero for ever. The update is not zero at first then.
    """

    def __init__(self, base: nn.Module, config: SeraConfig) -> None:
        super().__init__()
        d_in, d_out = linear_widths(base)
        config.check_fits("this layer", d_in, d_out)
        self.base = base
        self.config = config
        self.d_in, self.d_out = d_in, d_out
        weight = base.weight
        assert isinstance(weight, Tensor)
        # Adapters train in float32 on a base of any dtype: bf16 would lose most optimiser updates.
        empty = partial(torch.empty, device=weight.device, dtype=torch.float32)
        rank, segment_rank = config.rank, config.segment_rank
        self.sera_a = nn.Parameter(empty(d_in, segment_rank), "a" in config.train_factors)
        self.sera_c = nn.Parameter(empty(rank, rank), "c" in config.train_factors) if config.use_mixer else None
        self.sera_b = nn.Parameter(empty(segment_rank, d_out), "b" in config.train_factors)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        base.requires_grad_(False)
        if not weight.is_meta:
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw A and C at random. Set B to zero, or draw B too if it does not train."""
        _kaiming_uniform(self.sera_a, fan_in=self.d_in // self.config.split)
        if self.sera_c is not None:
            _kaiming_uniform(self.sera_c, fan_in=self.config.rank)
        if "b" not in self.config.train_factors:
            _kaiming_uniform(self.sera_b, fan_in=self.config.segment_rank)
        else:
            nn.init.zeros_(self.sera_b)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d_in) to (..., d_out)."""
        factors = self.sera_a, self.sera_c, self.sera_b
        return add_update(self.base(x), self.dropout(x), *factors, self.config.split, self.config.scaling)

    def delta_weight(self) -> Tensor:
        """Return the dense update scaling * A C B, (d_in, d_out), in the factors' dtype."""
        split = self.config.split
        a = torch.block_diag(*self.sera_a.view(split, -1, self.config.segment_rank))
        b = torch.block_diag(*self.sera_b.view(self.config.segment_rank, split, -1).transpose(0, 1))
        mixed = a if self.sera_c is None else a @ self.sera_c
        delta: Tensor = self.config.scaling * (mixed @ b)
        return delta

    def extra_repr(self) -> str:
        """Return a summary of the shape for `print(model)`."""
        c = self.config
        return f"{self.d_in} -> {self.d_out}, rank={c.rank}, split={c.split}, use_mixer={c.use_mixer}"


def _kaiming_uniform(parameter: Tensor, fan_in: int) -> None:
    # nn.init.kaiming_uniform_ would take the fan-in from the stored shape, but the fan-in of a block is needed.
    bound = 1 / math.sqrt(fan_in)
    nn.init.uniform_(parameter, -bound, bound)
