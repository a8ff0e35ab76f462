"""The image: pinned by digest and hash, offline checks of its files."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8")
INSTRUCTIONS = re.sub(r"(?m)^#.*\n", "", DOCKERFILE).replace("\\\n", " ").splitlines()
LINUX = {"sys_platform": "linux", "platform_machine": "x86_64", "python_version": "3.12", "extra": ""}


def locked() -> dict[str, str]:
    """Versions of requirements.lock; every package has hashes, and none a marker."""
    versions = {}
    for entry in (ROOT / "requirements.lock").read_text("utf-8").replace("\\\n", " ").splitlines():
        if entry.startswith("#"):
            continue
        pinned = re.fullmatch(r"([a-z0-9-]+)==(\S+)((?: +--hash=sha256:[0-9a-f]{64})+)", entry)
        assert pinned, entry
        versions[pinned[1]] = pinned[2]
    return versions


def constrained() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_the_lock_has_the_tested_versions() -> None:
    tested = constrained()
    lock = locked()
    assert {name: version for name, version in lock.items() if tested.get(name, version) != version} == {}
    # What the tested set leaves to the build of torch: the CUDA libraries.
    others = set(lock) - set(tested)
    assert {name for name in others if not re.match(r"nvidia-|cuda-|triton$", name)} == set()


def test_the_lock_has_every_dependency_and_the_build_backend() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    lock = locked()
    extras = project["project"]["optional-dependencies"]
    served = [text for name, needed in extras.items() if name != "dev" for text in needed]
    for text in (*project["project"]["dependencies"], *served, *project["build-system"]["requires"]):
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate(LINUX):
            assert requirement.specifier.contains(lock[canonicalize_name(requirement.name)]), text


def test_every_base_image_has_a_digest() -> None:
    stages = [line.split() for line in INSTRUCTIONS if line.startswith("FROM ")]
    assert len(stages) >= 2
    for stage in stages:
        assert re.fullmatch(r"\S+:\S+@sha256:[0-9a-f]{64}", stage[1]), stage


def test_the_image_has_the_cuda_that_torch_was_built_with() -> None:
    (image,) = {match[1] for match in re.finditer(r"(?m)^FROM nvidia/cuda:(\d+\.\d+)\.", DOCKERFILE)}
    assert locked()["nvidia-cuda-runtime"].startswith(f"{image}.")


def test_everything_is_installed_by_hash_or_without_a_network() -> None:
    installs = [
        command
        for line in INSTRUCTIONS
        if line.startswith("RUN ")
        for command in line.split("&&")
        if re.search(r"\bpip\b.* install\b", command)
    ]
    assert len(installs) == 2
    for command in installs:
        assert "--require-hashes" in command or {"--no-index", "--no-build-isolation"} <= set(command.split()), command


def test_the_last_stage_has_a_compiler_for_triton_and_no_other_tools() -> None:
    last = max(number for number, line in enumerate(INSTRUCTIONS) if line.startswith("FROM "))
    (packages,) = re.findall(r"install -y --no-install-recommends ([^&]+?) *&&", " ".join(INSTRUCTIONS[last:]))
    assert set(packages.split()) == {"python3", "gcc", "libc6-dev", "libpython3.12-dev"}
    assert not [line for line in INSTRUCTIONS[last:] if re.search(r"\b(pip|venv|curl|wget)\b", line)]


def test_the_build_context_has_what_is_copied() -> None:
    context = {line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines()}
    for line in INSTRUCTIONS:
        if line.startswith("COPY ") and "--from" not in line:
            assert set(line.split()[1:-1]) <= context, line
