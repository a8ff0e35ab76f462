"""Unguessable names: none comes twice, and few of them ask the system."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

from sera_serve import random_bytes
from sera_serve.random_bytes import random_hex, random_seed


def test_names_have_their_length_and_none_comes_twice() -> None:
    found: list[str] = []

    def take() -> None:
        own = [random_hex(8) for _ in range(3000)]
        found.extend(own)

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 12_000
    assert [len(random_hex(nbytes)) for nbytes in (5, 8, 12, 24)] == [10, 16, 24, 48]


def test_seeds_have_31_bits() -> None:
    seeds = [random_seed() for _ in range(2000)]
    assert min(seeds) >= 0 and max(seeds) < 1 << 31
    # All bits: each is set in about half of them.
    assert all(800 < sum(seed >> bit & 1 for seed in seeds) < 1200 for bit in range(31))


def test_hundreds_of_names_ask_the_system_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def draw(nbytes: int) -> bytes:
        asked.append(nbytes)
        return b"".join(place.to_bytes(8, "big") for place in range(nbytes // 8))

    random_bytes._stock.clear()
    monkeypatch.setattr(os, "urandom", draw)
    names = {random_hex(8) for _ in range(500)} | {random_hex(12) for _ in range(100)}
    random_bytes._stock.clear()
    assert len(asked) == 1 and len(names) == 600


FORKS = """
import os
from sera_serve.random_bytes import random_hex

random_hex(8)
child = os.fork()
os.write(1, f"{random_hex(8)}\\n".encode())
if child:
    os.waitpid(child, 0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_forked_process_gives_other_names() -> None:
    # In a process of its own: this one has threads.
    names = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, text=True, check=True).stdout.split()
    assert len(set(names)) == 2
