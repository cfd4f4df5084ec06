"""The layer contract as checks that anybody can run on their own layers.

A compressed layer of yours is tested by one function::

    import pytest
    from lowrank_nn.testing import layer_checks, run_check

    @pytest.mark.parametrize(("cls", "case", "check"), layer_checks([MyLinear]))
    def test_contract(cls, case, check):
        assert run_check(cls, case, check), "refused"

Nothing here needs a test framework: a broken promise is an ``AssertionError``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator

from lowrank_nn.errors import UnsupportedLayerError
from lowrank_nn.layers import LAYERS, CompressedLayer
from lowrank_nn.testing import checks_function, checks_metric, checks_module, checks_source, checks_training
from lowrank_nn.testing._tools import built
from lowrank_nn.testing.cases import CASES as CASES
from lowrank_nn.testing.cases import Case as Case

Check = Callable[[type[CompressedLayer], Case], None]

SLOW_CHECKS: tuple[Check, ...] = (checks_module.check_export, checks_module.check_compile)
"""Checks that take about a second each."""

ACCELERATOR_CHECKS: tuple[Check, ...] = (checks_function.check_accelerator,)
"""Checks that need an accelerator, as ``torch.accelerator`` finds it."""

CHECKS: tuple[Check, ...] = tuple(
    check
    for module in (checks_function, checks_source, checks_metric, checks_module, checks_training)
    for name, check in vars(module).items()
    if name.startswith("check_") and check not in SLOW_CHECKS + ACCELERATOR_CHECKS
)
"""The checks of the contract; the docstring of each is the promise it holds a class to."""


def layer_checks(
    classes: Iterable[type[CompressedLayer]] | None = None,
    *,
    cases: Iterable[Case] = CASES,
    checks: Iterable[Check] = CHECKS,
) -> Iterator[tuple[type[CompressedLayer], Case, Check]]:
    """Yield every (class, case, check) whose case is of the kind that the class replaces.

    Args:
        classes: Compressed classes; all registered ones by default.
        cases: Dense layers to check them on.
        checks: Functions of a class and a case: :data:`CHECKS`, :data:`SLOW_CHECKS`, :data:`ACCELERATOR_CHECKS` or
            yours.
    """
    cases, checks = tuple(cases), tuple(checks)
    for cls in tuple(LAYERS.values() if classes is None else classes):
        for case in cases:
            if case.kind is cls.replaces:
                for check in checks:
                    yield cls, case, check


def refuses(cls: type[CompressedLayer], case: Case) -> bool:
    """Return whether ``cls`` refuses the case's dense layer by ``UnsupportedLayerError``; other errors go through."""
    try:
        built(cls, case)
    except UnsupportedLayerError:
        return True
    return False


def run_check(cls: type[CompressedLayer], case: Case, check: Check) -> bool:
    """Run one check.

    Returns:
        True if the promise holds; False if ``cls`` refuses the case by ``UnsupportedLayerError``. A class that
        refuses is not broken, but count the refusals: one that refuses everything passes nothing.

    Raises:
        AssertionError: The promise is broken; the message names class, case, promise and what was found.
    """
    with warnings.catch_warnings():
        # torch says this of dense layers too; it is no news about the compressed one.
        warnings.filterwarnings("ignore", message="Using padding='same' with even kernel lengths")
        if refuses(cls, case):
            return False
        try:
            check(cls, case)
        except AssertionError as error:
            promise = (check.__doc__ or check.__name__).strip()
            raise AssertionError(f"{cls.__name__} on {case.name}: {error}\nThe promise: {promise}") from error
    return True
