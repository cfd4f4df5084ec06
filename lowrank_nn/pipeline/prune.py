"""The step that masks weights by a criterion."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from lowrank_nn.errors import OptionError, PlanError
from lowrank_nn.layers import CompressedLayer, PrunedConv2d, PrunedLinear
from lowrank_nn.pipeline.apply import class_for, decide_layer
from lowrank_nn.pipeline.select import Patterns, select
from lowrank_nn.pipeline.state import Decision, State, Step
from lowrank_nn.planning import BatchLoss
from lowrank_nn.planning.fisher import diagonal_fisher

_CLASSES: tuple[type[CompressedLayer], ...] = (PrunedConv2d, PrunedLinear)


class Prune(Step):
    """Hold a share of each layer's weights at zero, in units of a chosen granularity.

    Acts on convolutions and linear layers, and on the factors inside low-rank layers. The zeros survive fine-tuning
    and quantization and shrink the saved file; a masked layer needs as many MACs as before, except where whole rows or
    columns of kernel positions go (``granularity="shape"``), which leaves a smaller convolution.

    Args:
        amount: Share of the units of each layer to prune, above 0 and below 1.
        granularity: What is pruned together; see :class:`lowrank_nn.PrunedConv2d`. Layers that do not have the
            granularity (a linear layer has no kernels) stay as they are.
        criterion: ``"l1"``, ``"l2"``, ``"random"``, or ``"obd"``, which needs ``batches`` and ``loss``.
        where: Shell patterns on dotted paths of the layers wanted.
        but_not: Shell patterns of the layers to leave as they are.
        batches: Batches for the diagonal Fisher information of ``"obd"``.
        loss: ``loss(model, batch)``, a scalar, for ``"obd"``.

    Raises:
        OptionError: ``amount`` is not between 0 and 1, or ``"obd"`` lacks batches or loss.
    """

    def __init__(
        self,
        amount: float,
        *,
        granularity: str = "element",
        criterion: str = "l1",
        where: Patterns = "*",
        but_not: Patterns = (),
        batches: Iterable[Any] | None = None,
        loss: BatchLoss | None = None,
    ) -> None:
        if not 0 < amount < 1:
            raise OptionError(f"Prune: amount is a share above 0 and below 1, got {amount!r}.")
        if criterion == "obd" and (batches is None or loss is None):
            raise OptionError("Prune: criterion='obd' needs batches=... and loss=... (loss(model, batch) -> scalar).")
        self.amount, self.granularity, self.criterion = amount, granularity, criterion
        self.where, self.but_not, self.batches, self.loss = where, but_not, batches, loss

    def __repr__(self) -> str:
        return f"Prune({self.amount}, granularity={self.granularity!r}, criterion={self.criterion!r})"

    def decide(self, state: State) -> list[Decision]:
        """Decide for each matching layer.

        Raises:
            PlanError: A pattern matches nothing.
        """
        fitting = {site.path: class_for(site, _CLASSES) for site in state.sites()}
        sites = [site for site in state.sites() if fitting[site.path] is not None]
        options = {"sparsity": self.amount, "granularity": self.granularity, "criterion": self.criterion}
        decisions = []
        for site in select(sites, self.where, self.but_not, "Prune"):
            cls = fitting[site.path]
            assert cls is not None
            decisions.append(
                decide_layer(state, site, cls, options | {"seed": state.seed}, _flat_fisher(self, site.layer))
            )
        return decisions

    def measure(self, state: State, decisions: list[Decision]) -> dict[str, dict[str, Any]]:
        """Return the Fisher information of each layer to be pruned, for ``"obd"``.

        Raises:
            PlanError: The batches are used up.
        """
        if state.dry or self.criterion != "obd":
            return {
                decision.path: _flat_fisher(self, state.model.get_submodule(decision.path)) for decision in decisions
            }
        assert self.batches is not None
        assert self.loss is not None
        paths = [decision.path for decision in decisions]
        fisher = diagonal_fisher(state.model, self.batches, self.loss, paths=paths)
        missing = sorted(set(paths) - set(fisher))
        if missing:
            raise PlanError(f"Prune: the loss does not depend on {', '.join(missing)}; leave them out (but_not=...).")
        return {path: {"fisher": fisher[path]} for path in paths}


def _flat_fisher(step: Prune, layer: nn.Module) -> dict[str, Tensor]:
    """Return a stand-in for the Fisher information where the criterion needs one."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return {"fisher": weight.detach().new_ones(weight.shape)} if step.criterion == "obd" else {}
