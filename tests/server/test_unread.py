"""Which connections end where unread responses have too many bytes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from sera_serve.server import unread
from sera_serve.server.unread import UnreadResponses, reader_of


class Connection:
    """As much of a transport as is looked at."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.ended = False

    def get_write_buffer_size(self) -> int:
        return self.size

    def abort(self) -> None:
        self.ended = True


class World:
    """Connections, and a clock that stands still until a test moves it."""

    def __init__(self) -> None:
        self.now = 100.0
        self.responses = UnreadResponses(100)

    def send(self, owner: str, size: int) -> Connection:
        connection = Connection(size)

        async def add() -> None:
            self.responses.add(cast(asyncio.Transport, connection), owner)
            await asyncio.sleep(0)

        asyncio.run(add())
        return connection


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    world = World()
    monkeypatch.setattr(unread.time, "monotonic", lambda: world.now)
    yield world


def test_what_fits_stays(world: World) -> None:
    connections = [world.send("a", 50), world.send("b", 50)]
    connections[0].size = 10
    # What was read since counts no more.
    connections.append(world.send("a", 40))
    assert not any(each.ended for each in connections)


def test_a_connection_that_ended_counts_no_more(world: World) -> None:
    first = world.send("a", 60)
    world.responses.remove(cast(asyncio.Transport, first))
    world.responses.remove(cast(asyncio.Transport, first))
    assert not world.send("a", 60).ended and not first.ended


def test_the_slowest_of_who_has_most_ends(world: World) -> None:
    other = world.send("b", 25)
    quick, slow, still = world.send("a", 25), world.send("a", 25), world.send("a", 24)
    world.now += 10
    quick.size, slow.size = 10, 20
    world.send("a", 10)
    assert not any(each.ended for each in (other, quick, slow, still)), "it fits what was read meanwhile"
    young = world.send("a", 20)
    assert still.ended and not any(each.ended for each in (other, quick, slow, young))
    world.send("a", 20)
    assert slow.ended and not (other.ended or quick.ended or young.ended)


def test_the_first_of_equal_ones_ends(world: World) -> None:
    first, second = world.send("a", 50), world.send("a", 50)
    third = world.send("a", 50)
    assert first.ended and not second.ended and not third.ended


def test_one_response_alone_ends_where_it_is_too_large(world: World) -> None:
    other = world.send("b", 10)
    assert world.send("a", 101).ended and not other.ended


def test_a_reader_is_the_tenant_of_a_key_or_an_address() -> None:
    def cycle(**state: Any) -> Any:
        return SimpleNamespace(scope={"state": state})

    def of_tenant(tenant: str | None) -> Any:
        return cycle(caller=SimpleNamespace(tenant=tenant))

    assert reader_of(of_tenant("acme"), "1.2.3.4") == "tenant 'acme'"
    assert reader_of(of_tenant(None), "1.2.3.4") == reader_of(None, "1.2.3.4") == "client 1.2.3.4"
    assert reader_of(cycle(), "2001:db8::1") == reader_of(None, "2001:db8::2")
