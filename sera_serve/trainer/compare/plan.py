"""The plan of a comparison: bases, data sets and seeds, and each run of a method as a process gets it."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sera_serve.errors import InvalidConfiguration
from sera_serve.trainer.compare.learning_rates import LearningRateRule
from sera_serve.trainer.compare.variants import (
    DEFAULT_RANK,
    ComparedMethod,
    Variant,
    shape_of,
    shapes_adapter,
    sizes_of,
)
from sera_serve.trainer.data.images import named_images_digest
from sera_serve.trainer.data.labelled import USES
from sera_serve.trainer.methods import METHODS
from sera_serve.trainer.option_text import read_yaml
from sera_serve.trainer.settings import FILES, TrainSettings
from sera_serve.trainer.tables.table import HUB
from sera_serve.trainer.task_options import LOWER_IS_BETTER as LOSSES
from sera_serve.trainer.task_options import MULTI_LABEL_METRICS, REPORTED_METRICS, TASK_METRICS
from sera_serve.trainer.together.records import contents_digest

_OPEN = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)
# The comparison sets these itself.
_OWN = (
    *("store", "name", "work_dir", "resume", "checkpoint_seconds", "seed", "method", "description", "init_from"),
    # One file would be of every run.
    "plot",
)
_PACKAGE = "package:"
# Of every metric that a task computes, those of task_options and those that choose no epoch.
LOWER_IS_BETTER = frozenset({*LOSSES, "perplexity", "bits_per_byte"})
Purpose = Literal["rate", "score"]
Loop = Literal["seed", "base", "data", "method"]


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

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

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
            if rule is not None and options.get("learning_rate") is not None:
                raise ValueError(f"{where}: learning_rate is chosen by learning_rates; take one of the two out")
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
        rank = None if varies else self.settings.get("rank", DEFAULT_RANK)
        return [variant for method in self.methods for variant in sizes_of(method, rank)]

    def cells(self) -> list[Cell]:
        """Return every place of the table."""
        return [
            Cell(base, data, variant)
            for base in self.bases
            for data in self.data
            for variant in self.variants()
            if variant.data is None or data in variant.data
        ]

    def tuning_cells(self, rule: LearningRateRule, cell: Cell) -> list[Cell]:
        """Return the places whose runs choose the learning rate of `cell`."""
        return [Cell(cell.base, data, cell.variant) for data in rule.data or [cell.data]]

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
            f"{where} is {name}"
            for where, name in self._files()
            if not name.startswith(HUB) and not Path(name).exists()
        ]
        if absent:
            raise InvalidConfiguration(
                f"plan {path}: {'; '.join(absent)}: no such file or folder here; correct the path, which starts from "
                "the working folder",
                param="plan",
            )

    def check_outputs(self, path: Path, outputs: Iterable[Path]) -> None:
        """Refuse to write over what the runs read: a table `sms.csv` over the rows of a plan `sms.yaml`.

        Raises:
            InvalidConfiguration: An output is the plan itself, one of its files, or within one of its folders.
        """
        inputs = {"the plan": path} | {where: Path(name) for where, name in self._files() if not name.startswith(HUB)}
        for output in outputs:
            for where, used in inputs.items():
                if output.resolve().is_relative_to(used.resolve()):
                    way = "into" if used.is_dir() else "over"
                    raise InvalidConfiguration(
                        f"{output} would be written {way} {where} ({used}); give another --output or --results",
                        param="output",
                    )

    def _files(self) -> Iterator[tuple[str, str]]:
        """Every file and folder of data, by its place in the plan."""
        for where, options in self._option_groups():
            for name in FILES:
                if options.get(name) is not None:
                    yield f"{where}.{name}", str(options[name])

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
            options = {name: value for name, value in options.items() if not shapes_adapter(name)}
        elif variant.baseline is None:
            options["rank"] = variant.rank or options.get("rank", DEFAULT_RANK)
        options |= variant.options
        if options.get("eval") is not None:
            # The plan's part is for the data without a file of its own.
            options.pop("eval_fraction", None)
        score, evaluates = self.score_of(cell.data), options.get("eval_fraction") != 0
        if score in self._metrics(cell.data) and evaluates:
            options.setdefault("select_by", score)
        # A folder of images may have parts for evaluation and test.
        if not evaluates and (purpose == "rate" or options.get("test") is None) and options["task"] != "image-classify":
            raise InvalidConfiguration(
                f"{cell.variant.label} on {cell.data} over {cell.base}: eval_fraction is 0, and no row is left to "
                f"{'choose a learning rate' if purpose == 'rate' else 'score'} by; give eval, or an eval_fraction",
                param="eval_fraction",
            )
        if learning_rate is not None:
            options["learning_rate"] = learning_rate
        if purpose == "rate":
            options.pop("test", None)
        options |= {"base": _base_spec(base.base), "seed": seed, "store": "-", "name": "compare/run"}
        try:
            checked = TrainSettings.model_validate(options)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"])) or "options"
            raise InvalidConfiguration(
                f"{cell.variant.label} on {cell.data} over {cell.base}: {where}: "
                f"{first['msg'].removeprefix('Value error, ')}; correct it in methods, data, bases or settings",
                param=where,
            ) from error
        # Without defaults: an option that a method does not know must stay unset, and a new option of the trainer must
        # not give finished runs other names.
        settings = checked.model_dump(mode="json", exclude={"store", "name"}, exclude_unset=True)
        shape = asdict(shape_of(variant, variant.baseline, settings)) if variant.baseline is not None else None
        test_rows = self.data[cell.data].test_rows if purpose == "score" else None
        named = settings | {"base": cell.base}
        for use in FILES:
            if named.get(use) is not None:
                named[use] = _contents(str(named[use]))
        named |= _beside_tables(checked)
        identity = json.dumps([named, shape, test_rows, purpose], sort_keys=True)
        return RunSpec(settings, shape, test_rows, hashlib.sha256(identity.encode()).hexdigest()[:16], purpose)


def _check_options(where: str, options: Mapping[str, Any]) -> None:
    for name in options:
        if name in _OWN:
            raise ValueError(f"{where}: {name} is set by the comparison; take it out")
        if name not in TrainSettings.model_fields:
            raise ValueError(f"{where}: unknown option {name!r}; see train_adapter --help for the options of a run")


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


def _beside_tables(settings: TrainSettings) -> dict[str, str]:
    """Name the images that the tables of a run name by their contents; none where a folder or zip file has them."""
    if settings.task not in ("image-classify", "retrieve") or settings.images is not None:
        return {}
    found = {}
    for use in USES:
        path: Path | None = getattr(settings, use)
        if path is not None and path.is_file() and path.suffix.lower() != ".zip":
            digest = _named_images(path, settings.image_column, settings.delimiter, settings.encoding, use)
            if digest is not None:
                found[f"{use}_images"] = digest
    return found


# A plan names each of its runs.
_named_images = cache(named_images_digest)


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
            faults.append((f"{where}: " if where else "") + item["msg"].removeprefix("Value error, "))
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
    if (rule := plan.learning_rates) is not None:
        for cell in plan.cells():
            if cell.variant.learning_rate is None:
                for each in plan.tuning_cells(rule, cell):
                    plan.spec(each, rule.seed, rule.start[0], "rate")
    plan.check_scores(path)
    return plan
