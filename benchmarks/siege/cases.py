"""The cases of a siege, and one run of a case: a fresh server, quiet clients, the attack, and what was noticed."""

from __future__ import annotations

import asyncio
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.server_process import ServerProcess, Surroundings
from benchmarks.siege import attacks_by_publishing as publishing
from benchmarks.siege import attacks_on_connections as connections
from benchmarks.siege import attacks_on_parsing as parsing
from benchmarks.siege import attacks_on_work as work
from benchmarks.siege import mishaps, shutdowns
from benchmarks.siege.probe import GENERATE, HEALTH, Sample, Watcher, figures, longest_pause
from benchmarks.siege.server import Gauge
from benchmarks.siege.wire import Attack, Outcome, Target

HEALTH_SOURCE, CLIENT_SOURCE, ATTACKER = "127.0.0.2", "127.0.0.3", "127.0.1.1"
QUIET_S = 4.0
# After the attack: until both clients have answers again.
RECOVERY_S = 60.0
_LATE_S = 20.0


@dataclass(frozen=True)
class Case:
    """One attack, and what it needs.

    Attributes:
        size: As the attack says; `quick` is that of a quick run.
        seconds: Most seconds of the attack.
        store: Which store is served; `private` if the attack changes it.
        descriptors: Most files that the server may have open.
        temp_mib: Size of a file system in memory for temporary files, and `store_mib` for the store. 0 is the disk.
        grace_s: Of the server's shutdown.
        ends: The attack ends the server.
        recovers: Answers may be expected after the attack.
    """

    name: str
    attack: Attack
    size: int
    quick: int
    seconds: float = 30
    store: str = "small"
    private: bool = False
    descriptors: int | None = None
    temp_mib: int = 0
    store_mib: int = 0
    grace_s: int = 30
    ends: bool = False
    recovers: bool = True


CASES = (
    Case("pax digits", parsing.pax_digits, 80 << 10, 48 << 10),
    Case("endless header", parsing.endless_header, 100 << 20, 48 << 20),
    Case("endless URI", parsing.endless_uri, 100 << 20, 48 << 20),
    Case("endless trailer", parsing.endless_trailer, 100 << 20, 48 << 20),
    Case("many headers", parsing.many_headers, 120 << 20, 50 << 20),
    Case("pipelined requests", parsing.pipelined, 300_000, 100_000),
    Case("long prompts", work.long_prompts, 384 << 10, 128 << 10, seconds=40),
    Case("longest prompts", work.long_prompts, 1 << 20, 512 << 10, seconds=40),
    Case("listings", work.listings, 150, 40, seconds=40, store="large"),
    Case("invalid tokens", work.invalid_tokens, 6, 2),
    Case("deep nesting", work.deep_nesting, 8, 2),
    Case("huge numbers", work.huge_numbers, 4, 2),
    Case("idle connections", connections.idle, 1100, 1100, seconds=20, descriptors=1024),
    Case("half headers", connections.half_headers, 1100, 1100, seconds=20, descriptors=1024),
    Case("half bodies", connections.half_bodies, 600, 300, seconds=20, descriptors=1024),
    Case("half uploads", connections.half_uploads, 550, 550, seconds=25, descriptors=1024),
    Case("unread answers", connections.unread_answers, 40, 20, seconds=25, store="large"),
    Case("store locked", work.store_locked, 12, 8, private=True),
    Case("odd charsets", publishing.odd_charsets, 1, 1),
    Case("cross-site", publishing.cross_site, 1, 1, private=True),
    Case("overflow", publishing.overflow, 1, 1, private=True),
    Case("full temporary folder", mishaps.full_temp, 2, 1, temp_mib=16, private=True),
    Case("full store", mishaps.full_store, 12, 12, store_mib=32, private=True),
    Case("store removed", mishaps.store_removed, 3, 1, private=True, recovers=False),
    Case("end under load", shutdowns.in_flight, 200, 200, seconds=35, grace_s=2, ends=True),
    Case("end, half uploads", shutdowns.half_upload, 4, 4, seconds=35, grace_s=12, ends=True),
    Case("end, idle", shutdowns.idle_server, 1, 1, seconds=20, ends=True),
)


@dataclass(frozen=True)
class Ground:
    """What every case of one siege shares: the checkout whose server is attacked, and the folder with its stores."""

    checkout: Path
    folder: Path
    quick: bool


class NotPossible(Exception):
    """The case cannot be run on this machine, or its server does not start."""


def run_case(case: Case, ground: Ground) -> dict[str, Any]:
    """Run one case; returns its row."""
    try:
        with ExitStack() as stack:
            return _run(case, ground, stack)
    except NotPossible as error:
        return {"case": case.name, "skipped": str(error)}


