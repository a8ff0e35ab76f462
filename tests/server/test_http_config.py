"""How the application is served."""

from __future__ import annotations

from pathlib import Path

import httpx
from fastapi import FastAPI

from sera_serve.config import ServeSettings
from sera_serve.serving import http_config


def test_clients_close_idle_connections_before_the_server_does(tmp_path: Path) -> None:
    config = http_config(FastAPI(), ServeSettings(store=tmp_path, shutdown_grace_s=7))
    kept_by_httpx = httpx.Limits().keepalive_expiry
    assert kept_by_httpx is not None and config.timeout_keep_alive > kept_by_httpx
    assert config.timeout_graceful_shutdown == 7
