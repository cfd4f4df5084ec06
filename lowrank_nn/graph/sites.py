"""Which layers of a model are really called, in which order and with which shapes."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from lowrank_nn.cost.flops import FlopCounter
from lowrank_nn.errors import PlanError, UnsupportedLayerError
from lowrank_nn.graph.inputs import first_shape, run_model
from lowrank_nn.graph.preserve import evaluating
from lowrank_nn.layers import CompressedLayer

KINDS = (
    _ConvNd,
    nn.Linear,
    nn.Bilinear,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.RNNBase,
    nn.RNNCellBase,
    _NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)
"""Layers that are sites in any case: with children, as parametrized ones have, or without parameters of their own."""

PRICED = (_ConvNd, nn.Linear, nn.RNNBase, nn.RNNCellBase, CompressedLayer)
"""Layers whose multiply-accumulates :func:`lowrank_nn.graph.site_cost` knows by formula."""

PATHS_SHOWN = 50


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a layer.

    Attributes:
        input_shape: Shape of the first tensor among the arguments; ``()`` if there is none.
        output_shape: Shape of the first tensor in what it returned; ``()`` if there is none.
    """

    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Site:
    """A place in the model where a layer stands.

    Attributes:
        path: Dotted path of the layer; "" if the model itself is the layer.
        layer: The layer.
        aliases: Further paths of the same layer, where modules share it.
        calls: One entry per call in the recorded forward; empty if it was never called.
        inside: Path of the nearest compressed layer that the layer is a part of; None outside any.
        tied_to: ``"path.parameter"`` of every parameter of another module that is one of this layer's own.
        weight_reads: How often code outside the layer read its weight in the recorded forward, as
            ``F.linear(x, self.fc.weight)`` does; 0 for layers without a formula and inside compressed ones.
    """

    path: str
    layer: nn.Module
    aliases: tuple[str, ...]
    calls: tuple[Call, ...]
    inside: str | None
    tied_to: tuple[str, ...]
    weight_reads: int = 0


@dataclasses.dataclass(frozen=True)
class Recording:
    """What one forward of a model did.

    Attributes:
        sites: All sites in the order of their first call; those never called last, in module order.
        other_macs: Multiply-accumulates outside the layers that have a formula: attention products, matrix products
            in a forward, custom layers; not those that reading a compressed layer's weight takes.
        output: What the model returned.
    """

    sites: tuple[Site, ...]
    other_macs: int
    output: Any

    def __getitem__(self, path: str) -> Site:
        """Return the site at ``path`` (or at an alias of it).

        Raises:
            PlanError: There is no layer at this path.
        """
        for site in self.sites:
            if path == site.path or path in site.aliases:
                return site
        raise PlanError(f"no layer at {path!r}. {describe_paths(site.path for site in self.sites)}")


def record(model: nn.Module, example_inputs: Any) -> Recording:
    """Run ``model`` once, in eval mode and without gradients, and return which layers were called and how.

    Sites are the layers of the kinds that torch knows by weight (convolutions, linear, embedding, recurrent and
    normalisation layers), all other modules without children that hold parameters, compressed layers, and the
    layers inside these. The model and the process are left as they were, also after an error.

    Args:
        model: Any module whose forward runs: control flow may depend on data, layers may be shared or run repeatedly.
        example_inputs: What it is called with; see :func:`lowrank_nn.graph.call_model`.

    Raises:
        UnsupportedLayerError: The model is compiled or scripted, or holds layers that have no weights yet.
        PlanError: The forward failed; the error it raised is chained.
    """
    refuse_opaque(model)
    sites = find_sites(model)
    log = _CallLog()
    with evaluating(model):
        for site in sites:
            vars(site.layer)["forward"] = log.watch(site)
            if _is_priced(site):
                log.watch_reads(site)
        with log.counter:
            output = run_model(model, example_inputs)
    return Recording(log.ordered(sites), log.other_macs(), output)


def find_sites(model: nn.Module) -> list[Site]:
    """Return the sites of ``model`` in module order, without calls; nothing is run."""
    paths: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(path)
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module, (path, *_) in paths.items():
        for name, parameter in module.named_parameters(prefix=path, recurse=False, remove_duplicate=False):
            owners.setdefault(id(parameter), []).append((module, name))
    compressed = {path for path, *_ in (paths[m] for m in paths if isinstance(m, CompressedLayer))}
    sites = []
    for module, (path, *aliases) in paths.items():
        if _is_site(module):
            shared = (owner for p in module.parameters(recurse=False) for owner in owners[id(p)])
            tied = tuple(dict.fromkeys(name for other, name in shared if other is not module))
            sites.append(Site(path, module, tuple(aliases), (), _enclosing(path, compressed), tied))
    return sites


