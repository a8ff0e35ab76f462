"""Tables by row, and the device's copy of the pages in them."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from sera_kernels import NO_ADAPTER
from sera_serve.engine import BASE_PRINCIPAL, GenerateParams
from sera_serve.engine.loop.pages import SCRATCH
from sera_serve.engine.loop.row_tables import DeviceRows, RowTables
from sera_serve.engine.request import GenerationRequest

ROWS, PAGES = 5, 7


def running(row: int, pages: list[int]) -> GenerationRequest:
    request = GenerationRequest(principal=BASE_PRINCIPAL, tokens=[1, 2])
    request.row, request.pages = row, pages
    return request


@pytest.mark.parametrize("seed", range(20))
def test_the_device_has_the_pages_of_every_request_after_each_upload(seed: int) -> None:
    dice = random.Random(seed)
    tables = RowTables(ROWS, PAGES)
    device = DeviceRows(tables, torch.device("cpu"), 9, torch.float32)
    requests: dict[int, GenerationRequest] = {}
    brought = 0
    for _ in range(300):
        row = dice.randrange(ROWS)
        request = requests.get(row)
        if request is None or len(request.pages) == PAGES or dice.random() < 0.2:
            # Another one in its place, or itself with other pages, as after a preemption.
            request = running(row, [dice.randrange(1, 99) for _ in range(dice.randint(1, PAGES))])
            requests[row] = request
            tables.enter(request)
        else:
            request.pages.append(dice.randrange(1, 99))
            tables.grow(request)
        if dice.random() < 0.4:
            if dice.random() < 0.1:
                # A launch that failed on its way.
                device.stage(tables)
                tables.forget_taken()
            staged = device.stage(tables)
            brought += len(staged) // 2
            device.upload(staged)
            assert not len(device.stage(tables)), "nothing is brought twice"
            for row, held in requests.items():
                assert device.pages[row, : len(held.pages)].tolist() == held.pages
    assert device.pages[device.padding].tolist() == [SCRATCH] * PAGES
    assert brought > 200


def test_new_pages_alone_are_taken() -> None:
    tables = RowTables(ROWS, PAGES)
    assert tables.take_new_pages().shape == (2, 0)
    long, short = running(4, [11, 12, 13]), running(1, [21])
    for request in (long, short):
        tables.enter(request)
    assert tables.take_new_pages().tolist() == [[7, 28, 29, 30], [21, 11, 12, 13]]
    long.pages.append(14)
    tables.grow(long)
    assert tables.take_new_pages().tolist() == [[31], [14]]
    assert tables.take_new_pages().dtype == np.int64


def test_a_row_has_what_its_request_asks_for() -> None:
    tables = RowTables(ROWS, PAGES)
    params = GenerateParams(temperature=0.5, top_k=3, top_p=0.25, min_p=0.125)
    request = GenerationRequest(principal=BASE_PRINCIPAL, tokens=[5, 6, 7], params=params, seed=1 << 63, adapter_from=2)
    request.row, request.pages, request.computed, request.rotary_side = 3, [11, 12], 1, 1
    request.lease = cast(Any, SimpleNamespace(slot=4))
    tables.enter(request)
    # What lies in another request's page might be NaN.
    assert tables.pages[3].tolist() == [11, 12, *[11] * (PAGES - 2)]
    assert (tables.computed[3], tables.next_token[3], tables.seed[3]) == (1, 6, 1 << 63)
    assert tables.slots_at(3, np.arange(4)).tolist() == [NO_ADAPTER, NO_ADAPTER, 4, 4]
    options = (tables.temperature, tables.top_k, tables.top_p, tables.min_p, tables.truncates, tables.is_long)
    assert [column[3] for column in options] == [0.5, 3, 0.25, 0.125, True, True]
    request.computed = 2
    tables.advance(request)
    assert (tables.computed[3], tables.next_token[3]) == (2, 7)
    # Nothing of it is left for the next one.
    tables.enter(running(3, [21]))
    assert tables.slots_at(3, np.arange(4)).tolist() == [NO_ADAPTER] * 4
    assert [column[3] for column in options] == [0, 0, 1, 0, False, False]
    assert (tables.computed[3], tables.next_token[3], tables.seed[3]) == (0, 1, 0)
