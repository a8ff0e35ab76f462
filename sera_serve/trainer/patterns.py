"""Rank, split and alpha by module: mappings from patterns of module names to values."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from sera_serve.errors import InvalidConfiguration
from sera_serve.layers.config import SeraConfig
from sera_serve.layers.targets import adaptable_linears, linear_widths, match_targets, near_names, pattern_matches

if TYPE_CHECKING:
    from sera_serve.trainer.settings import TrainSettings

PATTERN_OPTIONS = ("rank_pattern", "split_pattern", "alpha_pattern")
_MOST_PATTERNS = 1000
_MOST_CHARACTERS = 256
_MOST_RANK = 4096

Pattern = tuple[tuple[str, float], ...]
"""Pairs of a module-name pattern and a value, in the order in which they were written."""


def parse_pattern(option: str, value: Any) -> Pattern | None:
    """Read the value of a pattern option.

    Args:
        option: Name of the option. `alpha_pattern` takes positive numbers, the others positive integers.
        value: A mapping, pairs, or text such as `q_proj=8,layers.0.*.v_proj=4`.

    Raises:
        ValueError: The value is no such mapping. The message names the entry.
    """
    if value is None:
        return None
    number = _positive_number if option == "alpha_pattern" else _positive_integer
    pairs: list[tuple[str, float]] = []
    for name, given in _entries(value):
        if not isinstance(name, str) or not name.strip() or len(name) > _MOST_CHARACTERS:
            raise ValueError(f"{name!r} is no module name or pattern; write q_proj=8,layers.0.*.v_proj=4")
        if name.strip() in (known for known, _ in pairs):
            raise ValueError(f"pattern {name.strip()!r} is there twice; keep one")
        pairs.append((name.strip(), number(name.strip(), given)))
    if not pairs:
        raise ValueError("no pattern is given; write q_proj=8,layers.0.*.v_proj=4, or leave the option out")
    if len(pairs) > _MOST_PATTERNS:
        raise ValueError(f"{len(pairs)} patterns are given; the limit is {_MOST_PATTERNS}")
    return tuple(pairs)


def _entries(value: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        return value.items()
    if isinstance(value, str):
        parts = [part.strip() for part in value.split(",")]
        for part in parts:
            if part.count("=") != 1:
                raise ValueError(f"{part!r} is not of the form pattern=value; write q_proj=8,layers.0.*.v_proj=4")
        return [(name, number) for name, _, number in (part.partition("=") for part in parts)]
    if isinstance(value, (list, tuple)) and all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in value):
        return [(name, number) for name, number in value]
    raise ValueError("a mapping is needed, such as `q_proj: 8` or q_proj=8,layers.0.*.v_proj=4")


def _positive_integer(name: str, value: Any) -> float:
    try:
        number = int(value) if isinstance(value, str) else value
    except ValueError:
        number = None
    if type(number) is not int or not 1 <= number <= _MOST_RANK:
        raise ValueError(f"{name}={value} needs an integer from 1 to {_MOST_RANK}")
    return number


def _positive_number(name: str, value: Any) -> float:
    try:
        number = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{name}={value} needs a positive number")
    return number


def value_for(pattern: Pattern | None, path: str) -> float | None:
    """Return the value of the last entry that matches `path`, or None if no entry does."""
    return next((value for name, value in reversed(pattern or ()) if pattern_matches(name, path)), None)


def adapter_shapes(settings: TrainSettings, model: nn.Module) -> dict[str, SeraConfig]:
    """Return the shape of each layer of `model` that the settings adapt: `shapes_by_path` of its linear layers.

    Raises:
        InvalidConfiguration: See `shapes_by_path`.
    """
    return shapes_by_path(settings, {path: linear_widths(found) for path, found in adaptable_linears(model).items()})


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
                    f"--{option.replace('_', '-')}: {name!r} matches no layer that is adapted; "
                    f"there is {near_names(name, targets)}",
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
