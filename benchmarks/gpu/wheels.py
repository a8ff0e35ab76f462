"""Fetch what a GPU machine without a network needs beside torch, Triton and numpy, in the versions of constraints.txt.

python -m benchmarks.gpu.wheels DIR [--python 3.12] [--tests]
# on that machine, with the checkout and DIR:
pip install --no-index --no-deps --target SITE DIR/*.whl && PYTHONPATH=SITE:.:kernels python -m benchmarks.gpu ...
# with --tests also: python -m pytest tests/engine/test_serving_elsewhere.py tests/trainer/test_other_device.py
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

CONSTRAINTS = Path(__file__).resolve().parents[2] / "constraints.txt"
# What the engine and the server import, their own dependencies included; 18 MB.
PACKAGES = (
    *("transformers", "fastapi", "starlette", "uvicorn", "httptools", "python-multipart", "python-dotenv"),
    *("pydantic", "pydantic-core", "pydantic-settings", "annotated-types", "annotated-doc", "typing-extensions"),
    *("typing-inspection", "opentelemetry-api", "concurrent-log-handler", "portalocker", "llguidance", "orjson"),
)
# What the tests of serving and training on a GPU need as well; pandas, pyarrow, xxhash, accelerate, Pillow, and pytest
# with its xdist and timeout are taken to be there.
TEST_PACKAGES = ("datasets", "dill", "multiprocess", "greenlet")
# Of x86-64 Linux, newest first. A wheel is tagged with the oldest glibc that it runs on.
_GLIBC = ("2_31", "2_28", "2_27", "2_17", "2_5")


def pins(packages: Sequence[str], constraints: str) -> list[str]:
    """`name==version` of each package.

    Raises:
        ValueError: A package has no pin.
    """
    lines = (line.split("#")[0].strip() for line in constraints.splitlines())
    known = {line.partition("==")[0].lower(): line for line in lines if "==" in line}
    if missing := [name for name in packages if name not in known]:
        raise ValueError(f"constraints.txt has no version of {', '.join(missing)}; add them")
    return [known[name] for name in packages]


def main(arguments: Sequence[str] | None = None) -> None:
    """Download the wheels."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.wheels", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="where the wheels go; made if it is not there")
    parser.add_argument("--python", default="3.12", help="that machine's Python (3.12)")
    parser.add_argument("--tests", action="store_true", help="also what tests on a GPU need")
    given = parser.parse_args(arguments)
    packages = PACKAGES + TEST_PACKAGES if given.tests else PACKAGES
    platforms = [f"--platform=manylinux_{version}_x86_64" for version in _GLIBC]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += [f"--python-version={given.python}", "--implementation=cp", "--abi=cp" + given.python.replace(".", "")]
    command += ["--abi=abi3", "--abi=none", *platforms, "--platform=manylinux2014_x86_64", "--platform=any"]
    command += [f"--dest={given.folder}", *pins(packages, CONSTRAINTS.read_text())]
    status = subprocess.run(command, check=False).returncode
    if status == 0:
        wheels = sorted(given.folder.glob("*.whl"))
        print(f"{len(wheels)} wheels, {sum(wheel.stat().st_size for wheel in wheels) / 1e6:.0f} MB, in {given.folder}")
    sys.exit(status)


if __name__ == "__main__":
    main()
