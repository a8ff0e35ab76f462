import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("SERA_TEST_KILLS", "3"))


@pytest.mark.timeout(60 + 10 * KILLS)
def test_a_killed_training_resumes_and_the_store_keeps_every_version(stories: Path, tmp_path: Path) -> None:
    # A process of its own: it forks, which this one with its threads must not.
    script = Path(__file__).with_name("kill_rounds.py")
    command = [sys.executable, str(script), "--kills", str(KILLS), "--base", str(stories)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["kills"] == KILLS
    assert report["versions_kept"] == report["runs"] >= 1
