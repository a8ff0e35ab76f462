"""The configuration of the HTTP server, and the calls of the framework."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path

import httpx
from fastapi import FastAPI
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute

from sera_serve.commands.serve import http_config
from sera_serve.config import ServeSettings
from sera_serve.server import health, native
from sera_serve.server.graceful import ENDING_S


def test_clients_close_idle_connections_before_the_server_does(tmp_path: Path) -> None:
    config = http_config(FastAPI(), ServeSettings(store=tmp_path, shutdown_grace_s=7), lambda code: None)
    kept_by_httpx = httpx.Limits().keepalive_expiry
    assert kept_by_httpx is not None and config.timeout_keep_alive > kept_by_httpx
    # Everything has ended before uvicorn cancels what is left.
    assert config.timeout_graceful_shutdown == 7 + ENDING_S


def test_the_framework_calls_nothing_in_threads() -> None:
    def called(dependant: Dependant) -> Iterator[object]:
        yield dependant.call
        for dependency in dependant.dependencies:
            yield from called(dependency)

    routes = [route for router in (*native.ROUTERS, health.router) for route in router.routes]
    calls = [call for route in routes if isinstance(route, APIRoute) for call in called(route.dependant)]
    assert len(calls) > 15 and all(map(inspect.iscoroutinefunction, calls))
