"""What the server says at start-up: what is loaded, and lines to paste that work."""

from __future__ import annotations

import json
import shlex
from typing import Any

from rich.console import Console
from rich.table import Table

from adapters_store import AdapterStore, StoreError, check_base
from sera_serve.base import FrozenBase
from sera_serve.config import ServeSettings
from sera_serve.demo import EXAMPLES

# Adapters looked at in search of one for each task.
_LOOKED_AT = 50
# Answers end without a line break, and the prompt of the shell would follow on their line.
CURL = "curl -sw '\\n'"


def describe_server(
    console: Console, settings: ServeSettings, base: FrozenBase, store: AdapterStore, port: int
) -> None:
    """Print what is served, where, and one request for each kind of adapter in the store."""
    host = "localhost" if settings.host in ("127.0.0.1", "::1", "0.0.0.0", "::") else settings.host
    url = f"http://{host}:{port}"
    parameters = sum(parameter.numel() for parameter in base.model.parameters())
    facts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    facts.add_row("base", f"{base.name}, {base.kind} of {parameters:,} parameters, context {base.max_length}")
    facts.add_row("device", f"{base.device}, {str(base.dtype).removeprefix('torch.')}")
    facts.add_row("adapter memory", f"{settings.pool_mib} MiB on the device, {settings.host_cache_mib} MiB cached")
    facts.add_row("store", f"{settings.store.resolve()}, {store.count_adapters():,} adapters")
    facts.add_row("address", url)
    console.print("\n[bold]sera-serve is ready[/bold]")
    console.print(facts)
    for title, path, body in _examples(base, store):
        console.print(f"\n[dim]# {title}[/dim]", highlight=False)
        # Not wrapped, or it could not be pasted.
        console.print(curl_line(f"{url}{path}", body), markup=False, highlight=False, soft_wrap=True)
    console.print(f"\n[dim]# adapters in the store[/dim]\n{CURL} {url}/v1/adapters\n", highlight=False)


def curl_line(url: str, body: dict[str, Any]) -> str:
    """A shell command that posts JSON."""
    data = shlex.quote(json.dumps(body, ensure_ascii=False))
    return f"{CURL} {url} -H 'Content-Type: application/json' -d {data}"


def _examples(base: FrozenBase, store: AdapterStore) -> list[tuple[str, str, dict[str, Any]]]:
    """(title, path, body) of requests that this server answers."""
    found: dict[str, str] = {}
    shapes = base.module_shapes()
    for info in store.list_page(limit=_LOOKED_AT).adapters:
        if info.task in found or (info.task == "generate" and base.kind == "encoder"):
            continue
        try:
            check_base(store.config(info.digest), base.info, shapes)
        except StoreError:
            # Made for another base: it would be refused.
            continue
        found[info.task] = info.adapter
    examples: list[tuple[str, str, dict[str, Any]]] = []
    if adapter := found.get("generate"):
        body = {"adapter": adapter, "prompt": EXAMPLES.get(adapter, "Once upon a time"), "max_new_tokens": 40}
        examples.append((f"generate with {adapter}", "/v1/generate", body))
    if adapter := found.get("classify"):
        body = {"adapter": adapter, "inputs": [EXAMPLES.get(adapter, "This is the text to classify.")]}
        examples.append((f"classify with {adapter}", "/v1/classify", body))
    if base.kind == "decoder":
        body = {"adapter": None, "prompt": "Once upon a time", "max_new_tokens": 40}
        examples.append(("the bare base", "/v1/generate", body))
    return examples
