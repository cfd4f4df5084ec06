"""The step that replaces chosen layers by a chosen class, and the decision about one layer that all steps share."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any

from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lowrank_nn.errors import PlanError, RankError, UnsupportedLayerError
from lowrank_nn.graph import Site, site_cost
from lowrank_nn.layers import LAYERS, CompressedLayer, LowRankLayer, RankRule, read_layer
from lowrank_nn.pipeline.select import Patterns, select
from lowrank_nn.pipeline.state import Decision, State, Step, build


class Apply(Step):
    """Replace every layer that matches by a compressed class, with the same options everywhere.

    A layer that the class cannot carry over, that the model never calls, whose weight is shared with another layer,
    or that would not become smaller stays as it is; the report says why.

    Args:
        layer_class: The compressed class, or several: each layer takes the first that replaces its kind.
        where: Shell patterns on dotted paths of the layers wanted.
        but_not: Shell patterns of the layers to leave as they are.
        strict: Raise instead of leaving a matching layer as it is.
        **options: Options of the class's ``from_pretrained_layer``, such as ``rank=(16, 16)``.

    Raises:
        PlanError: It is no such class, an option is unknown to the class, or one that it needs is missing.
    """

    def __init__(
        self,
        layer_class: type[CompressedLayer] | Sequence[type[CompressedLayer]],
        *,
        where: Patterns = "*",
        but_not: Patterns = (),
        strict: bool = False,
        **options: Any,
    ) -> None:
        self.layer_classes = tuple(layer_class) if isinstance(layer_class, (list, tuple)) else (layer_class,)
        self.where, self.but_not, self.strict, self.options = where, but_not, strict, options
        for cls in self.layer_classes:
            if not (isinstance(cls, type) and issubclass(cls, CompressedLayer)):
                raise PlanError(
                    f"Apply: expected a class of compressed layers, or several, got {cls!r}. There are: "
                    f"{', '.join(LAYERS)}."
                )
            check_options(cls, options)

    def _shown(self) -> dict[str, Any]:
        one, *more = self.layer_classes
        named = {"layer_class": self.layer_classes if more else one, "where": self.where, "but_not": self.but_not}
        return named | {"strict": self.strict} | self.options

    def decide(self, state: State) -> list[Decision]:
        """Decide for each matching layer.

        Raises:
            PlanError: A pattern matches nothing, or ``strict`` is set and some layers cannot be replaced.
        """
        chosen = matching(state, self.layer_classes, self.where, self.but_not, "Apply")
        watched = state.watch(chosen, "Apply: ranks")
        decisions = [decide_layer(state, site, cls, self.options) for site, cls in watched]
        left = [f"{decision.path}: {decision.note}" for decision in decisions if decision.layer_class is None]
        if self.strict and left:
            raise PlanError("Apply: strict is set, and these layers cannot be replaced: " + "; ".join(left))
        return decisions


def matching(
    state: State, classes: Sequence[type[CompressedLayer]], where: Patterns, but_not: Patterns, step: str
) -> list[tuple[Site, type[CompressedLayer]]]:
    """Return the layers wanted of the kinds that ``classes`` replace, each with the first class for its kind.

    Args:
        state: The dry run.
        classes: The compressed classes.
        where: Shell patterns on dotted paths of the layers wanted.
        but_not: Shell patterns of the layers to leave as they are.
        step: Name of the step, for the message.

    Raises:
        PlanError: A pattern matches nothing.
    """
    sites = state.sites()
    fitting = {site.path: (site, cls) for site in sites if (cls := class_for(site, classes)) is not None}
    others = [site for site in sites if site.path not in fitting]
    wanted = select([site for site, _ in fitting.values()], where, but_not, step, others)
    return [fitting[site.path] for site in wanted]


def class_for(site: Site, classes: Sequence[type[CompressedLayer]]) -> type[CompressedLayer] | None:
    """Return the first class that can stand in for this kind of layer, or None.

    Low-rank classes come before pruning and quantization: they leave the parts of a factorised layer alone, and take
    a pruned or quantized layer only to refuse it, so that the report says why it stays.
    """
    for cls in classes:
        layer = site.layer
        if issubclass(cls, LowRankLayer):
            if site.inside is not None or isinstance(layer, LowRankLayer):
                continue
            if isinstance(layer, CompressedLayer) and layer.replaces is cls.replaces:
                return cls
        if isinstance(layer, (cls.replaces, *cls.stacks_on)):
            return cls
    return None


def decide_layer(
    state: State,
    site: Site,
    cls: type[CompressedLayer],
    options: dict[str, Any],
    stand_ins: dict[str, Any] | None = None,
) -> Decision:
    """Decide whether ``cls`` replaces the layer at ``site``, with rank rules resolved from the given weights.

    Args:
        state: The dry run.
        site: The layer, on the meta device.
        cls: The compressed class.
        options: Options of its ``from_pretrained_layer``.
        stand_ins: Values for options that will be measured on data later, so that the layer can be built now.
    """
    note = refusal(site)
    if note:
        return Decision(site.path, None, note=note)
    try:
        options = dict(_with_rank(state, site, cls, options))
        decision = Decision(site.path, cls, options)
        new = build(decision, site.layer, stand_ins or {})
    except (UnsupportedLayerError, RankError) as error:
        return Decision(site.path, None, note=error.message)
    if why := _not_worth_it(site, new):
        shown = ", ".join(f"{name}={value!r}" for name, value in options.items())
        return Decision(site.path, None, note=f"{cls.__name__}({shown}) {why}")
    return decision


def refusal(site: Site) -> str:
    """Return why a layer cannot be replaced whatever the class; empty if it can."""
    if not site.calls and isinstance(site.layer, NonDynamicallyQuantizableLinear):  # torch has no other use for it
        return "its attention reads its weight and never calls it: pass split_attention(model) for layers instead"
    if not site.calls:
        return "the model never calls it"
    if site.tied_to:
        return f"its weight is shared with {', '.join(site.tied_to)}"
    return ""


def without_compressed_form(site: Site) -> bool:
    """Whether a layer multiplies by a weight and is of a kind that no class of this library replaces."""
    kinds: tuple[type, ...] = (CompressedLayer, *(cls.replaces for cls in LAYERS.values()))
    weights = [p for p in site.layer.parameters(recurse=False) if p.dim() >= 2]
    return site.inside is None and bool(weights) and not isinstance(site.layer, kinds)


def check_options(cls: type[CompressedLayer], options: dict[str, Any]) -> None:
    """Refuse options that ``cls.from_pretrained_layer`` does not take, and to go without those that it needs.

    Raises:
        PlanError: An option is unknown to the class, or missing.
    """
    parameters = inspect.signature(cls.from_pretrained_layer).parameters
    known = {name: option for name, option in parameters.items() if name != "layer"}
    unknown = sorted(options.keys() - known.keys())
    if unknown:
        raise PlanError(f"Apply: {cls.__name__} takes no option {', '.join(unknown)}; it takes {', '.join(known)}.")
    needed = (name for name, option in known.items() if option.default is inspect.Parameter.empty)
    missing = [name for name in needed if name not in options]
    if missing:
        raise PlanError(f"Apply: {cls.__name__} needs {', '.join(missing)}: Apply({cls.__name__}, {missing[0]}=...).")


def _with_rank(state: State, site: Site, cls: type[CompressedLayer], options: dict[str, Any]) -> dict[str, Any]:
    """Return the options with the rank that a rank rule gives for the weights of the layer."""
    if not issubclass(cls, LowRankLayer) or isinstance(site.layer, CompressedLayer):
        return options
    source = read_layer(state.weights_of(site), cls)  # refuses what only real weights can show, such as NaN
    rank = options.get("rank")
    if not isinstance(rank, RankRule):
        return options
    variant = {name: value for name, value in options.items() if name != "rank"}
    return options | {"rank": cls.resolve_rank(rank, source, **variant)}


def _not_worth_it(site: Site, new: CompressedLayer) -> str:
    """Return why ``new`` does not replace the layer; empty if it saves something and takes no more params or MACs.

    What it may save are params, MACs, bytes or nonzeros.
    """
    old, now = site_cost(site), site_cost(dataclasses.replace(site, layer=new))
    smaller = now.params < old.params or now.bytes < old.bytes or now.nonzeros < old.nonzeros
    if not smaller and now.macs >= old.macs:
        return "would save nothing"
    if now.params > old.params:
        return f"would take {now.params:,} params in place of {old.params:,}"
    return f"would take {now.macs:,} MACs in place of {old.macs:,}" if now.macs > old.macs else ""
