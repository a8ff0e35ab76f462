"""The frozen base model: loading, fingerprint, preprocessing of inputs, rotary scaling by sequence."""

from adapters_store import Pooling
from sera_serve.base.image_tower import BaseKind, pool_image_states
from sera_serve.base.images import ImageInput, decode_image, save_image_spec, to_pixels
from sera_serve.base.import_base import import_base
from sera_serve.base.loading import DTYPES, EMBEDDED, base_outline, freeze_base, load_base
from sera_serve.base.model import FrozenBase, check_length, check_task, merge_adapter, pool_states
from sera_serve.base.preprocess import LONG_CHARACTERS, ModelInputs
from sera_serve.base.quantize import planned_bytes, quantize_base
from sera_serve.base.rotary import RotaryContext
from sera_serve.base.spans import Span
from sera_serve.quantization import Quantize

__all__ = [
    "DTYPES",
    "EMBEDDED",
    "LONG_CHARACTERS",
    "BaseKind",
    "FrozenBase",
    "ImageInput",
    "ModelInputs",
    "Pooling",
    "Quantize",
    "RotaryContext",
    "Span",
    "base_outline",
    "check_length",
    "check_task",
    "decode_image",
    "freeze_base",
    "import_base",
    "load_base",
    "merge_adapter",
    "planned_bytes",
    "pool_image_states",
    "pool_states",
    "quantize_base",
    "save_image_spec",
    "to_pixels",
]