def _run(case: Case, ground: Ground, stack: ExitStack) -> dict[str, Any]:
    place = Path(stack.enter_context(TemporaryDirectory(dir=ground.folder, ignore_cleanup_errors=True)))
    temp, store = place / "temp", ground.folder / case.store
    temp.mkdir(parents=True)
    if case.temp_mib:
        stack.enter_context(memory_folder(temp, case.temp_mib))
    if case.private:
        store = place / "store"
        store.mkdir()
        if case.store_mib:
            stack.enter_context(memory_folder(store, case.store_mib))
        shutil.copytree(ground.folder / case.store, store, dirs_exist_ok=True)
    around = Surroundings(ground.checkout, {"TMPDIR": str(temp)}, case.descriptors)
    server = stack.enter_context(
        ServerProcess(Path("embedded"), store, place / "log", around, shutdown_grace_s=case.grace_s)
    )
    try:
        # On a busy machine a start takes minutes.
        server.wait_until_ready(300)
    except RuntimeError as error:
        raise NotPossible(f"no server: {error}"[:300]) from error
    gauge = Gauge(server.pid, temp)
    stack.callback(gauge.close)
    address = (server.host, server.port)
    watchers = [Watcher(address, HEALTH_SOURCE, HEALTH), Watcher(address, CLIENT_SOURCE, GENERATE)]
    wait_for_answers(watchers, time.monotonic(), 30)
    quiet = time.monotonic()
    time.sleep(QUIET_S)
    start = gauge.begin()
    target = Target(*address, server.pid, store, ground.folder / "bundles", (ATTACKER,), case.seconds)
    begun = time.monotonic()
    outcome = run_attack(case.attack, target, case.quick if ground.quick else case.size)
    ended = time.monotonic()
    if case.ends:
        status = server.wait(case.grace_s + _LATE_S)
    else:
        if case.recovers:
            wait_for_answers(watchers, ended, RECOVERY_S)
        time.sleep(1)
        kept = gauge.now()
    gone = time.monotonic()
    most = gauge.most
    if not case.ends:
        status = server.stop()
    health, client = (watcher.stop() for watcher in watchers)
    row: dict[str, Any] = {"case": case.name, "seconds": round(ended - begun, 1)}
    if case.ends:
        row["end_s"] = round(gone - begun, 1)
    else:
        row |= noticed(health, client, quiet, begun, ended)
        row |= {"rss_mib": start.rss_mib, "rss_grown_mib": round(most.rss_mib - start.rss_mib, 1)}
        row |= {"rss_kept_mib": round(kept.rss_mib - start.rss_mib, 1), "over_cap": gauge.over_cap}
        row |= {"files": most.files, "temp_mib": most.temp_mib}
    return row | {"attacker": dict(outcome.counts), "figures": outcome.figures, "exit_status": status}


def noticed(health: list[Sample], client: list[Sample], quiet: float, begun: float, ended: float) -> dict[str, Any]:
    """What the two healthy clients saw of an attack: the attack's time, and what it went on to delay."""
    reference = next((sample.answer for sample in client if not sample.failure), None)
    before = figures(client, quiet, begun, reference)
    during = figures(client, begun, ended, reference)
    return {
        "healthz_pause_s": longest_pause([sample for sample in health if sample.begun < ended], begun),
        "healthz_quiet_s": longest_pause([sample for sample in health if sample.ended < begun], quiet),
        "quiet_p95_s": before.p95,
        "client": asdict(during),
        "wrong": figures(client, quiet, math.inf, reference).wrong,
    }


def wait_for_answers(watchers: Collection[Watcher], since: float, seconds: float) -> None:
    """Wait until every watcher has an answer to a request that it began after a moment, but no longer than that."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not all(watcher.answered_since(since) for watcher in watchers):
        time.sleep(0.05)


@contextmanager
def memory_folder(folder: Path, mib: int) -> Iterator[None]:
    """Mount a file system in memory on a folder.

    Raises:
        NotPossible: This user may not.
    """
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        raise NotPossible(f"no small file system: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        # Lazily: the server may still be about to end.
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def run_attack(attack: Attack, target: Target, size: int, niceness: int = 0) -> Outcome:
    """Run an attack in a process of its own, for its time at most; returns what it got."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_attack, args=(attack, target, size, niceness, sender), daemon=True)
    process.start()
    sender.close()
    try:
        if receiver.poll(target.seconds + _LATE_S):
            outcome: Outcome = receiver.recv()
            return outcome
        return Outcome(figures={"attacker": "hung"})
    except EOFError:
        return Outcome(figures={"attacker": "failed"})
    finally:
        process.kill()
        process.join()


def _attack(attack: Attack, target: Target, size: int, niceness: int, sender: Connection) -> None:
    os.nice(niceness)
    outcome = Outcome()

    async def limited() -> None:
        try:
            async with asyncio.timeout(target.seconds):
                await attack(target, size, outcome)
        except TimeoutError:
            outcome.figures["cut off after"] = target.seconds

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        asyncio.run(limited())
    except (OSError, ExceptionGroup) as error:
        outcome.figures["attacker"] = repr(error)[:200]
    sender.send(outcome)
