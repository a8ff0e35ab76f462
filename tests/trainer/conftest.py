"""Fixtures of the trainer's tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from trainer_samples import save_tiny_base


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a decoder with random weights."""
    return save_tiny_base(tmp_path_factory.mktemp("tiny_base"))


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an encoder with random weights."""
    return save_tiny_base(tmp_path_factory.mktemp("tiny_encoder"), "encoder")


@pytest.fixture(scope="session")
def stories(shared_data: Path) -> Path:
    """Folder of a small real decoder."""
    return shared_data / "weights" / "stories260K"


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Also for the runs that a file's tests share."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
