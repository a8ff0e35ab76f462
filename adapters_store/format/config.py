"""The adapter configuration: what a bundle's tensors mean, their base model, and how they were trained."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

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
from adapters_store.format.strict_json import parse_json

FORMAT_VERSION = 2
"""The newest format version that is read. A bundle is written in the oldest version that has its fields."""
PARAM = "adapter_config"
MAX_CHAT_TEMPLATE_BYTES = 64 << 10
_MAX_WIDTH = 1 << 20
_MAX_DEPTH = 8
# Fields of version 2 and their values where they are not used. They are written and hashed only where they are used:
# so bundles of version 1 keep their digests.
_LATER: dict[str, Any] = {"chat_template": None, "head": None}
_LATER_OF_MODULES: dict[str, Any] = {"has_gain": False, "has_offset": False}

Task = Literal["generate", "classify"]
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

    @model_serializer(mode="wrap")
    def _without_unused(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return _without_defaults(handler(self), _LATER_OF_MODULES)

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


class AdapterConfig(_Strict):
    """Everything about an adapter but its weights. See FORMAT.md for each field.

    The constructor raises `pydantic.ValidationError`; `from_json` raises `InvalidConfig`. The constructor finds
    `format_version` by itself: 2 exactly where a field of version 2 is used.
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
    # The last field, because its default depends on the others.
    format_version: Annotated[int, Field(ge=1, le=FORMAT_VERSION)] = Field(
        default_factory=lambda fields: _version(fields)
    )

    @property
    def num_labels(self) -> int:
        """Rows of the head; 0 for a generator."""
        return len(self.labels) if self.labels else 0

    @property
    def parameters(self) -> int:
        """Numbers in the bundle, head included."""
        return sum(spec.parameters for spec in self.modules.values()) + self.head_parameters

    @property
    def head_parameters(self) -> int:
        """Numbers in a classifier's head; 0 for a generator."""
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
        return {"format_version": fields.pop("format_version"), **_without_defaults(fields, _LATER)}

    @model_validator(mode="after")
    def _version_is_the_oldest(self) -> AdapterConfig:
        needed = _version(dict(self))
        if self.format_version < needed:
            raise _refusal("a field of format version 2 is used; write 2", "format_version")
        if self.format_version > needed:
            raise _refusal("no field of format version 2 is used; write 1", "format_version")
        return self

    @model_validator(mode="after")
    def _head_and_task_agree(self) -> AdapterConfig:
        if self.task == "generate":
            for field in ("labels", "pooling", "max_length", "head"):
                if getattr(self, field) is not None:
                    raise _refusal(f"{field} is only for task 'classify'; leave it null", field)
        else:
            if self.chat_template is not None:
                raise _refusal("chat_template is only for task 'generate'; leave it null", "chat_template")
            if self.labels is None or len(self.labels) < 2 or len(set(self.labels)) != len(self.labels):
                raise _refusal("task 'classify' needs at least two labels, all different", "labels")
            if self.pooling is None:
                raise _refusal("task 'classify' needs pooling: last_token, cls or mean", "pooling")
        if (not self.modules) != (self.method == "head-only"):
            raise _refusal("modules is empty exactly when method is 'head-only'", "modules")
        if not self.modules and self.task == "generate":
            raise _refusal("method 'head-only' is only for task 'classify'", "method")
        return self

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
        value = parse_json_object(text)
        version = value.get("format_version")
        if type(version) is int and not 1 <= version <= FORMAT_VERSION:
            raise UnsupportedFormat(
                f"adapter_config.format_version is {version}; this release reads 1 to {FORMAT_VERSION}",
                param=f"{PARAM}.format_version",
            )
        if "format_version" not in value:
            raise InvalidConfig(
                "adapter_config.format_version is missing; write 1, or 2 where a field of version 2 is used",
                param=f"{PARAM}.format_version",
            )
        if version == 1 and (field := _first_later_field(value)) is not None:
            raise InvalidConfig(
                f"{PARAM}.{field} is a field of format version 2; remove it, or write format_version 2",
                param=f"{PARAM}.{field}",
            )
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            raise _as_invalid_config(error) from error


def _version(fields: Mapping[str, Any]) -> int:
    """The oldest format version that has every field in use."""
    modules: Mapping[str, ModuleSpec] = fields["modules"]
    later = any(fields[name] is not None for name in _LATER) or any(
        spec.has_gain or spec.has_offset for spec in modules.values()
    )
    return 2 if later else 1


def _first_later_field(value: Mapping[str, Any]) -> str | None:
    """The dotted path of the first field of version 2 in a configuration that was only parsed, or None."""
    if (name := next((name for name in _LATER if name in value), None)) is not None:
        return name
    modules = value.get("modules")
    for path, spec in modules.items() if isinstance(modules, dict) else ():
        if isinstance(spec, dict) and (name := next((name for name in _LATER_OF_MODULES if name in spec), None)):
            return f"modules.{path}.{name}"
    return None


def _without_defaults(fields: dict[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out those of `defaults` that have their default value."""
    return {name: value for name, value in fields.items() if name not in defaults or value != defaults[name]}


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no white space; NaN is refused by `ValueError`."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def parse_json_object(text: str | bytes) -> dict[str, Any]:
    """Parse strict JSON: UTF-8, one object, no key twice, no NaN or Infinity; else `InvalidConfig`."""
    try:
        value = parse_json(text)
    except json.JSONDecodeError as error:
        raise InvalidConfig(f"adapter_config is not valid JSON: {error}", param=PARAM) from error
    if not isinstance(value, dict):
        raise InvalidConfig("adapter_config must be a JSON object", param=PARAM)
    return value


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
