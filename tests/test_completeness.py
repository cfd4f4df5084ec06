"""Nothing public without a docstring, nothing registered without an export and a row in the docs."""

import dataclasses
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import lowrank_nn
from lowrank_nn.errors import LowRankError
from lowrank_nn.layers import LAYERS
from lowrank_nn.testing import layer_checks

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
MODULES = [
    importlib.import_module(info.name) for info in pkgutil.walk_packages(lowrank_nn.__path__, f"{lowrank_nn.__name__}.")
]


def own_definitions(module):
    """Public classes and functions that the module defines itself."""
    for name, value in vars(module).items():
        if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
            continue
        if inspect.isclass(value) or inspect.isfunction(value):
            yield name, value


def public_names():
    """Names that `lowrank_nn/__init__.py` exports."""
    return {
        name: value
        for name, value in vars(lowrank_nn).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_everything_public_has_a_docstring(module):
    assert module.__doc__
    missing = []
    for name, value in own_definitions(module):
        if not value.__doc__:
            missing.append(name)
        if inspect.isclass(value):
            missing += [
                f"{name}.{member}"
                for member, method in vars(value).items()
                if not member.startswith("_")
                and inspect.isfunction(method)
                and not inspect.getdoc(getattr(value, member))
            ]
    assert missing == []


@pytest.mark.parametrize("name", list(LAYERS))
def test_every_layer_is_exported_and_documented(name):
    cls = LAYERS[name]
    assert cls.__name__ == name
    assert getattr(lowrank_nn, name, None) is cls, "lowrank_nn/__init__.py does not export it"
    rows = [line for page in PAGES for line in page.read_text().splitlines() if line.startswith("|")]
    assert any(f"`{name}`" in row for row in rows), "no table in README.md or docs/ has a row for it"


def summary(value):
    """The first line of a docstring, as Markdown."""
    line = inspect.getdoc(value).splitlines()[0]
    return re.sub(r":\w+:`~?([^`]+)`", r"`\1`", line).replace("``", "`")


def test_the_index_lists_every_public_name_with_its_summary_and_a_page_about_it():
    text = (ROOT / "docs/api.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (.+) \| \[\w+\]\((\w+\.md)\) \|$", text, flags=re.MULTILINE)
    listed = {name: (what, page) for name, what, page in rows}
    assert len(rows) == len(listed), "a name is listed twice"
    assert set(listed) == set(public_names())
    for name, value in public_names().items():
        what, page = listed[name]
        if inspect.isclass(value) or inspect.isfunction(value):
            assert what == summary(value)
        assert re.search(rf"\b{name}\b", (ROOT / "docs" / page).read_text()), f"{page} does not mention {name}"


def test_the_index_lists_names_of_subpackages_that_exist():
    text = (ROOT / "docs/api.md").read_text()
    rows = re.findall(r"^\| `(lowrank_nn\.\w+)\.(\w+)` \| (.+) \|$", text, flags=re.MULTILINE)
    assert len(rows) > 20
    assert {name: what for _, name, what in rows} == {
        name: summary(getattr(importlib.import_module(module), name)) for module, name, _ in rows
    }


@pytest.mark.parametrize("name", list(LAYERS))
def test_every_layer_docstring_has_its_sections(name):
    doc = inspect.getdoc(LAYERS[name])
    parameters = inspect.signature(LAYERS[name]).parameters
    for section in ("Args:", "Shape:", "Raises:", "References:"):
        assert section in doc, f"no {section} section"
    assert [p for p in parameters if f"    {p}:" not in doc] == []


def test_every_layer_has_contract_checks():
    assert {cls.__name__ for cls, _, _ in layer_checks()} == set(LAYERS)


def test_every_error_is_one_of_ours_and_exported():
    definitions = dict(own_definitions(importlib.import_module("lowrank_nn.errors")))
    errors = {name: value for name, value in definitions.items() if inspect.isclass(value)}
    assert all(issubclass(error, LowRankError) for error in errors.values())
    assert {name for name in errors if getattr(lowrank_nn, name, None) is not errors[name]} == set()


def test_public_names_have_one_home_and_a_docstring():
    for name, value in public_names().items():
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__module__.startswith("lowrank_nn."), name
            assert inspect.getdoc(value), name


def own_parameters(value):
    """The parameters of a function, or of the constructor that a class defines itself."""
    if inspect.isclass(value) and not ("__init__" in vars(value) or dataclasses.is_dataclass(value)):
        return []
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [name for name, parameter in inspect.signature(value).parameters.items() if parameter.kind not in kinds]


def test_every_argument_of_a_public_name_is_documented():
    missing = {}
    for name, value in public_names().items():
        if inspect.isclass(value) or inspect.isfunction(value):
            text = f"{inspect.getdoc(value)}\n{inspect.getdoc(value.__init__)}"
            documented = set(re.findall(r"^ +(\w+): ", text, flags=re.MULTILINE))
            if undocumented := [parameter for parameter in own_parameters(value) if parameter not in documented]:
                missing[name] = undocumented
    assert missing == {}


def resolves(reference, module):
    """Whether a cross-reference in a module's docstrings names something: in full, or as seen from the module."""
    if reference.startswith("lowrank_nn."):
        found, names = lowrank_nn, reference.split(".")[1:]
        for name in names:
            found = getattr(found, name, None)
        return found is not None
    first, *rest = reference.split(".")
    around = importlib.import_module(module.__name__.rpartition(".")[0] or "lowrank_nn")
    seen = [module, around, lowrank_nn, *(value for value in vars(module).values() if inspect.isclass(value))]
    found = next((getattr(place, first) for place in seen if hasattr(place, first)), None)
    for name in rest:
        found = getattr(found, name, None)
    return found is not None


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_cross_references_in_docstrings_name_something(module):
    references = re.findall(r":(?:func|class|meth|mod|data):`~?([\w.]+)`", inspect.getsource(module))
    assert [reference for reference in references if not resolves(reference, module)] == []


def test_names_exported_by_packages_exist_and_are_public():
    for module in MODULES:
        if hasattr(module, "__path__"):
            assert not [
                name
                for name in vars(module)
                if name.startswith("_") and not name.startswith("__") and inspect.isclass(vars(module)[name])
            ]
