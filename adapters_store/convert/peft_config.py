"""Second stage of an import: reads PEFT's configuration, and refuses what it asks for and a bundle cannot hold.

The fields are those of `peft.LoraConfig` (PEFT 0.21). Tensor keys and shapes decide which layers are adapted; the
configuration is read for scalings and for refusals.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic
from typing import Any, cast

import regex

from adapters_store.convert.peft_errors import UnsupportedAdapter
from adapters_store.errors import InvalidConfig

_PARAM = "adapter_config"
_MAX_PATTERN = 512
# Patterns of one field. PEFT's EVA may name each layer, and a large model has several hundred.
_MAX_PATTERNS = 1024
# Seconds for all patterns of a checkpoint together, compiled and matched. A pattern can be made to take exponential
# time.
_PATTERN_SECONDS = 2.0
# Characters of a pattern, and of all patterns of a checkpoint, with repeats written out. The compiler writes them out,
# holds the interpreter's lock, and has no time limit: a million characters take a second and 270 MiB.
_MAX_WRITTEN_OUT = 1 << 14
_MAX_ALL_WRITTEN_OUT = 1 << 18
# What repeats in a pattern, wherever it stands. An escaped one counts too: the bound needs no parser to be sound.
_REPEAT = re.compile(r"\+|\{(?:(?P<least>[0-9]*)(?:,[0-9]*)?\})?", re.ASCII)

# Methods that PEFT's `save_as_lora` converts.
_CONVERTIBLE = frozenset(
    [
        "C3A",
        "DELORA",
        "FOURIERFT",
        "GRALORA",
        "LOHA",
        "LOKR",
        "MISS",
        "PSOFT",
        "RANDLORA",
        "TINYLORA",
        "UNILORA",
        "VBLORA",
        "VERA",
        "WAVEFT",
    ]
)
# Fields that say how an adapter was made or is loaded. They do not change what it computes.
_NO_EFFECT = frozenset(
    [
        "task_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "target_modules",
        "exclude_modules",
        "lora_dropout",
        "fan_in_fan_out",
        "modules_to_save",
        "layers_to_transform",
        "layers_pattern",
        "megatron_config",
        "megatron_core",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "qalora_group_size",
        "runtime_config",
        "ensure_weight_tying",
    ]
)
_READ = frozenset(
    [
        "peft_type",
        "r",
        "lora_alpha",
        "rank_pattern",
        "alpha_pattern",
        "use_rslora",
        "use_dora",
        "lora_bias",
        "bias",
        "init_lora_weights",
        "use_bdlora",
        "id2label",
    ]
)
# Fields whose use is refused, with the reason.
_REFUSED = {
    "use_qalora": "QALoRA pools the inputs of a layer before the adapter",
    "alora_invocation_tokens": "an activated LoRA begins at certain tokens of a prompt",
    "arrow_config": "Arrow routes each token among several adapters",
    "layer_replication": "it repeats layers of the base",
    "kasa_config": "KaSA changes the base's weights",
    "velora_config": "VeLoRA has layers of its own",
    "monteclora_config": "MonteCLoRA samples its weights",
    "trainable_token_indices": "it replaces rows of the base's embedding",
    "target_parameters": "it adapts parameters that are no linear layers, such as experts",
}
_REMEDY = "train a plain LoRA, or merge the adapter into the base and serve that"
# Initialisations that leave the base as it is.
_GOOD_INITIALISATIONS = frozenset({"gaussian", "eva", "orthogonal", "mica", "true", "false"})
_TASKS = ("CAUSAL_LM", "SEQ_CLS", "FEATURE_EXTRACTION")


@dataclass(frozen=True)
class PeftConfig:
    """What an import reads of a LoRA's configuration.

    Attributes:
        rank: `r`; a layer's rank is that of its tensors.
        alpha: `lora_alpha`, for layers that no pattern names.
        rank_patterns: Rank by pattern, in the order in which PEFT tries them.
        alpha_patterns: Alpha by pattern, likewise.
        use_rslora: Whether the scaling is alpha / sqrt(rank) in place of alpha / rank.
        use_dora: Whether each layer has a magnitude vector.
        lora_bias: Whether each layer has a bias after B.
        blocks: Blocks of the block-diagonal factors of BD-LoRA; 1 without it.
        task_type: PEFT's name of the task, or None.
        base_name: Name or path of the base that the adapter was trained on, or None.
        labels: The labels of `id2label`, or None.
    """

    rank: int
    alpha: float
    rank_patterns: Mapping[str, int]
    alpha_patterns: Mapping[str, float]
    use_rslora: bool
    use_dora: bool
    lora_bias: bool
    blocks: int
    task_type: str | None
    base_name: str | None
    labels: tuple[str, ...] | None

    def scaling(self, alpha: float, rank: int) -> float:
        """The factor of a layer's update."""
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


