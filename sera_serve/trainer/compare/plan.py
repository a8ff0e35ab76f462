"""The plan of a comparison: bases, data sets, methods with sizes, seeds, and the rule for learning rates."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from sera_serve.errors import InvalidConfiguration
from sera_serve.trainer.baselines import ADAPTER_OPTIONS, BASELINES, NEED_ADAPTERS, WITH_LORA_B, BaselineShape
from sera_serve.trainer.methods import METHODS
from sera_serve.trainer.option_text import read_yaml
from sera_serve.trainer.settings import ADAPTER, FILES, TrainSettings, group_of
from sera_serve.trainer.tables.table import HUB
from sera_serve.trainer.task_options import LOWER_IS_BETTER as LOSSES
from sera_serve.trainer.task_options import MULTI_LABEL_METRICS, REPORTED_METRICS, TASK_METRICS
from sera_serve.trainer.together.records import contents_digest

_STRICT = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
_OPEN = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)
# The comparison sets these itself.
_OWN = ("store", "name", "work_dir", "resume", "seed", "method", "description", "init_from")
_PACKAGE = "package:"
# Of every metric that a task computes, those of task_options and those that choose no epoch.
LOWER_IS_BETTER = frozenset({*LOSSES, "perplexity", "bits_per_byte"})
Purpose = Literal["rate", "score"]
Loop = Literal["seed", "base", "data", "method"]
Size = Annotated[int, Field(ge=1)]
Sizes = Size | Annotated[list[Size], Field(min_length=1)]
_DEFAULT_RANK = 8
_WITHOUT_RANK = (*NEED_ADAPTERS, "full", "head-only")


class ComparedBase(BaseModel):
    """A base of the plan. Further keys are options of the training runs on it, such as `target_modules`.

    Attributes:
        base: As `--base`; or `package:NAME/FOLDER`, a folder inside an installed Python package.
    """

    model_config = _OPEN

    base: str = Field(min_length=1)


class ComparedData(BaseModel):
    """A data set of the plan. Further keys are options of its training runs, such as `train` and `text_column`.

    Attributes:
        score: The metric in the table; the first of the task's metrics unless given, with `multi_label` the first of
            those of sets of labels. It is that of the test rows where there are any, and of the evaluation rows
            elsewhere.
        test_rows: Score at most this many test rows, the same for all runs.
    """

    model_config = _OPEN

    score: str | None = None
    test_rows: int | None = Field(None, ge=1)


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

    model_config = _OPEN

    method: str
    name: str | None = None
    rank: Sizes | None = None
    blocks: int = Field(4, ge=1)
    reduction_factor: Sizes = 16
    learning_rate: float | None = Field(None, gt=0, le=10)
    data: list[str] | None = None

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
            taken |= {name: not _shapes_adapter(name) or name in ADAPTER_OPTIONS[self.method] for name in options}
        for name, is_taken in taken.items():
            if not is_taken and name in self.model_fields_set:
                raise ValueError(f"{name} has no meaning for method {self.method}; leave it out")
        return self


class LearningRateRule(BaseModel):
    """How learning rates are chosen: on held-out rows of the training file, with a seed of its own.

    All rates of `start` are tried. While the best one is the lowest or the highest tried, the next of `ladder` on that
    side is tried too. The highest score on the held-out rows wins; of equal scores, the lower loss; of equal losses,
    the lower rate. Test rows are not read.

    Attributes:
        ladder: All rates that may be tried, ascending.
        start: Those that are tried first.
        seed: The seed of these runs; none of the plan's own.
        data: With names of data sets, a method has one rate for all, by its mean score on these. Without, each data
            set has a rate of its own.
    """

    model_config = _STRICT

    ladder: list[float]
    start: list[float] = Field(min_length=1)
    seed: int = Field(100, ge=0, lt=2**32)
    data: list[str] | None = Field(None, min_length=1)

    @model_validator(mode="after")
    def _is_a_ladder(self) -> LearningRateRule:
        if sorted(set(self.ladder)) != self.ladder or not all(0 < rate <= 10 for rate in self.ladder):
            raise ValueError("ladder must be ascending rates above 0, at most 10")
        places = [self.ladder.index(rate) if rate in self.ladder else -1 for rate in self.start]
        if -1 in places or places != list(range(places[0], places[0] + len(places))):
            raise ValueError("start must be neighbouring rates of ladder, ascending")
        return self

    def next_rate(self, tried: Mapping[float, tuple[float, float]]) -> float | None:
        """Return the next rate to try, or None if the choice is made.

        Args:
            tried: (score, minus loss) by rate; minus infinity for a run that failed.
        """
        for rate in self.start:
            if rate not in tried:
                return rate
        best = self.ladder.index(self.best(tried))
        places = sorted(self.ladder.index(rate) for rate in tried)
        if not any(score > -math.inf for score, _ in tried.values()):
            # Nothing worked so far: a lower rate is what may.
            best = places[0]
        if best == places[0] and best > 0:
            return self.ladder[best - 1]
        if best == places[-1] and best + 1 < len(self.ladder):
            return self.ladder[best + 1]
        return None

    def best(self, tried: Mapping[float, tuple[float, float]]) -> float:
        """Return the best rate of those tried."""
        return max(tried, key=lambda rate: (tried[rate], -rate))


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


@dataclass(frozen=True)
class Cell:
    """One place of the table: a method on a data set over a base."""

    base: str
    data: str
    variant: Variant


@dataclass(frozen=True)
class RunSpec:
    """One training run, as the process that trains it gets it.

    Attributes:
        settings: Options of the run, as JSON values, without store and folders.
        baseline: The shape of a baseline, or None.
        test_rows: See `ComparedData`.
        digest: Equal for equal runs over equal data. Names the run in the file of results.
        purpose: `rate`: tried for the choice of a learning rate. `score`: counts in the table.
    """

    settings: dict[str, Any]
    baseline: dict[str, Any] | None
    test_rows: int | None
    digest: str
    purpose: Purpose


class ComparePlan(BaseModel):
    """A comparison: every method in every size, on every data set, over every base, with every seed."""

    model_config = _STRICT

    bases: dict[str, ComparedBase] = Field(min_length=1)
    data: dict[str, ComparedData] = Field(min_length=1)
    methods: list[ComparedMethod] = Field(min_length=1)
    seeds: list[int] = Field(min_length=1)
    settings: dict[str, Any] = Field(default_factory=dict)
    learning_rates: LearningRateRule | None = None
    order: list[Loop] = Field(default_factory=lambda: list(get_args(Loop)))
    results: Path | None = None

    @model_validator(mode="after")
    def _is_consistent(self) -> ComparePlan:
        if sorted(self.order) != sorted(get_args(Loop)):
            raise ValueError(f"order must name each of {', '.join(get_args(Loop))} once, the outermost loop first")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError("seeds has a seed twice")
        rule = self.learning_rates
        if rule is not None and rule.seed in self.seeds:
            raise ValueError(f"learning_rates.seed {rule.seed} is one of seeds; the choice needs a seed of its own")
        for where, names in [
            *((f"methods[{i}].data", method.data) for i, method in enumerate(self.methods)),
            ("learning_rates.data", rule.data if rule is not None else None),
        ]:
            for name in names or ():
                if name not in self.data:
                    raise ValueError(f"{where}: data set {name!r} is not in the plan; it has {', '.join(self.data)}")
        labels = [variant.label for variant in self.variants()]
        if twice := {label for label in labels if labels.count(label) > 1}:
            raise ValueError(f"two methods have the name {min(twice)!r}; give one another name")
        for where, options in self._option_groups():
            _check_options(where, options)
        return self

    def _option_groups(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        yield "settings", self.settings
        for name, base in self.bases.items():
            yield f"bases.{name}", base.model_extra or {}
        for name, data in self.data.items():
            yield f"data.{name}", data.model_extra or {}
        for i, method in enumerate(self.methods):
            yield f"methods[{i}]", method.model_extra or {}

    def variants(self) -> list[Variant]:
        """Return every method in every size, in the plan's order."""
        # A rank of bases or data sets differs between the cells of a row, so it is no part of the row's name.
        places = [*self.bases.values(), *self.data.values()]
        varies = any("rank" in (place.model_extra or {}) for place in places)
        rank = None if varies else self.settings.get("rank", _DEFAULT_RANK)
        return [variant for method in self.methods for variant in _sizes_of(method, rank)]

    def cells(self) -> list[Cell]:
        """Return every place of the table."""
        return [
            Cell(base, data, variant)
            for base in self.bases
            for data in self.data
            for variant in self.variants()
            if variant.data is None or data in variant.data
        ]

    def ordered(self) -> list[tuple[Cell, int]]:
        """Return every run that counts, (cell, seed), in the order in which they are made."""
        places: dict[Loop, list[Any]] = {
            "base": list(self.bases),
            "data": list(self.data),
            "method": [variant.label for variant in self.variants()],
            "seed": self.seeds,
        }

        def key(run: tuple[Cell, int]) -> list[int]:
            cell, seed = run
            values: dict[Loop, Any] = {"base": cell.base, "data": cell.data, "method": cell.variant.label, "seed": seed}
            return [places[loop].index(values[loop]) for loop in self.order]

        return sorted(((cell, seed) for cell in self.cells() for seed in self.seeds), key=key)

    def score_of(self, data: str) -> str:
        """Return the metric of a data set."""
        return self.data[data].score or self._metrics(data)[0]

    def check_scores(self, path: Path) -> None:
        """Refuse a score that no run of its data set will have: it would be found only after the first run.

        Raises:
            InvalidConfiguration: There is one. `path` is the plan's, for the message.
        """
        for name, data in self.data.items():
            known = (*self._metrics(name), *REPORTED_METRICS.get(self._options(name)["task"], ()))
            if data.score is not None and data.score not in known:
                near = difflib.get_close_matches(data.score, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise InvalidConfiguration(
                    f"plan {path}: data.{name}.score is {data.score!r}, and its runs have {', '.join(known)}{hint}",
                    param="plan",
                )

    def check_files(self, path: Path) -> None:
        """Refuse files and folders that do not exist: a run would find it only when its turn comes, hours later.

        Raises:
            InvalidConfiguration: There are some. `path` is the plan's, for the message.
        """
        absent = [
            f"{where}.{name} is {options[name]}"
            for where, options in self._option_groups()
            for name in FILES
            if options.get(name) is not None
            and not str(options[name]).startswith(HUB)
            and not Path(str(options[name])).exists()
        ]
        if absent:
            raise InvalidConfiguration(
                f"plan {path}: {'; '.join(absent)}: no such file or folder here; correct the path, which starts from "
                "the working folder",
                param="plan",
            )

    def _metrics(self, data: str) -> tuple[str, ...]:
        options = self._options(data)
        if options.get("multi_label"):
            return MULTI_LABEL_METRICS
        # The check of the options refuses a task that is not known.
        return TASK_METRICS.get(options["task"], ("loss",))

    def _options(self, data: str) -> dict[str, Any]:
        return {"task": "classify", **self.settings, **(self.data[data].model_extra or {})}

    def spec(self, cell: Cell, seed: int, learning_rate: float | None, purpose: Purpose) -> RunSpec:
        """Describe one run.

        Args:
            cell: What runs.
            seed: Its seed.
            learning_rate: Its rate, or None for the method's default.
            purpose: A run for the choice of a rate reads no test rows.

        Raises:
            InvalidConfiguration: The options do not fit each other. The message names the places of the plan.
        """
        base, variant = self.bases[cell.base], cell.variant
        options: dict[str, Any] = self._options(cell.data) | (base.model_extra or {})
        if not METHODS[variant.options["method"]].adapts:
            # The plan's targets are for the other methods.
            options = {name: value for name, value in options.items() if not _shapes_adapter(name)}
        elif variant.baseline is None:
            options["rank"] = variant.rank or options.get("rank", _DEFAULT_RANK)
        options |= variant.options
        score = self.score_of(cell.data)
        if score in self._metrics(cell.data):
            options.setdefault("select_by", score)
        if learning_rate is not None:
            options["learning_rate"] = learning_rate
        if purpose == "rate":
            options.pop("test", None)
        options |= {"base": _base_spec(base.base), "seed": seed, "store": "-", "name": "compare/run"}
        try:
            # Without defaults: an option that a method does not know must stay unset, and a new option of the trainer
            # must not give finished runs other names.
            settings = TrainSettings.model_validate(options).model_dump(
                mode="json", exclude={"store", "name"}, exclude_unset=True
            )
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"])) or "options"
            raise InvalidConfiguration(
                f"{cell.variant.label} on {cell.data} over {cell.base}: {where}: "
                f"{first['msg'].removeprefix('Value error, ')}; correct it in methods, data, bases or settings",
                param=where,
            ) from error
        shape = asdict(_shape_of(variant, variant.baseline, settings)) if variant.baseline is not None else None
        test_rows = self.data[cell.data].test_rows if purpose == "score" else None
        named = settings | {"base": cell.base}
        for use in FILES:
            if named.get(use) is not None:
                named[use] = _contents(str(named[use]))
        identity = json.dumps([named, shape, test_rows, purpose], sort_keys=True)
        return RunSpec(settings, shape, test_rows, hashlib.sha256(identity.encode()).hexdigest()[:16], purpose)


def _check_options(where: str, options: Mapping[str, Any]) -> None:
    for name in options:
        if name in _OWN:
            raise ValueError(f"{where}: {name} is set by the comparison; take it out")
        if name not in TrainSettings.model_fields:
            raise ValueError(f"{where}: unknown option {name!r}; see train_adapter --help for the options of a run")


def _shapes_adapter(name: str) -> bool:
    return group_of(TrainSettings.model_fields[name]) == ADAPTER and name not in ("pooling", "dropout")


def _shape_of(variant: Variant, baseline: BaselineShape, settings: Mapping[str, Any]) -> BaselineShape:
    """The shape of a baseline in one run, of which `settings` are the options.

    Raises:
        InvalidConfiguration: The baseline has no factor for LoRA+.
    """
    if settings.get("lora_plus_ratio") is not None and baseline.method not in WITH_LORA_B:
        raise InvalidConfiguration(
            f"{variant.label}: lora_plus_ratio sets the learning rate of B, and {baseline.method} has no B of LoRA; "
            "give it in methods that have one",
            param="lora_plus_ratio",
        )
    if baseline.method in _WITHOUT_RANK:
        return baseline
    return replace(baseline, rank=variant.rank or settings.get("rank", _DEFAULT_RANK))


def _sizes_of(entry: ComparedMethod, default_rank: int | None) -> Iterator[Variant]:
    """Every size of a method; `default_rank` is the rank in the name of a method without one, None for no such part."""
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


def _base_spec(base: str) -> str:
    """Replace `package:NAME/FOLDER` by the folder."""
    if not base.startswith(_PACKAGE):
        return base
    name, _, folder = base.removeprefix(_PACKAGE).partition("/")
    found = find_spec(name) if name.isidentifier() else None
    places = list(found.submodule_search_locations or ()) if found is not None else []
    if not places:
        raise InvalidConfiguration(
            f"base {base!r}: the Python package {name!r} is not installed; install it, or give --base NAME=FOLDER",
            param="bases",
        )
    return str(Path(places[0]) / folder)


@cache
def _contents(path: str) -> str:
    """Name a file by its contents, a folder by the names and contents of its files, anything else by itself."""
    place = Path(path)
    if place.is_file():
        with place.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if place.is_dir():
        return contents_digest(place)
    return path


def read_plan(path: Path, bases: Mapping[str, str] | None = None) -> ComparePlan:
    """Read and check a plan.

    Args:
        path: YAML file.
        bases: Other places of the plan's bases, by name.

    Raises:
        InvalidConfiguration: The file cannot be read, or a value is impossible. The message names the place.
    """
    try:
        plan = ComparePlan.model_validate(read_yaml(path, "plan", "plan"))
    except ValidationError as error:
        faults = []
        for item in error.errors(include_url=False):
            where = ".".join(map(str, item["loc"]))
            faults.append(f"{where}: " * bool(where) + item["msg"].removeprefix("Value error, "))
        raise InvalidConfiguration(f"plan {path}: {'; '.join(faults)}", param="plan") from error
    for name, place in (bases or {}).items():
        if name not in plan.bases:
            raise InvalidConfiguration(
                f"--base {name}={place}: the plan has no base {name!r}; it has {', '.join(plan.bases)}", param="base"
            )
        moved = plan.bases[name].model_copy(update={"base": place})
        plan = plan.model_copy(update={"bases": {**plan.bases, name: moved}})
    for cell, seed in plan.ordered():
        plan.spec(cell, seed, cell.variant.learning_rate, "score")
    plan.check_scores(path)
    return plan
