"""Rates of a minute, with a clock that stands still."""

from __future__ import annotations

import pytest

from sera_serve.access import RATE_HEADERS, Quota, RateLimitExceeded, Rates, rate_headers


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def rates(clock: Clock) -> Rates:
    return Rates(clock)


def headers(rates: Rates, tenant: str, quota: Quota) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in rate_headers(rates.state(tenant, quota))}


def test_requests_are_refused_until_one_is_there_again(rates: Rates, clock: Clock) -> None:
    quota = Quota(requests_per_minute=6)
    for _ in range(6):
        rates.admit("acme", quota)
    for _ in range(3):
        with pytest.raises(RateLimitExceeded, match="6 requests a minute") as refused:
            rates.admit("acme", quota)
    # A sixth of a minute brings one back. What was refused is not charged.
    assert (refused.value.retry_after, refused.value.param, refused.value.status) == (10, "requests_per_minute", 429)
    clock.now += 9.9
    with pytest.raises(RateLimitExceeded):
        rates.admit("acme", quota)
    clock.now += 0.2
    rates.admit("acme", quota)


def test_a_tenant_at_its_limit_takes_nothing_from_another(rates: Rates) -> None:
    quota = Quota(requests_per_minute=1, tokens_per_minute=10)
    rates.admit("acme", quota)
    rates.charge_tokens("acme", quota, 10)
    with pytest.raises(RateLimitExceeded):
        rates.admit("acme", quota)
    rates.admit("zoo", quota)
    assert headers(rates, "zoo", quota)["x-ratelimit-remaining-tokens"] == "10"


def test_tokens_beyond_the_limit_are_a_debt(rates: Rates, clock: Clock) -> None:
    quota = Quota(tokens_per_minute=60)
    rates.charge_tokens("acme", quota, 59)
    rates.admit("acme", quota)
    rates.charge_tokens("acme", quota, 61)
    with pytest.raises(RateLimitExceeded, match="60 tokens a minute") as refused:
        rates.admit("acme", quota)
    assert refused.value.retry_after == 60
    clock.now += 60
    with pytest.raises(RateLimitExceeded):
        rates.admit("acme", quota)
    clock.now += 1
    rates.admit("acme", quota)


def test_a_request_that_is_refused_for_tokens_is_not_charged(rates: Rates) -> None:
    quota = Quota(requests_per_minute=5, tokens_per_minute=1000)
    rates.charge_tokens("acme", quota, 1000)
    with pytest.raises(RateLimitExceeded, match="tokens"):
        rates.admit("acme", quota)
    assert headers(rates, "acme", quota)["x-ratelimit-remaining-requests"] == "5"


@pytest.mark.parametrize("quota", [Quota(requests_per_minute=0), Quota(tokens_per_minute=0)])
def test_zero_allows_nothing(rates: Rates, clock: Clock, quota: Quota) -> None:
    clock.now += 1e6
    with pytest.raises(RateLimitExceeded) as refused:
        rates.admit("acme", quota)
    assert refused.value.retry_after == 3600
    assert set(headers(rates, "acme", quota).values()) >= {"0"}


def test_headers_have_the_form_of_openai(rates: Rates, clock: Clock) -> None:
    quota = Quota(requests_per_minute=60, tokens_per_minute=1000)
    assert tuple(headers(rates, "acme", quota)) == RATE_HEADERS
    assert headers(rates, "acme", quota)["x-ratelimit-reset-requests"] == "0s"
    rates.admit("acme", quota)
    rates.charge_tokens("acme", quota, 1)
    assert headers(rates, "acme", quota) == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "1s",
        "x-ratelimit-limit-tokens": "1000",
        "x-ratelimit-remaining-tokens": "999",
        "x-ratelimit-reset-tokens": "60ms",
    }
    rates.charge_tokens("acme", quota, 6000)
    clock.now += 0.5
    found = headers(rates, "acme", quota)
    assert (found["x-ratelimit-reset-requests"], found["x-ratelimit-reset-tokens"]) == ("500ms", "6m0s")
    assert found["x-ratelimit-remaining-tokens"] == "0"
    clock.now += 1
    assert headers(rates, "acme", quota)["x-ratelimit-reset-tokens"] == "5m59s"


def test_a_limit_that_changes_holds_at_once(rates: Rates) -> None:
    for _ in range(10):
        rates.admit("acme", Quota())
    with pytest.raises(RateLimitExceeded):
        rates.admit("acme", Quota(requests_per_minute=10))
    rates.admit("acme", Quota(requests_per_minute=11))


def test_without_a_limit_what_was_used_is_forgotten_with_time(rates: Rates, clock: Clock) -> None:
    rates.charge_tokens("acme", Quota(), 1000)
    clock.now += 60
    assert rates.used("acme", Quota()) == (0, 368), "a part of 1/e is left"


def test_tenants_that_came_long_ago_are_forgotten(rates: Rates, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sera_serve.access.rates._MAX_BUCKETS", 4)
    for tenant in ("first", "second", "third"):
        rates.admit(tenant, Quota())
    assert [rates.used(tenant, Quota())[0] for tenant in ("first", "second", "third")] == [0, 1, 1]


@pytest.mark.parametrize("before", [None, 600])
def test_what_was_used_before_a_lower_limit_is_no_debt(rates: Rates, clock: Clock, before: int | None) -> None:
    free = Quota(requests_per_minute=before, tokens_per_minute=None if before is None else 10**6)
    for _ in range(500):
        rates.admit("acme", free)
    rates.charge_tokens("acme", free, 300_000)
    limited = Quota(requests_per_minute=10, tokens_per_minute=1000)
    with pytest.raises(RateLimitExceeded) as refused:
        rates.admit("acme", limited)
    assert refused.value.retry_after == 6
    assert {rate.reset_s for rate in rates.state("acme", limited).values()} == {60.0}
    # A debt that was made under the limit stays.
    clock.now += 60
    rates.admit("acme", limited)
    rates.charge_tokens("acme", limited, 3000)
    clock.now += 60
    with pytest.raises(RateLimitExceeded):
        rates.admit("acme", limited)


def test_the_use_of_a_tenant_without_limits_is_known(rates: Rates, clock: Clock) -> None:
    assert rates.used("acme", Quota()) == (0, 0)
    rates.admit("acme", Quota())
    rates.charge_tokens("acme", Quota(), 100)
    assert rates.used("acme", Quota()) == (1, 100)
    clock.now += 600
    assert rates.used("acme", Quota()) == (0, 0)
    assert headers(rates, "acme", Quota()) == {}
