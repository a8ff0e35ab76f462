"""Requests that schemathesis makes of the OpenAPI document, sent with the keys of tenants that must not see each other.

Each request goes to the server with the key of one tenant. What comes back must be declared in the document, and must
not be an error of the server. Where a request names something that another tenant has, the same bytes are sent again
with a name that nobody has: both answers must be alike.
"""

from __future__ import annotations

import copy
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any
from urllib.parse import quote

import hypothesis
import requests
import schemathesis
from requests import PreparedRequest
from schemathesis import GenerationMode
from schemathesis.core.failures import FailureGroup
from schemathesis.generation.stateful import APIStateMachine
from schemathesis.schemas import APIOperation, BaseSchema
from schemathesis.specs.openapi import checks

# What the server says when it has too much to do, or is told to stop: never a fault of the request.
OVERLOADED = (b'"overloaded"', b'"engine_unavailable"', b'"too_many_connections"')
_CHECKS = [
    schemathesis.checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
]
_VOLATILE_HEADERS = ("x-request-id", "date", "connection", "keep-alive", "x-ratelimit", "retry-after", "server-timing")
# Of an answer, what differs from one request to the next.
_VOLATILE_TEXT = re.compile(rb"req-[0-9a-f]+")
# Where answers name an adapter.
_ADAPTER_IN = {
    "/v1/adapters": ("/adapter", "/adapters/0/adapter"),
    "/v1/adapters/{tenant}/{name}": ("/adapter",),
    "/v1/adapters/{tenant}/{name}/pin": ("/adapter",),
    "/v1/adapters/{tenant}/{name}/versions": ("/adapter",),
    "/v1/adapters/{tenant}/{name}/aliases/{alias}": ("/adapter",),
    "/v1/adapters/{tenant}/{name}/shares": ("/adapter",),
    "/v1/models": ("/data/1/id",),
}
# Share of the valid requests that name something.
_AIMED = 0.75
# Larger values are allowed, and cost time alone.
_MOST = {
    "max_new_tokens": 8,
    "max_tokens": 8,
    "max_completion_tokens": 8,
    "max_output_tokens": 8,
    "n": 3,
    "best_of": 3,
    "min_tokens": 4,
}


@dataclass(frozen=True)
class Target:
    """A server, and what its tenants have.

    Attributes:
        url: Address without a path.
        keys: Secret of each caller, by name. A caller `admin` sees everything, and is compared with nobody.
        names: Values for parameters of paths and queries, by the name of the parameter.
        bodies: Makers of bodies that are served, by the label of the operation. Generated fields are added to them.
        hidden: By caller: texts that name what another tenant has, each with a text of the same length that names
            nothing.
    """

    url: str
    keys: Mapping[str, str]
    names: Mapping[str, Sequence[str]]
    bodies: Mapping[str, Callable[[random.Random], dict[str, Any]]]
    hidden: Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class Finding:
    """One fault: what was sent, by whom, and what is wrong with the answer."""

    operation: str
    caller: str
    fault: str
    request: str
    answer: str


@dataclass
class Outcome:
    """What came of the requests.

    Attributes:
        requests: How many were sent, by operation and status.
        compared: How many of them were sent again with a name that nobody has, by operation.
        overloaded: How many were refused because of load.
        findings: The faults, each once for an operation and a fault.
    """

    requests: Counter[tuple[str, int]] = field(default_factory=Counter)
    compared: Counter[str] = field(default_factory=Counter)
    overloaded: int = 0
    findings: list[Finding] = field(default_factory=list)

    def add(self, finding: Finding) -> None:
        """Keep a fault that is not there yet."""
        if not any((f.operation, f.fault[:80]) == (finding.operation, finding.fault[:80]) for f in self.findings):
            self.findings.append(finding)

    def total(self) -> int:
        """How many requests were sent, those that compare included."""
        return self.requests.total() + self.compared.total()


