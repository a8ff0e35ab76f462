"""The rotary kernel against transformers' own function, bit for bit, and what it writes to the pool."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from sera_kernels.rotary import rotate_and_write

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def angles(tokens: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    half = torch.randn(tokens, width // 2)
    both = torch.cat([half, half], 1)
    return both.cos().to(dtype), both.sin().to(dtype)


def strided(tokens: int, heads: int, width: int, dtype: torch.dtype) -> Tensor:
    """A part of a joined product: its rows are not adjacent."""
    return torch.randn(tokens, heads * width + 24).to(dtype)[:, 8 : 8 + heads * width].unflatten(1, (heads, width))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "value_width", "rotated"),
    [
        (4, 2, 64, 64, 64),
        (3, 1, 80, 80, 80),
        (6, 6, 128, 96, 128),
        (4, 2, 96, 96, 24),
        (1, 1, 2, 1, 2),
        (40, 8, 64, 64, 64),
    ],
)
def test_it_gives_what_transformers_gives(
    dtype: torch.dtype, heads: int, kv_heads: int, width: int, value_width: int, rotated: int
) -> None:
    torch.manual_seed(0)
    tokens = 3
    q, k = strided(tokens, heads, width, dtype), strided(tokens, kv_heads, width, dtype)
    v = strided(tokens, kv_heads, value_width, dtype)
    cos, sin = angles(tokens, rotated, dtype)
    keys, values = (torch.full((3, 4, kv_heads, size), torch.nan, dtype=dtype) for size in (width, value_width))
    places = torch.tensor([9, 4, 2])
    new_q, new_k = rotate_and_write(q, k, v, cos, sin, keys, values, places)
    turned = apply_rotary_pos_emb(*(x[None, ..., :rotated].transpose(1, 2) for x in (q, k)), cos[None], sin[None])
    for mine, turn, old in zip((new_q, new_k), turned, (q, k), strict=True):
        want = torch.cat([turn[0].transpose(0, 1), old[..., rotated:]], 2)
        assert mine.is_contiguous()
        if dtype == torch.bfloat16:
            # Triton's interpreter cuts bfloat16 off where a GPU rounds.
            torch.testing.assert_close(mine, want, rtol=2**-6, atol=2**-6)
        else:
            assert torch.equal(mine, want)
    assert torch.equal(keys.flatten(0, 1)[places], new_k)
    assert torch.equal(values.flatten(0, 1)[places], v)
    untouched = [place for place in range(12) if place not in places.tolist()]
    assert keys.flatten(0, 1)[untouched].isnan().all() and values.flatten(0, 1)[untouched].isnan().all()


def test_what_does_not_fit_is_refused() -> None:
    q, k = torch.zeros(2, 4, 8), torch.zeros(2, 2, 8)
    pool = torch.zeros(1, 2, 2, 8)
    places = torch.zeros(2, dtype=torch.int64)
    cos = torch.zeros(2, 8)
    with pytest.raises(ValueError, match="do not fit q"):
        rotate_and_write(q, k, k, cos[:, :7].contiguous(), cos[:, :7].contiguous(), pool, pool, places)
    with pytest.raises(ValueError, match="do not fit the pools"):
        rotate_and_write(q, k[:, :1].contiguous(), k, cos, cos, pool, pool, places)
    with pytest.raises(ValueError, match="must be contiguous"):
        rotate_and_write(q.transpose(0, 1), k, k, cos, cos, pool, pool, places)
    assert rotate_and_write(q[:0], k[:0], k[:0], cos[:0], cos[:0], pool, pool, places[:0])[0].shape == (0, 4, 8)


@pytest.mark.parametrize(("heads", "kv_heads", "width", "rotated"), [(4, 2, 64, 64), (3, 1, 80, 24), (9, 9, 128, 128)])
def test_updates_are_added_first(heads: int, kv_heads: int, width: int, rotated: int) -> None:
    tokens = 3
    q, k, v = (strided(tokens, count, width, torch.float32) for count in (heads, kv_heads, kv_heads))
    sizes = [count * width for count in (heads, kv_heads, kv_heads)]
    updates = torch.randn(tokens, sum(sizes)).split(sizes, 1)
    cos, sin = angles(tokens, rotated, torch.float32)
    places = torch.tensor([9, 4, 2])
    pools = [[torch.zeros(3, 4, kv_heads, width) for _ in range(2)] for _ in range(2)]
    complete = [x + update.view(x.shape) for x, update in zip((q, k, v), updates, strict=True)]
    want = rotate_and_write(*complete, cos, sin, *pools[0], places)
    got = rotate_and_write(q, k, v, cos, sin, *pools[1], places, updates)
    for mine, right in zip((*got, *pools[1], v), (*want, *pools[0], complete[2]), strict=True):
        assert torch.equal(mine, right)
