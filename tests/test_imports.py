"""Imports run one way; read from the source, so that imports inside functions count too."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
ROOTS = {
    "sera_serve": REPOSITORY / "sera_serve",
    "adapters_store": REPOSITORY / "adapters_store",
    "sera_kernels": REPOSITORY / "kernels" / "sera_kernels",
}
# What each package may import of ours. Modules directly in sera_serve are listed by name.
SHARED = {"sera_serve.errors", "sera_serve.loop_turns", "sera_serve.random_bytes", "sera_serve.threads"}
ALLOWED: dict[str, set[str]] = {
    "adapters_store": set(),
    "sera_kernels": set(),
    "sera_serve.errors": set(),
    "sera_serve.loop_turns": set(),
    "sera_serve.random_bytes": set(),
    "sera_serve.threads": {"sera_serve.errors"},
    "sera_serve.terminal": set(),
    # The console scripts: they import what they run by its name.
    "sera_serve.scripts": set(),
    # Options that are read without torch.
    "sera_serve.quantization": set(),
    "sera_serve.strict_yaml": set(),
    "sera_serve.sera_config": SHARED,
    "sera_serve.config": SHARED | {"sera_serve.access", "sera_serve.quantization", "sera_serve.strict_yaml"},
    # Its users need nothing that a server needs.
    "sera_serve.client": set(),
    "sera_serve.layers": SHARED | {"sera_serve.quantization", "sera_serve.sera_config", "sera_kernels"},
    "sera_serve.base": SHARED | {"sera_serve.quantization", "sera_serve.layers", "adapters_store"},
    "sera_serve.residency": SHARED | {"sera_serve.layers", "adapters_store", "sera_kernels"},
    "sera_serve.engine": SHARED
    | {"sera_serve.config", "sera_serve.base", "sera_serve.residency", "sera_serve.layers"}
    | {"adapters_store", "sera_kernels"},
    # Keys, shares and quotas.
    "sera_serve.access": SHARED | {"adapters_store"},
    # Training jobs: they check rows as the trainer does, and their processes run it.
    "sera_serve.jobs": SHARED
    | {"sera_serve.access", "sera_serve.base", "sera_serve.layers", "sera_serve.trainer", "adapters_store"},
    # What all HTTP interfaces share.
    "sera_serve.server": SHARED
    | {"sera_serve.config", "sera_serve.access", "sera_serve.base", "sera_serve.engine", "sera_serve.jobs"}
    | {"adapters_store"},
    "sera_serve.server.native": SHARED
    | {"sera_serve.access", "sera_serve.server", "sera_serve.engine", "adapters_store"},
    "sera_serve.server.openai": SHARED
    | {"sera_serve.access", "sera_serve.server", "sera_serve.server.native", "sera_serve.base", "sera_serve.engine"}
    | {"sera_serve.jobs", "adapters_store"},
    # The factory puts the interfaces together. Nothing below it imports the factory.
    "sera_serve.server.app": SHARED
    | {"sera_serve.server", "sera_serve.server.native", "sera_serve.server.openai"}
    | {"sera_serve.access", "sera_serve.config", "sera_serve.engine", "adapters_store"},
    "sera_serve.trainer": SHARED
    | {"sera_serve.scripts", "sera_serve.terminal", "sera_serve.quantization", "sera_serve.sera_config"}
    | {"sera_serve.strict_yaml"}
    | {"sera_serve.base", "sera_serve.layers", "adapters_store"},
}
# The entry points: they put the packages together.
TOP = {"sera_serve", "sera_serve.cli", "sera_serve.commands"}


def unit(module: str) -> str:
    """The package, or the module directly in sera_serve, that a dotted name belongs to."""
    parts = module.split(".")
    if module in ("sera_serve.server", "sera_serve.server.app"):
        # The package's own module exports the factory, and has no other content.
        return "sera_serve.server.app"
    if parts[:2] == ["sera_serve", "server"] and parts[2] in ("native", "openai"):
        return ".".join(parts[:3])
    return ".".join(parts[:2]) if parts[0] == "sera_serve" else parts[0]


def modules() -> list[tuple[str, Path]]:
    found = []
    for name, folder in ROOTS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = [name, *path.relative_to(folder).with_suffix("").parts]
            found.append((".".join(part for part in parts if part != "__init__"), path))
    return found


def imports(path: Path) -> set[str]:
    """Units of ours that a file imports."""
    return {unit(name) for name in imported_names(path)}


def imported_names(path: Path) -> set[str]:
    """Dotted names of ours that a file imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            names.add(node.module)
            if node.module in ("sera_serve", "sera_serve.server"):
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.partition(".")[0] in ROOTS}


