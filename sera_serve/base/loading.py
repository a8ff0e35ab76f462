"""Loads a base model from the package, a folder or a hub id, and freezes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from sera_serve.base.fingerprint import fingerprint
from sera_serve.base.model import FrozenBase
from sera_serve.base.rotary import install_per_sequence_rotary, rotary_scaling
from sera_serve.errors import BaseNotFound, InvalidConfiguration

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EMBEDDED = "embedded"
_EMBEDDED_FOLDER = Path(__file__).parents[1] / "embedded_base"


def load_base(spec: str, device: str = "cpu", dtype: str = "auto") -> FrozenBase:
    """Load a base model for serving or training.

    Args:
        spec: `"embedded"`, a folder in Hugging Face format, or a hub id. Only a hub id may use the network.
        device: Torch device, such as `"cpu"` or `"cuda"`.
        dtype: `"auto"` (float32 on CPU, the checkpoint's own elsewhere) or one of float32, bfloat16, float16.

    Raises:
        BaseNotFound: `spec` names nothing that can be loaded.
        InvalidConfiguration: The dtype is unknown, the device is missing, or the base's rotary scaling is unsupported.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise InvalidConfiguration(f"dtype is {dtype!r}; choose auto, {', '.join(DTYPES)}", param="dtype")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InvalidConfiguration("device is cuda, but torch sees no GPU; use --device cpu", param="device")
    source = str(_EMBEDDED_FOLDER) if spec == EMBEDDED else spec
    try:
        config = AutoConfig.from_pretrained(source)
        kind: Literal["decoder", "encoder"] = "decoder" if _is_decoder(config) else "encoder"
        loader = AutoModelForCausalLM if kind == "decoder" else AutoModel
        # The checkpoint's own dtype first: the fingerprint must not depend on the dtype served.
        model, report = loader.from_pretrained(source, dtype="auto", output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise BaseNotFound(
            f"base {spec!r} could not be loaded ({str(error).splitlines()[0]}); "
            'name "embedded", a folder with config.json and weights, or a hub id',
            param="base",
        ) from error
    _settle_missing(model, sorted(report["missing_keys"]), spec)
    name = spec if spec == EMBEDDED or not Path(spec).exists() else Path(spec).resolve().name
    return freeze_base(model, tokenizer, name, kind, device=device, dtype=dtype)


def base_outline(spec: str, device: str = "cpu", dtype: str = "auto") -> PreTrainedModel:
    """Make a base model without its weights, on the device "meta", in the dtype that `load_base` would give it.

    Only the configuration is read, so this takes no memory, however large the base is.

    Raises:
        BaseNotFound: `spec` names nothing that has a configuration.
    """
    try:
        config = AutoConfig.from_pretrained(str(_EMBEDDED_FOLDER) if spec == EMBEDDED else spec)
        loader = AutoModelForCausalLM if _is_decoder(config) else AutoModel
        automatic = torch.float32 if device == "cpu" else config.get_text_config().dtype or torch.float32
        with torch.device("meta"):
            return loader.from_config(config, dtype=DTYPES.get(dtype, automatic)).eval()
    except (OSError, ValueError) as error:
        raise BaseNotFound(f"base {spec!r} has no configuration: {str(error).splitlines()[0]}", param="base") from error


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
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    kind: Literal["decoder", "encoder"] = "decoder",
    *,
    device: str = "cpu",
    dtype: str = "auto",
) -> FrozenBase:
    """Freeze a model that is already in memory, in place.

    A model with longrope scaling gets rotary modules that work by sequence; see `sera_serve.base.rotary`.

    Args:
        model: The model to freeze and to move.
        tokenizer: Its tokenizer. A tokenizer without a padding token gets one.
        name: What messages and the fingerprint call the base.
        kind: Whether the model is a decoder or an encoder.
        device: As in `load_base`.
        dtype: As in `load_base`.

    Raises:
        InvalidConfiguration: The base's rotary scaling is unsupported.
    """
    info = fingerprint(model, name)
    if rotary_scaling(model, name).kind == "longrope":
        install_per_sequence_rotary(model)
    automatic = torch.float32 if device == "cpu" else model.dtype
    model = model.to(device=device, dtype=DTYPES.get(dtype, automatic)).eval().requires_grad_(False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return FrozenBase(name, model, tokenizer, info, kind)


def _is_decoder(config: Any) -> bool:
    names = getattr(config, "architectures", None) or []
    return any("CausalLM" in name or name.endswith("LMHeadModel") for name in names)
