"""A file imports only from packages below its own."""

import ast
from pathlib import Path

import pytest

import lowrank_nn

ROOT = Path(lowrank_nn.__file__).parent
LEVELS = [
    {"errors", "accelerator"},
    {"decompose"},
    {"cost"},
    {"layers"},
    {"graph", "distill", "testing"},
    {"planning"},
    {"storage"},
    {"report"},
    {"pipeline"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def package_of(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_packages(source, package):
    """Packages of lowrank_nn that a file's imports reach, also those inside functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in {package}"
            names = [node.module] if node.module != "lowrank_nn" else [f"lowrank_nn.{a.name}" for a in node.names]
        else:
            continue
        for name in names:
            top, _, rest = name.partition(".")
            if top == "lowrank_nn":
                yield rest.partition(".")[0]


def violations(source, package):
    reached = set(imported_packages(source, package)) - {package}
    return sorted(name for name in reached if LEVEL.get(name, len(LEVELS)) >= LEVEL[package])


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_only_from_below(path):
    package = package_of(path)
    assert package in LEVEL, f"{package} has no place in the order"
    assert violations(path.read_text(), package) == []


@pytest.mark.parametrize(
    ("package", "source", "expected"),
    [
        ("decompose", "from lowrank_nn.layers import SVDLinear", ["layers"]),
        ("decompose", "def f():\n    import lowrank_nn.layers.svd", ["layers"]),
        ("layers", "from lowrank_nn import pipeline", ["pipeline"]),
        ("graph", "from lowrank_nn.distill import x", ["distill"]),
        ("storage", "from lowrank_nn import load", ["load"]),
        ("pipeline", "from lowrank_nn.errors import PlanError\nfrom lowrank_nn.report import Report\nimport torch", []),
        ("layers", "from lowrank_nn.layers._base import x", []),
    ],
)
def test_the_check_itself(package, source, expected):
    assert violations(source, package) == expected


def test_every_package_has_a_place():
    assert {package_of(path) for path in FILES} <= set(LEVEL)
