"""Lists of the adapters that a caller may use."""

from __future__ import annotations

from collections.abc import Iterator
from heapq import merge
from itertools import islice
from operator import attrgetter

from adapters_store import AdapterStore, AdapterSummary, Page
from sera_serve.server.auth import Caller
from sera_serve.threads import pause


def visible_page(caller: Caller, store: AdapterStore, after: str | None, limit: int, tenant: str | None = None) -> Page:
    """One page of the adapters that a caller may use, in order of their ids: its own, and those shared with it.

    Blocks, and pauses between the adapters (`threads.pause`).

    Args:
        caller: Whose page it is.
        store: Has the adapters.
        after: The page begins with the first id above this one.
        limit: Adapters a page, at least 1.
        tenant: Only adapters of this tenant.

    Raises:
        InvalidAdapterName: `tenant` is not of the allowed form.
    """
    own = caller.seen_tenant
    if own is None:
        return store.list_page(tenant, after, limit, pause)
    mine = store.list_page(own, after, limit + 1, pause).adapters if tenant in (None, own) else ()
    shared = _shared(caller, store, own, after or "", tenant)
    found = list(islice(merge(mine, shared, key=attrgetter("adapter")), limit + 1))
    return Page(tuple(found[:limit]), found[limit - 1].adapter if len(found) > limit else None)


def _shared(caller: Caller, store: AdapterStore, own: str, after: str, tenant: str | None) -> Iterator[AdapterSummary]:
    for adapter in caller.access.shared_with(own, after):
        pause()
        if tenant is not None and not adapter.startswith(f"{tenant}/"):
            continue
        # A command deletes an adapter first, and its shares after it.
        if (summary := store.listed_summary(adapter)) is not None:
            yield summary
