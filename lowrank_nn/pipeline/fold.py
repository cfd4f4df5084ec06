"""The step that folds batch normalisations into the layers in front of them."""

from __future__ import annotations

import dataclasses

from lowrank_nn.graph import find_links
from lowrank_nn.graph.fold import Fold, find_folds, fold_, fold_proven
from lowrank_nn.pipeline.state import Decision, State, Step


@dataclasses.dataclass(frozen=True)
class FoldDecision(Decision):
    """That the layer at ``path`` takes up a norm.

    Attributes:
        fold: The layer and the norm.
    """

    fold: Fold = dataclasses.field(kw_only=True)


class FoldBatchNorm(Step):
    """Fold batch normalisations, with their running statistics, into the layers right in front of them.

    What is folded, how it is proven, and what stays: :func:`lowrank_nn.fold_batchnorm`. Factorised layers take a norm
    up in their last factor; pruned and quantized layers do not, so put this step ahead of them, and behind all training
    that is to update statistics.
    """

    def decide(self, state: State) -> list[Decision]:
        """Decide for every batch normalisation of the model."""
        if FoldBatchNorm not in state.cache:
            state.cache[FoldBatchNorm] = find_links(state.dense, state.example_inputs)
        # Steps replace layers, not the ways between them: the given model's links hold for the present one.
        folds, left = find_folds(state.model, state.cache[FoldBatchNorm])
        stays = [Decision(path, None, note=reason) for path, reason in left.items()]
        return [*(FoldDecision(fold.layer, None, fold=fold) for fold in folds), *stays]

    def execute(self, state: State, decisions: list[Decision]) -> None:
        """Fold as decided, and take back what changes the model's outputs."""
        folds = [decision.fold for decision in decisions if isinstance(decision, FoldDecision)]
        if state.dry:
            for fold in folds:
                fold_(state.model, fold)
            return
        refused = fold_proven(state.model, folds, state.example_inputs)
        for fold in folds:
            if fold.norm in refused:
                state.remark(fold.norm, f"FoldBatchNorm: taken back, {refused[fold.norm]}")
            else:
                state.remark(fold.layer, "FoldBatchNorm: took up the norm behind it")
