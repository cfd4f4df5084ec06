"""What compression did to each layer and to the whole, and what it cost."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lowrank_nn.cost import Cost
from lowrank_nn.errors import LowRankError
from lowrank_nn.graph import Recording, Site, model_cost, site_cost
from lowrank_nn.graph.fold import norm_scale, scaled_weight
from lowrank_nn.graph.rescaling import Rescaling, rescaled_weight
from lowrank_nn.layers import CompressedLayer
from lowrank_nn.planning import LayerChoices
from lowrank_nn.report import plots, render
from lowrank_nn.report.describe import describe, describe_size
from lowrank_nn.storage import packed_size

logger = logging.getLogger(__name__)

_ROWS = 64  # rows of a weight that are compared at a time


@dataclasses.dataclass(frozen=True)
class Row:
    """One layer, before and after.

    Attributes:
        path: The layer's dotted path.
        was: Its class before.
        became: Its class now, with the classes of its factors.
        options: Ranks, bits and so on.
        error: Relative change of the weight, ||W - W'|| / ||W||; None where the layer was not replaced, has lost
            channels or, in a plan, where it is not known yet, as that of a layer to be fitted to data is not.
        before: Cost before.
        after: Cost now.
    """

    path: str
    was: str
    became: str
    options: str
    error: float | None
    before: Cost
    after: Cost

    @property
    def replaced(self) -> bool:
        """Whether the layer is another one now, or has another size."""
        return self.was != self.became or self.before.params != self.after.params


@dataclasses.dataclass(frozen=True)
class Latency:
    """Measured time of one forward.

    Attributes:
        before: Median milliseconds of the dense model.
        after: Median milliseconds of the compressed model.
        speedup: Median over rounds of before / after.
        threads: Number of threads torch used.
        device: Where the models ran.
    """

    before: float
    after: float
    speedup: float
    threads: int
    device: str


@dataclasses.dataclass(frozen=True, repr=False)
class Report:
    """A row per layer, totals, ratios, and what was left as it was and why.

    Printing it, or typing its name, gives a table of at most 120 columns; notebooks show it as HTML.

    Attributes:
        title: ``"plan"`` or ``"result"``.
        rows: One per layer with a weight matrix or kernel, in order of first call.
        rest: Cost of everything else (normalisations, embeddings, products of activations).
        before: Cost of the dense model.
        after: Cost of the compressed model.
        file_bytes: Size of the file that ``save`` writes, for the dense and the compressed model; None in a plan,
            and where ``save`` refuses a model.
        left: Reason to paths of the layers that a step left as they were.
        latency: Measured times, if asked for.
        remarks: What else there is to know about layers: remark to paths.
        choices: What low-rank steps chose for each layer and out of what, for pictures.
    """

    title: str
    rows: tuple[Row, ...]
    rest: Cost
    before: Cost
    after: Cost
    file_bytes: tuple[int, int] | None
    left: dict[str, tuple[str, ...]]
    latency: Latency | None = None
    remarks: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    choices: tuple[LayerChoices, ...] = ()

    @property
    def compression_rate(self) -> dict[str, float]:
        """Compression rate alpha = a / a*, of params, MACs, bytes and, where known, the file."""
        ratios = {
            name: _ratio(getattr(self.before, name), getattr(self.after, name)) for name in ("params", "macs", "bytes")
        }
        if self.file_bytes is not None:
            ratios["file"] = _ratio(*self.file_bytes)
        return ratios

    @property
    def index_space_saving(self) -> dict[str, float]:
        """Index space saving beta = (a - a*) / a*, of the same quantities."""
        return {name: ratio - 1 for name, ratio in self.compression_rate.items()}

    @property
    def speedup(self) -> float | None:
        """Measured speed-up delta = s / s*, the time before over the time after; None if not measured."""
        return None if self.latency is None else self.latency.speedup

    def __str__(self) -> str:
        return render.to_text(self)

    def __repr__(self) -> str:
        return str(self)

    def plot(self, path: str | Path, *, cost: str = "params", most: int = 30) -> None:
        """Save a picture of each layer's candidates, error against cost, with the chosen one.

        Args:
            path: File to write; its ending says the format (png, pdf, svg).
            cost: ``"params"``, ``"macs"``, ``"bytes"`` or ``"latency"`` (with a budget of it).
            most: Layers to draw at most; the largest are taken.

        Raises:
            OptionError: No step chose under a budget, or there is no such cost or format.
            MissingExtraError: matplotlib is not installed.
        """
        plots.save_figure(plots.candidates_figure(self.choices, cost, most), path)

    def plot_spectra(self, path: str | Path, model: nn.Module, *, most: int = 30) -> None:
        """Save a picture of the singular values that each layer's rank cuts off, with the rank.

        Args:
            path: File to write; its ending says the format (png, pdf, svg).
            model: The dense model, whose weights are decomposed for this.
            most: Layers to draw at most; the largest are taken.

        Raises:
            OptionError: No layer has a rank that is one of matrices, or there is no such format.
            MissingExtraError: matplotlib is not installed.
        """
        plots.save_figure(plots.spectra_figure(self.choices, model, most), path)

    def to_markdown(self) -> str:
        """Return the report as Markdown tables."""
        return render.to_markdown(self)

    def _repr_html_(self) -> str:
        return render.to_html(self)

    def to_dict(self) -> dict[str, Any]:
        """Return everything but ``choices`` as JSON-able values."""
        return {
            "title": self.title,
            "rows": [dataclasses.asdict(row) for row in self.rows],
            "rest": dataclasses.asdict(self.rest),
            "before": dataclasses.asdict(self.before),
            "after": dataclasses.asdict(self.after),
            "file_bytes": None if self.file_bytes is None else list(self.file_bytes),
            "left": {reason: list(paths) for reason, paths in self.left.items()},
            "remarks": {remark: list(paths) for remark, paths in self.remarks.items()},
            "latency": None if self.latency is None else dataclasses.asdict(self.latency),
            "compression_rate": self.compression_rate,
            "index_space_saving": self.index_space_saving,
            "speedup": self.speedup,
        }


def make_report(
    title: str,
    dense: tuple[nn.Module, Recording],
    small: tuple[nn.Module, Recording],
    *,
    left: dict[str, tuple[str, ...]],
    errors: dict[str, float] | None = None,
    remarks: dict[str, tuple[str, ...]] | None = None,
    choices: tuple[LayerChoices, ...] = (),
    folded: Mapping[str, str] | None = None,
    rescaled: Rescaling | None = None,
) -> Report:
    """Compare a model before and after compression.

    Args:
        title: ``"plan"`` or ``"result"``.
        dense: The model as given, and what it was recorded to do.
        small: The compressed model (on the meta device for a plan), and what it was recorded to do.
        left: Reason to paths of the layers that were left as they were.
        errors: Predicted relative weight errors, for a plan; without them the errors are measured and the files sized.
        remarks: What else there is to know about layers: remark to paths.
        choices: What low-rank steps chose for each layer, and out of what.
        folded: By path of a layer, the norm of the dense model that it has taken up; its weight is compared with the
            dense weight that has taken up the same.
        rescaled: What weights were multiplied by without changing what the model computes; likewise. Of low-rank layers
            whose factors were, there is no error.
    """
    rows = []
    counted: tuple[set[Tensor], set[Tensor]] = (set(), set())
    for site in dense[1].sites:
        if site.inside is None and _has_matrix(site.layer):
            after = small[1][site.path]
            became, options = describe(after.layer)
            options = " ".join(filter(None, (options, describe_size(site.layer, after.layer))))
            scale = _scale(dense[0], (folded or {}).get(site.path))
            error = _weight_error(site, after, scale, rescaled or {}) if errors is None else errors.get(site.path)
            costs = (_cost_once(place, seen) for place, seen in zip((site, after), counted, strict=True))
            rows.append(Row(site.path, describe(site.layer)[0], became, options, error, *costs))
    before, after_all = model_cost(*dense), model_cost(*small)
    rest = after_all - sum((row.after for row in rows), Cost())
    files = _file_bytes(dense[0], small[0]) if errors is None else None
    return Report(title, tuple(rows), rest, before, after_all, files, left, remarks=remarks or {}, choices=choices)


def _file_bytes(dense: nn.Module, small: nn.Module) -> tuple[int, int] | None:
    try:
        return packed_size(dense), packed_size(small)
    except LowRankError as error:  # the model runs and is compressed; that save refuses it is for save to say
        logger.warning("the report has no file sizes: %s", error)
        return None


def _cost_once(site: Site, seen: set[Tensor]) -> Cost:
    """Return the cost of a site without the tied parameters that an earlier row has counted."""
    own = set(site.layer.parameters(recurse=False))
    again = sum(p.numel() for p in own & seen)
    size = sum(p.numel() * p.element_size() for p in own & seen)
    seen |= own
    return site_cost(site) - Cost(params=again, bytes=size, nonzeros=again)


def _has_matrix(layer: nn.Module) -> bool:
    """Whether a layer multiplies: it holds a weight of two dims or more that is not a lookup table."""
    if isinstance(layer, CompressedLayer):
        return True
    weights = (p for p in layer.parameters(recurse=False) if p.dim() >= 2)
    return not isinstance(layer, (nn.Embedding, nn.EmbeddingBag)) and any(True for _ in weights)


def _scale(dense: nn.Module, norm: str | None) -> Tensor | None:
    """Return what a norm multiplies each output channel of the layer in front of it by."""
    return None if norm is None else norm_scale(dense.get_submodule(norm))


def _weight_error(before: Site, after: Site, scale: Tensor | None, rescaled: Rescaling) -> float | None:
    if not isinstance(after.layer, CompressedLayer) or any(path.startswith(f"{after.path}.") for path in rescaled):
        return None
    old, new = before.layer.weight, after.layer.weight
    assert isinstance(old, Tensor)
    assert isinstance(new, Tensor)
    if old.shape != new.shape:  # channels were removed
        return None
    if scale is not None:
        old = scaled_weight(before.layer, scale)
    if before.path in rescaled:
        old = rescaled_weight(before.layer, old, rescaled[before.path])
    change = norm = 0.0
    for was, now in zip(_row_blocks(old), _row_blocks(new), strict=True):
        change += float((was - now).square().sum())
        norm += float(was.square().sum())
    return math.sqrt(change / max(norm, 1e-300))


def _row_blocks(weight: Tensor) -> Iterator[Tensor]:
    """Yield a few rows at a time in float64: a large weight is never held in float64 as a whole."""
    for start in range(0, len(weight), _ROWS):
        yield weight[start : start + _ROWS].detach().double()


def _ratio(before: float, after: float) -> float:
    return before / after if after else float("inf") if before else 1.0
