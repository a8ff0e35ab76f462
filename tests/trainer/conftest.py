"""Fixtures of the trainer's tests."""

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


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
