"""Rank, split and alpha of each adapted layer, by the patterns of the settings."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from sera_serve.errors import InvalidConfiguration
from sera_serve.layers.targets import match_targets, near_names, pattern_matches
from sera_serve.sera_config import SeraConfig
from sera_serve.trainer.option_text import flag
from sera_serve.trainer.pattern_options import PATTERN_OPTIONS, Pattern

if TYPE_CHECKING:
    from sera_serve.trainer.settings import TrainSettings


def value_for(pattern: Pattern | None, path: str) -> float | None:
    """Return the value of the last entry that matches `path`, or None if no entry does."""
    return next((value for name, value in reversed(pattern or ()) if pattern_matches(name, path)), None)


def shapes_by_path(settings: TrainSettings, widths: Mapping[str, tuple[int, int]]) -> dict[str, SeraConfig]:
    """Return the shape of each layer that the settings adapt, by its dotted path; empty for head-only.

    The last matching entry of a pattern wins. A layer without a matching entry has the settings' own value. The
    default split and the default alpha of a layer follow from the layer's own rank.

    Args:
        settings: Options of the run.
        widths: (d_in, d_out) of each linear layer of the base that may be adapted, by its dotted path.

    Raises:
        InvalidConfiguration: A name or pattern matches no adapted layer, or a shape does not fit its layer or the
            method.
    """
    common = settings.adapter_config()
    if common is None:
        return {}
    targets = match_targets(list(widths), common)
    for option in PATTERN_OPTIONS:
        for name, _ in getattr(settings, option) or ():
            if not any(pattern_matches(name, path) for path in targets):
                raise InvalidConfiguration(
                    f"{flag(option)}: {name!r} matches no layer that is adapted; there is {near_names(name, targets)}",
                    param=option,
                )
    shapes = {path: _shape(settings, common, path) for path in targets}
    for path, shape in shapes.items():
        try:
            shape.check_fits(path, *widths[path])
        except InvalidConfiguration as error:
            raise InvalidConfiguration(error.message, param=_origin(settings, path, error)) from error
    return shapes


def total_ranks(shapes: Collection[SeraConfig], budget: float) -> tuple[int, int]:
    """Return the total rank of the layers before and after rank allocation.

    Args:
        shapes: The shape of each adapted layer at the start.
        budget: Mean rank of a layer at the end.

    Raises:
        InvalidConfiguration: The budget is not below the mean rank, or leaves no unit.
    """
    if not shapes:
        raise InvalidConfiguration(
            "--budget shares rank between layers, and none is adapted; leave it out", param="budget"
        )
    first = sum(shape.rank for shape in shapes)
    last = math.floor(budget * len(shapes))
    unit = min(shape.split for shape in shapes)
    if last >= first:
        raise InvalidConfiguration(
            f"--budget {budget:g} is not below the mean rank {first / len(shapes):g}; "
            "raise --rank (twice the budget is a usual choice), or leave --budget out",
            param="budget",
        )
    if last < unit:
        raise InvalidConfiguration(
            f"--budget {budget:g} leaves a total rank of {last} to {len(shapes)} layers, and a unit has "
            f"{unit}; raise --budget or lower --split",
            param="budget",
        )
    return first, last


def _shape(settings: TrainSettings, common: SeraConfig, path: str) -> SeraConfig:
    rank = int(value_for(settings.rank_pattern, path) or settings.rank)
    split = int(value_for(settings.split_pattern, path) or settings.split_of(rank))
    alpha = value_for(settings.alpha_pattern, path) or settings.lora_alpha or 2.0 * rank
    try:
        settings.check_shape(rank, split)
        return dataclasses.replace(common, rank=rank, split=split, lora_alpha=alpha)
    except InvalidConfiguration as error:
        raise InvalidConfiguration(f"layer {path}: {error.message}", param=_origin(settings, path, error)) from error


def _origin(settings: TrainSettings, path: str, error: InvalidConfiguration) -> str | None:
    """The option that a layer's rank or split comes from, for an error about them."""
    if error.param in ("rank", "split", None):
        for option in ("split_pattern", "rank_pattern"):
            if value_for(getattr(settings, option), path) is not None:
                return option
    return error.param
