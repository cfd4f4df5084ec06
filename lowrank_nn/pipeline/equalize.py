"""The step that makes the ranges of weights equal between layers."""

from __future__ import annotations

from lowrank_nn.graph.equalization import equalize_
from lowrank_nn.graph.rescaling import merged
from lowrank_nn.pipeline.state import Decision, State, Step


class Equalize(Step):
    """Rescale channels between the layers that compute and those that read them, so that few bits serve all of them.

    What is rescaled, how it is proven, and what stays: :func:`lowrank_nn.equalize`. The factors of low-rank layers are
    rescaled like other layers, pruned and quantized layers are not, so put this step behind ``FoldBatchNorm`` and right
    ahead of ``Quantize``. It changes numbers only: there is nothing of it in a plan.
    """

    def __repr__(self) -> str:
        return "Equalize()"

    def decide(self, state: State) -> list[Decision]:
        """Decide nothing: every layer stays what it is."""
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