class PatternBudget:
    """The time and the size that all patterns of a checkpoint may take together, whichever field they are in."""

    def __init__(self) -> None:
        """Begin with all of it."""
        self.left = _PATTERN_SECONDS
        self.characters_left = _MAX_ALL_WRITTEN_OUT

    def take(self, pattern: str, field: str) -> None:
        """Count the characters of a pattern with its repeats written out.

        Raises:
            InvalidConfig: They are too many, or a brace begins no count.
        """
        size = len(pattern)
        for repeat in _REPEAT.finditer(pattern):
            if repeat[0] == "{":
                raise _invalid(
                    field, f"pattern {_shown(pattern)} has a brace that begins no count; name the layers without braces"
                )
            # The compiler writes the least number of repeats, and the rest as a loop.
            size *= 2 if repeat[0] == "+" else 1 + int(repeat["least"] or "0")
            if size > _MAX_WRITTEN_OUT:
                raise _invalid(
                    field,
                    f"pattern {_shown(pattern)} has more than {_MAX_WRITTEN_OUT} characters with its repeats written "
                    "out; use fewer of + and {n}, or name layers in full",
                )
        self.characters_left -= size
        if self.characters_left < 0:
            raise _invalid(
                field,
                f"all patterns have more than {_MAX_ALL_WRITTEN_OUT} characters with their repeats written out; use "
                "one pattern for several layers",
            )

    @contextmanager
    def spend(self, field: str) -> Iterator[float]:
        """Count the time inside, and give what is left, in seconds.

        Raises:
            InvalidConfig: Nothing is left, before or after; or the inside raised TimeoutError or MemoryError.
        """
        began = monotonic()
        try:
            if self.left > 0:
                yield self.left
                self.left -= monotonic() - began
            if self.left <= 0:
                raise TimeoutError
        except TimeoutError:
            raise _invalid(
                field, f"the patterns take more than {_PATTERN_SECONDS:g} s to compile and match; name layers in full"
            ) from None
        except MemoryError:
            raise _invalid(
                field, "the patterns take too much memory to compile and match; name layers in full"
            ) from None


class PatternMatcher:
    """Finds the pattern for a layer as PEFT does: `(.*\\.)?(pattern)$`, the first that matches."""

    def __init__(self, patterns: Collection[str], field: str, budget: PatternBudget) -> None:
        """Compile the patterns of a field.

        Args:
            patterns: Regular expressions, in the order in which they are tried.
            field: The field's name in the configuration.
            budget: What all fields of a checkpoint share.

        Raises:
            InvalidConfig: They are too many or too long, one is no regular expression, or they take too long.
        """
        self._field = field
        self._budget = budget
        self._patterns: list[tuple[str, Any]] = []
        if len(patterns) > _MAX_PATTERNS:
            raise _invalid(field, f"it has {len(patterns)} patterns; the limit is {_MAX_PATTERNS}")
        for pattern in patterns:
            if len(pattern) > _MAX_PATTERN:
                raise _invalid(field, f"a pattern has {len(pattern)} characters; the limit is {_MAX_PATTERN}")
            budget.take(pattern, field)
            with budget.spend(field):
                whole = rf"(.*\.)?({pattern})$"
                try:
                    # PEFT's own library knows no calls of groups, such as (?R): their stack grows to 1 GiB.
                    re.compile(whole)
                    # The other library has time limits. Its cache would keep the patterns of many more checkpoints.
                    compiled = regex.compile(whole, cache_pattern=False)
                except (re.error, regex.error, RecursionError, OverflowError) as error:
                    raise _invalid(field, f"{pattern!r} is no regular expression ({error})") from error
            self._patterns.append((pattern, compiled))

    def find(self, path: str) -> str | None:
        """The first pattern that matches the path of a layer; None without one.

        Raises:
            InvalidConfig: The patterns take too long.
        """
        if not self._patterns:
            return None
        with self._budget.spend(self._field) as seconds:
            end = monotonic() + seconds
            for pattern, compiled in self._patterns:
                # A timeout of zero or less would be no timeout.
                if (left := end - monotonic()) <= 0:
                    raise TimeoutError
                if compiled.match(path, timeout=left):
                    return pattern
        return None


def read_peft_config(fields: Mapping[str, Any]) -> PeftConfig:
    """Check every field of a configuration, and read those that matter.

    Raises:
        UnsupportedAdapter: It is no LoRA, or uses what a bundle cannot hold; `param` names the field.
        InvalidConfig: A field has an impossible value.
    """
    _check_method(fields)
    for field, value in fields.items():
        if field in _REFUSED and not _is_unset(value):
            raise _unsupported(field, f"{field} is used: {_REFUSED[field]}; {_REMEDY}")
        if field not in _NO_EFFECT | _READ | _REFUSED.keys() and not _is_unset(value):
            raise _unsupported(
                field,
                f"{field} is {_shown(value)}, and this release does not know the field; remove it if it does not "
                "change what the adapter computes",
            )
    _check_initialisation(fields.get("init_lora_weights", True))
    bias = fields.get("bias", "none")
    if bias != "none":
        raise _unsupported(
            "bias", f"bias is {_shown(bias)}: the adapter changes biases of the base; train it with bias='none'"
        )
    task = fields.get("task_type")
    if task is not None and not isinstance(task, str):
        raise _invalid("task_type", f"it is {_shown(task)}; it must be a name, such as CAUSAL_LM, or null")
    if task is not None and task not in _TASKS:
        raise _unsupported("task_type", f"task_type is {_shown(task)}; an import takes {', '.join(_TASKS)}, or null")
    _check_names(fields, "modules_to_save")
    return PeftConfig(
        rank=_positive_integer(fields, "r", 8),
        alpha=_number("lora_alpha", fields.get("lora_alpha", 8)),
        rank_patterns={key: cast(int, value) for key, value in _patterns(fields, "rank_pattern").items()},
        alpha_patterns=_patterns(fields, "alpha_pattern"),
        use_rslora=_boolean(fields, "use_rslora"),
        use_dora=_boolean(fields, "use_dora"),
        lora_bias=_boolean(fields, "lora_bias"),
        blocks=_blocks(fields.get("use_bdlora")),
        task_type=task,
        base_name=_text(fields, "base_model_name_or_path"),
        labels=read_labels(fields.get("id2label")),
    )


