"""Fixed-point numbers, and training on them: rounding to nearest or at random."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from lowrank_nn.errors import OptionError, check_whole_number

Rounding = Literal["nearest", "stochastic"]
AnyOptimizer = TypeVar("AnyOptimizer", bound=Optimizer)


@dataclasses.dataclass(frozen=True)
class FixedPoint:
    r"""The fixed-point numbers of IL integer bits, the sign among them, and FL fraction bits.

    They are the multiples of the step 2^-FL from -2^(IL - 1) to 2^(IL - 1) - 2^-FL; what lies beyond is clipped.
    ``"nearest"`` rounds halves to even. ``"stochastic"`` rounds x up with the probability of its distance from the
    number below, in steps, so that the expected value is x: updates of weights that are smaller than half a step are
    not lost, and networks train in 16 bits as in 32.

    To keep the weights of a network in 16 bits while it trains::

        weights = FixedPoint(2, 14, rounding="stochastic")
        FineTune(loader, 5, optimizer=lambda p: weights.round_after(torch.optim.SGD(p, 0.05)))

    Args:
        integer_bits: IL, from 1.
        fraction_bits: FL, from 0; at most 24 bits in all, which float32 holds exactly.
        rounding: ``"nearest"`` or ``"stochastic"``.

    Raises:
        OptionError: The bits or ``rounding`` are not such.

    References:
        Gupta, Agrawal, Gopalakrishnan, Narayanan 2015, "Deep Learning with Limited Numerical Precision".
    """

    integer_bits: int = 2
    fraction_bits: int = 14
    rounding: Rounding = "nearest"

    def __post_init__(self) -> None:
        check_whole_number("FixedPoint: integer_bits", self.integer_bits, 1, 24)
        check_whole_number("FixedPoint: fraction_bits", self.fraction_bits, 0, 24 - self.integer_bits)
        if self.rounding not in get_args(Rounding):
            raise OptionError(f"FixedPoint: rounding must be 'nearest' or 'stochastic', got {self.rounding!r}.")

    @property
    def bits(self) -> int:
        """Bits of a number, IL + FL."""
        return self.integer_bits + self.fraction_bits

    @property
    def step(self) -> float:
        """Distance of neighbours, 2^-FL."""
        return 2.0**-self.fraction_bits

    def round(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return ``x`` rounded to these numbers, of the same dtype.

        The gradient is straight-through: 1 where the result was not clipped, else 0.

        Args:
            x: Any shape; of a dtype that holds these numbers (float32 or float64, half precision up to 8 or 11 bits).
            generator: Source of ``"stochastic"``; torch's global one if left out.

        Raises:
            OptionError: The dtype of ``x`` does not hold numbers of so many bits.
        """
        limit = 2.0 ** (self.bits - 1)
        # The clipping is differentiable, the rounding is a constant beside it: exact, as their difference is added.
        steps = (self._checked(x) / self.step).clamp(-limit, limit - 1)
        whole = self._whole(steps.detach(), generator).clamp(-limit, limit - 1)
        return whole * self.step + (steps - steps.detach()) * self.step

    def to_integers(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return ``x`` rounded, as multiples of the step, in the narrowest of int8, int16 and int32.

        Args:
            x: As for :meth:`round`.
            generator: As for :meth:`round`.

        Raises:
            OptionError: The dtype of ``x`` does not hold numbers of so many bits.
        """
        dtype = next(t for t, bits in ((torch.int8, 8), (torch.int16, 16), (torch.int32, 32)) if self.bits <= bits)
        return (self.round(x.detach(), generator) / self.step).to(dtype)

    def from_integers(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Undo :meth:`to_integers`.

        Args:
            codes: Multiples of the step.
            dtype: Dtype of the result.
        """
        return codes.to(dtype) * self.step

    def round_after(self, optimizer: AnyOptimizer, generator: torch.Generator | None = None) -> AnyOptimizer:
        """Have every step of ``optimizer`` end with its parameters rounded, in place; they are rounded now too.

        Args:
            optimizer: Any optimizer.
            generator: As for :meth:`round`.

        Returns:
            The optimizer itself.
        """

        @torch.no_grad()
        def round_all(*_: Any) -> None:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.copy_(self.round(parameter, generator))

        round_all()
        optimizer.register_step_post_hook(round_all)
        return optimizer

    def _whole(self, steps: Tensor, generator: torch.Generator | None) -> Tensor:
        if self.rounding == "nearest":
            return torch.round(steps)
        draws = torch.rand(steps.shape, dtype=steps.dtype, device=steps.device, generator=generator)
        floor = torch.floor(steps)
        return floor + (draws < steps - floor)

    def _checked(self, x: Tensor) -> Tensor:
        held = 1 - round(math.log2(torch.finfo(x.dtype).eps)) if x.is_floating_point() else 0
        if held < self.bits:
            raise OptionError(
                f"FixedPoint: {x.dtype} holds {held} significant bits, and these numbers have {self.bits}. Convert to "
                "float32 first."
            )
        return x
