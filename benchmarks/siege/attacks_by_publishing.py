"""Attacks by what is published, and by whose page publishes it."""

from __future__ import annotations

import json

from benchmarks.siege.wire import Outcome, Sender, Target, multipart, multipart_type

CHARSETS = ("undefined", "punycode", "idna", "utf-7", "utf-16", "rot13", "zlib", "nonsense", "")


async def odd_charsets(target: Target, size: int, outcome: Outcome) -> None:
    """Upload `size` times in every charset that Python has a special codec for."""
    form = multipart("attack/charset", b"no bundle")
    sender = Sender(target)
    for _ in range(size):
        for charset in CHARSETS:
            await sender.ask(outcome, "POST", "/v1/adapters", form, multipart_type(f"; charset={charset}"))


async def cross_site(target: Target, size: int, outcome: Outcome) -> None:
    """Publish and delete as a page of another site can make a browser do, `size` times each."""
    sender = Sender(target)
    bundle = (target.bundles / "good.safetensors").read_bytes()
    for _ in range(size):
        for name, headers in (
            ("another origin", "Origin: https://evil.example\r\nSec-Fetch-Site: cross-site\r\n"),
            ("origin null", "Origin: null\r\n"),
            ("another host", "Host: evil.example\r\n"),
        ):
            one = Outcome()
            await sender.publish(one, "siege/other", bundle, headers)
            outcome.counts[f"{name}: {next(iter(one.counts))}"] += 1
        one = Outcome()
        await sender.ask(one, "DELETE", "/v1/adapters/spare/01", None, "Host: evil.example\r\n")
        outcome.counts[f"delete, another host: {next(iter(one.counts))}"] += 1


async def overflow(target: Target, size: int, outcome: Outcome) -> None:
    """Publish finite adapters whose products overflow, and generate with each `size` times."""
    sender = Sender(target)
    for name in ("large_values", "large_scaling"):
        adapter = f"attack/{name.replace('_', '-')}"
        await sender.publish(outcome, adapter, (target.bundles / f"{name}.safetensors").read_bytes())
        for _ in range(size):
            body = {"adapter": adapter, "prompt": "Once upon a time", "max_new_tokens": 8}
            reply = await sender.ask(outcome, "POST", "/v1/generate", body)
            if reply is not None and reply.status == 200:
                tokens = json.loads(reply.body)["token_ids"]
                outcome.counts["tokens of one id" if len(set(tokens)) == 1 else "tokens"] += 1
