"""The adapter configuration: what a bundle's tensors mean, their base model, and how they were trained."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from adapters_store.errors import InvalidConfig, UnsupportedFormat
from adapters_store.format.strict_json import canonical_json, parse_json_object

FORMAT_VERSION = 3
"""The newest format version that is read. A bundle is written in the oldest version that has its fields."""
PARAM = "adapter_config"
MAX_CHAT_TEMPLATE_BYTES = 64 << 10
_MAX_WIDTH = 1 << 20
_MAX_DEPTH = 8
_MAX_SIDE = 4096
# Fields of later versions and their values where they are not used. They are written and hashed only where they are
# used: so bundles of older versions keep their digests.
_LATER: dict[int, dict[str, Any]] = {
    2: {"chat_template": None, "head": None},
    3: {"multi_label": False, "image": None},
}
_ALL_LATER = {name: default for fields in _LATER.values() for name, default in fields.items()}
_LATER_OF_MODULES: dict[str, Any] = {"has_gain": False, "has_offset": False}

Task = Literal["generate", "classify", "regress", "token-classify", "image-classify", "retrieve"]
_TASKS_OF_VERSION_1 = ("generate", "classify")
Method = Literal["sera", "lora", "melora", "moslora", "lora-fa", "head-only"]
Pooling = Literal["last_token", "cls", "mean"]
Activation = Literal["tanh", "relu", "gelu"]
Width = Annotated[int, Field(ge=1, le=_MAX_WIDTH)]
ModulePath = Annotated[str, Field(max_length=256, pattern=r"\A[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*\z")]
Text = Annotated[str, Field(min_length=1, max_length=512)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class BaseInfo(_Strict):
    """Identity of the base model that an adapter belongs to.

    `name` is for people. The other four fields decide whether an adapter fits a base model.
    """

    name: Text
    architecture: Text
    config_digest: Text
    weights_digest: Text
    hidden_size: Width


class HeadSpec(_Strict):
    """The hidden layer of a classifier's head: h' = activation(head.dense.weight h + head.dense.bias).

    Attributes:
        activation: tanh, relu, or gelu: the exact one, x * Phi(x).
        width: Outputs of the hidden layer, and inputs of the projection to the labels.
    """

    activation: Activation
    width: Width


class ImageSpec(_Strict):
    """How an image becomes the base's input, in training and on the server.

    Pixels are scaled by 1/255, resized, center-cropped to (height, width) where `resize` is `shortest_edge`, and then
    normalised: (value - mean) / std for each of the channels red, green, blue.

    Attributes:
        height: Pixels of the base's input.
        width: Likewise.
        resize: `exact`: both sides become the input's. `shortest_edge`: the shape stays, and the image just covers
            the input.
        resample: The filter of the resizing.
        mean: Of each channel.
        std: Of each channel; positive.
    """

    height: Annotated[int, Field(ge=1, le=_MAX_SIDE)]
    width: Annotated[int, Field(ge=1, le=_MAX_SIDE)]
    resize: Literal["exact", "shortest_edge"]
    resample: Literal["nearest", "bilinear", "bicubic", "lanczos"]
    mean: Annotated[list[float], Field(min_length=3, max_length=3)]
    std: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=3, max_length=3)]


class ModuleSpec(_Strict):
    """One adapted linear layer: y = gain * (W x + b + scaling * ((x A) C) B) + offset, element by element.

    A and B are block-diagonal in `split` blocks. `has_gain` and `has_offset` tell whether the layer has the vectors
    gain and offset, (d_out,); the gain is 1 and the offset 0 where it has none.
    """

    d_in: Width
    d_out: Width
    rank: Width
    split: Width
    use_mixer: bool
    scaling: float
    has_gain: bool = False
    has_offset: bool = False

    @property
    def segment_rank(self) -> int:
        """Rank of one block."""
        return self.rank // self.split

    @property
    def parameters(self) -> int:
        """Numbers that the layer's tensors hold.

        (d_in + d_out) * segment_rank, rank^2 with the mixer, and d_out each for a gain and an offset.
        """
        factors = (self.d_in + self.d_out) * self.segment_rank + self.use_mixer * self.rank**2
        return factors + (self.has_gain + self.has_offset) * self.d_out

    @model_validator(mode="after")
    def _split_divides(self) -> ModuleSpec:
        sizes = {"rank": self.rank, "d_in": self.d_in, "d_out": self.d_out}
        for field, size in sizes.items():
            if size % self.split:
                fitting = math.gcd(*sizes.values())
                divisors = [d for d in range(1, min(fitting, 4096) + 1) if fitting % d == 0][-8:]
                raise _refusal(
                    f"split {self.split} does not divide {field} {size}; a split of "
                    f"{', '.join(map(str, divisors))} would fit",
                    "split",
                )
        return self


@dataclass(frozen=True)
class TaskRule:
    """What the configuration of a task has.

    Attributes:
        must: Fields that it needs.
        may: Further fields that it may have.
        has_head: Whether the bundle has the tensors of a head.
    """

    must: frozenset[str]
    may: frozenset[str]
    has_head: bool


RULES: dict[Task, TaskRule] = {
    "generate": TaskRule(frozenset(), frozenset({"chat_template"}), has_head=False),
    "classify": TaskRule(
        frozenset({"labels", "pooling"}), frozenset({"max_length", "head", "multi_label"}), has_head=True
    ),
    "regress": TaskRule(frozenset({"pooling"}), frozenset({"max_length", "head"}), has_head=True),
    "token-classify": TaskRule(frozenset({"labels"}), frozenset({"max_length", "head"}), has_head=True),
    "image-classify": TaskRule(
        frozenset({"labels", "pooling", "image"}), frozenset({"head", "multi_label"}), has_head=True
    ),
    "retrieve": TaskRule(frozenset({"image"}), frozenset({"max_length"}), has_head=False),
}
# What a message says of a field that is missing.
_VALUES = {
    "pooling": ": last_token, cls or mean",
    "image": ": how training made the base's input of an image",
    "labels": ": one for each row of the head",
}


class AdapterConfig(_Strict):
    """Everything about an adapter but its weights. See FORMAT.md for each field.

    The constructor raises `pydantic.ValidationError`; `from_json` raises `InvalidConfig`. The constructor finds
    `format_version` by itself: the oldest that has the task and every field in use.
    """

    task: Task
    method: Method
    base: BaseInfo
    modules: dict[ModulePath, ModuleSpec]
    labels: list[Text] | None = None
    pooling: Pooling | None = None
    max_length: Width | None = None
    training: dict[str, JsonValue] = Field(default_factory=dict)
    chat_template: Annotated[str, Field(min_length=1)] | None = None
    head: HeadSpec | None = None
    multi_label: bool = False
    image: ImageSpec | None = None
    # The last field, because its default depends on the others.
    format_version: Annotated[int, Field(ge=1, le=FORMAT_VERSION)] = Field(
        default_factory=lambda fields: _version(fields)
    )

    @property
    def has_head(self) -> bool:
        """Whether the adapter has a head: every task but generate and retrieve."""
        return RULES[self.task].has_head

    @property
    def num_labels(self) -> int:
        """Rows of the head: its labels, 1 for a regression, 0 without a head."""
        if self.task == "regress":
            return 1
        return len(self.labels) if self.labels else 0

    @property
    def parameters(self) -> int:
        """Numbers in the bundle, head included."""
        return sum(spec.parameters for spec in self.modules.values()) + self.head_parameters

    @property
    def head_parameters(self) -> int:
        """Numbers in the head; 0 without one."""
        if self.head is None:
            return self.num_labels * (self.base.hidden_size + 1)
        return self.head.width * (self.base.hidden_size + 1) + self.num_labels * (self.head.width + 1)

    @field_validator("modules", "training", mode="before")
    @classmethod
    def _plain_dict(cls, value: Any) -> Any:
        return dict(value) if isinstance(value, Mapping) else value

    @field_validator("training")
    @classmethod
    def _training_is_json(cls, value: dict[str, JsonValue]) -> dict[str, JsonValue]:
        _check_json(value, "training", 1)
        return value

    @field_validator("chat_template")
    @classmethod
    def _chat_template_is_short(cls, value: str | None) -> str | None:
        if value is not None and (size := len(value.encode("utf-8", "surrogatepass"))) > MAX_CHAT_TEMPLATE_BYTES:
            raise _refusal(
                f"chat_template has {size} bytes; the limit is {MAX_CHAT_TEMPLATE_BYTES}: shorten it", "chat_template"
            )
        return value

    @model_serializer(mode="wrap")
    def _without_unused(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields = handler(self)
        # Here, not in each of hundreds of modules.
        for spec in fields.get("modules", {}).values():
            for name in [name for name in _LATER_OF_MODULES if not spec.get(name, True)]:
                del spec[name]
        return {"format_version": fields.pop("format_version"), **_without_defaults(fields, _ALL_LATER)}

    @model_validator(mode="after")
    def _version_is_the_oldest(self) -> AdapterConfig:
        needed = _version(dict(self))
        if self.format_version != needed:
            raise _refusal(
                f"format_version {needed} is the oldest that has the task and the fields in use; write {needed}",
                "format_version",
            )
        return self

    @model_validator(mode="after")
    def _fields_fit_task(self) -> AdapterConfig:
        rule = RULES[self.task]
        for field in ("labels", "pooling", "max_length", "chat_template", "head", "multi_label", "image"):
            used = getattr(self, field) not in (None, False)
            if used and field not in rule.may | rule.must:
                takers = " and ".join(f"'{task}'" for task, other in RULES.items() if field in other.may | other.must)
                absent = "leave it false" if field == "multi_label" else "leave it null"
                raise _refusal(f"{field} is only for task {takers}; {absent}", field)
            if not used and field in rule.must:
                raise _refusal(f"task '{self.task}' needs {field}{_VALUES.get(field, '')}", field)
        if self.labels is not None:
            self._check_labels(self.labels)
        if self.task == "image-classify" and self.pooling == "last_token":
            raise _refusal("task 'image-classify' needs pooling: cls or mean", "pooling")
        if (not self.modules) != (self.method == "head-only"):
            raise _refusal("modules is empty exactly when method is 'head-only'", "modules")
        if not self.modules and not rule.has_head:
            raise _refusal(f"method 'head-only' is for tasks with a head; '{self.task}' has none", "method")
        return self

    def _check_labels(self, labels: list[str]) -> None:
        fewest = 1 if self.multi_label else 2
        if len(labels) < fewest or len(set(labels)) != len(labels):
            least = "one label" if fewest == 1 else "two labels"
            raise _refusal(f"task '{self.task}' needs at least {least}, all different", "labels")
        if self.task == "token-classify":
            kinds = {label[2:] for label in labels[1:]}
            if labels[0] != "O" or "" in kinds or {f"{x}-{kind}" for kind in kinds for x in "BI"} != set(labels[1:]):
                raise _refusal(
                    "task 'token-classify' needs the tags of the BIO form: 'O' first, then 'B-name' and 'I-name' for "
                    "each kind of span",
                    "labels",
                )

    def canonical_json(self) -> str:
        """The canonical JSON, input of the digest: keys sorted, no white space, non-ASCII characters as they are."""
        return canonical_json(self.model_dump(mode="json"))

    @classmethod
    def from_json(cls, text: str | bytes) -> AdapterConfig:
        """Parse and check a configuration.

        Raises:
            InvalidConfig: Not UTF-8 JSON, a key twice, NaN, or a field (`param` names it) unknown, missing or
                impossible.
            UnsupportedFormat: Another format version.
        """
        value = parse_json_object(text, PARAM, InvalidConfig, PARAM)
        version = value.get("format_version")
        if type(version) is int and not 1 <= version <= FORMAT_VERSION:
            raise UnsupportedFormat(
                f"adapter_config.format_version is {version}; this release reads 1 to {FORMAT_VERSION}",
                param=f"{PARAM}.format_version",
            )
        if "format_version" not in value:
            raise InvalidConfig(
                "adapter_config.format_version is missing; write the oldest version that has the task and the fields",
                param=f"{PARAM}.format_version",
            )
        if type(version) is int and (later := _first_later_field(value, version)) is not None:
            field, needed = later
            what = f"the task {value['task']!r}" if field == "task" else f"{PARAM}.{field}"
            raise InvalidConfig(
                f"{what} is of format version {needed}; remove it, or write format_version {needed}",
                param=f"{PARAM}.{field}",
            )
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            raise _as_invalid_config(error) from error


def _version(fields: Mapping[str, Any]) -> int:
    """The oldest format version that has the task and every field in use."""
    modules: Mapping[str, ModuleSpec] = fields["modules"]
    version = 1 if fields["task"] in _TASKS_OF_VERSION_1 else 3
    if any(spec.has_gain or spec.has_offset for spec in modules.values()):
        version = max(version, 2)
    for later, defaults in _LATER.items():
        if any(fields[name] != default for name, default in defaults.items()):
            version = max(version, later)
    return version


def _first_later_field(value: Mapping[str, Any], version: int) -> tuple[str, int] | None:
    """What a parsed configuration may not have in `version`: its dotted path, and the version that has it; or None."""
    for later, defaults in _LATER.items():
        if later > version and (name := next((name for name in defaults if name in value), None)) is not None:
            return name, later
    task = value.get("task")
    if version < 3 and isinstance(task, str) and task in set(get_args(Task)) - set(_TASKS_OF_VERSION_1):
        return "task", 3
    modules = value.get("modules")
    for path, spec in modules.items() if version < 2 and isinstance(modules, dict) else ():
        if isinstance(spec, dict) and (name := next((name for name in _LATER_OF_MODULES if name in spec), None)):
            return f"modules.{path}.{name}", 2
    return None


def _without_defaults(fields: dict[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out those of `defaults` that have their default value."""
    return {name: value for name, value in fields.items() if name not in defaults or value != defaults[name]}


def _check_json(value: JsonValue, where: str, depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise _refusal(f"{where} is nested deeper than {_MAX_DEPTH} levels", "training")
    if isinstance(value, float) and not math.isfinite(value):
        raise _refusal(f"{where} is {value}; write null for a figure that does not exist", "training")
    if isinstance(value, dict):
        for key, item in value.items():
            _check_json(item, f"{where}.{key}", depth + 1)
    elif isinstance(value, list):
        for item in value:
            _check_json(item, f"{where}[]", depth + 1)


def _refusal(message: str, field: str) -> PydanticCustomError:
    # The braces of a message must not be read as a template.
    return PydanticCustomError("refused", "{reason}", {"reason": message, "field": field})


def _as_invalid_config(error: ValidationError) -> InvalidConfig:
    first = error.errors(include_url=False)[0]
    context = first.get("ctx", {})
    location = [str(part) for part in first["loc"]]
    if "field" in context and context["field"] not in location:
        location.append(str(context["field"]))
    param = ".".join([PARAM, *location])
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return InvalidConfig(f"{param}: {first['msg']}{more}", param=param)