@pytest.mark.parametrize(("module", "path"), modules(), ids=lambda value: value if isinstance(value, str) else "")
def test_a_module_imports_only_what_its_package_may(module: str, path: Path) -> None:
    package = unit(module)
    if package in TOP:
        return
    assert imports(path) - {package} <= ALLOWED[package]


def test_the_walk_sees_the_packages() -> None:
    seen = {unit(module) for module, _ in modules()}
    assert seen == set(ALLOWED) | TOP


# Inside a package: each part imports only parts of lower floors, and its own.
FLOORS: dict[str, list[set[str]]] = {
    "sera_serve.engine": [
        {
            *("adapter_uses", "constraint", "memory", "named_adapters", "sampling", "schema_bounds"),
            *("answer_tokens", "results", "stop_strings", "tenant_memory"),
        },
        {"image_rows"},
        {"request"},
        {"structured"},
        {"admission", "fair_queue", "overflow", "prompts", "references", "stream"},
        {"choices", "scheduler", "loop"},
        {"tasks"},
        {"rows"},
        {"row_calls"},
        {"engine"},
    ],
    "sera_serve.client": [
        {"answers", "connection", "errors", "uploads"},
        {"calls", "events"},
        {"exchange"},
        {"sync_client", "async_client"},
    ],
    "adapters_store": [
        {"errors"},
        {"names", "format"},
        {"records"},
        {"backends", "card", "convert"},
        {"integrity"},
        {"counting", "stored_bundles"},
        {"store"},
        {"combinations"},
    ],
    "sera_serve.residency": [
        {"packing", "staging", "stats", "turns"},
        {"pool", "host_cache"},
        {"entry", "bundle_check"},
        {"completions", "placement", "import_probe"},
        {"loader"},
        {"manager"},
    ],
}


@pytest.mark.parametrize("package", FLOORS)
def test_the_parts_of_a_package_import_downwards(package: str) -> None:
    floor = {part: height for height, parts in enumerate(FLOORS[package]) for part in parts}
    wrong = []
    for module, path in modules():
        if not module.startswith(package + "."):
            continue
        own = module.removeprefix(package + ".").partition(".")[0]
        for name in imported_names(path):
            if name.startswith(package + "."):
                part = name.removeprefix(package + ".").partition(".")[0]
                if part in floor and part != own and floor[part] >= floor[own]:
                    wrong.append(f"{module} imports {name}")
    assert not wrong
    assert {
        m.removeprefix(package + ".").partition(".")[0] for m, _ in modules() if m.startswith(package + ".")
    } == set(floor)


def test_no_package_is_called_kernels() -> None:
    # It would shadow Hugging Face's `kernels`, which transformers imports.
    assert not (REPOSITORY / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("folder", ["benchmarks", "examples", "docs"])
def test_programs_beside_the_packages_import_modules_that_exist(folder: str) -> None:
    known = {module for module, _ in modules()}
    wrong = []
    for path in sorted((REPOSITORY / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module is not None:
                names = [node.module]
            wrong += [f"{path}: {name}" for name in names if name.partition(".")[0] in ROOTS and name not in known]
    assert not wrong
