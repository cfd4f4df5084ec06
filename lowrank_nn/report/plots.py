"""Pictures of the layers: what each had to choose from, and its spectrum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from lowrank_nn.errors import MissingExtraError, OptionError, check_whole_number
from lowrank_nn.layers import CompressedLayer
from lowrank_nn.planning import Candidate, LayerChoices
from lowrank_nn.planning.layer_choices import Spectrum

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which people tell apart whatever colours they see; markers say the same in black and white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "^", "s", "D", "v", "P", "X")
_CHOSEN: dict[str, Any] = {"marker": "*", "markersize": 12, "color": "black", "markerfacecolor": "#F0E442"}
_MODES = ("one matrix", "output channels", "input channels")
_PANEL, _GAP = (1.9, 1.3), (0.3, 0.55)  # width and height of a panel and between panels, in inches
_LEFT, _RIGHT, _TOP, _BOTTOM = 0.65, 1.4, 0.8, 0.6
_ONE_ROW = 6  # panels
_FLOOR = 1e-3  # singular values below this share of the largest are not drawn
_COSTS = {"params": "parameters", "macs": "MACs", "bytes": "bytes", "latency": "measured time"}


def candidates_figure(choices: Sequence[LayerChoices], cost: str = "params", most: int = 30) -> Figure:
    """Draw, for each layer, the error of every candidate against its cost, and which one was chosen.

    Args:
        choices: The choices of each layer.
        cost: ``"params"``, ``"macs"``, ``"bytes"`` or ``"latency"``.
        most: Layers to draw at most; the most expensive ones are taken.

    Raises:
        OptionError: There is nothing to draw, or no such cost, or ``most`` is no whole number from 1.
        MissingExtraError: matplotlib is not installed.
    """
    if cost not in _COSTS:
        raise OptionError(f"plot: cost must be one of {', '.join(_COSTS)}, got {cost!r}.")
    known = [layer for layer in choices if len(layer.candidates) > 1 and _cost(layer.candidates[0], cost) > 0]
    shown = _largest(known, [_cost(layer.candidates[0], cost) for layer in known], most)
    if not shown:
        raise OptionError(
            "plot: there are no candidates to draw. They come with LowRank() under a budget, without a rank rule; the "
            "latency only with a budget of it."
        )
    figure, panels = _panels(len(shown), sharex=True, sharey=True)
    names = sorted({_name(candidate) for layer in shown for candidate in layer.candidates[1:]})
    for axes, layer in zip(panels, shown, strict=True):
        _draw_candidates(axes, layer, cost, names)
    panels[0].set_xscale("log")
    panels[0].minorticks_off()
    panels[0].xaxis.set_major_formatter(lambda share, _: f"{100 * share:g}")
    panels[0].set_xlim(left=min(panels[0].get_xlim()[0], 0.09))
    panels[0].set_ylim(-0.05, 1.05)
    for index, name in enumerate(names):
        panels[0].plot([], [], linestyle="none", label=name, **style(index))
    panels[0].plot([], [], linestyle="none", label="chosen", **_CHOSEN)
    _label(figure, f"{_COSTS[cost]} kept (% of the dense layer)", "relative error", panels[0])
    _entitle(figure, "Candidates of each layer, and the chosen one", len(shown), len(known))
    return figure


def spectra_figure(choices: Sequence[LayerChoices], model: nn.Module, most: int = 30) -> Figure:
    """Draw, for each layer, the singular values that its rank cuts off, and the rank.

    Args:
        choices: The choices of each layer.
        model: The dense model, with its weights.
        most: Layers to draw at most; the largest are taken.

    Raises:
        OptionError: There is nothing to draw, ``most`` is no whole number from 1, or ``model`` is another model.
        MissingExtraError: matplotlib is not installed.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for layer in choices:
        if isinstance(modules.get(layer.path), CompressedLayer | None):
            raise OptionError(
                f"plot: the model has no dense layer {layer.path}. Pass the model that was to be compressed."
            )
    layers = [(layer, modules[layer.path]) for layer in choices]
    sizes = [sum(parameter.numel() for parameter in dense.parameters()) for _, dense in layers]
    spectra = [(layer, layer.spectra(dense)) for layer, dense in _largest(layers, sizes, most)]
    shown = [(layer, modes) for layer, modes in spectra if modes]
    if not shown:
        raise OptionError("plot: there is no layer to draw: the low-rank steps of the recipe could change none.")
    figure, panels = _panels(len(shown), sharex=False, sharey=True)
    for axes, (layer, modes) in zip(panels, shown, strict=True):
        _draw_spectrum(axes, layer, modes)
    panels[0].set_yscale("log")
    panels[0].minorticks_off()
    panels[0].set_ylim(_FLOOR, 1.5)
    drawn = {name for _, modes in shown for name in _mode_names(modes)}
    for colour, name in zip(_COLOURS, _MODES, strict=False):
        if name in drawn:
            panels[0].plot([], [], color=colour, linewidth=2, label=name)
    if any(mode.rank is not None for _, modes in shown for mode in modes):
        panels[0].plot([], [], color="grey", linewidth=1, linestyle=":", label="chosen rank")
    _label(figure, "index of the singular value", "singular value / largest", panels[0])
    _entitle(figure, "Singular values, and the rank that was chosen", len(shown), len(layers))
    return figure


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure in the format of the file's ending.

    Raises:
        OptionError: The ending is of no format that matplotlib writes.
    """
    formats = figure.canvas.get_supported_filetypes()
    if Path(path).suffix.removeprefix(".").lower() not in formats:
        raise OptionError(f"plot: {str(path)!r} must end in one of .{', .'.join(sorted(formats))}.")
    figure.savefig(path, dpi=150)


def new_figure(size: tuple[float, float]) -> Figure:
    """Return an empty figure, its size in inches.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("plots need matplotlib: pip install 'lowrank_nn[plots]'.") from error
    return Figure(figsize=size)