def describe_paths(paths: Iterable[str]) -> str:
    """Return a sentence that lists the paths there are, for error messages."""
    names = [path or '"" (the model itself)' for path in paths]
    more = f" and {len(names) - PATHS_SHOWN} more" if len(names) > PATHS_SHOWN else ""
    return f"There are: {', '.join(names[:PATHS_SHOWN]) or 'none'}{more}."


class _CallLog:
    """Calls of watched layers, and the flops spent in those that are priced by formula."""

    def __init__(self) -> None:
        self.counter = FlopCounter()
        self._calls: dict[str, list[Call]] = {}
        self._reads: collections.Counter[str] = collections.Counter()
        self._priced_flops = 0
        self._inside_priced = False

    def watch(self, site: Site) -> Callable[..., Any]:
        """Return a forward that does what the layer's does and logs the call."""
        forward = site.layer.forward
        priced = _is_priced(site)

        @functools.wraps(forward)
        def watched(*args: Any, **kwargs: Any) -> Any:
            shape = first_shape((args, kwargs))
            calls = self._calls.setdefault(site.path, [])
            with self._price() if priced else contextlib.nullcontext():
                output = forward(*args, **kwargs)
            calls.append(Call(shape, first_shape(output)))
            return output

        return watched

    def watch_reads(self, site: Site) -> None:
        """Have reads of the weight noted, until the layer's attributes are restored."""
        layer, namespace = site.layer, vars(site.layer)
        if not isinstance(layer, CompressedLayer):
            namespace["_parameters"] = _WatchedTable(layer._parameters, functools.partial(self._note_read, site.path))
            return
        dense_weight = layer.dense_weight

        def watched() -> Tensor:
            self._note_read(site.path)
            with self._price():
                return dense_weight()

        namespace["dense_weight"] = watched

    def _note_read(self, path: str) -> None:
        if not self._inside_priced:  # a layer's own forward reads its weight too, and is priced by formula
            self._reads[path] += 1

    def ordered(self, sites: list[Site]) -> tuple[Site, ...]:
        """Return ``sites`` with their calls, in the order of the first one."""
        by_path = {site.path: dataclasses.replace(site, weight_reads=self._reads[site.path]) for site in sites}
        called = [dataclasses.replace(by_path.pop(path), calls=tuple(calls)) for path, calls in self._calls.items()]
        return (*called, *by_path.values())

    def other_macs(self) -> int:
        """Return the multiply-accumulates outside the priced layers (two flops each)."""
        return (self.counter.flops - self._priced_flops) // 2

    @contextlib.contextmanager
    def _price(self) -> Iterator[None]:
        if self._inside_priced:
            yield
            return
        before, self._inside_priced = self.counter.flops, True
        try:
            yield
        finally:
            self._priced_flops += self.counter.flops - before
            self._inside_priced = False


class _WatchedTable(dict[str, Any]):
    """A module's table of parameters that tells when the one named ``weight`` is taken from it."""

    def __init__(self, table: Mapping[str, Any], note: Callable[[], None]) -> None:
        super().__init__(table)
        self._note = note

    def __getitem__(self, name: str) -> Any:
        if name == "weight":
            self._note()
        return super().__getitem__(name)


def _is_priced(site: Site) -> bool:
    return site.inside is None and isinstance(site.layer, PRICED)


def _is_site(module: nn.Module) -> bool:
    if isinstance(module, (*KINDS, CompressedLayer)):
        return True
    return not module._modules and any(p is not None for p in module._parameters.values())


def _enclosing(path: str, compressed: set[str]) -> str | None:
    """Return the nearest proper prefix of ``path`` that is in ``compressed``."""
    while path:
        path = path.rpartition(".")[0]
        if path in compressed:
            return path
    return None


def refuse_opaque(model: nn.Module) -> None:
    """Refuse a model whose layers cannot be watched or have no weights yet.

    Raises:
        PlanError: It is not a module.
        UnsupportedLayerError: It holds a compiled or scripted module, or layers that have no weights yet.
    """
    if not isinstance(model, nn.Module):
        raise PlanError(f"expected an nn.Module, got {type(model).__name__}.")
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule) or _is_compiled(module):
            raise UnsupportedLayerError(
                f"{type(module).__name__}: calls inside a compiled or scripted module cannot be watched. "
                "Pass the original module, and compile the result.",
                path=path,
            )
        if isinstance(module, LazyModuleMixin) or any(is_lazy(p) for p in module._parameters.values()):
            raise UnsupportedLayerError(
                f"{type(module).__name__} has no weight yet. Run the model once before.", path=path
            )


def _is_compiled(module: nn.Module) -> bool:
    # Importing dynamo takes a second and adds a warnings filter; where nobody has, nothing is compiled.
    return "torch._dynamo" in sys.modules and isinstance(module, torch._dynamo.OptimizedModule)
