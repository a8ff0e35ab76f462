"""The wheel has every file of the packages, and what an installed server needs beside its code."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
SETUPTOOLS: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
# What people miss most when it is not there.
NEEDED = [
    "sera_serve/server/console/index.html",
    "sera_serve/server/console/js/views/live.js",
    "sera_serve/server/console/vendor/uplot/uPlot.esm.js",
    "sera_serve/embedded_base/config.json",
    "sera_serve/jobs/chat_template.jinja",
    "sera_serve/deploy/grafana/sera-serve.json",
    "sera_serve/deploy/sera-serve.service",
    "sera_kernels/launches.json",
    "adapters_store/FORMAT.md",
    "sera_serve/py.typed",
]


def folder_of(package: str) -> Path:
    """The folder of a package in this tree."""
    mapped = SETUPTOOLS["package-dir"].get(package)
    return ROOT / (mapped or package.replace(".", "/"))


def files_of_packages() -> dict[str, Path]:
    """Every file below the packages by its name in the wheel, whatever pyproject.toml says of it."""
    found: dict[str, Path] = {}
    for package in SETUPTOOLS["packages"]:
        for path in folder_of(package).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc":
                found[f"{package.replace('.', '/')}/{path.relative_to(folder_of(package)).as_posix()}"] = path
    return found


def packaged() -> set[str]:
    """The names that setuptools puts into a wheel: modules of the listed packages, and files of the patterns."""
    names: set[str] = set()
    for package in SETUPTOOLS["packages"]:
        folder, prefix = folder_of(package), package.replace(".", "/")
        patterns = ["*.py", *SETUPTOOLS["package-data"].get(package, [])]
        for pattern in patterns:
            names |= {f"{prefix}/{path.relative_to(folder).as_posix()}" for path in folder.glob(pattern)}
    return names


def test_no_file_of_a_package_is_left_out() -> None:
    files = files_of_packages()
    assert len(files) > 300
    assert sorted(set(files) - packaged()) == []
    assert [name for name in NEEDED if name not in packaged()] == []


def test_each_pattern_of_package_data_finds_a_file() -> None:
    for package, patterns in SETUPTOOLS["package-data"].items():
        for pattern in patterns:
            assert any(folder_of(package).glob(pattern)), (package, pattern)


@pytest.mark.slow
def test_the_wheel_has_just_these_files(tmp_path: Path) -> None:
    # In a copy: a build leaves files beside its sources.
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    for name in ("sera_serve", "adapters_store", "kernels", "deploy"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "build"))
    command = ["wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path), str(source)]
    subprocess.run([sys.executable, "-m", "pip", *command], check=True, timeout=240)
    (wheel,) = tmp_path.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == packaged()
