"""kill -9 a training process at random moments, start it again, and check what is left each time.

    python tests/trainer/kill_rounds.py --kills 50

Prints one JSON object. Every run must end as the undisturbed run of its seed did; after every kill the store must open
and hold each version acknowledged so far, bit for bit.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from trainer_samples import ending_rule, settings_for, write_csv

from adapters_store import AdapterStore
from sera_serve.base import FrozenBase, load_base
from sera_serve.trainer.run import train_adapter
from sera_serve.trainer.settings import TrainSettings

STORIES = Path(__file__).resolve().parents[3] / "shared" / "data" / "weights" / "stories260K"
KILLS_A_RUN = 3


def start(settings: TrainSettings, base: FrozenBase, answer: Path) -> int:
    """Train in a forked process, which costs no imports; it writes its result to `answer` when acknowledged."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        result = train_adapter(settings, base=base)
        answer.write_text(json.dumps(asdict(result)))
        status = 0
    finally:
        os._exit(status)


def wait(process: int, seconds: float) -> int | None:
    """The exit status when the process ends within `seconds`, else None."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


def check(store: Path, acknowledged: dict[str, str]) -> None:
    """The store opens, and each acknowledged version is there with its content."""
    opened = AdapterStore(store)
    list(opened.iter_adapters())
    for ref, digest in acknowledged.items():
        assert opened.resolve(ref).digest == digest
        assert opened.load(digest).digest == digest


def rounds(kills: int, folder: Path, stories: Path, seed: int = 0) -> dict[str, Any]:
    """Run until `kills` processes were killed; raises AssertionError at the first thing that is wrong."""
    torch.set_num_threads(1)
    draw = random.Random(seed)
    rows = write_csv(folder / "rows.csv", ending_rule(60))
    base = load_base(str(stories))
    acknowledged: dict[str, str] = {}
    done, runs, resumed, moments = 0, 0, 0, []
    while done < kills:
        # A checkpoint at every step, so that many kills hit one being written.
        shared: dict[str, Any] = {"seed": runs, "dropout": 0.1, "checkpoint_seconds": 0, "learning_rate": 1e-2}
        answer = folder / "answer.json"
        (folder / f"alone{runs}").mkdir()
        begun = time.monotonic()
        alone = start(settings_for(stories, folder / f"alone{runs}", rows, **shared), base, answer)
        assert wait(alone, 120) == 0
        length = time.monotonic() - begun
        expected = json.loads(answer.read_text())
        answer.unlink()
        settings = settings_for(stories, folder, rows, **shared)
        for attempt in range(KILLS_A_RUN + 1):
            process = start(settings, base, answer)
            limit = draw.uniform(0, length) if attempt < KILLS_A_RUN and done < kills else 120
            status = wait(process, limit)
            if status is None:
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
                done += 1
                moments.append(round(limit / length, 2))
            else:
                assert status == 0
            if answer.exists() and answer.read_text().endswith("}"):
                break
            check(folder / "store", acknowledged)
        result = json.loads(answer.read_text())
        answer.unlink()
        assert result["digest"] == expected["digest"], "a resumed run came out different"
        acknowledged[f"acme/tiny@v{result['version']}"] = result["digest"]
        resumed += result["resumed_from"] is not None
        runs += 1
        check(folder / "store", acknowledged)
    return {
        "kills": done,
        "runs": runs,
        "runs_that_resumed_within": resumed,
        "versions_kept": len(acknowledged),
        "kill_moments_of_run_length": sorted(moments),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--base", type=Path, default=STORIES)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        report = rounds(options.kills, Path(temporary), options.base, options.seed)
    sys.stdout.write(json.dumps(report) + "\n")
