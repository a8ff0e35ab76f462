from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.job_platform import Platform


@pytest.fixture
def platform(tmp_path: Path) -> Iterator[Platform]:
    made = Platform(tmp_path)
    yield made
    made.supervisor.stop()
    made.database.close()
