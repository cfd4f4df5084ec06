"""The step that makes the ranges of weights equal between layers, and those of activations smaller."""

from __future__ import annotations

from typing import Any

from lowrank_nn.errors import CalibrationError
from lowrank_nn.graph.absorption import absorb_, find_absorbable
from lowrank_nn.graph.equalization import equalize_
from lowrank_nn.graph.preserve import evaluating
from lowrank_nn.graph.rescaling import merged
from lowrank_nn.pipeline.state import Decision, State, Step
from lowrank_nn.planning.calibration import run_batches
from lowrank_nn.planning.extremes import collect_extremes


class Equalize(Step):
    r"""Rescale channels between the layers that compute and those that read them, so that few bits serve all of them.

    What is rescaled, how it is proven, and what stays: :func:`lowrank_nn.equalize`. The factors of low-rank layers are
    rescaled like other layers, pruned and quantized layers are not, so put this step behind ``FoldBatchNorm`` and right
    ahead of ``Quantize``. It changes numbers only: there is nothing of it in a plan.

    With ``absorb`` high biases are absorbed after that, which makes the ranges of activations smaller. Where a channel
    in front of a ReLU was never below some c > 0 on the calibration data, c goes from the bias that computes it into
    those of the layers that read it:

    .. math:: W \operatorname{ReLU}(h) + b = W \operatorname{ReLU}(h - c) + (b + W c), \quad h \ge c

    So on these data the network computes the same; on others, a channel that falls below c counts as c. Layers that
    pad with zeros cannot make up for it along the border, where the paper lets them be wrong; the channels that they
    read stay, like those of residual sums, and the report says so. What stands in between is tried out.

    Args:
        absorb: Whether to absorb high biases; needs calibration batches.

    References:
        Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", sections 4.1.2 and
        4.1.3; there c = max(0, beta - 3 gamma) of the batch norm that was folded, which one value in 740 falls below.
    """

    def __init__(self, *, absorb: bool = False) -> None:
        self.absorb = absorb

    def _shown(self) -> dict[str, Any]:
        return {"absorb": self.absorb}

    def decide(self, state: State) -> list[Decision]:
        """Decide nothing: every layer stays what it is.

        Raises:
            CalibrationError: Biases are to be absorbed, and there are no calibration batches.
        """
        if self.absorb and state.calibration is None:
            raise CalibrationError(
                "Equalize: absorb=True needs calibration batches. Pass compress_model(..., calibration=batches), or "
                "leave it out."
            )
        return []

    def execute(self, state: State, decisions: list[Decision]) -> None:
        """Equalise the ranges, in the copy with numbers."""
        if state.dry:
            return
        rescaling, left = equalize_(state.model, state.example_inputs)
        state.rescaled = merged([state.rescaled, rescaling])
        for path, _ in state.model.named_modules():
            if path in rescaling:
                state.remark(path, "Equalize: channels rescaled against other layers")
        for path, reason in left.items():
            state.remark(path, f"Equalize: the channels that it computes stay: {reason}")
        if self.absorb:
            _absorb(state)


def _absorb(state: State) -> None:
    assert state.calibration is not None
    model, found = state.model, find_absorbable(state.model, state.example_inputs)
    paths = [channels.computed[0].path for channels, _ in found]
    extremes = collect_extremes(model, state.calibration, paths, progress=state.progress)
    with evaluating(model):
        (inputs,) = run_batches(model, state.calibration, max_batches=1, progress=False)
    absorbed, left = absorb_(model, found, extremes, inputs)
    for path in absorbed:
        state.remark(path, "Equalize: high biases absorbed by the layers that read them")
    for path, reason in left.items():
        state.remark(path, f"Equalize: high biases stay: {reason}")
