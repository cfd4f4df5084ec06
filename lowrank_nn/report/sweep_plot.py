"""A picture of a sweep: accuracy, or another metric, against what the models cost."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowrank_nn.errors import OptionError
from lowrank_nn.report.plots import new_figure, save_figure, style
from lowrank_nn.report.render import count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_QUANTITIES = {"params": "parameters", "macs": "multiply-accumulates", "bytes": "bytes", "ms": "latency (ms)"}


def sweep_figure(rows: Iterable[Mapping[str, Any]], metric: str = "accuracy") -> Figure:
    """Draw a metric against what the models cost, one line per method.

    Args:
        rows: One per model: the metric, any of ``params``, ``macs``, ``bytes`` and ``ms``, and the name of the method
            under ``method``. Rows of the method ``"dense"`` are drawn as a level to compare with.
        metric: Key of the metric in ``rows``, and the label of its axis.

    Raises:
        OptionError: A row has no metric, or no cost is in all rows.
        MissingExtraError: matplotlib is not installed.
    """
    rows = list(rows)
    wanted = [key for key in _QUANTITIES if rows and all(key in row for row in rows)]
    if not wanted or not all(metric in row for row in rows):
        raise OptionError(
            f"plot_sweep: every row needs {metric!r} and the same of {', '.join(map(repr, _QUANTITIES))}; got rows "
            f"with {', '.join(sorted({key for row in rows for key in row})) or 'nothing'}."
        )
    figure = new_figure((1 + 3.4 * len(wanted), 3.4))
    figure.set_layout_engine("constrained", wspace=0.08)
    panels = list(figure.subplots(1, len(wanted), squeeze=False, sharey=True)[0])
    for axes, key in zip(panels, wanted, strict=True):
        _draw_sweep(axes, rows, key, metric)
    panels[0].set_ylabel(metric)
    handles, labels = panels[0].get_legend_handles_labels()
    if labels:
        figure.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)
    return figure


def plot_sweep(rows: Iterable[Mapping[str, Any]], path: str | Path, *, metric: str = "accuracy") -> None:
    """Save a picture of a metric against what the models cost, one line per method.

    Args:
        rows: One per model: the metric, any of ``params``, ``macs``, ``bytes`` and ``ms``, and the name of the method
            under ``method``. Rows of the method ``"dense"`` are drawn as a level to compare with.
        path: File to write; its ending says the format (png, pdf, svg).
        metric: Key of the metric in ``rows``, and the label of its axis.

    Raises:
        OptionError: A row has no metric, no cost is in all rows, or there is no such format.
        MissingExtraError: matplotlib is not installed.
    """
    save_figure(sweep_figure(rows, metric), path)


def _draw_sweep(axes: Axes, rows: Sequence[Mapping[str, Any]], key: str, metric: str) -> None:
    methods = list(dict.fromkeys(str(row.get("method", "")) for row in rows))
    for index, method in enumerate(name for name in methods if name != "dense"):
        points = sorted((row[key], row[metric]) for row in rows if str(row.get("method", "")) == method)
        axes.plot(*zip(*points, strict=True), linewidth=1.5, markersize=5, label=method or None, **style(index))
    for row in rows:
        if row.get("method") == "dense":
            axes.axhline(row[metric], color="grey", linewidth=1, linestyle="--", label="dense")
            axes.plot(row[key], row[metric], "*", markersize=11, color="grey")
    low, high = min(row[key] for row in rows), max(row[key] for row in rows)
    if high > 3 * low > 0:
        axes.set_xscale("log")
        axes.set_xticks(_log_ticks(low / 1.2, high * 1.2))
        axes.set_xticks([], minor=True)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}" if key == "ms" else count(value))
    axes.set_xlabel(_QUANTITIES[key])
    axes.grid(alpha=0.3)


def _log_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return round numbers from ``low`` to ``high`` that are evenly spread on a logarithmic axis."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [first * 10.0**decade for decade in decades for first in (1, 2, 5)]
    shown = [tick for tick in ticks if low <= tick <= high]
    if len(shown) <= most:
        return shown
    whole = [10.0**decade for decade in decades if low <= 10.0**decade <= high]
    return whole[:: -(-len(whole) // most)]
