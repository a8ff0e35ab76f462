"""Tables by row, and the device's copy of the pages in them."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from sera_serve.engine import BASE_PRINCIPAL
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
