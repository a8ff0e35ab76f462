"""The process that trains the runs of a comparison: `python -m sera_serve.trainer.compare.worker`.

Its first line of standard output says that it is ready. From then on, each line of standard input is a run as JSON:
`settings`, `baseline`, `test_rows` of a `RunSpec`; and each line of standard output is a result as JSON, in the same
order. The process forks for each run, so that a run has its own memory and may fail or be killed alone, and the
libraries are imported once. A run on a GPU imports them anew: CUDA does not work in the fork of a process that has
asked for GPUs, as bitsandbytes and torchao do when they are imported. The process and its run end when standard input
closes.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

# The libraries of a run are imported in `main`: what comes before must be done before they are.

_MODULE, _RUN = "sera_serve.trainer.compare.worker", "run.json"
TrainOne = Callable[[dict[str, Any]], dict[str, Any]]
"""Trains one run; see `one_run.train_one`."""


def main() -> None:
    """Train the runs that standard input names, one after the other."""
    # Ctrl-C of a terminal comes to all of its processes. The command ends this one, by closing its input.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # What libraries print must not come between the results.
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from sera_serve.trainer.compare.one_run import train_one

    print("ready", file=results, flush=True)
    with os.fdopen(os.dup(0)) as runs:
        while line := runs.readline():
            # Here, because the process of a run may be killed. A run keeps checkpoints of all that it trains.
            with tempfile.TemporaryDirectory(prefix="compare-", ignore_cleanup_errors=True) as folder:
                result = _in_child(train_one, json.loads(line), folder)
            results.write(json.dumps(result) + "\n")
            results.flush()


def _in_child(train_one: TrainOne, run: dict[str, Any], folder: str) -> dict[str, Any]:
    """Train a run in a process of its own, whose temporary files are all in `folder`."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reading)
            if run["settings"].get("device") == "cuda":
                Path(folder, _RUN).write_text(json.dumps(run))
                os.set_inheritable(writing, True)
                os.execv(sys.executable, [sys.executable, "-m", _MODULE, folder, str(writing)])
            _write_result(train_one, run, folder, writing)
            status = 0
        finally:
            if status:
                traceback.print_exc()
            # Without the clean-up of the parent's objects, which are not the child's.
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        parts = []
        while True:
            ready, _, _ = select.select([pipe.fileno(), 0], [], [])
            if 0 in ready:
                # Nothing is sent while a run is under way, so this is the end of the input.
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                raise SystemExit(1)
            part = os.read(pipe.fileno(), 1 << 16)
            if not part:
                break
            parts.append(part)
    _, status = os.waitpid(child, 0)
    if status:
        number = os.waitstatus_to_exitcode(status)
        how = f"signal {-number} ({signal.Signals(-number).name})" if number < 0 else f"status {number}"
        return {"error": f"the process of the run ended with {how}; its last words are on standard error"}
    result: dict[str, Any] = json.loads(b"".join(parts))
    return result


def _write_result(train_one: TrainOne, run: dict[str, Any], folder: str, writing: int) -> None:
    tempfile.tempdir = folder
    with os.fdopen(writing, "w") as pipe:
        json.dump(train_one(run), pipe)


def _alone(folder: str, writing: str) -> None:
    """Train the run of a folder, and write its result to a pipe."""
    from sera_serve.trainer.compare.one_run import train_one

    _write_result(train_one, json.loads(Path(folder, _RUN).read_text()), folder, int(writing))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        _alone(*sys.argv[1:])
    else:
        main()
