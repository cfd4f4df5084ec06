"""The step that makes the weights of each layer share a few numbers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lowrank_nn.decompose.kmeans import Init
from lowrank_nn.errors import OptionError, check_whole_number
from lowrank_nn.layers import CodebookConv2d, CodebookLinear, CompressedLayer
from lowrank_nn.pipeline.apply import decide_layer, matching
from lowrank_nn.pipeline.evidence import measured_fisher
from lowrank_nn.pipeline.select import Patterns
from lowrank_nn.pipeline.state import Decision, State, Step
from lowrank_nn.planning import BatchLoss

_CLASSES: tuple[type[CompressedLayer], ...] = (CodebookConv2d, CodebookLinear)


class Codebook(Step):
    """Replace the weights of each layer by an index of a few bits into 2^bits shared numbers (k-means).

    Acts on convolutions and linear layers, on the factors inside low-rank layers, and on pruned layers, whose zeros
    stay zero and take no index. A ``FineTune`` step after it trains the shared numbers. Layers so small that the
    codebook would take more than it saves stay as they are.

    Args:
        bits: Bits per weight, 1 to 8.
        conv_bits: Bits in convolutions; ``bits`` if left out. They need more than linear layers do.
        init: How the numbers are found: ``"optimal"``, ``"linear"``, ``"density"`` or ``"random"``; see
            :meth:`lowrank_nn.CodebookConv2d.from_pretrained_layer`.
        where: Shell patterns on dotted paths of the layers wanted.
        but_not: Shell patterns of the layers to leave as they are.
        batches: Batches to take the diagonal Fisher information from: the numbers then suit the weights that matter
            to ``loss`` (Hessian-weighted k-means).
        loss: ``loss(model, batch)``, a scalar; goes with ``batches``.

    Raises:
        OptionError: ``bits`` or ``conv_bits`` is not from 1 to 8, or one of ``batches`` and ``loss`` is missing.

    References:
        Han, Mao, Dally 2016, "Deep Compression"; Choi, El-Khamy, Lee 2017, "Towards the limit of network quantization".
    """

    def __init__(
        self,
        bits: int = 4,
        *,
        conv_bits: int | None = None,
        init: Init = "optimal",
        where: Patterns = "*",
        but_not: Patterns = (),
        batches: Iterable[Any] | None = None,
        loss: BatchLoss | None = None,
    ) -> None:
        conv_bits = bits if conv_bits is None else conv_bits
        for name, value in (("bits", bits), ("conv_bits", conv_bits)):
            check_whole_number(f"Codebook: {name}", value, 1, 8)
        if (batches is None) != (loss is None):
            raise OptionError(
                "Codebook: batches and loss go together (loss(model, batch) -> scalar). Without both k-means is plain."
            )
        self.bits, self.conv_bits, self.init = bits, conv_bits, init
        self.where, self.but_not, self.batches, self.loss = where, but_not, batches, loss

    def _shown(self) -> dict[str, Any]:
        bits = {"bits": self.bits, "conv_bits": None if self.conv_bits == self.bits else self.conv_bits}
        return bits | {"init": self.init, "where": self.where, "but_not": self.but_not, "loss": self.loss}

    def decide(self, state: State) -> list[Decision]:
        """Decide for each matching layer.

        Raises:
            PlanError: A pattern matches nothing.
        """
        decisions = []
        for site, cls in matching(state, _CLASSES, self.where, self.but_not, "Codebook"):
            bits = self.conv_bits if cls is CodebookConv2d else self.bits
            options = {"bits": bits, "init": self.init, "seed": state.seed}
            decisions.append(decide_layer(state, site, cls, options))
        return decisions

    def measure(self, state: State, decisions: list[Decision]) -> dict[str, dict[str, Any]]:
        """Return the Fisher information of each layer, where it is asked for.

        Raises:
            PlanError: The loss does not depend on some of the layers.
        """
        if state.dry or self.batches is None or self.loss is None:
            return {}
        return measured_fisher("Codebook", state, decisions, self.batches, self.loss)