class Fuzzer:
    """Sends generated requests to a target, and collects what is wrong with the answers."""

    def __init__(self, target: Target, restore: Callable[[], None], seed: int = 0) -> None:
        """Read the document of the server.

        Args:
            target: The server.
            restore: Makes again what requests have deleted, and ends what they have shared. It is called before each
                scenario and each operation.
            seed: Of the requests.
        """
        self._restore = restore
        self.outcome = Outcome()
        self._target = target
        self._seed = seed
        self._random = random.Random(seed)
        self._session = requests.Session()
        document = self._session.get(f"{target.url}/openapi.json", timeout=30).json()
        self.schema: BaseSchema = schemathesis.openapi.from_dict(steered(document))
        self._callers = cycle(target.keys)

    def run_stateful(self, scenarios: int, steps: int = 12) -> None:
        """Run scenarios: sequences of requests in which answers give values to later requests."""
        fuzzer, begun = self, 0

        class Machine(self.schema.as_state_machine()):  # type: ignore[misc]
            def setup(self) -> None:
                nonlocal begun
                begun += 1
                fuzzer._restore()
                self.caller = next(fuzzer._callers)

            def call(self, case: schemathesis.Case, **kwargs: Any) -> schemathesis.Response:
                return fuzzer._send(case, self.caller)

            def validate_response(
                self, response: schemathesis.Response, case: schemathesis.Case, **kwargs: Any
            ) -> None:
                fuzzer._check(case, response, self.caller)

        while begun < scenarios:
            self._seed += 1
            machine: type[APIStateMachine] = hypothesis.seed(self._seed)(Machine)
            # Hypothesis repeats beginnings of scenarios, and a server with a state answers a repetition otherwise.
            with suppress(hypothesis.errors.Flaky):
                machine.run(settings=_settings(scenarios - begun, stateful_step_count=steps))

    def run_each(self, examples: int) -> None:
        """Send so many valid and so many invalid requests to every operation."""
        for operation in self.operations():
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
                self._restore()
                try:
                    self._run_operation(operation, mode, examples)
                except hypothesis.errors.Unsatisfiable:
                    # Without parameters and body, nothing can be wrong with a request.
                    continue

    def operations(self) -> Iterator[APIOperation]:
        """Every operation of the document."""
        for result in self.schema.get_all_operations():
            yield result.ok()

    def _run_operation(self, operation: APIOperation, mode: GenerationMode, examples: int) -> None:
        @hypothesis.seed(self._seed)
        @_settings(examples)
        @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
        def run(case: schemathesis.Case) -> None:
            caller = next(self._callers)
            response = self._send(case, caller)
            self._check(case, response, caller)
            if case.method in ("DELETE", "PUT") and response.status_code < 300:
                self._restore()

        run()

    def _send(self, case: schemathesis.Case, caller: str) -> schemathesis.Response:
        if case.meta is None or case.meta.generation.mode is GenerationMode.POSITIVE:
            self._aim(case)
        headers = {"Authorization": f"Bearer {self._target.keys[caller]}"}
        response = case.call(base_url=self._target.url, session=self._session, headers=headers, timeout=60)
        self.outcome.requests[case.operation.label, response.status_code] += 1
        return response

    def _aim(self, case: schemathesis.Case) -> None:
        """Have most valid requests name what is there, and ask for what can be served."""
        for parameters in (case.path_parameters, case.query):
            for name in list(parameters or ()):
                if name in self._target.names and self._random.random() < _AIMED:
                    parameters[name] = self._random.choice(self._target.names[name])
        maker = self._target.bodies.get(case.operation.label)
        if maker is None or self._random.random() > _AIMED:
            return
        body = maker(self._random)
        if isinstance(case.body, dict):
            others = [name for name in case.body if name not in body]
            kept = self._random.sample(others, min(len(others), self._random.choice((0, 0, 1, 2))))
            body |= {name: case.body[name] for name in kept}
        case.body = body

    def _check(self, case: schemathesis.Case, response: schemathesis.Response, caller: str) -> None:
        if _is_overload(response.status_code, response.content):
            self.outcome.overloaded += 1
            return
        try:
            case.validate_response(response, checks=_CHECKS)
        except FailureGroup as group:
            for failure in group.exceptions:
                self._found(case.operation.label, caller, f"{failure.title}: {failure.message}", response)
        except schemathesis.errors.SchemathesisError as error:
            self._found(case.operation.label, caller, f"{type(error).__name__}: {error}", response)
        self._compare(case.operation.label, response, caller)

    def _compare(self, label: str, response: schemathesis.Response, caller: str) -> None:
        """Send the request again, where it names what is hidden from the caller, with a name that nobody has."""
        hidden = self._target.hidden.get(caller, {})
        sent = response.request
        twin = _replaced(sent, hidden)
        if twin is None:
            return
        again = self._session.send(twin, timeout=60)
        self.outcome.compared[label] += 1
        if _is_overload(again.status_code, again.content):
            return
        first = _seen(response.status_code, response.headers, response.content, hidden)
        second = _seen(again.status_code, again.headers, again.content, hidden)
        for what, one, other in zip(("status", "headers", "body"), first, second, strict=True):
            if one != other:
                fault = f"the {what} tells what another tenant has: {one!r:.300} for it, {other!r:.300} for nothing"
                self._found(label, caller, fault, response)
                return

    def _found(self, label: str, caller: str, fault: str, response: schemathesis.Response) -> None:
        request = response.request
        sent = f"{request.method} {request.url} {request.body!r:.600}"
        self.outcome.add(Finding(label, caller, fault, sent, f"{response.status_code} {response.content[:300]!r}"))


