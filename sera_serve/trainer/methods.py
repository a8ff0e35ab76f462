"""The methods of the adapter family: what each trains, and what it fixes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from adapters_store.format.config import Method as StoredMethod
from sera_serve.errors import InvalidConfiguration
from sera_serve.sera_config import Factor

# The trainer's own methods are published as one of those of the adapter format.
Method = Literal[StoredMethod, "sera-freeze-a", "sera-freeze-b", "sera-c-only"]


@dataclass(frozen=True)
class MethodPreset:
    """The settings that a method of the adapter family fixes (paper, table of methods).

    Attributes:
        splits: Whether A and B have more than one diagonal block. The default number of blocks is the rank.
        use_mixer: Whether the mixer C exists.
        train_factors: Factors that train by default.
        adapts: Whether the method trains an adapter; False for head-only.
        learning_rate: The default, from short trials on the embedded base.
        stored: The method that the bundle names, or None if it is this one.
    """

    splits: bool = False
    use_mixer: bool = False
    train_factors: tuple[Factor, ...] = ("a", "b")
    adapts: bool = True
    learning_rate: float = 3e-3
    stored: StoredMethod | None = None

    def check(self, rank: int, split: int, train_factors: tuple[Factor, ...] | None) -> None:
        """Refuse a split or trained factors that belong to another method.

        Raises:
            InvalidConfiguration: The message names the method that the values describe.
        """
        if self.splits != (split > 1):
            mixer = "moslora" if self.use_mixer else "lora"
            remedy = (
                f"take a rank of at least 2 and a split above 1, or method {mixer}"
                if self.splits
                else f"leave --split out, or take method {'sera' if self.use_mixer else 'melora'}"
            )
            raise InvalidConfiguration(f"split {split} of rank {rank} does not belong to this method; {remedy}")
        if train_factors is not None and not (train_factors and set(train_factors) <= set(self.train_factors)):
            given = ",".join(train_factors) or "empty"
            raise InvalidConfiguration(
                f"train_factors is {given}; this method trains {','.join(self.train_factors)}", param="train_factors"
            )


METHODS: dict[Method, MethodPreset] = {
    # On hwu64 SeRA gained from 0.01 over 0.003, while LoRA of rank 8 no longer learned at 0.01.
    "sera": MethodPreset(splits=True, use_mixer=True, train_factors=("a", "c", "b"), learning_rate=1e-2),
    "lora": MethodPreset(),
    "melora": MethodPreset(splits=True, learning_rate=1e-2),
    "moslora": MethodPreset(use_mixer=True, train_factors=("a", "c", "b")),
    "lora-fa": MethodPreset(train_factors=("b",)),
    # The ablations of SeRA (paper, section 4.6, Tables 5 and 6).
    "sera-freeze-a": MethodPreset(
        splits=True, use_mixer=True, train_factors=("c", "b"), learning_rate=1e-2, stored="sera"
    ),
    "sera-freeze-b": MethodPreset(
        splits=True, use_mixer=True, train_factors=("a", "c"), learning_rate=1e-2, stored="sera"
    ),
    "sera-c-only": MethodPreset(splits=True, use_mixer=True, train_factors=("c",), learning_rate=1e-2, stored="sera"),
    "head-only": MethodPreset(train_factors=(), adapts=False, learning_rate=1e-2),
}
DEFAULT_METHOD: Method = "sera"
