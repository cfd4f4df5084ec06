"""Every error that the library raises on purpose, and the check of options that many share.

Each message says what is wrong, what was expected and what to do. The walker adds where: it re-raises a layer's
error through :meth:`LowRankError.at` with the module's dotted path in front.
"""

from __future__ import annotations

import numbers

from typing_extensions import Self


class LowRankError(Exception):
    """Base class of all errors of this library.

    Args:
        message: What is wrong, what was expected, what to do.
        path: Qualified name of the module concerned, shown in front of the message.
    """

    def __init__(self, message: str, *, path: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.path = path

    def __str__(self) -> str:
        return self.message if self.path is None else f"{self.path or '(the model itself)'}: {self.message}"

    def at(self, path: str) -> Self:
        """Return the same error, located at the module ``path``."""
        return type(self)(self.message, path=path)


class UnsupportedLayerError(LowRankError, TypeError):
    """A layer, or one of its attributes, that the method cannot carry over."""


class RankError(LowRankError, ValueError):
    """A rank outside the range that the weight admits, or a rank rule that finds no rank."""


class OptionError(LowRankError, ValueError):
    """An argument with a value that is not allowed."""


class CalibrationError(LowRankError, ValueError):
    """Calibration data that are missing, empty, not finite or of the wrong shape."""


class PlanError(LowRankError, ValueError):
    """A recipe or budget that cannot be carried out on this model."""


class BudgetError(PlanError):
    """A budget that cannot be met."""


class TrainingError(LowRankError, RuntimeError):
    """Training that cannot go on, such as a loss that is not finite."""


class MissingExtraError(LowRankError, ImportError):
    """A package that is needed for this and not installed."""


class FileFormatError(LowRankError, ValueError):
    """A file that is damaged, or does not fit the model it is loaded into."""


def is_share(value: object) -> bool:
    """Whether ``value`` is a number above 0 and at most 1."""
    return isinstance(value, numbers.Real) and 0 < float(value) <= 1


def check_whole_number(what: str, value: object, least: int, most: int | None = None) -> int:
    """Return ``value``, a whole number from ``least`` to ``most``.

    Args:
        what: Whose option it is, and its name: ``"FineTune: epochs"``.
        value: What was passed.
        least: The smallest that is allowed.
        most: The largest that is allowed; None for no limit.

    Raises:
        OptionError: It is something else.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= least and (most is None or value <= most):
        return value
    limits = f"from {least}" if most is None else f"from {least} to {most}"
    raise OptionError(f"{what} must be a whole number {limits}, got {value!r}.")
