"""Jobs that tests run in processes of their own, and kill.

Run as a script it is a fork server: torch is imported once, and each job is a fork of milliseconds. A line of JSON
on stdin starts a job or waits for one; a line of JSON on stdout answers.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from bundle_factory import make_bundle

from adapters_store import AdapterStore

FAULTY_CALLS = ("replace", "rename", "link", "unlink", "mkdir", "fsync", "rmdir")
NAME, OTHER = "acme/support", "acme/other"
CRASHED = 86


def publish_forever(store: str, name: str, first_seed: int, out: TextIO) -> None:
    """Publish new content until killed, acknowledging each version by a line."""
    opened = AdapterStore(store)
    seed = first_seed
    while True:
        published = opened.publish(make_bundle(seed), name)
        out.write(f"{published.adapter} {published.version} {published.digest}\n")
        seed += 1


def publish_some(store: str, name: str, seeds: list[int], out: TextIO) -> None:
    """Publish the contents of `seeds`, acknowledging each."""
    opened = AdapterStore(store)
    for seed in seeds:
        published = opened.publish(make_bundle(seed), name)
        out.write(f"{published.adapter} {published.version} {published.digest}\n")


def publish_and_delete(store: str, name: str, seeds: list[int], out: TextIO) -> None:
    """Publish and delete the same adapter again and again."""
    opened = AdapterStore(store)
    for seed in seeds:
        opened.publish(make_bundle(seed), name)
        opened.delete(name)
    out.write("done\n")


def collect_until(store: str, stop: str, out: TextIO) -> None:
    """Collect garbage until the file `stop` exists."""
    opened = AdapterStore(store)
    collections = 0
    while not Path(stop).exists():
        opened.collect_garbage()
        collections += 1
        time.sleep(0.001)
    out.write(f"{collections}\n")


def crash_at(store: str, action: str, call: int, after: bool, out: TextIO) -> None:
    """Do an action and die at the n-th system call that changes the store, before or after it is made."""

    def die() -> None:
        os._exit(CRASHED)

    with faults(call, die, after):
        (ACTIONS | OPENING)[action](Path(store))
    out.write("finished\n")


def _publish(seed: int, name: str = NAME) -> Callable[[Path], object]:
    return lambda root: AdapterStore(root).publish(make_bundle(seed), name)


# What is done to a store of versions v1 (seed 1) and v2 (seed 2) of NAME, with alias stable on v1.
ACTIONS: dict[str, Callable[[Path], object]] = {
    "publish a version": _publish(3),
    "publish a first version": _publish(3, OTHER),
    "publish the same again": _publish(1),
    "move an alias": lambda root: AdapterStore(root).set_alias(NAME, "stable", f"{NAME}@v2"),
    "remove an alias": lambda root: AdapterStore(root).remove_alias(NAME, "stable"),
    "delete a version": lambda root: AdapterStore(root).delete(f"{NAME}@v2"),
    "delete an adapter": lambda root: AdapterStore(root).delete(NAME),
    "collect garbage": lambda root: AdapterStore(root).collect_garbage(),
}

OPENING: dict[str, Callable[[Path], object]] = {"open": lambda root: AdapterStore(root)}


@contextmanager
def faults(call: int, strike: Callable[[], None], after: bool = False) -> Iterator[Callable[[], int]]:
    """Strike at the `call`-th of the system calls that change a store; yields how many were made."""
    count = 0
    originals = {name: getattr(os, name) for name in FAULTY_CALLS}

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            hit = count == call
            if hit and not after:
                strike()
            try:
                return original(*args, **kwargs)
            finally:
                if hit and after:
                    strike()

        return wrapped

    try:
        for name, original in originals.items():
            setattr(os, name, wrap(original))
        yield lambda: count
    finally:
        for name, original in originals.items():
            setattr(os, name, original)


JOBS: dict[str, Callable[..., None]] = {
    job.__name__: job for job in (publish_forever, publish_some, publish_and_delete, collect_until, crash_at)
}


class JobServer:
    """A running fork server, seen from the test."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, job: str, out: Path, **arguments: Any) -> int:
        """Fork a process that does `job` and writes to `out`; returns its id."""
        return int(self._ask({"job": job, "out": str(out), "arguments": arguments}))

    def wait(self, process: int) -> int:
        """The exit status of a process, negative for the signal that killed it."""
        return int(self._ask({"wait": process}))

    def kill(self, process: int) -> None:
        """kill -9."""
        os.kill(process, signal.SIGKILL)
        self.wait(process)

    def close(self) -> None:
        """End the server."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.wait(timeout=30)
        self._process.stdout.close()

    def _ask(self, question: dict[str, Any]) -> Any:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def _run_job(request: dict[str, Any]) -> None:
    with Path(request["out"]).open("a", buffering=1) as out:
        JOBS[request["job"]](**request["arguments"], out=out)


def _serve() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            answer = os.waitstatus_to_exitcode(status)
        elif (answer := os.fork()) == 0:
            try:
                _run_job(request)
                os._exit(0)
            finally:
                sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
                os._exit(1)
        sys.stdout.write(f"{answer}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _serve()