def steered(document: dict[str, Any]) -> dict[str, Any]:
    """A copy of an OpenAPI document whose requests ask for little work, with links between its operations.

    A link says which value of an answer is a parameter of a later request. Links are no part of the server's document:
    an adapter's name is one value of an answer and two parameters of a path.
    """
    made = copy.deepcopy(document)
    components = made.get("components", {}).get("schemas", {})
    seen: set[str] = set()

    def walk(schema: Any) -> None:
        if isinstance(schema, list):
            for part in schema:
                walk(part)
        if not isinstance(schema, dict):
            return
        reference = schema.get("$ref")
        if isinstance(reference, str) and reference not in seen:
            seen.add(reference)
            walk(components.get(reference.rpartition("/")[2]))
        for key, value in schema.items():
            if key in _MOST and isinstance(value, dict):
                for part in (value, *value.get("anyOf", ())):
                    if part.get("type") == "integer":
                        part["maximum"] = _MOST[key]
            walk(value)

    for path in made["paths"].values():
        for operation in path.values():
            walk(operation.get("requestBody", {}))
    _link(made["paths"])
    return made


def _link(paths: dict[str, Any]) -> None:
    """Link every answer that names an adapter to every operation on an adapter."""
    targets = {
        operation["operationId"]: path
        for path, operations in paths.items()
        if "{tenant}" in path and "{name}" in path
        for operation in operations.values()
    }
    for path, places in _ADAPTER_IN.items():
        for operation in paths.get(path, {}).values():
            for status in ("200", "201"):
                answer = operation["responses"].get(status)
                if answer is None or "operationId" not in operation:
                    continue
                answer["links"] = {
                    f"{target}By{place.strip('/').replace('/', '_')}": {
                        "operationId": target,
                        "parameters": {
                            "tenant": f"$response.body#{place}#regex:^([^/]+)/",
                            "name": f"$response.body#{place}#regex:^[^/]+/([^@]+)",
                        },
                    }
                    for target in targets
                    for place in places
                }


def _is_overload(status: int, body: bytes | None) -> bool:
    return status == 503 and any(code in (body or b"") for code in OVERLOADED)


def _settings(examples: int, **more: Any) -> hypothesis.settings:
    return hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
        **more,
    )


def _replaced(request: PreparedRequest, hidden: Mapping[str, str]) -> PreparedRequest | None:
    """The same request with every hidden text replaced, or None where it has none."""
    url, body = str(request.url), request.body
    content = body.encode() if isinstance(body, str) else body or b""
    for name, twin in hidden.items():
        assert len(name) == len(twin)
        url = url.replace(name, twin).replace(quote(name, safe=""), quote(twin, safe=""))
        content = content.replace(name.encode(), twin.encode())
    unchanged = content == (body.encode() if isinstance(body, str) else body or b"")
    if url == request.url and unchanged:
        return None
    replaced = request.copy()
    replaced.url = url
    replaced.body = content or None
    return replaced


def _seen(
    status: int, headers: Mapping[str, Any], body: bytes | None, hidden: Mapping[str, str]
) -> tuple[int, dict[str, Any], bytes]:
    """An answer without what differs from one request to the next, and with one text in place of every hidden one."""
    kept = {
        name.lower(): value if isinstance(value, str) else ", ".join(value)
        for name, value in headers.items()
        if not name.lower().startswith(_VOLATILE_HEADERS)
    }
    content = _VOLATILE_TEXT.sub(b"req", body or b"")
    for name, twin in hidden.items():
        content = content.replace(name.encode(), b"*" * len(name)).replace(twin.encode(), b"*" * len(name))
    return status, kept, content
