"""The cost of a layer, as four numbers that add up."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a layer, or a sum of layers, costs.

    Attributes:
        params: Stored scalars (weights and biases; a masked weight counts whole).
        macs: Multiply-accumulate operations of one forward. Bias additions, activations and normalisations
            are not counted, as in ``torch.utils.flop_counter`` (which reports two flops for each of these).
        bytes: Size of the layer's tensors as :func:`lowrank_nn.save` writes them.
        nonzeros: Scalars among ``params`` that a mask does not hold at zero.
    """

    params: int = 0
    macs: int = 0
    bytes: int = 0
    nonzeros: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.params + other.params,
            self.macs + other.macs,
            self.bytes + other.bytes,
            self.nonzeros + other.nonzeros,
        )

    def __sub__(self, other: Cost) -> Cost:
        return Cost(
            self.params - other.params,
            self.macs - other.macs,
            self.bytes - other.bytes,
            self.nonzeros - other.nonzeros,
        )
