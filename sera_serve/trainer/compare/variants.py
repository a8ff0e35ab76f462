"""The methods of a comparison, each in one size or in several."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from sera_serve.errors import InvalidConfiguration
from sera_serve.trainer.baselines import ADAPTER_OPTIONS, BASELINES, NEED_ADAPTERS, WITH_LORA_B, BaselineShape
from sera_serve.trainer.methods import METHODS
from sera_serve.trainer.settings import ADAPTER, TrainSettings, group_of

Size = Annotated[int, Field(ge=1)]
Sizes = Size | Annotated[list[Size], Field(min_length=1)]
DEFAULT_RANK = 8
_WITHOUT_RANK = (*NEED_ADAPTERS, "full", "head-only")
# Of the options that shape an adapter, those that a run of a baseline may have.
_SHAPES_BASELINES = {"method", "rank", *chain.from_iterable(ADAPTER_OPTIONS.values())}


class ComparedMethod(BaseModel):
    """A method of the plan, in one or several sizes. Further keys are options of its training runs.

    Attributes:
        method: One of `train_adapter --method`, or a baseline.
        name: Its name in the table; made of method and size unless given.
        rank: One rank or several. Without it, the rank of the base, of the data set or of `settings`, or else 8.
        blocks: Diagonal blocks of BD-LoRA.
        reduction_factor: houlsby, pfeiffer: width of the base by the width of a bottleneck; one or several.
        learning_rate: Fixed; without it the plan's rule chooses.
        data: Names of the data sets that the method runs on; all of them unless given.
    """

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    method: str
    name: str | None = None
    rank: Sizes | None = None
    blocks: int = Field(4, ge=1)
    reduction_factor: Sizes = 16
    learning_rate: float | None = Field(None, gt=0, le=10)
    data: list[str] | None = Field(None, min_length=1)

    @field_validator("method")
    @classmethod
    def _is_known(cls, value: str) -> str:
        known = (*METHODS, *BASELINES)
        if value not in known:
            raise ValueError(f"method {value!r} is unknown; choose one of {', '.join(known)}")
        return value

    @model_validator(mode="after")
    def _takes_its_options(self) -> ComparedMethod:
        taken = {
            "rank": self.method not in _WITHOUT_RANK,
            "blocks": self.method == "bd-lora",
            "reduction_factor": self.method in NEED_ADAPTERS,
        }
        if self.method in BASELINES:
            options = [name for name in self.model_extra or {} if name in TrainSettings.model_fields]
            taken |= {name: not shapes_adapter(name) or name in ADAPTER_OPTIONS[self.method] for name in options}
        for name, is_taken in taken.items():
            if not is_taken and name in self.model_fields_set:
                raise ValueError(f"{name} has no meaning for method {self.method}; leave it out")
        return self


@dataclass(frozen=True)
class Variant:
    """One method in one size.

    Attributes:
        label: Its name in the table.
        family: The label without the size. The plot joins the sizes of a family.
        options: Options of its training runs.
        baseline: The shape of a baseline, or None for our own methods.
        rank: Its rank; None takes that of the other options of the run.
        learning_rate: Fixed, or None.
        data: Names of its data sets, or None for all.
    """

    label: str
    family: str
    options: dict[str, Any]
    baseline: BaselineShape | None
    rank: int | None
    learning_rate: float | None
    data: list[str] | None


def shapes_adapter(name: str) -> bool:
    """Whether an option of a run shapes its adapter."""
    return group_of(TrainSettings.model_fields[name]) == ADAPTER and name not in ("pooling", "dropout")


def shape_of(variant: Variant, baseline: BaselineShape, settings: Mapping[str, Any]) -> BaselineShape:
    """The shape of a baseline in one run, of which `settings` are the options.

    Raises:
        InvalidConfiguration: An option would make another adapter of our methods alone; or the baseline has no factor
            for LoRA+, would train weights that are quantized, or would stop before its ranks have fallen.
    """
    for name, value in settings.items():
        if value is not None and shapes_adapter(name) and name not in _SHAPES_BASELINES:
            raise InvalidConfiguration(
                f"{variant.label}: {name} has no meaning for method {baseline.method}; give it in the methods that "
                "have it",
                param=name,
            )
    if baseline.method == "adalora" and settings.get("patience") is not None:
        raise InvalidConfiguration(
            f"{variant.label}: patience could end a run before its ranks have fallen; give patience in the other "
            "methods",
            param="patience",
        )
    if baseline.method == "full" and settings.get("quantize", "none") != "none":
        raise InvalidConfiguration(
            f"{variant.label}: quantize is {settings['quantize']}, and full fine-tuning trains every weight, which a "
            "quantized one cannot; give quantize in the other methods",
            param="quantize",
        )
    if settings.get("lora_plus_ratio") is not None and baseline.method not in WITH_LORA_B:
        raise InvalidConfiguration(
            f"{variant.label}: lora_plus_ratio sets the learning rate of B, and {baseline.method} has no B of LoRA; "
            "give it in methods that have one",
            param="lora_plus_ratio",
        )
    if baseline.method in _WITHOUT_RANK:
        return baseline
    return replace(baseline, rank=variant.rank or settings.get("rank", DEFAULT_RANK))


def sizes_of(entry: ComparedMethod, default_rank: int | None) -> Iterator[Variant]:
    """Every size of a method.

    Args:
        entry: The method.
        default_rank: The rank in the names of a method that gives none; None leaves the rank out of these names.
    """
    extra = entry.model_extra or {}
    is_baseline = entry.method in BASELINES
    options = {"method": "lora" if is_baseline else entry.method} | extra
    shape = BaselineShape(entry.method, blocks=entry.blocks) if is_baseline else None  # type: ignore[arg-type]
    split = f" split={extra['split']}" if not is_baseline and extra.get("split") is not None else ""
    sizes: list[tuple[str, BaselineShape | None, int | None]] = []
    if entry.method in NEED_ADAPTERS:
        for factor in _listed(entry.reduction_factor):
            sizes.append((f"1/{factor}", BaselineShape(entry.method, reduction_factor=factor), None))
    elif entry.method in _WITHOUT_RANK:
        sizes.append(("", shape, None))
    else:
        for rank in _listed(entry.rank):
            shown = default_rank if rank is None else rank
            sizes.append(((f"r={shown}" if shown is not None else "") + split, shape, rank))
    family = entry.name or _family(entry.method, extra)
    for size, shape, rank in sizes:
        # A name that was given needs the size only where there are several.
        label = family if entry.name and len(sizes) == 1 else f"{family} {size.strip()}".strip()
        yield Variant(label, family, options, shape, rank, entry.learning_rate, entry.data)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _family(method: str, options: Mapping[str, Any]) -> str:
    factors = options.get("train_factors")
    if factors is None:
        return method
    trained = factors if isinstance(factors, str) else ",".join(factors)
    return f"{method} trains {trained}"