def style(index: int) -> dict[str, Any]:
    """Return the colour and the marker of the series of this number."""
    colour = _COLOURS[index % len(_COLOURS)]
    return {"color": colour, "marker": _MARKERS[index % len(_MARKERS)], "markeredgewidth": 0}


def _draw_candidates(axes: Axes, layer: LayerChoices, cost: str, names: Sequence[str]) -> None:
    whole = _cost(layer.candidates[0], cost)
    for index, name in enumerate(names):
        mine = [candidate for candidate in layer.candidates if _name(candidate) == name]
        share = [_cost(candidate, cost) / whole for candidate in mine]
        error = [math.sqrt(candidate.error) for candidate in mine]
        axes.plot(share, error, linestyle="none", markersize=3, alpha=0.6, **style(index))
    chosen = layer.chosen
    if chosen is not None:
        point = (_cost(chosen, cost) / whole, math.sqrt(chosen.error))
        axes.plot(*point, **_CHOSEN, zorder=3)
        _title(axes, layer, f", {100 * _cost(chosen, cost) / whole:.0f} %" if chosen.layer_class else "")


def _draw_spectrum(axes: Axes, layer: LayerChoices, modes: Sequence[Spectrum]) -> None:
    for (values, rank), name in zip(modes, _mode_names(modes), strict=True):
        colour, order = _COLOURS[_MODES.index(name)], np.arange(1, len(values) + 1)
        relative = values / max(float(values[0]), 1e-300)
        visible = np.where(relative >= _FLOOR, relative, np.nan)
        axes.plot(order, visible, color=colour, linewidth=1, alpha=0.5)
        if rank is not None:
            axes.plot(order[:rank], visible[:rank], color=colour, linewidth=2.5)
            axes.axvline(rank + 0.5, color=colour, linewidth=1, linestyle=":")
    axes.set_xlim(0.5, max(len(values) for values, _ in modes) + 0.5)
    _title(axes, layer)


def _panels(number: int, *, sharex: bool, sharey: bool) -> tuple[Figure, list[Axes]]:
    fewest = max(4, math.isqrt(number))
    columns = number if number <= _ONE_ROW else min(range(fewest, fewest + 3), key=lambda c: (-number % c, -c))
    rows = -(-number // columns)
    inner = [n * size + (n - 1) * gap for n, size, gap in zip((columns, rows), _PANEL, _GAP, strict=True)]
    width, height = _LEFT + inner[0] + _RIGHT, _TOP + inner[1] + _BOTTOM
    figure = new_figure((width, height))
    # Laid out by hand: with many panels that takes a third of the time of an automatic layout.
    figure.subplots_adjust(
        left=_LEFT / width,
        right=1 - _RIGHT / width,
        top=1 - _TOP / height,
        bottom=_BOTTOM / height,
        wspace=_GAP[0] / _PANEL[0],
        hspace=_GAP[1] / _PANEL[1],
    )
    grid = figure.subplots(rows, columns, sharex=sharex, sharey=sharey, squeeze=False).flatten()
    for axes in grid[number:]:
        axes.remove()
    for index, axes in enumerate(grid[:number]):
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
        if sharex and index + columns >= number:
            axes.tick_params(labelbottom=True)
    return figure, list(grid[:number])


def _entitle(figure: Figure, title: str, shown: int, known: int) -> None:
    width, height = figure.get_size_inches()
    some = "" if shown == known else f" ({shown} of {known} layers, the largest)"
    figure.suptitle(title + some, fontsize=10, x=_LEFT / width, y=1 - 0.12 / height, ha="left", va="top")


def _label(figure: Figure, x: str, y: str, labelled: Axes) -> None:
    width, height = figure.get_size_inches()
    figure.supxlabel(x, fontsize=9, x=(1 + (_LEFT - _RIGHT) / width) / 2, y=0.1 / height)
    figure.supylabel(y, fontsize=9, x=0.1 / width)
    below_title = (1.0, 1 - 0.5 / height)
    handles = labelled.get_legend_handles_labels()
    figure.legend(*handles, loc="upper right", bbox_to_anchor=below_title, fontsize=8, frameon=False)


def _mode_names(modes: Sequence[Spectrum]) -> tuple[str, ...]:
    return _MODES[:1] if len(modes) == 1 else _MODES[1:]


def _largest(items: Sequence[Any], sizes: Sequence[float], most: int) -> list[Any]:
    """Return the largest items, in their order."""
    check_whole_number("plot: most", most, 1)
    kept = sorted(sorted(range(len(items)), key=lambda i: -sizes[i])[:most])
    return [items[i] for i in kept]


def _cost(candidate: Candidate, cost: str) -> float:
    return candidate.latency if cost == "latency" else float(getattr(candidate.cost, cost))


def _name(candidate: Candidate) -> str:
    return "dense" if candidate.layer_class is None else _format(candidate.layer_class)


def _format(cls: type[nn.Module]) -> str:
    return cls.__name__.removesuffix("Conv2d").removesuffix("Linear")


def _title(axes: Axes, layer: LayerChoices, more: str = "") -> None:
    chosen = "dense"
    if layer.layer_class is not None:
        rank = str(layer.options["rank"]).replace("None", "-")
        chosen = f"{_format(layer.layer_class)} rank {rank}"
    axes.set_title(f"{_short(layer.path)}\n{chosen}{more}", fontsize=7)


def _short(path: str, most: int = 30) -> str:
    return (path if len(path) <= most else f"..{path[2 - most :]}") or "(model)"
