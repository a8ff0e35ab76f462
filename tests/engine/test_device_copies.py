"""What a step brings to a device: never waited for, because the device may be busy, and once for all layers."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sera_serve.engine import BASE_PRINCIPAL, GenerateParams
from sera_serve.engine.loop import choice
from sera_serve.engine.loop.attention import KeyValuePool, LayerShape, Part, StepContext
from sera_serve.engine.loop.attention_backend import AttentionOptions
from sera_serve.engine.loop.choice import ChosenTokens, TokenChooser, take_prompt_logprobs
from sera_serve.engine.loop.hugging_face import ServedDecoder
from sera_serve.engine.loop.masks import RowMasks
from sera_serve.engine.loop.pages import PAGE_SIZE
from sera_serve.engine.loop.row_tables import RowTables
from sera_serve.engine.loop.runner import PackedStep, StepRunner
from sera_serve.engine.loop.torch_attention import TorchAttention
from sera_serve.engine.request import GenerationRequest
from sera_serve.engine.results import TokenLogprobs

# A device without memory.
META = torch.device("meta")


class Copies(TorchDispatchMode):
    """Notes of each copy to the device whether the host waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].device != META and result.device == META:
            self.waits.append(not (kwargs or {}).get("non_blocking"))
        return result


def requests(tables: RowTables, **options: Any) -> list[GenerationRequest]:
    found = []
    for row in range(2):
        request = GenerationRequest(
            principal=BASE_PRINCIPAL, tokens=[1, 2, 3], prompt_tokens=3, params=GenerateParams(**options)
        )
        request.row, request.pages = row, [1 + row]
        tables.enter(request)
        found.append(request)
    return found


def test_the_host_does_not_wait_for_the_inputs_of_a_packed_step() -> None:
    """It launches the step beside a graph, which the device may be busy with."""
    rotary: Any = SimpleNamespace(long_tokens=None)
    model: Any = SimpleNamespace(device=META, vocabulary=40, logits=lambda ids, positions, step, kept: kept)
    context: Any = SimpleNamespace(run=lambda batch: nullcontext())
    pool: Any = SimpleNamespace(has_paged_decode=True)
    runner = StepRunner(ServedDecoder(model, context, pool, rotary), rows=2, max_pages=4)
    runner.chooser = SimpleNamespace(choose=lambda logits, ends, unfinished: ChosenTokens([7, 7]))  # type: ignore[assignment]
    first, second = requests(runner.tables)
    with Copies() as copies:
        runner._run_packed([], [(first, 3), (second, 3)])
    assert copies.waits == [False] * 6, "ids, positions, slots, places, the last tokens, and sides of the threshold"
    packed = PackedStep(runner.tables, compiled=True)
    packed.add_chunk(first, 3)
    kept = runner._forward(packed, [])
    assert kept.dtype == torch.int64, "an empty list is an index too"


def test_the_host_does_not_wait_for_what_is_sampled_by() -> None:
    tables = RowTables(2, 4)
    asked = requests(tables, temperature=0.5, min_p=0.1)
    with Copies() as copies:
        assert TokenChooser(tables, 40)._sampling(asked, META) is not None
    assert copies.waits == [False] * 5


def test_the_host_does_not_wait_for_what_scores_are_adjusted_by(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "choose_tokens", lambda scores, *adjusted: torch.zeros(len(scores), dtype=torch.int64))
    tables = RowTables(8, 4)
    penalized = requests(tables, frequency_penalty=0.5)
    biased = requests(tables, logit_bias={5: 1.0})
    barred = requests(tables, min_tokens=2)
    barred[0].end_tokens = barred[1].end_tokens = frozenset({7})
    masks = RowMasks({barred[0]: np.ones(2, np.uint32)})
    chooser = TokenChooser(tables, 40)
    scores = torch.empty(6, 40, device=META)
    for given in ([], [9]):
        penalized[0].tokens += given
        with Copies() as copies:
            chooser._choose_by_kind(scores, [*penalized, *biased, *barred], set(), masks)
        # The rows of each kind, of each request the counts or the new token, three penalties and the places; the words
        # of masks, their rows, entries and values.
        assert copies.waits == [False] * (2 + (1 if given else 2) + 3 + 1 + 4)


def test_the_host_does_not_wait_to_drop_rows_of_prompts() -> None:
    request = requests(RowTables(2, 4), prompt_logprobs=0)[0]
    request.prompt_token_logprobs = [TokenLogprobs(1, None)] * 3
    with Copies() as copies:
        kept = take_prompt_logprobs(torch.empty(5, 40, device=META), [(request, 1, 3)], set())
    assert kept.shape == (3, 40) and copies.waits == [False]


def test_the_host_does_not_wait_for_pages_to_be_cleared() -> None:
    pool = KeyValuePool([LayerShape(1, 8, 8), LayerShape(1, 8, 4)], 4, torch.float32, META, TorchAttention())
    with Copies() as copies:
        pool.clear([1, 3])
    assert copies.waits == [False] * 2


def test_lengths_are_brought_once_for_all_blocks_of_queries_and_layers() -> None:
    pool = KeyValuePool([LayerShape(1, 8, 8)] * 2, 4, torch.float32, META, TorchAttention())
    new, total = 2 * PAGE_SIZE, 3 * PAGE_SIZE
    part = Part(new, np.array([total]), np.array([[1, 2, 3]]))
    step = StepContext(pool, torch.empty(new, dtype=torch.int64, device=META), [part])
    query, key = (torch.empty(new, heads, 8, device=META) for heads in (2, 1))
    options = AttentionOptions(0.3, softcap=5.0)
    with Copies() as copies:
        for layer in range(2):
            out: Tensor = pool.backend.packed(step, layer, query, key, key, options)
            for first in range(0, new, PAGE_SIZE):
                part.mask(range(first, first + PAGE_SIZE), range(total), None, query)
    assert out.shape == (new, 2, 8)
    assert copies.waits == [False] * 2, "the pages, and the lengths"