def read_labels(value: Any, file: str = _PARAM) -> tuple[str, ...] | None:
    """The labels of an `id2label`, `{"0": "no", "1": "yes"}`, in the order of their numbers; None without one.

    `file` is what messages call the file that has it.

    Raises:
        InvalidConfig: The numbers do not count from 0, or a label is no text.
    """
    if value is None:
        return None
    if not isinstance(value, dict) or not all(isinstance(label, str) and label for label in value.values()):
        raise _invalid("id2label", 'it must name each label, such as {"0": "no", "1": "yes"}', file)
    if set(value) != {str(index) for index in range(len(value))}:
        raise _invalid("id2label", f"its keys must be 0 to {len(value) - 1}", file)
    return tuple(value[str(index)] for index in range(len(value)))


def _check_method(fields: Mapping[str, Any]) -> None:
    method = fields["peft_type"]
    if method == "LORA":
        return
    if not isinstance(method, str):
        raise _invalid("peft_type", f"it is {_shown(method)}; it must be a name")
    remedy = _REMEDY
    if method in _CONVERTIBLE:
        remedy = "convert it with peft.save_as_lora(path, model, rank=...), and import the result"
    raise _unsupported("peft_type", f"peft_type is {method[:64]!r}; only LORA can be served: {remedy}")


def _check_initialisation(value: Any) -> None:
    # Null is the default, which leaves the base as it is.
    if value is None or str(value).lower() in _GOOD_INITIALISATIONS:
        return
    raise _unsupported(
        "init_lora_weights",
        f"init_lora_weights is {_shown(value)}: this initialisation changes the base's weights; save the adapter again "
        "with save_pretrained(..., path_initial_model_for_weight_conversion=...), which makes a plain LoRA of it",
    )


def _is_unset(value: Any) -> bool:
    """Whether a field has a value that means nothing: null, false, or empty."""
    return value is None or value is False or value in ({}, [], "")


def _blocks(value: Any) -> int:
    if _is_unset(value):
        return 1
    if not isinstance(value, dict):
        raise _invalid("use_bdlora", f"it is {_shown(value)}; it must be an object with nblocks")
    return _positive_integer(value, "nblocks", 1, "use_bdlora.nblocks")


def _patterns(fields: Mapping[str, Any], field: str) -> dict[str, float]:
    value = fields.get(field) or {}
    if not isinstance(value, dict):
        raise _invalid(field, f"it is {_shown(value)}; it must be an object of numbers by pattern")
    if field == "rank_pattern":
        return {key: _positive_integer(value, key, 1, field) for key in value}
    return {key: _number(field, number) for key, number in value.items()}


def _number(field: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
        raise _invalid(field, f"it is {_shown(value)}; it must be a finite number")
    return float(value)


def _positive_integer(fields: Mapping[str, Any], key: str, default: int, field: str | None = None) -> int:
    value = fields.get(key, default)
    if type(value) is not int or not 1 <= value <= 1 << 20:
        raise _invalid(field or key, f"{key} is {_shown(value)}; it must be an integer from 1")
    return value


def _boolean(fields: Mapping[str, Any], field: str) -> bool:
    value = fields.get(field)
    if value is not None and not isinstance(value, bool):
        raise _invalid(field, f"it is {_shown(value)}; it must be true or false")
    return bool(value)


def _text(fields: Mapping[str, Any], field: str) -> str | None:
    value = fields.get(field)
    if value is not None and not isinstance(value, str):
        raise _invalid(field, f"it is {_shown(value)}; it must be text or null")
    return value or None


def _check_names(fields: Mapping[str, Any], field: str) -> None:
    value = fields.get(field) or []
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise _invalid(field, f"it is {_shown(value)}; it must be a list of names")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _invalid(field: str, problem: str, file: str = _PARAM) -> InvalidConfig:
    return InvalidConfig(f"{file}.{field}: {problem}", param=f"{file}.{field}")


def _unsupported(field: str, message: str) -> UnsupportedAdapter:
    return UnsupportedAdapter(f"adapter_config.{message}", param=f"{_PARAM}.{field}")
