"""A kill or a failing disk at any moment loses nothing acknowledged and leaves nothing half-written."""

from __future__ import annotations

import errno
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from bundle_factory import make_bundle
from store_jobs import ACTIONS, CRASHED, NAME, OTHER, JobServer, faults

from adapters_store import AdapterStore
from adapters_store.errors import StoreWriteFailed

KILLS = 50
FIRST, SECOND, THIRD = (make_bundle(seed).digest for seed in (1, 2, 3))
# For each action: what may be seen after a crash in it, as (versions, aliases) of NAME, old state first, new one last.
OLD = ((1, 2), {"latest": 2, "stable": 1})
STATES = {
    "publish a version": [OLD, ((1, 2, 3), OLD[1]), ((1, 2, 3), {"latest": 3, "stable": 1})],
    "publish a first version": [OLD],
    "publish the same again": [OLD, ((1, 2), {"latest": 1, "stable": 1})],
    "move an alias": [OLD, ((1, 2), {"latest": 2, "stable": 2})],
    "remove an alias": [OLD, ((1, 2), {"latest": 2})],
    "delete a version": [OLD, ((1, 2), {"latest": 1, "stable": 1}), ((1,), {"latest": 1, "stable": 1})],
    "delete an adapter": [OLD, None],
    "collect garbage": [OLD],
}


MIN_CALLS = {action: 10 if action.startswith("publish a") else 2 for action in ACTIONS}


def acknowledged(out: Path) -> list[tuple[str, int, str]]:
    lines = out.read_text().splitlines(keepends=True)
    whole = [line.split() for line in lines if line.endswith("\n")]
    return [(adapter, int(version), digest) for adapter, version, digest in whole]


def test_kill_during_publish(jobs: JobServer, tmp_path: Path) -> None:
    """kill -9 at random moments, fifty times: the store opens and holds every version that was acknowledged."""
    rng = random.Random(0)
    root, out = tmp_path / "store", tmp_path / "acknowledged"
    out.touch()
    checked: set[tuple[str, int, str]] = set()
    for kill in range(KILLS):
        arguments = {"store": str(root), "name": f"acme/a{kill % 5}", "first_seed": kill * 1000}
        process = jobs.start("publish_forever", out, **arguments)
        # Half of the kills come at any time from the start, half from the first acknowledgement, so that a slow
        # machine has something to lose too.
        size = out.stat().st_size
        while kill % 2 and out.stat().st_size == size:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.04))
        jobs.kill(process)
        store = AdapterStore(root)
        assert not list((root / "tmp").iterdir())
        for adapter, version, digest in set(acknowledged(out)) - checked:
            assert store.resolve(f"{adapter}@v{version}").digest == digest
            assert store.load(digest).digest == digest
            checked.add((adapter, version, digest))
    assert len(checked) >= KILLS // 2
    store = AdapterStore(root)
    store.check_integrity()
    known = {(adapter, version) for adapter, version, _ in checked}
    found = {(info.adapter, version) for info in store.iter_adapters() for version in info.versions}
    # A kill between a version and its acknowledgement leaves one more at most.
    assert known <= found
    assert len(found - known) <= KILLS
    assert set(acknowledged(out)) == checked


def state(store: AdapterStore) -> tuple[tuple[int, ...], dict[str, int]] | None:
    info = next((info for info in store.iter_adapters() if info.adapter == NAME), None)
    return None if info is None else (info.versions, info.aliases)


def assert_sound(root: Path, action: str) -> None:
    """What must hold in any state that a crash in `action` leaves, and after doing it again."""
    store = AdapterStore(root, create=False)
    store.check_integrity()
    assert not list((root / "tmp").iterdir())
    seen = state(store)
    assert seen in STATES[action]
    digests = dict(enumerate((FIRST, SECOND, THIRD), start=1))
    for version in seen[0] if seen else ():
        assert store.load(store.resolve(f"{NAME}@v{version}").digest).digest == digests[version]
    if (seen is not None and seen != STATES[action][-1]) or not action.startswith(("delete", "remove")):
        ACTIONS[action](root)
    assert state(store) == STATES[action][-1]
    if action == "publish a first version":
        assert store.resolve(OTHER).version == 1
        assert store.load(THIRD).digest == THIRD
    # Version numbers are not used again, and nothing that is needed is collected.
    store.collect_garbage()
    store.check_integrity()
    published = store.publish(make_bundle(9), NAME)
    assert published.version == (4 if action == "publish a version" else 3)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("action", ACTIONS)
