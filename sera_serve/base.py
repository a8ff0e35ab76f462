"""The frozen base model: loading it, telling it apart from others, and its pooled states for classification."""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from adapters_store import BaseInfo
from sera_serve.errors import BaseNotFound, InvalidConfiguration
from sera_serve.layers import adaptable_linears, linear_widths

Pooling = Literal["last_token", "cls", "mean"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EMBEDDED = "embedded"
_SAMPLES_PER_TENSOR = 64
# Keys of a config that say how it was saved or is run, not what the model is.
_VOLATILE_CONFIG_KEYS = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"}


@dataclass(frozen=True)
class FrozenBase:
    """A base model that no longer trains, its tokenizer, and its identity.

    Attributes:
        name: What it was loaded from: "embedded", a path's last part, or a hub id.
        model: In evaluation mode, every parameter frozen.
        tokenizer: Its tokenizer, with a padding token.
        info: Fingerprint that adapters carry, taken before any change of dtype.
        kind: A decoder generates, and classifies on its last token; an encoder classifies.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    info: BaseInfo
    kind: Literal["decoder", "encoder"]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return cast(torch.device, self.model.device)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and activations."""
        return cast(torch.dtype, self.model.dtype)

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states, and so of a classifier head's rows."""
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def max_length(self) -> int:
        """Longest sequence in tokens that the base was made for."""
        limits = [getattr(self.model.config.get_text_config(), "max_position_embeddings", None)]
        # Tokenizers without a limit say 1e30.
        limits.append(self.tokenizer.model_max_length)
        return int(min(limit for limit in limits if limit is not None))

    @property
    def default_pooling(self) -> Pooling:
        """How a classifier on this base pools, unless its adapter says otherwise."""
        return "last_token" if self.kind == "decoder" else "cls"

    def module_shapes(self) -> dict[str, tuple[int, int]]:
        """(d_in, d_out) of every linear layer an adapter may sit on, by dotted path."""
        return {path: linear_widths(module) for path, module in adaptable_linears(self.model).items()}

    def encode(self, texts: list[str], max_length: int) -> tuple[Tensor, Tensor]:
        """Tokenize for classification: right-padded, cut to `max_length` tokens.

        Returns:
            `input_ids` and `attention_mask`, int64 (rows, longest row), on the base's device.
        """
        encoded = self.tokenizer(
            texts,
            truncation=True,
            max_length=max_length,
            padding=True,
            padding_side="right",
            return_tensors="pt",
        )
        return encoded["input_ids"].to(self.device), encoded["attention_mask"].to(self.device)

    def pooled_states(self, input_ids: Tensor, attention_mask: Tensor, pooling: Pooling) -> Tensor:
        """One vector a row from the last hidden states.

        Args:
            input_ids: int64 (rows, length), right-padded.
            attention_mask: (rows, length), 1 at real tokens.
            pooling: The state of the last real token, of the first one, or the mean over real ones.

        Returns:
            (rows, hidden_size), in the base's dtype.
        """
        return pool(self.hidden_states(input_ids, attention_mask), attention_mask, pooling)

    def hidden_states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Last hidden states (rows, length, hidden_size) of right-padded rows; arguments as in `pooled_states`."""
        backbone = self.model.base_model if self.kind == "decoder" else self.model
        states: Tensor = backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return states

    def share_weights(self) -> FrozenBase:
        """A second model object over the same weights, so that each can be wrapped and configured on its own."""
        memo = {id(tensor): tensor for tensor in [*self.model.parameters(), *self.model.buffers()]}
        return FrozenBase(self.name, copy.deepcopy(self.model, memo), self.tokenizer, self.info, self.kind)


def pool(states: Tensor, attention_mask: Tensor, pooling: Pooling) -> Tensor:
    """Reduce (rows, length, hidden) to (rows, hidden); see `FrozenBase.pooled_states`."""
    if pooling == "cls":
        return states[:, 0]
    if pooling == "mean":
        mask = attention_mask.unsqueeze(-1).to(states.dtype)
        return (states * mask).sum(1) / mask.sum(1)
    last = attention_mask.sum(1) - 1
    return states[torch.arange(len(states), device=states.device), last]


def load_base(spec: str, device: str = "cpu", dtype: str = "auto") -> FrozenBase:
    """Load a base model for serving or training.

    Args:
        spec: `"embedded"`, a folder in Hugging Face format, or a hub id (the only case that may use the network).
        device: Torch device, such as `"cpu"` or `"cuda"`.
        dtype: `"auto"` (float32 on CPU, the checkpoint's own elsewhere) or one of float32, bfloat16, float16.

    Raises:
        BaseNotFound: Nothing loadable at `spec`.
        InvalidConfiguration: Unknown dtype, or a device that is not there.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise InvalidConfiguration(f"dtype is {dtype!r}; choose auto, {', '.join(DTYPES)}", param="dtype")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InvalidConfiguration("device is cuda, but torch sees no GPU; use --device cpu", param="device")
    source = str(Path(__file__).parent / "embedded_base") if spec == EMBEDDED else spec
    try:
        config = AutoConfig.from_pretrained(source)
        kind: Literal["decoder", "encoder"] = "decoder" if _is_decoder(config) else "encoder"
        loader = AutoModelForCausalLM if kind == "decoder" else AutoModel
        # The checkpoint's own dtype first: the fingerprint must not depend on the dtype served.
        model = loader.from_pretrained(source, dtype="auto")
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise BaseNotFound(
            f"base {spec!r} could not be loaded ({str(error).splitlines()[0]}); "
            'name "embedded", a folder with config.json and weights, or a hub id',
            param="base",
        ) from error
    name = spec if spec == EMBEDDED or not Path(spec).exists() else Path(spec).resolve().name
    return freeze_base(model, tokenizer, name, kind, device=device, dtype=dtype)


def freeze_base(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    kind: Literal["decoder", "encoder"] = "decoder",
    *,
    device: str = "cpu",
    dtype: str = "auto",
) -> FrozenBase:
    """Make a `FrozenBase` of a model already in memory; arguments as in `load_base`."""
    info = fingerprint(model, name)
    automatic = torch.float32 if device == "cpu" else model.dtype
    model = model.to(device=device, dtype=DTYPES.get(dtype, automatic)).eval().requires_grad_(False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return FrozenBase(name, model, tokenizer, info, kind)


def fingerprint(model: PreTrainedModel, name: str) -> BaseInfo:
    """Identity of a base: architecture, digest of its config, digest of evenly spaced samples of every weight."""
    config: dict[str, Any] = model.config.to_diff_dict()
    kept = {key: value for key, value in config.items() if key not in _VOLATILE_CONFIG_KEYS}
    weights = hashlib.sha256()
    for path, parameter in sorted(model.named_parameters()):
        weights.update(path.encode() + str(tuple(parameter.shape)).encode())
        weights.update(_sample(parameter).numpy().tobytes())
    return BaseInfo(
        name=name,
        architecture=type(model).__name__,
        config_digest=hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest(),
        weights_digest=weights.hexdigest(),
        hidden_size=int(model.config.get_text_config().hidden_size),
    )


def _sample(parameter: nn.Parameter) -> Tensor:
    flat = parameter.detach().reshape(-1)
    step = max(1, flat.numel() // _SAMPLES_PER_TENSOR)
    # bf16 bits: what a float32 copy of a bf16 checkpoint still has in common with it.
    return flat[::step].to("cpu", torch.bfloat16).contiguous().view(torch.int16)


def _is_decoder(config: Any) -> bool:
    names = getattr(config, "architectures", None) or []
    return any("CausalLM" in name or name.endswith("LMHeadModel") for name in names)
