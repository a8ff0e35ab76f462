"""The comparison of an imported adapter with PEFT's arithmetic sees an import that is wrong."""

import pytest
import torch
from torch import Tensor

from adapters_store import AdapterBundle, AdapterConfig, BaseInfo, ModuleSpec, PeftLayer
from sera_serve.residency.import_probe import ImportMismatch, largest_error

WIDTH, SCALING = 64, 1e-3


def bundle_of(a: Tensor, b: Tensor) -> AdapterBundle:
    """One layer `m` with the factors of PEFT's layout: a (rank, d_in), b (d_out, rank)."""
    base = BaseInfo(
        name="a base", architecture="LlamaForCausalLM", config_digest="0", weights_digest="0", hidden_size=WIDTH
    )
    spec = ModuleSpec(d_in=WIDTH, d_out=WIDTH, rank=len(a), split=1, use_mixer=False, scaling=SCALING)
    config = AdapterConfig(task="generate", method="lora", base=base, modules={"m": spec})
    return AdapterBundle(config, {"m.sera_a": a.T.contiguous(), "m.sera_b": b.T.contiguous()})


# With the larger factors, A x is beyond float16.
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1.0), (torch.float16, 1.0), (torch.float16, 2e4)])
def test_a_wrong_update_is_refused(dtype: torch.dtype, size: float) -> None:
    torch.manual_seed(0)
    a, b = (size * torch.randn(2, WIDTH).sign()).to(dtype), torch.full((WIDTH, 2), 0.01, dtype=dtype)
    layers = {"m": PeftLayer(a, b, SCALING, None, None)}
    assert largest_error(bundle_of(a, b), layers, {"m": 0}, dtype) < 1e-3
    with pytest.raises(ImportMismatch, match="layer m: the update differs"):
        largest_error(bundle_of(a, 1.01 * b), layers, {"m": 0}, dtype)
