"""What the log-probabilities of calls under way take of memory: those of a tenant, and all together.

A call alone is bounded where it is admitted, by what it could come to. All calls of a tenant are counted as their
tokens come. Most end long before their limit, and would be refused for nothing.
"""

from __future__ import annotations

from sera_serve.engine.tenant_memory import Reservation, TenantMemory
from sera_serve.errors import TenantOverloaded

LOGPROB_BYTES = 128
"""Of one log-probability: some 20 until it is written, and then its JSON until the answer is sent."""
# Log-probabilities that are reserved at once: to reserve is to look at all reservations.
_AT_ONCE = 2048


class LogprobRoom:
    """Room for the log-probabilities of one call. It ends when nobody refers to it any more.

    One thread at a time may use it: that of the event loop before the call's requests are queued, and then the loop's.
    """

    def __init__(self, memory: TenantMemory, tenant: str) -> None:
        """Begin with nothing."""
        self._memory = memory
        self._reservation = Reservation(tenant)
        self._left = 0

    def take(self, count: int) -> bool:
        """Count further log-probabilities; False where the calls of the tenant would have too many together."""
        if count > self._left:
            more = max(_AT_ONCE, count - self._left)
            if not self._memory.grow(self._reservation, more * LOGPROB_BYTES):
                return False
            self._left += more
        self._left -= count
        return True


def too_many(param: str) -> TenantOverloaded:
    """The refusal of a request whose log-probabilities find no memory now; the field `param` asked for them."""
    return TenantOverloaded(
        f"the log-probabilities of this tenant's requests under way take too much memory together; send fewer requests "
        f"with {param} at a time, or ask for fewer at each token",
        param=param,
    )
