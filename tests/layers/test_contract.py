"""Every registered layer class, on every awkward dense layer, held to every promise of the contract.

`PYTHONPATH=. python tests/layers/test_contract.py` writes state_keys.json anew: do so only when a class is added, or
when its keys change on purpose, with a migration for files that were saved before.
"""

import json
from pathlib import Path

import pytest

from lowrank_nn.layers import LAYERS
from lowrank_nn.testing import CASES, CHECKS, CUDA_CHECKS, SLOW_CHECKS, layer_checks, refuses, run_check
from lowrank_nn.testing._tools import built

STATE_KEYS = Path(__file__).parent / "state_keys.json"

REFUSED: dict[str, set[str]] = {}
"""The cases that a class refuses; everything else it must serve."""

ALWAYS_ROUNDS: set[str] = set()
"""Classes without lossless options."""

KNOWN_EXCEPTIONS: dict[str, dict[str, str]] = {}
"""Broken promises, {class: {check: reason}}; a check that holds after all fails the suite."""


def contract(checks):
    return list(parameters(checks))


def parameters(checks):
    for cls, case, check in layer_checks(checks=checks):
        if case.name in REFUSED.get(cls.__name__, ()):
            continue
        reason = KNOWN_EXCEPTIONS.get(cls.__name__, {}).get(check.__name__)
        marks = [pytest.mark.xfail(reason=reason, strict=True, raises=AssertionError)] if reason else []
        yield pytest.param(cls, case, check, id=f"{cls.__name__}-{case.name}-{check.__name__[6:]}", marks=marks)


@pytest.mark.parametrize(("cls", "case", "check"), contract(CHECKS))
def test_promise(cls, case, check):
    assert run_check(cls, case, check), "refused, and not in REFUSED"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(("cls", "case", "check"), contract(SLOW_CHECKS))
def test_slow_promise(cls, case, check):
    assert run_check(cls, case, check), "refused, and not in REFUSED"


@pytest.mark.cuda
@pytest.mark.parametrize(("cls", "case", "check"), contract(CUDA_CHECKS))
def test_cuda_promise(cls, case, check):
    assert run_check(cls, case, check), "refused, and not in REFUSED"


@pytest.mark.parametrize("cls", list(LAYERS.values()), ids=list(LAYERS))
def test_refuses_only_the_cases_declared(cls):
    cases = [case for case in CASES if case.kind is cls.replaces]
    assert {case.name for case in cases if refuses(cls, case)} == REFUSED.get(cls.__name__, set())
    assert len(REFUSED.get(cls.__name__, ())) < len(cases) / 4


def test_only_the_classes_declared_have_no_lossless_options():
    plain = [case for case in CASES if case.name.endswith("_plain")]
    without = {
        name
        for name, cls in LAYERS.items()
        for case in plain
        if case.kind is cls.replaces and cls.lossless_options(case.layer()) is None
    }
    assert without == ALWAYS_ROUNDS


def test_tables_name_things_that_exist():
    names = {case.name for case in CASES}
    assert len(names) == len(CASES)
    assert set().union(*REFUSED.values()) <= names
    assert {*REFUSED, *KNOWN_EXCEPTIONS, *ALWAYS_ROUNDS} <= set(LAYERS)
    assert {check for checks in KNOWN_EXCEPTIONS.values() for check in checks} <= {
        check.__name__ for check in CHECKS + SLOW_CHECKS + CUDA_CHECKS
    }


def test_every_class_has_cases_and_every_check_a_promise():
    kinds = {case.kind for case in CASES}
    assert all(cls.replaces in kinds for cls in LAYERS.values())
    assert all(check.__doc__ for check in CHECKS + SLOW_CHECKS + CUDA_CHECKS)


def state_keys():
    plain = {case.kind: case for case in CASES if case.name.endswith("_plain")}
    return {
        name: {key: str(value.dtype) for key, value in built(cls, plain[cls.replaces]).state_dict().items()}
        for name, cls in sorted(LAYERS.items())
    }


def test_state_dict_keys_are_those_of_saved_files():
    assert state_keys() == json.loads(STATE_KEYS.read_text())


if __name__ == "__main__":
    STATE_KEYS.write_text(json.dumps(state_keys(), indent=2) + "\n")
