"""The frozen base model: loading, fingerprint, preprocessing of inputs, rotary scaling by sequence."""

from sera_serve.base.fingerprint import fingerprint
from sera_serve.base.import_base import import_base
from sera_serve.base.loading import DTYPES, EMBEDDED, base_outline, freeze_base, load_base
from sera_serve.base.model import FrozenBase, Pooling, merge_adapter, pool_states
from sera_serve.base.preprocess import LONG_CHARACTERS, ModelInputs, Preprocessor
from sera_serve.base.rotary import RotaryContext, RotaryScaling, rotary_scaling

__all__ = [
    "DTYPES",
    "EMBEDDED",
    "LONG_CHARACTERS",
    "FrozenBase",
    "ModelInputs",
    "Pooling",
    "Preprocessor",
    "RotaryContext",
    "RotaryScaling",
    "base_outline",
    "fingerprint",
    "freeze_base",
    "import_base",
    "load_base",
    "merge_adapter",
    "pool_states",
    "rotary_scaling",
]
