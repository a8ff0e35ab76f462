"""Shows a loaded base to the importer of adapters."""

from __future__ import annotations

from torch import Tensor
from transformers.pytorch_utils import Conv1D

from adapters_store import ImportBase
from sera_serve.base.model import FrozenBase
from sera_serve.errors import InvalidConfiguration
from sera_serve.layers.quantized_linear import QuantizedLinear


def import_base(base: FrozenBase) -> ImportBase:
    """Return what an import must know of a base. Weights are read when they are asked for."""

    def weight(path: str) -> Tensor:
        layer = base.model.get_submodule(path)
        if isinstance(layer, QuantizedLinear):
            raise InvalidConfiguration(
                f"this checkpoint needs the base's own weights, and those of {path} are quantized to {layer.kind}; "
                "import it on a base without --quantize: the result runs on the quantized base too",
                param="quantize",
            )
        # GPT-2's Conv1D stores (d_in, d_out).
        found: Tensor = layer.get_parameter("weight").detach()
        return found.T if isinstance(layer, Conv1D) else found

    def bias(path: str) -> Tensor | None:
        found = getattr(base.model.get_submodule(path), "bias", None)
        return found.detach() if isinstance(found, Tensor) else None

    template = getattr(base.text_tokenizer, "chat_template", None)
    return ImportBase(
        info=base.info,
        kind=base.kind,
        shapes=base.module_shapes(),
        prefix=str(getattr(base.model, "base_model_prefix", "") or ""),
        vocab_size=int(base.model.config.get_text_config().vocab_size) if base.reads_text else 0,
        chat_template=template if isinstance(template, str) else None,
        weight=weight,
        bias=bias,
        image=base.image_spec,
    )
