"""The process that trains the runs of a comparison, and the command over it: whole, so slow."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from trainer_samples import ending_rule, write_csv

from sera_serve.trainer.compare.one_run import train_one

pytestmark = pytest.mark.slow
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}


def test_the_worker_says_that_it_is_ready_and_ends_with_its_input() -> None:
    command = [sys.executable, "-m", "sera_serve.trainer.compare.worker"]
    worker = subprocess.run(command, input="", capture_output=True, text=True, check=True, env=ENVIRONMENT)
    assert worker.stdout == "ready\n"
    # What bitsandbytes says where it is installed.
    assert "gemm_4bit" not in worker.stderr


LONG = {"task": "classify", "epochs": 1000, "method": "head-only", "seed": 0}


def lives(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_the_worker_does_not_hear_an_interrupt_and_ends_with_its_input(tiny_encoder: Path, tmp_path: Path) -> None:
    rows = write_csv(tmp_path / "train.csv", ending_rule(48))
    run = {"settings": LONG | {"base": str(tiny_encoder), "train": str(rows)}, "baseline": None, "test_rows": 0}
    worker = subprocess.Popen(
        [sys.executable, "-m", "sera_serve.trainer.compare.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT | {"TMPDIR": str(tmp_path)},
    )
    assert worker.stdin is not None and worker.stdout is not None and worker.stderr is not None
    assert worker.stdout.readline() == "ready\n"
    worker.stdin.write(json.dumps(run) + "\n")
    worker.stdin.flush()
    wait_for(lambda: bool(psutil.Process(worker.pid).children()))
    (child,) = psutil.Process(worker.pid).children()
    wait_for(lambda: any(tmp_path.glob("compare-*/**/store")))
    for pid in (worker.pid, child.pid):
        os.kill(pid, signal.SIGINT)
    time.sleep(1)
    assert worker.poll() is None and lives(child.pid)
    worker.stdin.close()
    assert worker.wait(timeout=10) == 1
    wait_for(lambda: not lives(child.pid))
    words = worker.stderr.read()
    worker.stdout.close()
    worker.stderr.close()
    assert "Traceback" not in words
    assert not list(tmp_path.glob("compare-*"))


def test_a_run_on_a_gpu_imports_its_libraries_anew(tiny_encoder: Path, tmp_path: Path) -> None:
    """In a fork it would find the GPU of its parent, with which CUDA does not work."""
    rows = write_csv(tmp_path / "train.csv", ending_rule(48))
    settings = LONG | {"base": str(tiny_encoder), "train": str(rows), "device": "cuda", "epochs": 1}
    command = [sys.executable, "-m", "sera_serve.trainer.compare.worker"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as worker:
        assert worker.stdin is not None and worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
        worker.stdin.write(json.dumps({"settings": settings, "baseline": None, "test_rows": 0}) + "\n")
        worker.stdin.flush()
        own = psutil.Process(worker.pid)
        wait_for(lambda: any(len(child.cmdline()) > len(command) for child in own.children()))
        result = json.loads(worker.stdout.readline())
        worker.stdin.close()
    assert "metrics" in result if torch.cuda.is_available() else "sees no GPU" in result["error"], result


@pytest.mark.parametrize("moment", ["importing", "training", "killed"])
def test_an_interrupt_ends_the_command_and_its_processes_without_a_traceback(
    tiny_encoder: Path, tmp_path: Path, moment: str
) -> None:
    rows = write_csv(tmp_path / "train.csv", ending_rule(48))
    plan = {
        "bases": {"tiny": {"base": str(tiny_encoder)}},
        "data": {"words": {"train": str(rows)}},
        "methods": [{"method": "head-only"}],
        "seeds": [0],
        "settings": {"epochs": 1000, "pooling": "mean"},
    }
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    # A process that was started in the background of a script ignores interrupts.
    takes_it = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    command = [sys.executable, "-c", f"{takes_it}; from sera_serve.trainer.cli import main; main()", "compare"]
    # A group of its own, to which the signal goes as that of a terminal's Ctrl-C does.
    parent = subprocess.Popen(
        [*command, str(tmp_path / "plan.yaml")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        start_new_session=True,
    )
    assert parent.stderr is not None
    depth = 1 if moment == "importing" else 2
    wait_for(lambda: len(psutil.Process(parent.pid).children(recursive=True)) == depth)
    processes = psutil.Process(parent.pid).children(recursive=True)
    # The worker's own Python is up then, and no library of a run is imported.
    time.sleep(0.5)
    if moment == "killed":
        parent.kill()
    else:
        os.killpg(parent.pid, signal.SIGINT)
    words = parent.stderr.read()
    parent.stderr.close()
    assert parent.wait(timeout=20) == (-signal.SIGKILL if moment == "killed" else 130)
    wait_for(lambda: not any(lives(process.pid) for process in processes), 20)
    assert "Traceback" not in words
    assert ("stopped; the same command goes on with the runs that are left" in words) == (moment != "killed")


def test_a_run_without_rows_to_test_on_scores_none(tiny_encoder: Path, tmp_path: Path) -> None:
    train = write_csv(tmp_path / "train.csv", ending_rule(48))
    settings = {"base": str(tiny_encoder), "task": "classify", "train": str(train), "test": str(train), "epochs": 1}
    for rows, expected in ((0, False), (5, True)):
        run = {"settings": settings | {"method": "head-only"}, "baseline": None, "test_rows": rows}
        assert ("test_accuracy" in train_one(run)["metrics"]) == expected


def test_a_comparison_from_the_command_line(tiny_encoder: Path, tmp_path: Path) -> None:
    train = write_csv(tmp_path / "train.csv", ending_rule(48))
    plan = {
        "bases": {"tiny": {"base": str(tiny_encoder), "target_modules": "query,value"}},
        "data": {"words": {"train": str(train), "test": str(train), "test_rows": 20}},
        "methods": [
            {"method": "sera", "rank": 4},
            {"method": "vera", "rank": 16, "learning_rate": 0.01},
            {"method": "houlsby", "learning_rate": 0.01},
            {"method": "head-only", "learning_rate": 0.01},
        ],
        "seeds": [0, 1],
        "settings": {"epochs": 1, "pooling": "mean"},
        "learning_rates": {"ladder": [0.01, 0.1], "start": [0.01], "seed": 9},
    }
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(plan))
    command = [sys.executable, "-c", "from sera_serve.trainer.cli import main; main()", "compare", str(path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stderr
    table = json.loads(done.stdout.splitlines()[-1])
    assert table["left"] == 0
    cells = {cell["method"]: cell for cell in table["cells"]}
    assert list(cells) == ["sera r=4", "vera r=16", "houlsby 1/16", "head-only"]
    for name, cell in cells.items():
        assert cell["runs"] == (0 if name == "houlsby 1/16" else 2), (name, cell["error"])
    assert "needs the library adapters" in cells["houlsby 1/16"]["error"]
    assert cells["head-only"]["parameters"] == 0
    assert (tmp_path / "plan.png").is_file()
    results = (tmp_path / "plan.results.jsonl").read_text().splitlines()
    # Equal settings give equal figures, whenever they run.
    (tmp_path / "plan.results.jsonl").write_text("".join(line + "\n" for line in results[:-3]))
    subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=True)
    again = (tmp_path / "plan.results.jsonl").read_text().splitlines()
    assert [json.loads(line).get("metrics") for line in again] == [json.loads(line).get("metrics") for line in results]
