"""Import of PEFT's LoRA checkpoints, in named stages: files, configuration, keys, layers, head, bundle.

| stage | module | what it decides |
|---|---|---|
| files | `peft_files` | where the configuration and the weights are; whether it is a PEFT checkpoint |
| configuration | `peft_config` | scalings; what is refused |
| keys | `peft_keys` | which tensor belongs to which layer of the base |
| layers | `peft_layers` | factors, scaling, gain and offset of each layer |
| head | `peft_head` | the classifier's head, labels and pooling |
| bundle | this module | the configuration and tensors of a bundle |

Nothing of a checkpoint is dropped in silence: it is carried over, or refused by name, or named in `warnings`.
Format: https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import JsonValue, ValidationError
from torch import Tensor

from adapters_store.convert.import_base import ImportBase
from adapters_store.convert.peft_config import PeftConfig, read_labels, read_peft_config
from adapters_store.convert.peft_errors import UnsupportedAdapter
from adapters_store.convert.peft_files import (
    ADDED_TOKENS_FILE,
    MODEL_CONFIG_FILE,
    TEMPLATE_FILE,
    TOKENIZER_CONFIG_FILE,
    PeftFiles,
)
from adapters_store.convert.peft_head import HeadKeys, PeftHead, match_head, read_head
from adapters_store.convert.peft_keys import LayerKeys, match_layers, sort_keys
from adapters_store.convert.peft_layers import PeftLayer, TensorReader, check_layers, read_layers
from adapters_store.errors import InvalidConfig
from adapters_store.format.bundle import AdapterBundle
from adapters_store.format.config import AdapterConfig, ModuleSpec, Task
from adapters_store.format.safetensors_file import MODEL_FILE
from adapters_store.format.strict_json import parse_json

# Names of files that are listed in a warning; there may be hundreds.
_SHOWN_FILES = 12


@dataclass(frozen=True)
class PeftImport:
    """A PEFT checkpoint as a bundle.

    Attributes:
        bundle: The same adapter in the store's format; its factors have the checkpoint's own dtype.
        layers: What PEFT itself would compute with, by path in the base: for a comparison.
        warnings: What differs between the checkpoint and the base, and which files nothing reads.
    """

    bundle: AdapterBundle
    layers: dict[str, PeftLayer]
    warnings: tuple[str, ...]


def import_peft(
    files: PeftFiles, base: ImportBase, check_elements: Callable[[int], None] = lambda elements: None
) -> PeftImport:
    """Make a bundle of a PEFT checkpoint for a base.

    The result computes what PEFT computes: the factors are PEFT's own, transposed. DoRA becomes a gain for each output,
    `lora_bias` an offset.

    The weights are read, and what is compressed is expanded, after all that the header says was compared with the
    configuration and the base.

    Args:
        files: The checkpoint.
        base: The base.
        check_elements: Is told how many elements the bundle has or more, before the weights are read. What it raises
            refuses the import.

    Raises:
        UnsupportedAdapter: It asks for something that a bundle cannot hold.
        UnknownModule, WrongShape: It was made for another base.
        RankTooLarge, BundleTooLarge: Its factors are too large; they were not read.
        MissingTensor, NotFinite, InvalidConfig, InvalidArchive: It is damaged or contradicts itself.
    """
    config = read_peft_config(files.config)
    _check_image_type(config, base)
    warnings = _warnings(files, config, base)
    reader = TensorReader(files)
    sorted_keys = sort_keys(files.header.table.entries)
    # The lora_A of a convolution has the sides of its kernel, too.
    layers_a = ((path, keys.lora_a) for path, keys in sorted_keys.layers.items() if keys.lora_a is not None)
    convolutions = {path for path, key in layers_a if len(reader.shape(key)) > 2}
    matched = match_layers(sorted_keys.layers, base, convolutions)
    elements = check_layers(reader, matched, config, base)
    labels = config.labels
    if sorted_keys.head and not labels:
        # A model's `config.json` beside the checkpoint may name them, too.
        labels = read_labels(_json_beside(files, MODEL_CONFIG_FILE).get("id2label"), MODEL_CONFIG_FILE)
    head_keys = match_head(reader, sorted_keys.head, config, base, labels)
    _check_task(config, base, matched, head_keys)
    if head_keys is not None:
        elements.pop(head_keys.base_layer or "", None)
    check_elements(sum(elements.values()) + (0 if head_keys is None else head_keys.elements))
    layers, notes = read_layers(reader, matched, config, base)
    head = None if head_keys is None else read_head(reader, head_keys, base, layers)
    modules, tensors = _modules(layers, base)
    warnings += notes
    record = _record(files, warnings)
    bundle = _bundle(base, modules, tensors, head, _template(files, base, head), record)
    return PeftImport(bundle, layers, tuple(warnings))


def with_record(bundle: AdapterBundle, **fields: JsonValue) -> AdapterBundle:
    """The bundle with fields added to the `import` of its training record."""
    training = dict(bundle.config.training)
    before = training.get("import")
    training["import"] = {**(before if isinstance(before, dict) else {}), **fields}
    return AdapterBundle(bundle.config.model_copy(update={"training": training}), bundle.tensors)


def _modules(layers: Mapping[str, PeftLayer], base: ImportBase) -> tuple[dict[str, ModuleSpec], dict[str, Tensor]]:
    modules: dict[str, ModuleSpec] = {}
    tensors: dict[str, Tensor] = {}
    for path, layer in layers.items():
        d_in, d_out = base.shapes[path]
        gain = offset = None
        if layer.magnitude is not None or layer.lora_bias is not None:
            gain, offset = layer.gain_and_offset(base.weight(path), base.bias(path))
        modules[path] = ModuleSpec(
            d_in=d_in,
            d_out=d_out,
            rank=layer.rank,
            split=1,
            use_mixer=False,
            scaling=layer.scaling,
            has_gain=gain is not None,
            has_offset=offset is not None,
        )
        tensors[f"{path}.sera_a"] = layer.a.T
        tensors[f"{path}.sera_b"] = layer.b.T
        if gain is not None:
            tensors[f"{path}.gain"] = gain
        if offset is not None:
            tensors[f"{path}.offset"] = offset
    return modules, tensors


def _bundle(
    base: ImportBase,
    modules: dict[str, ModuleSpec],
    tensors: dict[str, Tensor],
    head: PeftHead | None,
    template: str | None,
    record: dict[str, JsonValue],
) -> AdapterBundle:
    try:
        config = AdapterConfig(
            task=_task(base, head),
            method="lora" if modules else "head-only",
            base=base.info,
            modules=modules,
            labels=None if head is None else list(head.labels),
            pooling=None if head is None else head.pooling,
            head=None if head is None else head.spec,
            chat_template=template,
            image=base.image,
            training={"import": record},
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise InvalidConfig(f"the checkpoint makes no bundle: {first['msg']}", param="adapter_config") from error
    return AdapterBundle(config, tensors if head is None else tensors | head.tensors)


def _task(base: ImportBase, head: PeftHead | None) -> Task:
    if base.kind == "dual":
        return "retrieve"
    if head is None:
        return "generate"
    return "image-classify" if base.kind == "vision" else "classify"


def _record(files: PeftFiles, warnings: Sequence[str]) -> dict[str, JsonValue]:
    kept = ("peft_version", "base_model_name_or_path", "r", "lora_alpha", "use_rslora", "use_dora", "lora_dropout")
    said: dict[str, JsonValue] = {
        name: files.config[name] for name in kept if isinstance(files.config.get(name), str | int | float | bool)
    }
    dtypes = sorted({entry.dtype for entry in files.header.table.entries.values()})
    return {"from": "peft", "config": said, "dtypes": list(dtypes), "warnings": list(warnings)}


def _check_task(config: PeftConfig, base: ImportBase, layers: Mapping[str, LayerKeys], head: HeadKeys | None) -> None:
    if head is None and not layers:
        raise UnsupportedAdapter(
            "the checkpoint has no LoRA factors (lora_A, lora_B) and no head; save the adapter again",
            param=MODEL_FILE,
        )
    if head is None and base.kind == "encoder" and config.task_type != "FEATURE_EXTRACTION":
        raise UnsupportedAdapter(
            f"base {base.info.name!r} is an encoder, and the checkpoint has no classifier head; an encoder serves "
            "classifiers (task_type SEQ_CLS) and embeddings (task_type FEATURE_EXTRACTION)",
            param="adapter_config.task_type",
        )
    if base.kind == "vision" and head is None:
        raise UnsupportedAdapter(
            f"base {base.info.name!r} classifies images, and the checkpoint has no classifier; add 'classifier' to "
            "modules_to_save, and train again",
            param="adapter_config.modules_to_save",
        )
    if head is not None and config.task_type == "CAUSAL_LM":
        raise UnsupportedAdapter(
            "task_type is CAUSAL_LM, and the checkpoint has a classifier head; correct one of the two",
            param="adapter_config.task_type",
        )


def _check_image_type(config: PeftConfig, base: ImportBase) -> None:
    if base.kind in ("vision", "dual") and config.task_type not in (None, "FEATURE_EXTRACTION"):
        raise UnsupportedAdapter(
            f"task_type is {config.task_type}, and base {base.info.name!r} takes images; PEFT has no name for tasks of "
            "images: leave it null",
            param="adapter_config.task_type",
        )


def _warnings(files: PeftFiles, config: PeftConfig, base: ImportBase) -> list[str]:
    """What differs between the checkpoint and the base and does no harm; raises UnsupportedAdapter for new tokens."""
    warnings = []
    theirs = config.base_name
    if theirs is not None and not _same_name(theirs, base.info.name):
        warnings.append(
            f"the adapter names {theirs[:200]!r} as its base, and the base here is {base.info.name!r}; the shapes of "
            "its layers fit"
        )
    if files.ignored:
        shown = ", ".join(name[:64] for name in files.ignored[:_SHOWN_FILES])
        more = len(files.ignored) - _SHOWN_FILES
        warnings.append(f"files that nothing reads: {shown}" + (f" and {more} more" if more > 0 else ""))
    added = _json_beside(files, ADDED_TOKENS_FILE)
    beyond = [token for token, index in added.items() if not isinstance(index, int) or index >= base.vocab_size]
    if beyond:
        raise UnsupportedAdapter(
            f"{ADDED_TOKENS_FILE} has tokens beyond the {base.vocab_size} of the base, such as "
            f"{str(beyond[0])[:64]!r}: the vocabulary was resized; train without new tokens",
            param=ADDED_TOKENS_FILE,
        )
    if base.image is not None:
        warnings.append(
            "a PEFT checkpoint does not say how images were prepared in training; the bundle has the base's own "
            "preprocessing"
        )
    return warnings


def _same_name(theirs: str, ours: str) -> bool:
    """Whether two names or paths can mean one base. A quantised copy is another one: its weights differ."""
    return theirs.rstrip("/").rpartition("/")[2].lower() == ours.rstrip("/").rpartition("/")[2].lower()


def _template(files: PeftFiles, base: ImportBase, head: PeftHead | None) -> str | None:
    """A chat template beside the checkpoint, where it differs from the base's own. A classifier has none."""
    if head is not None:
        return None
    text: Any = None
    if TEMPLATE_FILE in files.beside:
        try:
            text = files.beside[TEMPLATE_FILE].decode("utf-8")
        except UnicodeDecodeError:
            raise InvalidConfig(f"{TEMPLATE_FILE} is not UTF-8", param=TEMPLATE_FILE) from None
    else:
        text = _json_beside(files, TOKENIZER_CONFIG_FILE).get("chat_template")
        if isinstance(text, list):
            # Older tokenizers may have several templates by name.
            named = [part for part in text if isinstance(part, dict) and part.get("name") == "default"]
            text = named[0].get("template") if named else None
    return text if isinstance(text, str) and text and text != base.chat_template else None


def _json_beside(files: PeftFiles, name: str) -> dict[str, Any]:
    if name not in files.beside:
        return {}
    try:
        value = parse_json(files.beside[name])
    except json.JSONDecodeError as error:
        raise InvalidConfig(f"{name} is not valid JSON: {error}", param=name) from error
    return value if isinstance(value, dict) else {}
