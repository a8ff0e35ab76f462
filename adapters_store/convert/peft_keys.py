"""Third stage of an import: turns the keys of a checkpoint into parts of layers of the base.

PEFT writes `base_model.model.<path>.lora_A.weight`, some writers an adapter's name after `lora_A`, and loralib
`<path>.lora_A`. The path may have the name of the backbone before it, or lack it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from adapters_store.convert.import_base import ImportBase
from adapters_store.convert.peft_errors import UnsupportedAdapter
from adapters_store.errors import UnknownModule
from adapters_store.format.safetensors_file import MODEL_FILE

# Names of wrappers around a backbone, which one side's paths may have and the other's lack.
_WRAPPERS = ("base_model", "model", "module", "_orig_mod", "language_model", "text_model")
# What PEFT writes before the path in the model that it adapted.
_PEFT_MODEL = "base_model.model."
# Longer than the path of any layer. A longer name would take quadratic time.
_MAX_NAME = 512
_PART = re.compile(
    r"(?P<path>[^\s]+)\.(?P<kind>lora_A|lora_B|lora_magnitude_vector)(?:\.(?P<rest>[A-Za-z0-9_.-]+))?", re.ASCII
)
# Parts that are refused wherever they appear, with the reason.
_REFUSED = {
    "lora_embedding_": "it adapts an embedding",
    "token_adapter": "it replaces rows of the base's embedding (trainable_token_indices)",
    "trainable_tokens": "it replaces rows of the base's embedding (trainable_token_indices)",
    "lora_E": "it is AdaLoRA's, which scales each rank",
    "ranknum": "it is AdaLoRA's, which scales each rank",
    "embed_tokens": "it replaces the base's embedding, perhaps of a resized vocabulary",
    "wte": "it replaces the base's embedding, perhaps of a resized vocabulary",
    "word_embeddings": "it replaces the base's embedding, perhaps of a resized vocabulary",
    "lm_head": "it changes the base's output embedding",
    "embed_out": "it changes the base's output embedding",
}
_REFUSED_PARTS = tuple(_REFUSED)
HEAD_ROOTS = ("score", "classifier", "pre_classifier", "pooler")
_SHOWN = 3
# Layers of ViT and DeiT have other names since transformers 5; checkpoints of older releases have these. The names of
# `transformers.conversion_mapping`.
_OLDER_NAMES: dict[str, str] = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
_OLDER_LAYERS = "encoder.layer."


@dataclass
class LayerKeys:
    """The keys of one layer's tensors; None where the checkpoint has no such tensor.

    Attributes:
        path: The layer's path in the model that PEFT adapted, with all wrappers of that model: patterns are about it.
    """

    path: str
    lora_a: str | None = None
    lora_b: str | None = None
    lora_bias: str | None = None
    magnitude: str | None = None


@dataclass(frozen=True)
class SortedKeys:
    """The keys of a checkpoint by what they belong to.

    Attributes:
        layers: Keys of adapted layers, by the checkpoint's own path, wrappers left out.
        head: Keys of a classifier's tensors by their names in the model for the task, such as `classifier.weight`.
    """

    layers: dict[str, LayerKeys] = field(default_factory=dict)
    head: dict[str, str] = field(default_factory=dict)


def sort_keys(names: Iterable[str]) -> SortedKeys:
    """Sort the names of a checkpoint's tensors.

    Raises:
        UnsupportedAdapter: A tensor is of a kind that cannot be carried over, is there twice, or belongs to a second
            adapter; `param` is its name.
    """
    found = SortedKeys()
    adapters: set[str] = set()
    for name in names:
        if len(name) > _MAX_NAME:
            raise _unknown_tensor(f"{name[:_MAX_NAME]}...")
        # One look at each segment for all refused parts: a checkpoint may have very many segments.
        refused = next((segment for segment in name.split(".") if segment.startswith(_REFUSED_PARTS)), None)
        if refused is not None:
            reason = next(reason for part, reason in _REFUSED.items() if refused.startswith(part))
            raise UnsupportedAdapter(
                f"tensor {name!r} cannot be carried over: {reason}; train the adapter without it, or merge it into "
                "the base and serve that",
                param=name,
            )
        match = _PART.fullmatch(name)
        if match is None:
            _take_head(found, name)
            continue
        _take_part(found, name, match, adapters)
    if len(adapters) > 1:
        raise UnsupportedAdapter(
            f"the checkpoint holds several adapters: {', '.join(sorted(adapters)[:8])}; save each one by itself",
            param=MODEL_FILE,
        )
    return found


def _take_part(found: SortedKeys, name: str, match: re.Match[str], adapters: set[str]) -> None:
    segments = (match["rest"] or "weight").split(".")
    last = segments[-1] if segments[-1] in ("weight", "bias") else "weight"
    adapter = segments[: len(segments) - (segments[-1] in ("weight", "bias"))]
    if len(adapter) > 1 or (last == "bias" and match["kind"] != "lora_B"):
        raise _unknown_tensor(name)
    adapters.update(adapter)
    path = match["path"]
    keys = found.layers.setdefault(_unwrapped(path, _WRAPPERS), LayerKeys(path.removeprefix(_PEFT_MODEL)))
    attribute = {"lora_A": "lora_a", "lora_B": "lora_b", "lora_magnitude_vector": "magnitude"}[match["kind"]]
    attribute = "lora_bias" if last == "bias" else attribute
    if (other := getattr(keys, attribute)) is not None:
        raise UnsupportedAdapter(f"tensors {other!r} and {name!r} are for the same layer", param=name)
    setattr(keys, attribute, name)


def _take_head(found: SortedKeys, name: str) -> None:
    path = _unwrapped(name, _WRAPPERS)
    segments = [segment for segment in path.split(".") if segment not in ("modules_to_save", "default")]
    roots = [index for index, segment in enumerate(segments) if segment in HEAD_ROOTS]
    # `bert.pooler.dense.weight` has the backbone's name before it.
    if "original_module" in segments or not roots or roots[0] > 1:
        raise _unknown_tensor(name)
    short = ".".join(segments[roots[0] :])
    if short in found.head:
        raise UnsupportedAdapter(f"tensors {found.head[short]!r} and {name!r} are the same part of a head", param=name)
    found.head[short] = name


def _unknown_tensor(name: str) -> UnsupportedAdapter:
    return UnsupportedAdapter(
        f"tensor {name!r} is neither a LoRA's factor nor a part of a classifier's head; it was trained with the "
        "adapter (modules_to_save or bias), and the adapter does not work without it: train without it",
        param=name,
    )


def match_layers(
    layers: Mapping[str, LayerKeys], base: ImportBase, convolutions: Collection[str] = ()
) -> dict[str, LayerKeys]:
    """Find the layer of the base behind each path of a checkpoint.

    Args:
        layers: The keys by path in the checkpoint.
        base: The base; its linear layers are those that can be adapted.
        convolutions: The paths whose factors are those of a convolution.

    Returns:
        The keys by path in the base, in the order of the checkpoint.

    Raises:
        UnknownModule: Some or all of the paths are no linear layers of the base; the message has both sides' names.
        UnsupportedAdapter: One of those is a convolution, or a layer of the classifier's head.
    """
    wrappers = (*_WRAPPERS, base.prefix) if base.prefix else _WRAPPERS
    paths: dict[str, list[str]] = {}
    for path in base.shapes:
        paths.setdefault(_unwrapped(path, wrappers), []).append(path)
    matched: dict[str, LayerKeys] = {}
    missing: list[str] = []
    for path, keys in layers.items():
        newer = _newer_name(_unwrapped(path, wrappers)) if base.kind == "vision" else None
        if newer is not None and newer in base.shapes:
            path = newer
        candidates = [path] if path in base.shapes else paths.get(_unwrapped(path, wrappers), [])
        if len(candidates) != 1 or candidates[0] in matched:
            missing.append(path)
        else:
            matched[candidates[0]] = keys
    if (convolution := next((path for path in missing if path in convolutions), None)) is not None:
        raise UnsupportedAdapter(
            f"layer {convolution!r} is a convolution, and only linear layers are adapted here; leave it out of "
            "target_modules, and train again",
            param=convolution,
        )
    if (head := next((path for path in missing if path.partition(".")[0] in HEAD_ROOTS), None)) is not None:
        name = head.partition(".")[0]
        raise UnsupportedAdapter(
            f"layer {head!r} is a part of the classifier's head, which is no part of the base, and the checkpoint has "
            f"only a LoRA of it; leave {name!r} out of target_modules, add it to modules_to_save, and train again",
            param=head,
        )
    if missing:
        theirs = ", ".join(missing[:_SHOWN])
        ours = ", ".join(_alike(missing[0], list(base.shapes))[:_SHOWN])
        count = "none" if not matched else f"only {len(matched)}"
        raise UnknownModule(
            f"{count} of the checkpoint's {len(layers)} layers are in base {base.info.name!r} "
            f"({base.info.architecture}): it has no {theirs}; its own are such as {ours}; name the base that the "
            "adapter was trained on",
            param=missing[0],
        )
    return matched


def _newer_name(path: str) -> str | None:
    """The path of a layer of a ViT or DeiT whose path before transformers 5 was `path`; None for another path."""
    if not path.startswith(_OLDER_LAYERS):
        return None
    number, _, name = path.removeprefix(_OLDER_LAYERS).partition(".")
    return f"layers.{number}.{_OLDER_NAMES[name]}" if name in _OLDER_NAMES else None


def _unwrapped(path: str, wrappers: Iterable[str]) -> str:
    """A path without the wrappers at its beginning; its last name always stays."""
    segments = path.split(".")
    names = set(wrappers)
    start = 0
    while start < len(segments) - 1 and segments[start] in names:
        start += 1
    return ".".join(segments[start:])


def _alike(path: str, candidates: list[str]) -> list[str]:
    """The candidates whose last name is that of `path`, else all."""
    last = path.rpartition(".")[2]
    return [candidate for candidate in candidates if candidate.rpartition(".")[2] == last] or candidates
