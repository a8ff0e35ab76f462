"""Loads a base model from the package, a folder or a hub id, and freezes it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from adapters_store import ImageSpec
from sera_serve.base.fingerprint import fingerprint
from sera_serve.base.image_tower import DUAL_FAMILIES, VISION_FAMILIES, BaseKind, image_tower
from sera_serve.base.images import base_image_spec, check_pillow
from sera_serve.base.model import FrozenBase
from sera_serve.base.quantize import quantize_base
from sera_serve.base.rotary import install_per_sequence_rotary
from sera_serve.errors import BaseNotFound, InvalidConfiguration
from sera_serve.quantization import Quantize

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EMBEDDED = "embedded"
EMBEDDED_FOLDER = Path(__file__).parents[1] / "embedded_base"


def load_base(spec: str, device: str = "cpu", dtype: str = "auto", quantize: Quantize = "none") -> FrozenBase:
    """Load a base model for serving or training.

    Args:
        spec: `"embedded"`, a folder in Hugging Face format, or a hub id. Only a hub id may use the network.
        device: Torch device, such as `"cpu"` or `"cuda"`.
        dtype: `"auto"` (float32 on CPU, the checkpoint's own elsewhere) or one of float32, bfloat16, float16.
        quantize: What the linear layers are kept in; see `quantize_base`. The fingerprint does not depend on it.

    Raises:
        BaseNotFound: `spec` names nothing that can be loaded.
        InvalidConfiguration: The dtype is unknown, the device is missing, the base's rotary scaling is unsupported, or
            the base cannot be quantized here. Or the base takes images, and Pillow is not installed, or the images do
            not have three channels, or no `ImageSpec` describes their preprocessing.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise InvalidConfiguration(f"dtype is {dtype!r}; choose auto, {', '.join(DTYPES)}", param="dtype")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InvalidConfiguration("device is cuda, but torch sees no GPU; use --device cpu", param="device")
    index = torch.device(device).index
    if device.startswith("cuda") and index is not None and index >= torch.cuda.device_count():
        raise InvalidConfiguration(
            f"device is {device}, and torch sees {torch.cuda.device_count()} GPUs, from cuda:0 on; name one of them",
            param="device",
        )
    source = str(EMBEDDED_FOLDER) if spec == EMBEDDED else spec
    try:
        config = AutoConfig.from_pretrained(source)
        kind = _kind(config)
        tower = image_tower(config)
        loader = AutoModelForCausalLM if kind == "decoder" else AutoModel
        # The checkpoint's own dtype first: the fingerprint must not depend on the dtype served.
        with _without_load_report():
            model, report = loader.from_pretrained(
                source, dtype="auto", output_loading_info=True, ignore_mismatched_sizes=True, **_options(kind)
            )
        tokenizer = None if kind == "vision" else AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise BaseNotFound(
            f"base {spec!r} could not be loaded ({str(error).splitlines()[0]}); "
            'name "embedded", a folder with config.json and weights, or a hub id',
            param="base",
        ) from error
    _check_shapes(sorted(report["mismatched_keys"]), spec)
    _settle_missing(model, sorted(report["missing_keys"]), spec)
    name = spec if spec == EMBEDDED or not Path(spec).exists() else Path(spec).resolve().name
    if tower is not None:
        check_pillow()
    spec_of_images = None if tower is None else base_image_spec(source, config.model_type, tower)
    base = freeze_base(model, tokenizer, name, kind, device=device, dtype=dtype, image_spec=spec_of_images)
    if quantize != "none":
        quantize_base(base, quantize)
    return base


def base_outline(spec: str, device: str = "cpu", dtype: str = "auto") -> PreTrainedModel:
    """Make a base model without its weights, on the device "meta", in the dtype that `load_base` would give it.

    Only the configuration is read, so this takes no memory, however large the base is.

    Raises:
        BaseNotFound: `spec` names nothing that has a configuration.
        InvalidConfiguration: The images of the base do not have three channels.
    """
    try:
        config = AutoConfig.from_pretrained(str(EMBEDDED_FOLDER) if spec == EMBEDDED else spec)
        kind = _kind(config)
        # Raises what `load_base` would.
        image_tower(config)
        loader = AutoModelForCausalLM if kind == "decoder" else AutoModel
        automatic = torch.float32 if device == "cpu" else config.get_text_config().dtype or torch.float32
        with torch.device("meta"):
            return loader.from_config(config, dtype=DTYPES.get(dtype, automatic), **_options(kind)).eval()
    except (OSError, ValueError) as error:
        raise BaseNotFound(f"base {spec!r} has no configuration: {str(error).splitlines()[0]}", param="base") from error


@contextmanager
def _without_load_report() -> Iterator[None]:
    """Keep transformers from logging a table of keys that a checkpoint lacks, has in excess, or has of other shapes.

    `load_base` checks the first and the last kind itself. The second is of no use here: the pooler of a ViT, or the
    head of a model that was trained for another task. A table of failed conversions is kept: transformers' error
    refers to it.
    """

    def is_needed(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return "LOAD REPORT" not in text or "CONVERSION" in text

    logger = transformers_logging.get_logger("transformers.modeling_utils")
    logger.addFilter(is_needed)
    try:
        yield
    finally:
        logger.removeFilter(is_needed)


def _check_shapes(mismatched: list[tuple[str, Any, Any]], spec: str) -> None:
    if mismatched:
        path, found, expected = mismatched[0]
        raise BaseNotFound(
            f"base {spec!r} has weights of other shapes than its config.json says, such as {path!r}: {tuple(found)}, "
            f"not {tuple(expected)} ({len(mismatched)} in all); save the whole model",
            param="base",
        )


def _settle_missing(model: PreTrainedModel, missing: list[str], spec: str) -> None:
    """Zero a pooler that the checkpoint lacks, and refuse a checkpoint that lacks other weights.

    transformers draws missing weights at random: the base would have another fingerprint at every load. The pooler of
    an encoder is not used, and checkpoints of masked language models, such as RoBERTa's, do not have it.
    """
    needed = [path for path in missing if "pooler" not in path.split(".")]
    if needed:
        raise BaseNotFound(
            f"base {spec!r} lacks weights, such as {needed[0]!r} ({len(needed)} in all); save the whole model",
            param="base",
        )
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for path in missing:
            if path in parameters:
                parameters[path].zero_()


def freeze_base(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    name: str,
    kind: BaseKind = "decoder",
    *,
    device: str = "cpu",
    dtype: str = "auto",
    image_spec: ImageSpec | None = None,
) -> FrozenBase:
    """Freeze a model that is already in memory, in place.

    A model with longrope scaling gets rotary modules that work by sequence; see `sera_serve.base.rotary`.

    Args:
        model: The model to freeze and to move.
        tokenizer: Its tokenizer. A tokenizer without a padding token gets one. None for a vision base.
        name: What messages and the fingerprint call the base.
        kind: See `FrozenBase`.
        device: As in `load_base`.
        dtype: As in `load_base`.
        image_spec: The preprocessing of images. None is the family's own, where the base takes images.

    Raises:
        InvalidConfiguration: The base's rotary scaling is unsupported.
    """
    info = fingerprint(model, name)
    install_per_sequence_rotary(model, name)
    automatic = torch.float32 if device == "cpu" else model.dtype
    model = model.to(device=device, dtype=DTYPES.get(dtype, automatic)).eval().requires_grad_(False)
    if tokenizer is not None and tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    tower = image_tower(model.config) if kind in ("vision", "dual") else None
    if tower is not None and image_spec is None:
        image_spec = base_image_spec(None, model.config.model_type, tower)
    return FrozenBase(name, model, tokenizer, info, kind, image_spec)


def _kind(config: Any) -> BaseKind:
    if config.model_type in VISION_FAMILIES:
        return "vision"
    if config.model_type in DUAL_FAMILIES:
        return "dual"
    names = getattr(config, "architectures", None) or []
    return "decoder" if any("CausalLM" in name or name.endswith("LMHeadModel") for name in names) else "encoder"


def _options(kind: BaseKind) -> dict[str, Any]:
    # Nothing reads the pooler of an image tower, and an adapter on it would change nothing.
    return {"add_pooling_layer": False} if kind == "vision" else {}
