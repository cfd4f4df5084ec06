"""What may remain of a model."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from lowrank_nn.cost import Cost
from lowrank_nn.errors import OptionError


@dataclasses.dataclass(frozen=True)
class Budget:
    """What may remain at the end of a recipe, as shares of the dense model; several at once must all hold.

    Args:
        params: Share of the stored scalars.
        macs: Share of the multiply-accumulates of one forward of the example inputs.
        bytes: Share of the bytes that the tensors take in a saved file.
        latency: Share of the measured time of one forward of the example inputs, on this machine, with torch's current
            number of threads.

    Raises:
        OptionError: No share is given, or one is outside (0, 1].
    """

    params: float | None = None
    macs: float | None = None
    bytes: float | None = None
    latency: float | None = None

    def __post_init__(self) -> None:
        shares = self.shares()
        if not shares:
            raise OptionError("Budget: give at least one of params, macs, bytes, latency.")
        for name, share in shares.items():
            if not 0 < share <= 1:
                raise OptionError(
                    f"Budget: {name} is the share of the dense model that may remain, above 0 and at most 1, got "
                    f"{share!r}."
                )

    def shares(self) -> dict[str, float]:
        """Return the shares that were given, by name."""
        fields = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        return {name: share for name, share in fields if share is not None}

    def allowed(self, dense: Cost, milliseconds: float = 0.0) -> NDArray[np.float64]:
        """Return what each given share allows for a model with the dense cost and latency given."""
        return np.array(list(self.shares().values())) * self.spent(dense, milliseconds)

    def spent(self, cost: Cost, milliseconds: float = 0.0) -> NDArray[np.float64]:
        """Return what this budget limits of a cost and a latency, in the order of :meth:`shares`."""
        amounts = dataclasses.asdict(cost) | {"latency": milliseconds}
        return np.array([amounts[name] for name in self.shares()], dtype=np.float64)

    def scaled(self, factor: float) -> Budget:
        """Return the budget with every share multiplied by ``factor``, none above 1."""
        return Budget(**{name: min(1.0, share * factor) for name, share in self.shares().items()})
