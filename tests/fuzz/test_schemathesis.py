"""schemathesis over the whole OpenAPI document, with the keys of two tenants and of an operator.

`python -m benchmarks.api_fuzz` sends thousands of requests; these are some hundred.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from benchmarks.api_fuzz_things import Things
from benchmarks.api_fuzzing import Finding, Fuzzer
from sera_serve.base import FrozenBase
from support.factories import random_decoder
from support.two_tenants import TENANTS, TwoTenants, twin_of, two_tenants

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base() -> FrozenBase:
    return random_decoder()


@pytest.fixture(scope="module")
def tenants(base: FrozenBase, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoTenants]:
    logging.getLogger("sera_serve").setLevel(logging.CRITICAL)
    with two_tenants(base, tmp_path_factory.mktemp("fuzz"), max_training_jobs=0) as tenants:
        yield tenants


@pytest.fixture(scope="module")
def things(tenants: TwoTenants) -> Iterator[Things]:
    private = {f"{tenant}/{name}": twin_of(f"{tenant}/{name}") for tenant in TENANTS for name in ("secret", "sorter")}
    bundle = next(iter(tenants.bundles.values())).to_bytes()
    base = tenants.engine.base.name
    things = Things(tenants.url, tenants.keys, base, list(tenants.bundles), private, bundle, tenants.restore)
    yield things
    things.close()


def told(findings: list[Finding]) -> str:
    return "\n\n".join(f"{f.operation} by {f.caller}: {f.fault}\n{f.request}\n{f.answer}" for f in findings)


def test_requests_of_the_document(things: Things) -> None:
    fuzzer = Fuzzer(things.target, things.restore)
    fuzzer.run_each(3)
    outcome = fuzzer.outcome
    assert not outcome.findings, told(outcome.findings)
    assert {label for label, _ in outcome.requests} == {operation.label for operation in fuzzer.operations()}
    assert outcome.overloaded == 0
    assert outcome.requests.total() > 150 and outcome.compared.total() > 10
    assert sum(count for (_, status), count in outcome.requests.items() if status < 300) > 30


def test_sequences_of_requests(things: Things) -> None:
    fuzzer = Fuzzer(things.target, things.restore, seed=1)
    fuzzer.run_stateful(scenarios=15, steps=8)
    assert not fuzzer.outcome.findings, told(fuzzer.outcome.findings)
    assert fuzzer.outcome.requests.total() > 30