def test_crash_at_every_step(action: str, after: bool, jobs: JobServer, two_versions: Path, tmp_path: Path) -> None:
    for call in range(1, 200):
        root = tmp_path / f"store{call}"
        shutil.copytree(two_versions, root)
        out = tmp_path / f"out{call}"
        process = jobs.start("crash_at", out, store=str(root), action=action, call=call, after=after)
        status = jobs.wait(process)
        finished = out.read_text() == "finished\n"
        assert status == (0 if finished else CRASHED)
        if finished:
            assert state(AdapterStore(root)) == STATES[action][-1]
            break
        assert_sound(root, action)
    assert finished
    # It did crash somewhere: even the shortest action makes a few calls.
    assert call > MIN_CALLS[action]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("action", ACTIONS)
def test_failing_disk_at_every_step(action: str, after: bool, two_versions: Path, tmp_path: Path) -> None:
    def fail() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a file")

    for call in range(1, 200):
        root = tmp_path / f"store{call}"
        shutil.copytree(two_versions, root)
        with faults(call, fail, after) as made:
            try:
                ACTIONS[action](root)
            except StoreWriteFailed as error:
                assert (error.code, error.status) == ("store_write_failed", 507)
                assert "No space left" in error.message
        assert_sound(root, action)
        if made() < call:
            break
    assert made() < call


def test_crash_while_the_store_is_made(jobs: JobServer, tmp_path: Path) -> None:
    for call in range(1, 100):
        root, out = tmp_path / f"store{call}", tmp_path / f"out{call}"
        arguments = {"store": str(root), "action": "publish a first version", "call": call, "after": True}
        status = jobs.wait(jobs.start("crash_at", out, **arguments))
        store = AdapterStore(root)
        store.check_integrity()
        assert store.publish(make_bundle(3), OTHER).version == 1
        if status == 0:
            break
    assert status == 0


def test_unfinished_file_of_any_length_is_cleared(two_versions: Path, tmp_path: Path) -> None:
    data = make_bundle(3).to_bytes()
    shutil.copytree(two_versions, tmp_path / "store")
    for length in range(0, len(data), 97):
        (tmp_path / "store" / "tmp" / f"cut{length}").write_bytes(data[:length])
    store = AdapterStore(tmp_path / "store")
    assert not list((tmp_path / "store" / "tmp").iterdir())
    assert state(store) == OLD


class Journal:
    """The order of flushes and moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[tuple[str, str, str]] = []
        for name in ("replace", "link"):
            monkeypatch.setattr(os, name, self._moving(name, getattr(os, name)))
        monkeypatch.setattr(os, "fsync", self._flushing(os.fsync))

    def _moving(self, name: str, call: Callable[..., None]) -> Callable[..., None]:
        def wrapped(source: Path, target: Path, **options: object) -> None:
            self.events.append((name, str(source), str(target)))
            call(source, target, **options)

        return wrapped

    def _flushing(self, call: Callable[[int], None]) -> Callable[[int], None]:
        def wrapped(descriptor: int) -> None:
            call(descriptor)
            self.events.append(("fsync", str(Path(f"/proc/self/fd/{descriptor}").readlink()), ""))

        return wrapped

    def check(self) -> list[str]:
        """Each file was flushed before it was moved, its new directory before the next step; returns the targets."""
        targets = []
        for index, (kind, source, target) in enumerate(self.events):
            if kind == "fsync":
                continue
            assert self.events[index - 1] == ("fsync", source, ""), "moved before it was flushed"
            assert self.events[index + 1] == ("fsync", str(Path(target).parent), ""), "directory not flushed"
            targets.append(Path(target).name)
        return targets


def test_order_of_flushes(two_versions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a power cut must not reorder: content before name, bundle before version, version before alias."""
    root = tmp_path / "store"
    shutil.copytree(two_versions, root)
    store = AdapterStore(root)
    journal = Journal(monkeypatch)
    store.publish(make_bundle(3), OTHER)
    assert journal.check() == [f"{THIRD}.safetensors", "v1.json", "latest.json"]
    journal.events.clear()
    store.delete(f"{NAME}@v2")
    assert journal.check() == ["latest.json", "support.json"]
    assert journal.events[-1] == ("fsync", str(root / "adapters" / NAME / "versions"), "")
    journal.events.clear()
    store.delete(NAME)
    assert journal.check() == ["support.json"]
    assert journal.events[-1] == ("fsync", str(root / "adapters" / "acme"), "")
