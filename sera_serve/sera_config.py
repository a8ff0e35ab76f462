"""The configuration of an adapter: rank, split, mixer, scaling and target modules."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from sera_serve.errors import InvalidConfiguration

Factor = Literal["a", "c", "b"]
ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class SeraConfig:
    """One member of the family delta W = scaling * A C B (paper, section 3).

    LoRA is `split=1, use_mixer=False`. LoRA-FA is LoRA with `train_factors=("b",)`. MoSLoRA is `split=1` with the
    mixer C. MELoRA is `split>1` without the mixer. SeRA is `split>1` with the mixer.

    Attributes:
        rank: Width of the reduced vector (r in the paper).
        split: Number of diagonal blocks of A and of B. It must divide the rank and both widths of each adapted layer.
        lora_alpha: Numerator of the constant scaling `lora_alpha / rank`.
        target_modules: Suffixes of module names (`("q_proj", "v_proj")`), with wildcards (`"layers.0.*.v_proj"`), or
            `"all-linear"` for every linear layer except the output embedding.
        use_mixer: Whether the matrix C (rank x rank) exists. Without it, C is the identity.
        dropout: Probability that an input element of the adapter is set to zero in training.
        train_factors: Factors that receive gradients. The other factors keep their initial values.

    Raises:
        InvalidConfiguration: A value is out of range, or rank and split do not fit each other.
    """

    rank: int
    split: int
    lora_alpha: float
    target_modules: tuple[str, ...] | Literal["all-linear"]
    use_mixer: bool = True
    dropout: float = 0.0
    train_factors: tuple[Factor, ...] = ("a", "c", "b")

    def __post_init__(self) -> None:
        if isinstance(self.target_modules, list):
            object.__setattr__(self, "target_modules", tuple(self.target_modules))
        if self.rank < 1:
            raise InvalidConfiguration(f"rank is {self.rank}; it must be at least 1", param="rank")
        if self.split < 1 or self.rank % self.split:
            raise InvalidConfiguration(
                f"split {self.split} does not divide rank {self.rank}; choose one of {divisors(self.rank)}",
                param="split",
            )
        if not (math.isfinite(self.lora_alpha) and self.lora_alpha > 0):
            raise InvalidConfiguration(
                f"lora_alpha is {self.lora_alpha}; it must be a positive number (2 * rank is a usual choice)",
                param="lora_alpha",
            )
        if not 0 <= self.dropout < 1:
            raise InvalidConfiguration(f"dropout is {self.dropout}; it must be in [0, 1)", param="dropout")
        if not self.target_modules:
            raise InvalidConfiguration(
                'target_modules is empty; name module suffixes such as "q_proj", or "all-linear"',
                param="target_modules",
            )
        if isinstance(self.target_modules, str) and self.target_modules != ALL_LINEAR:
            raise InvalidConfiguration(
                f'target_modules is {self.target_modules!r}; pass a tuple of suffixes, or "all-linear"',
                param="target_modules",
            )
        unknown = set(self.train_factors) - {"a", "c", "b"}
        if unknown or not self.train_factors:
            raise InvalidConfiguration(
                f"train_factors is {self.train_factors!r}; choose at least one of 'a', 'c', 'b'",
                param="train_factors",
            )
        if self.train_factors == ("c",) and not self.use_mixer:
            raise InvalidConfiguration(
                "only C would train, but use_mixer is False: nothing would train; set use_mixer",
                param="train_factors",
            )

    @property
    def segment_rank(self) -> int:
        """Rank of one segment, rank / split (alpha in section 3.2 of the paper)."""
        return self.rank // self.split

    @property
    def scaling(self) -> float:
        """Constant factor of the update, lora_alpha / rank, as in LoRA."""
        return self.lora_alpha / self.rank

    def check_fits(self, path: str, d_in: int, d_out: int) -> None:
        """Raise `InvalidConfiguration` unless `split` divides both widths. The message lists splits that would."""
        if d_in % self.split == 0 and d_out % self.split == 0:
            return
        fitting = divisors(math.gcd(math.gcd(d_in, d_out), self.rank))
        raise InvalidConfiguration(
            f"split {self.split} does not divide the widths {d_in} -> {d_out} of {path}; "
            f"with rank {self.rank} a split of {', '.join(map(str, fitting))} fits there",
            param="split",
        )


def divisors(number: int) -> list[int]:
    """Return all positive divisors of `number`, ascending."""
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]
