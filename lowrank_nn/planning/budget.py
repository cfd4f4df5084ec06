"""What may remain of a model."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from torch import nn

from lowrank_nn.cost import Cost
from lowrank_nn.errors import OptionError, is_share

Quantity = Literal["params", "macs", "bytes", "latency"]

_SHARES: tuple[Quantity, ...] = get_args(Quantity)


@dataclasses.dataclass(frozen=True, repr=False)
class Budget:
    """What may remain at the end of a recipe, as shares of the dense model; several at once must all hold.

    With ``accuracy_drop`` the share of one quantity is searched instead: the smallest model is wanted whose metric is
    within that drop.

    Args:
        params: Share of the stored scalars.
        macs: Share of the multiply-accumulates of one forward of the example inputs.
        bytes: Share of the bytes that the tensors take in a saved file.
        latency: Share of the measured time of one forward of the example inputs, on this machine, with torch's current
            number of threads.
        accuracy_drop: By how much the metric may drop from the dense model's, in the metric's own units.
        evaluate: ``evaluate(model)`` returns the metric, a number that is larger for a better model. It is called in
            eval mode and without gradients, with copies.
        of: The quantity that is to be small, ``"params"``, ``"macs"``, ``"bytes"`` or ``"latency"``.

    Raises:
        OptionError: Nothing is limited, a share is outside (0, 1], or one of ``accuracy_drop`` and ``evaluate`` comes
            without the other.
    """

    params: float | None = None
    macs: float | None = None
    bytes: float | None = None
    latency: float | None = None
    accuracy_drop: float | None = None
    evaluate: Callable[[nn.Module], float] | None = None
    of: Quantity = "params"

    def __post_init__(self) -> None:
        shares = self.shares()
        if not shares and self.accuracy_drop is None and self.evaluate is None:
            raise OptionError("Budget: give at least one of params, macs, bytes, latency, or accuracy_drop.")
        for name, share in shares.items():
            if not is_share(share):
                raise OptionError(
                    f"Budget: {name} is the share of the dense model that may remain, above 0 and at most 1, got "
                    f"{share!r}."
                )
        self._check_search()

    def __repr__(self) -> str:
        """Show what is limited."""
        given = (field.name for field in dataclasses.fields(self) if getattr(self, field.name) != field.default)
        return f"Budget({', '.join(f'{name}={getattr(self, name)!r}' for name in given)})"

    def _check_search(self) -> None:
        if (self.accuracy_drop is None) != (self.evaluate is None):
            raise OptionError(
                "Budget: accuracy_drop and evaluate belong together: accuracy_drop=0.5, evaluate=a function of the "
                "model that returns the metric."
            )
        drop: Any = 0.0 if self.accuracy_drop is None else self.accuracy_drop
        if not (isinstance(drop, numbers.Real) and math.isfinite(drop) and float(drop) >= 0):
            raise OptionError(f"Budget: accuracy_drop must be a finite number from 0, got {self.accuracy_drop!r}.")
        if self.evaluate is not None and not callable(self.evaluate):
            raise OptionError(f"Budget: evaluate must be a function of the model, got {self.evaluate!r}.")
        if self.of not in _SHARES:
            raise OptionError(f"Budget: of must be one of {', '.join(_SHARES)}, got {self.of!r}.")
        if self.of != "params" and self.accuracy_drop is None:
            raise OptionError(f"Budget: of={self.of!r} says what accuracy_drop is to make small, and there is none.")

    def shares(self) -> dict[str, float]:
        """Return the shares that were given, by name."""
        return {name: share for name in _SHARES if (share := getattr(self, name)) is not None}

    def allowed(self, dense: Cost, milliseconds: float = 0.0) -> NDArray[np.float64]:
        """Return what each given share allows, in the order of :meth:`shares`.

        Args:
            dense: Cost of the dense model.
            milliseconds: Time of one of its forwards, where the budget has a share of that.
        """
        return np.array(list(self.shares().values())) * self.spent(dense, milliseconds)

    def spent(self, cost: Cost, milliseconds: float = 0.0) -> NDArray[np.float64]:
        """Return what this budget limits, in the order of :meth:`shares`.

        Args:
            cost: Cost of a model.
            milliseconds: Time of one of its forwards, where the budget has a share of that.
        """
        amounts = dataclasses.asdict(cost) | {"latency": milliseconds}
        return np.array([amounts[name] for name in self.shares()], dtype=np.float64)

    def with_share(self, share: float) -> Budget:
        """Return a budget of shares alone: this one of the quantity that is searched, and those that were given."""
        return dataclasses.replace(self, accuracy_drop=None, evaluate=None, of="params", **{self.of: share})

    def scaled(self, factor: float) -> Budget:
        """Return the budget with every share multiplied by ``factor``, none above 1."""
        shares: dict[str, Any] = {name: min(1.0, share * factor) for name, share in self.shares().items()}
        return dataclasses.replace(self, **shares)
