"""Who may import whom, and what `import torchlin` costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path
from types import ModuleType

import pytest

import torchlin

PACKAGE = Path(torchlin.__file__).parent

# From low to high: a file imports from lines above its own, and from its own line without cycles.
LAYERS = (
    ("registry", "version", "machine"),
    ("autograd",),
    ("loss",),
    ("losses", "penalties"),
    ("functional", "heads"),
    ("storage", "fused", "integers"),
    ("optim", "features"),
    ("bank",),
    ("patches",),
    ("objective",),
    ("solvers",),
    ("data",),
    ("report", "report_path", "metrics", "predict"),
    ("folder",),
    ("classifier", "run", "progress"),
    ("probe",),
    ("estimators",),
    ("export",),
    ("cli", "__main__", "__init__"),
)
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}
# `torchlin/__init__.py` hands out everything; its lazy names are checked by what its import loads.
FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]

HEAVY = (
    "lightning",
    "pytorch_lightning",
    "torchvision",
    "torchmetrics",
    "matplotlib",
    "sklearn",
    "PIL",
    "pandas",
    "rich",
    "jsonargparse",
)


def part_of(module: str) -> str:
    """torchlin.data.folder → data; torchlin itself → __init__."""
    return [*module.split("."), "__init__"][1]


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def known_modules() -> set[str]:
    return {module_of(path) for path in PACKAGE.rglob("*.py")}


def imports(path: Path) -> set[str]:
    """Modules of torchlin that the file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = path.relative_to(PACKAGE.parent).parts
                base = ".".join([*here[: len(here) - node.level], *filter(None, [base])])
            submodules = {f"{base}.{alias.name}" for alias in node.names} & known_modules()
            found |= submodules or {base}
    return {name for name in found if name.split(".")[0] == "torchlin"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_file_imports_from_lower_layers_only(path: Path) -> None:
    part = part_of(module_of(path))
    assert part in LEVEL, f"torchlin/{path.relative_to(PACKAGE)} belongs to no layer: name it in LAYERS"
    for name in imports(path):
        assert LEVEL[part_of(name)] <= LEVEL[part], f"{module_of(path)} imports {name}"


def test_no_imports_in_a_circle() -> None:
    graph = {module_of(path): imports(path) for path in FILES}
    parents = {name for name in graph if (PACKAGE.parent / Path(*name.split("."))).is_dir()}
    # A package's own __init__ collects its files; a file of it may name a sibling, not the collection.
    for name in parents:
        assert not any(name in graph[child] for child in graph if child.startswith(f"{name}."))
    assert list(TopologicalSorter(graph).static_order())


def loaded_by(code: str) -> set[str]:
    listing = f"{code}\nimport sys\nprint(*sorted(m.split('.')[0] for m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", listing], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_import_torchlin_loads_torch_and_nothing_heavier() -> None:
    loaded = loaded_by("import torchlin")
    assert {"torch", "torchlin"} <= loaded
    assert not loaded & set(HEAVY)


def test_import_torchlin_data_loads_nothing_heavier_than_torch() -> None:
    assert not loaded_by("import torchlin.data; dir(torchlin.data)") & set(HEAVY)


def test_unknown_public_name_suggests_the_nearest() -> None:
    with pytest.raises(AttributeError, match=r"'LinerHead' \(did you mean 'LinearHead'\?\)"):
        torchlin.LinerHead  # noqa: B018
    with pytest.raises(AttributeError, match=r"'CIFAR10Data' \(did you mean 'CIFAR10DataModule'\?\)"):
        torchlin.data.CIFAR10Data  # noqa: B018


@pytest.mark.parametrize("package", [torchlin, torchlin.data], ids=["torchlin", "torchlin.data"])
def test_public_names_are_listed_and_unique(package: ModuleType) -> None:
    assert len(set(package.__all__)) == len(package.__all__)
    assert set(package.__all__) <= set(dir(package))
    for name in package.__all__:
        assert getattr(package, name) is not None
