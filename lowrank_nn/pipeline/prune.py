"""The step that prunes: weights masked by a criterion, or filters removed for good."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from lowrank_nn.errors import OptionError, is_share
from lowrank_nn.layers import CompressedLayer, PrunedConv2d, PrunedLinear
from lowrank_nn.layers._masks import GRANULARITIES, Granularity
from lowrank_nn.pipeline.apply import decide_layer, matching
from lowrank_nn.pipeline.evidence import measured_fisher
from lowrank_nn.pipeline.filters import FilterRemoval
from lowrank_nn.pipeline.select import Patterns
from lowrank_nn.pipeline.state import Decision, State, Step
from lowrank_nn.planning import BatchLoss
from lowrank_nn.planning.importance import FROM_LOSS, UNIT_CRITERIA, UnitCriterion
from lowrank_nn.planning.unit_choice import KeepRule, Scope

_CLASSES: tuple[type[CompressedLayer], ...] = (PrunedConv2d, PrunedLinear)
_MASKED_CRITERIA = ("l1", "l2", "obd", "random")


class Prune(Step):
    """Remove filters from the whole network, or hold a share of each layer's weights at zero.

    With ``granularity="filter"`` layers become smaller. What belongs to a filter is found by running the model
    (:func:`lowrank_nn.find_groups`): its row and bias, its place in every norm behind it, the columns of all layers
    that read it, and whatever a residual sum, a concatenation or a depthwise convolution ties to it; heads of an
    attention and the ranks inside low-rank layers are such units too. They go together, and every removal is proven:
    without them the model gives what it gave with them held at zero, in eval and train mode, forward and backward, its
    layer norms taken over the channels that stay. What cannot be proven stays, and the report says why.

    With any other granularity, convolutions, linear layers and the factors inside low-rank layers are masked. The
    zeros survive fine-tuning and quantization and shrink the saved file; a masked layer needs as many MACs as before,
    except where whole rows or columns of kernel positions go (``granularity="shape"``), which leaves a smaller
    convolution.

    Args:
        amount: Share of the units of each layer to prune, above 0 and below 1. For filters it may be left out: then as
            many go as the budget asks for.
        granularity: What is pruned together: ``"filter"``, or a granularity of :class:`lowrank_nn.PrunedConv2d`, which
            masks. Layers that do not have it (a linear layer has no kernels) stay as they are.
        criterion: What matters least goes: ``"l1"``, ``"l2"``, ``"random"``, or ``"obd"``. For filters also
            ``"bn_scale"``, ``"geometric_median"``, ``"taylor"`` and ``"similar"`` (what read a filter then reads its
            like); with calibration data ``"activation"``, ``"apoz"``, ``"lasso"``, ``"thinet"``, ``"obs"``; or a
            function ``criterion(model, group)``; see :func:`lowrank_nn.unit_importance`.
        scope: For filters: ``"layer"`` takes ``amount`` of every group of layers, ``"global"`` the least important of
            all groups; by default the former with an amount, the latter with a budget. With a budget, criteria that
            estimate what is lost (``"taylor"``, ``"obd"``, ``"lasso"``, ``"thinet"``, ``"obs"``) count per share of the
            budget that is saved.
        round_to: For filters: what the number of those that stay in a layer is a multiple of.
        min_keep: For filters: share of each group that stays at least; one always does.
        where: Shell patterns on dotted paths of the layers wanted. A filter goes only if all layers that compute a part
            of it are wanted, such as all that add to one residual sum.
        but_not: Shell patterns of the layers to leave as they are; their inputs may still become fewer.
        batches: Batches for ``loss``.
        loss: ``loss(model, batch)``, a scalar, for ``"obd"`` and ``"taylor"``.
        reconstruct: For filters, where there are calibration data: whether to fit the layers that read removed ones
            anew, in the order of execution, to give what they gave out of what is left (least squares; mean outputs
            are kept by biases or by the norms behind). Holds the activations of all calibration data at one point of
            the network, before and after, in memory.

    Raises:
        OptionError: ``amount`` is not between 0 and 1 or contradicts ``min_keep``, there is no such granularity,
            criterion or scope, one that needs batches and loss lacks them, or what only filters can heed comes with
            another granularity.
    """

    def __init__(
        self,
        amount: float | None = None,
        *,
        granularity: Granularity = "element",
        criterion: str | UnitCriterion = "l1",
        scope: Scope | None = None,
        round_to: int = 1,
        min_keep: float | None = None,
        where: Patterns = "*",
        but_not: Patterns = (),
        batches: Iterable[Any] | None = None,
        loss: BatchLoss | None = None,
        reconstruct: bool = True,
    ) -> None:
        if amount is not None and not (is_share(amount) and amount < 1):
            raise OptionError(f"Prune: amount is a share above 0 and below 1, got {amount!r}.")
        if granularity not in GRANULARITIES:
            raise OptionError(f"Prune: granularity must be one of {', '.join(GRANULARITIES)}, got {granularity!r}.")
        if criterion in FROM_LOSS and (batches is None or loss is None):
            raise OptionError(
                f"Prune: criterion={criterion!r} needs batches=... and loss=... (loss(model, batch) -> scalar)."
            )
        known = UNIT_CRITERIA if granularity == "filter" else _MASKED_CRITERIA
        if criterion not in known and (granularity != "filter" or not callable(criterion)):
            raise OptionError(
                f"Prune: criterion must be one of {', '.join(known)} with granularity={granularity!r}, got "
                f"{criterion!r}."
            )
        self.amount, self.granularity, self.criterion = amount, granularity, criterion
        self.where, self.but_not, self.batches, self.loss = where, but_not, batches, loss
        self.filters: FilterRemoval | None = None
        if granularity == "filter":
            least = min(0.1, 1 - (amount or 0)) if min_keep is None else min_keep
            keep = KeepRule(scope or ("global" if amount is None else "layer"), round_to, least)
            if amount is not None and amount > 1 - least + 1e-9:
                raise OptionError(f"Prune: amount={amount} and min_keep={min_keep} contradict each other.")
            self.filters = FilterRemoval(amount, keep, criterion, where, but_not, batches, loss, reconstruct)
        elif amount is None or scope is not None or round_to != 1 or min_keep is not None:
            raise OptionError(
                f"Prune: granularity={granularity!r} masks the share amount of each layer; scope, round_to, min_keep "
                "and a budget instead of an amount are for granularity='filter'."
            )

    def _shown(self) -> dict[str, Any]:
        names = ("amount", "granularity", "criterion", "where", "but_not", "loss")
        named = {name: getattr(self, name) for name in names}
        if self.filters is None:
            return named
        keep = self.filters.keep
        named |= {"scope": keep.scope, "round_to": keep.round_to, "min_keep": keep.min_keep}
        return named | {"reconstruct": self.filters.reconstruct}

    def allocates(self) -> bool:
        """Whether the budget says how much is removed."""
        return self.amount is None

    def decide(self, state: State) -> list[Decision]:
        """Decide for each matching layer.

        Raises:
            PlanError: A pattern matches nothing, or there is neither an amount nor a budget.
            BudgetError: The budget cannot be met.
        """
        if self.filters is not None:
            return self.filters.decide(state)
        options = {
            "sparsity": self.amount,
            "granularity": self.granularity,
            "criterion": self.criterion,
            "seed": state.seed,
        }
        chosen = matching(state, _CLASSES, self.where, self.but_not, "Prune")
        return [decide_layer(state, site, cls, options, self._stand_ins(site.layer)) for site, cls in chosen]

    def execute(self, state: State, decisions: list[Decision]) -> None:
        """Remove filters, or replace layers by masked ones, as decided."""
        if self.filters is not None:
            self.filters.execute(state, decisions)
        else:
            super().execute(state, decisions)

    def measure(self, state: State, decisions: list[Decision]) -> dict[str, dict[str, Any]]:
        """Return the Fisher information of each layer to be pruned, for ``"obd"``.

        Raises:
            PlanError: The loss does not depend on some of the layers.
        """
        if state.dry or self.criterion != "obd":
            return {d.path: self._stand_ins(state.model.get_submodule(d.path)) for d in decisions}
        assert self.batches is not None
        assert self.loss is not None
        return measured_fisher("Prune", state, decisions, self.batches, self.loss)

    def _stand_ins(self, layer: nn.Module) -> dict[str, Any]:
        """Return a stand-in for the Fisher information where the criterion needs one."""
        weight = layer.weight
        assert isinstance(weight, Tensor)
        return {"fisher": weight.detach().new_ones(weight.shape)} if self.criterion == "obd" else {}
