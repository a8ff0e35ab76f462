"""Less memory than the adapters need: every result comes from the right weights, and the limits hold."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from support.faulty_serving import WRITERS, Serving, name

Serve = Callable[..., Serving]


@pytest.mark.parametrize(("cache_mib", "resident"), [(0, 2), (1, 2), (1, 64)])
def test_all_adapters_are_served_from_little_memory(serve: Serve, cache_mib: int, resident: int) -> None:
    serving = serve(host_cache_mib=cache_mib, pool_mib=1, max_resident=resident)
    residency = serving.engine.residency
    sizes = [serving.store.inspect(name(i)).nbytes for i in range(WRITERS)]
    assert max(sizes) < 1 << 20 < sum(sizes), "one adapter must fit, and all of them must not"
    adapters = [name(i) for i in range(WRITERS)] * 4
    random.Random(0).shuffle(adapters)
    ended = threading.Event()

    def watch() -> None:
        # Raises if the memory in use exceeds a limit.
        while not ended.wait(0.002):
            residency.check_invariants()

    with ThreadPoolExecutor(13) as clients:
        watching = clients.submit(watch)
        try:
            answers = list(clients.map(serving.ask, adapters))
        finally:
            ended.set()
        watching.result(10)
    for adapter, answer in zip(adapters, answers, strict=True):
        serving.assert_right(adapter, answer)
    assert residency.host_cache.limit == cache_mib << 20
    assert 0 < len(residency.resident_digests()) <= min(resident, WRITERS - 1)
