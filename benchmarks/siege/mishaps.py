"""What an operator may meet: no space for temporary files or in the store, and a store that is gone."""

from __future__ import annotations

import asyncio
import errno
import shutil
from pathlib import Path

from benchmarks.siege.wire import Outcome, Sender, Target, together

# Large enough to be kept in the temporary folder, not in memory.
LARGE_UPLOAD = 24 << 20
_PAGE = 4096


async def full_temp(target: Target, size: int, outcome: Outcome) -> None:
    """Upload `size` times what the temporary folder has no room for, then something small."""
    sender = Sender(target)
    for _ in range(size):
        await sender.publish(outcome, "attack/temp", bytes(LARGE_UPLOAD))
    await together(4, lambda index: sender.publish(outcome, f"attack/temp-{index}", bytes(LARGE_UPLOAD)))
    small = Outcome()
    await sender.publish(small, "attack/small", _bundle(target, "good"))
    outcome.figures["small upload"] = next(iter(small.counts))


async def full_store(target: Target, size: int, outcome: Outcome) -> None:
    """Publish with room for ever more of what a version consists of, then delete on a disk that is full.

    Args:
        target: Its store has a file system of its own.
        size: From no room for the bundle to so many pages more than the bundle needs.
        outcome: `orphan bundles` are those that refused publishes left behind.
    """
    sender = Sender(target)
    bundle = _bundle(target, "good")
    bundles, filler = target.store / "bundles", target.store / "filler"
    before = set(bundles.iterdir())
    orphans = set()
    for pages in range(-1, size):
        _leave(filler, len(bundle) + pages * _PAGE)
        reply = await sender.publish(outcome, "attack/full", bundle)
        if reply is not None and reply.status == 201:
            break
        orphans |= set(bundles.iterdir()) - before
    _leave(filler, 0)
    deleted = Outcome()
    await sender.ask(deleted, "DELETE", "/v1/adapters/spare/00")
    outcome.figures["delete"] = next(iter(deleted.counts))
    outcome.figures["orphan bundles"] = len(orphans)
    filler.unlink()


def _leave(filler: Path, free: int) -> None:
    """Make the filler so large that about so many bytes are free."""
    filler.unlink(missing_ok=True)
    wanted = max(0, shutil.disk_usage(filler.parent).free - free)
    with filler.open("wb", buffering=0) as file:
        try:
            file.write(bytes(wanted - wanted % _PAGE))
            while not free:
                file.write(bytes(_PAGE))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise


async def store_removed(target: Target, size: int, outcome: Outcome) -> None:
    """Remove the store under the server, then ask `size` times for everything that needs the store."""
    shutil.rmtree(target.store)
    sender = Sender(target)
    generate = {"adapter": "siege/other", "prompt": "Once", "max_new_tokens": 1}
    for _ in range(size):
        for method, path, body in (
            ("GET", "/readyz", None),
            ("GET", "/v1/adapters", None),
            ("POST", "/v1/generate", generate),
        ):
            one = Outcome()
            await sender.ask(one, method, path, body)
            outcome.counts[f"{path} {next(iter(one.counts))}"] += 1
        await asyncio.sleep(0.5)


def _bundle(target: Target, name: str) -> bytes:
    return (target.bundles / f"{name}.safetensors").read_bytes()
