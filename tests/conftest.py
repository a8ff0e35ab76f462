"""Fixtures shared by every test."""

import gc
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Before anything imports Triton, whose functions are made for either the interpreter or the compiler.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Collecting the tests makes much and frees little.
gc.disable()

REPOSITORY = Path(__file__).resolve().parent.parent
# A run takes one of so many parts of the slow tests.
_SLOW_PARTS = 5


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--slow",
        choices=("none", "part", "all"),
        default="part",
        help="slow tests: none; part: a fifth of them, another fifth at the next commit; all (default: part)",
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    choice = config.getoption("--slow")
    # Tests that were named one by one, or by their file, always run.
    named = [argument.partition("::")[0] for argument in config.args if ".py" in argument]
    if choice == "all" or named:
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    # Neighbours are often cases of one test. Dealt out in turn, they make parts that take about equally long.
    chosen_part = [] if choice == "none" else slow[_commit_number() % _SLOW_PARTS :: _SLOW_PARTS]
    left_out = set(slow) - set(chosen_part)
    if left_out:
        config.hook.pytest_deselected(items=[item for item in slow if item in left_out])
        items[:] = [item for item in items if item not in left_out]


def pytest_collection_finish(session: pytest.Session) -> None:
    """Leave the modules out of garbage collections.

    A run imports every library that the project works with. A full collection over all of their objects takes as long
    as a small training, and each training asks for one.
    """
    gc.enable()
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def _later_modules_too() -> Iterator[None]:
    """Leave what tests have imported, and what libraries have cached, out of garbage collections too."""
    yield
    gc.collect()
    gc.freeze()


def pytest_unconfigure(config: pytest.Config) -> None:
    """Let the end of the process collect everything; some libraries report what is left of theirs."""
    gc.unfreeze()


def _commit_number() -> int:
    """A number that changes with each commit, and is the same for every process of a run; 0 without git."""
    found = subprocess.run(
        ["git", "rev-list", "--count", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    return int(found.stdout) if found.returncode == 0 else 0


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the checkout; its absence is a failure in CI and a shown skip elsewhere."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        reason = f"real data not found: put it at {folder}"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return folder


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    """Sums of floats depend on the number of threads, which torch keeps: no test changes it for the next."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
