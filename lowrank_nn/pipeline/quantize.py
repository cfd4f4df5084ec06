"""The step that turns weights, and activations where asked, into small integers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from lowrank_nn.errors import CalibrationError, LowRankError, OptionError
from lowrank_nn.graph import chain_quantized
from lowrank_nn.layers import BFloat16Conv2d, BFloat16Linear, CompressedLayer, QuantConv2d, QuantLinear
from lowrank_nn.layers._integer import IntegerLayer
from lowrank_nn.layers._kernel import obstacle
from lowrank_nn.layers._observers import OBSERVERS, ObserverName
from lowrank_nn.layers._quant_weight import Scheme
from lowrank_nn.layers.bfloat16 import BFloat16Layer, bfloat16_obstacle
from lowrank_nn.pipeline.apply import decide_layer, matching
from lowrank_nn.pipeline.bits import share_out_bits
from lowrank_nn.pipeline.evidence import carry_out, gather_once, uses_data
from lowrank_nn.pipeline.fastest import slower_layers
from lowrank_nn.pipeline.select import Patterns
from lowrank_nn.pipeline.state import Decision, State, Step
from lowrank_nn.planning.ranges import collect_ranges

_CLASSES: dict[bool, tuple[type[CompressedLayer], ...]] = {
    True: (QuantConv2d, QuantLinear),
    False: (BFloat16Conv2d, BFloat16Linear),
}
"""The classes of integers, and those of bfloat16."""


class Quantize(Step):
    """Quantize the weights of convolutions and linear layers, the factors of low-rank layers included.

    With ``activations`` too, layers run on integer kernels in eval mode where the CPU has exact ones, and hand their
    outputs on as integers (:func:`lowrank_nn.chain_quantized`); the report says which layers cannot. Fold batch
    normalisations first (``FoldBatchNorm``): one that stands between layers is computed in floating point.

    With calibration data, weights of fewer than 8 bits are not rounded one by one: scales are chosen and weights
    rounded so that the layer's outputs change little on these data, what one weight is off by being made up for by
    others, and the change of the mean output is taken up by the bias, or the running mean of the norm behind. Then all
    layers (not the factors of low-rank ones) are rounded once more in the order of execution, each to give what the
    given network gave, out of what the quantized layers before it produce.

    Args:
        weights: ``"int2"`` to ``"int8"``; or several of these, such as ``["int3", "int4", "int6"]``, of which each
            layer gets one, all chosen together so that the network's output changes little under
            ``Budget(bytes=...)``, by the same knapsack as the ranks of ``LowRank``; or ``"bf16"``, which takes no other
            option but ``where`` and ``but_not``: half the bytes, and products in bfloat16 where the CPU has them, which
            needs no calibration.
        activations: ``"int2"`` to ``"int8"`` for the inputs of each layer, with ranges measured on the calibration
            batches of ``compress_model``; None leaves activations in floating point.
        scheme: ``"symmetric"`` (one scale per output channel) or ``"affine"`` (one scale and zero point per tensor).
        observer: How a range is chosen from what was measured: ``"minmax"``, ``"percentile"``, ``"mse"`` or
            ``"entropy"``.
        keep_fastest: Whether layers stay in floating point that are timed and found slower in integers. Costs some
            seconds, and bytes where layers stay.
        data_aware: Whether to round weights by what that does on the calibration data; if left out, where there are
            some and weights get fewer than 8 bits: the nearest numbers lose next to nothing with 8.
        reconstruct: Whether to round the layers once more in the order of execution, where data have a say. Holds the
            activations of all calibration data at one point of the given and of the quantized network in memory.
        where: Shell patterns on dotted paths of the layers wanted.
        but_not: Shell patterns of the layers to leave as they are.

    Raises:
        OptionError: ``weights``, ``activations``, ``scheme`` or ``observer`` is not one of those names, or
            ``keep_fastest`` is set without ``activations``, or another option with ``"bf16"``.

    References:
        Nagel et al. 2020, "Up or Down? Adaptive Rounding for Post-Training Quantization"; Frantar et al. 2022, "GPTQ:
        Accurate Post-Training Quantization for Generative Pre-trained Transformers" (rounding on data). Nagel et al.
        2019, "Data-Free Quantization Through Weight Equalization and Bias Correction" (bias).
    """

    def __init__(
        self,
        weights: str | Sequence[str] = "int8",
        *,
        activations: str | None = None,
        scheme: Scheme = "symmetric",
        observer: ObserverName = "minmax",
        keep_fastest: bool = False,
        data_aware: bool | None = None,
        reconstruct: bool = True,
        where: Patterns = "*",
        but_not: Patterns = (),
    ) -> None:
        self.weights, self.activations = weights, activations
        integers = weights != "bf16"
        given = (activations, scheme, observer, keep_fastest, data_aware, reconstruct)
        if not integers and given != (None, "symmetric", "minmax", False, None, True):
            raise OptionError(
                "Quantize: 'bf16' takes no option but where and but_not: numbers are rounded as they are. Leave the "
                "others out."
            )
        self.widths = _widths(weights) if integers else (16,)
        self.activation_bits = None if activations is None else _bits("activations", activations)
        if keep_fastest and activations is None:
            raise OptionError(
                "Quantize: keep_fastest=True has no effect without activations: layers of which only the weights are "
                "integers never run faster. Pass activations='int8' as well."
            )
        if scheme not in ("symmetric", "affine"):
            raise OptionError(f"Quantize: scheme must be 'symmetric' or 'affine', got {scheme!r}.")
        if observer not in OBSERVERS:
            raise OptionError(f"Quantize: observer must be one of {', '.join(map(repr, OBSERVERS))}, got {observer!r}.")
        self.scheme, self.observer, self.keep_fastest = scheme, observer, keep_fastest
        self.data_aware, self.reconstruct = data_aware, reconstruct
        self.where, self.but_not = where, but_not

    def _shown(self) -> dict[str, Any]:
        names = ("weights", "activations", "scheme", "observer", "keep_fastest", "data_aware", "reconstruct")
        return {name: getattr(self, name) for name in (*names, "where", "but_not")}

    def allocates(self) -> bool:
        """Whether the bits of each layer come from the budget."""
        return len(self.widths) > 1

    def decide(self, state: State) -> list[Decision]:
        """Decide for each matching layer.

        Raises:
            PlanError: A pattern matches nothing, or there are several widths and no budget of bytes.
            CalibrationError: Activations are to be quantized, or data heeded, and there are no calibration batches.
            BudgetError: There are several widths, and the smallest do not meet the budget.
        """
        if self.activation_bits is not None and state.calibration is None:
            raise CalibrationError(
                "Quantize: activations need calibration batches. Pass calibration=batches, or leave activations=None "
                "to quantize weights only."
            )
        on_data = self._on_data(state)
        integers = self.weights != "bf16"
        options: dict[str, Any] = {}
        if integers:
            options = {"bits": max(self.widths), "scheme": self.scheme, "activation_bits": self.activation_bits}
        chosen = matching(state, _CLASSES[integers], self.where, self.but_not, "Quantize")
        decisions = [decide_layer(state, site, cls, options, self._stand_ins()) for site, cls in chosen]
        if self.allocates():
            evidence = gather_once(state, curvature=True) if on_data else None
            decisions = share_out_bits(state, decisions, self.widths, evidence, self._stand_ins())
        if not self.keep_fastest:
            return decisions
        slower = slower_layers(state, decisions)
        return [Decision(d.path, None, note=slower[d.path]) if d.path in slower else d for d in decisions]

    def execute(self, state: State, decisions: list[Decision]) -> None:
        """Replace the layers as decided, and let them hand integers to each other."""
        if state.dry or not self._on_data(state):
            super().execute(state, decisions)
        else:
            replaced = [decision for decision in decisions if decision.layer_class is not None]
            data = self.measure(state, replaced)
            carry_out("Quantize", state, replaced, curvature=False, data=data, sequential=self.reconstruct)
        if state.dry:
            return
        if self.activation_bits is not None:
            chain_quantized(state.model, state.example_inputs)
        for decision in decisions:
            reason = _obstacle(state.model.get_submodule(decision.path))
            if reason:
                state.remark(decision.path, f"Quantize: simulated in floating point: {reason}")

    def _on_data(self, state: State) -> bool:
        return uses_data("Quantize", state, self.data_aware, by_default=min(self.widths) < 8)

    def measure(self, state: State, decisions: list[Decision]) -> dict[str, dict[str, Any]]:
        """Return the ranges of each layer to be quantized, measured on the calibration batches."""
        if self.activation_bits is None or state.dry:
            return {decision.path: self._stand_ins() for decision in decisions}
        assert state.calibration is not None
        paths = [decision.path for decision in decisions]
        try:
            ranges = collect_ranges(
                state.model,
                state.calibration,
                paths,
                observer=self.observer,
                bits=self.activation_bits,
                progress=state.progress,
            )
        except LowRankError as error:
            raise type(error)(f"Quantize: {error}") from error
        return {path: {"input_range": ranges[path].input, "output_range": ranges[path].output} for path in paths}

    def _stand_ins(self) -> dict[str, Any]:
        return {} if self.activation_bits is None else {"input_range": (0.0, 1.0)}


def _obstacle(layer: nn.Module) -> str:
    """Return why a layer that could run on other kernels than those of floats does not; empty if it does."""
    if isinstance(layer, BFloat16Layer):
        return bfloat16_obstacle(layer)
    return obstacle(layer) if isinstance(layer, IntegerLayer) and layer.activation_bits is not None else ""


def _widths(weights: str | Sequence[str]) -> tuple[int, ...]:
    names = list(weights) if isinstance(weights, Sequence) and not isinstance(weights, str) else [weights]
    if not names:
        raise OptionError("Quantize: weights must name at least one width, 'int2' to 'int8', got none.")
    return tuple(sorted({_bits("weights", name) for name in names}))


def _bits(name: str, value: object) -> int:
    found = re.fullmatch(r"int([2-8])", value) if isinstance(value, str) else None
    if found is None:
        other = " or 'bf16'" if name == "weights" else ""
        raise OptionError(f"Quantize: {name} must be 'int2' to 'int8'{other}, got {value!r}.")
    return int(found[1])
