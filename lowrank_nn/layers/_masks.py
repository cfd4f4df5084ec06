"""What is pruned together, how it is scored, and which of it stays."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch import Tensor

from lowrank_nn.errors import CalibrationError, OptionError, UnsupportedLayerError
from lowrank_nn.layers._window import Window, crop_window

Granularity = Literal["element", "row", "column", "kernel", "group", "channel", "filter", "shape"]
GRANULARITIES: tuple[str, ...] = get_args(Granularity)
Criterion = Literal["l1", "l2", "obd", "random"]

# Dims of the weight seen as (conv groups, filters, channels, kernel height, kernel width) that one unit spans.
_SPANNED: dict[str, tuple[int, ...]] = {
    "element": (),
    "row": (4,),
    "column": (3,),
    "kernel": (3, 4),
    "group": (1,),
    "channel": (1, 3, 4),
    "filter": (2, 3, 4),
    "shape": (0, 1, 2),
}
_FOR_MATRICES = ("element", "channel", "filter")
_FOR_KERNELS = ("row", "column", "kernel", "group", "shape", "window")
WINDOWED = ("element", "shape")
"""Granularities whose units can be counted inside a window of the kernel."""


@dataclasses.dataclass(frozen=True)
class Units:
    """The units that a weight falls into; all of one size.

    Attributes:
        granularity: What a unit is.
        blocks: The weight's shape as (conv groups, filters per group, channels per group, kh, kw).
    """

    granularity: Granularity
    blocks: tuple[int, int, int, int, int]

    @classmethod
    def of(cls, name: str, granularity: Granularity, weight_shape: tuple[int, ...], groups: int = 1) -> Units:
        """Return the units of a weight.

        Args:
            name: Class that messages name.
            granularity: What a unit is.
            weight_shape: ``(O, I / groups, kh, kw)``, or ``(O, I)`` of a linear layer.
            groups: Groups of the convolution.

        Raises:
            OptionError: There is no such granularity.
            UnsupportedLayerError: A linear layer has no such units.
        """
        if len(weight_shape) == 2 and granularity in _FOR_KERNELS:
            raise UnsupportedLayerError(
                f"{name}: a linear layer has no units of granularity {granularity!r}; choose one of "
                f"{', '.join(map(repr, _FOR_MATRICES))}, or leave linear layers out (but_not=...)."
            )
        if granularity not in _SPANNED:
            allowed = ", ".join(map(repr, GRANULARITIES))
            raise OptionError(f"{name}: granularity must be one of {allowed}, got {granularity!r}.")
        out, inn, *taps = weight_shape
        height, width = taps or (1, 1)
        return cls(granularity, (groups, out // groups, inn, height, width))

    @property
    def grid(self) -> tuple[int, ...]:
        """Shape of a tensor with one entry per unit: ``blocks`` with ones where a unit spans the dim."""
        spanned = _SPANNED[self.granularity]
        return tuple(1 if dim in spanned else n for dim, n in enumerate(self.blocks))

    @property
    def count(self) -> int:
        """Number of units in the weight."""
        return math.prod(self.grid)

    @property
    def size(self) -> int:
        """Scalars in one unit."""
        return math.prod(self.blocks) // self.count

    def kept(self, sparsity: float) -> int:
        """Return how many units stay when the share ``sparsity`` goes, to the nearest unit; at least one."""
        return max(1, self.count - math.floor(sparsity * self.count + 0.5))

    def sums(self, values: Tensor) -> Tensor:
        """Return the sum of ``values``, one per scalar of the weight, over each unit; shape :attr:`grid`."""
        spanned = _SPANNED[self.granularity]
        blocks = values.reshape(self.blocks)
        return blocks.sum(spanned, keepdim=True) if spanned else blocks

    def norms(self, values: Tensor) -> Tensor:
        """Return the Euclidean norm of each unit, shape :attr:`grid`; its gradient is zero where the norm is."""
        spanned = _SPANNED[self.granularity]
        blocks = values.reshape(self.blocks)
        return torch.linalg.vector_norm(blocks, dim=spanned, keepdim=True) if spanned else blocks.abs()

    def spread(self, keep: Tensor, weight_shape: tuple[int, ...]) -> Tensor:
        """Return the mask of the weight's scalars from one entry per unit; no two of them share memory."""
        return keep.expand(self.blocks).contiguous().reshape(weight_shape)


def check_sparsity(name: str, sparsity: float) -> float:
    """Return ``sparsity`` as a float.

    Raises:
        OptionError: It is not a number from 0 to below 1.
    """
    number = isinstance(sparsity, (int, float)) and not isinstance(sparsity, bool)
    if not number or not 0 <= sparsity < 1:
        raise OptionError(
            f"{name}: sparsity must be a share of units from 0 to below 1, got {sparsity!r}. "
            "To drop a layer whole, take it out of the model."
        )
    return float(sparsity)


def unit_scores(
    name: str, units: Units, weight: Tensor, criterion: Criterion, fisher: Tensor | None = None, seed: int = 0
) -> Tensor:
    r"""Return how much each unit matters, up to one positive factor; shape ``units.grid``.

    ``"l1"``: sum \|w\|. ``"l2"``: sum w^2, in the order of the norms. ``"obd"``: 1/2 sum F w^2, the rise of the loss by
    a second-order expansion with the diagonal Fisher information F for second derivative. ``"random"``: drawn.

    Args:
        name: Class that messages name.
        units: The units.
        weight: The dense weight.
        criterion: Which score.
        fisher: F, of the weight's shape; for ``"obd"`` alone.
        seed: Seed of ``"random"``; the global random state is left alone.

    Raises:
        OptionError: There is no such criterion, or ``fisher`` was given for another one than ``"obd"``.
        CalibrationError: ``fisher`` is missing, of another shape, negative or not finite.
    """
    if criterion not in get_args(Criterion):
        raise OptionError(f"{name}: criterion must be 'l1', 'l2', 'obd' or 'random', got {criterion!r}.")
    if fisher is not None and criterion != "obd":
        raise OptionError(f"{name}: fisher is used by criterion='obd' alone, got it with criterion={criterion!r}.")
    if criterion == "random":
        # Drawn on the CPU so that every device prunes the same units.
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(units.grid, generator=generator, dtype=torch.float32, device="cpu").to(weight.device)
    magnitude = _relative(weight.abs())
    if criterion == "l1":
        return units.sums(magnitude)
    if criterion == "l2":
        return units.sums(magnitude.square())
    return units.sums(magnitude.square() * _relative(checked_fisher(name, fisher, weight))) / 2


def _relative(values: Tensor) -> Tensor:
    """Return non-negative ``values`` over their maximum, so that squares neither overflow nor vanish."""
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    return values / values.max().clamp_min(torch.finfo(values.dtype).tiny)


def checked_fisher(name: str, fisher: Tensor | None, weight: Tensor) -> Tensor:
    """Return the Fisher information on the device of ``weight``.

    Raises:
        CalibrationError: It is missing, of another shape, negative or not finite.
    """
    shape = tuple(weight.shape)
    if fisher is None:
        raise CalibrationError(
            f"{name}: criterion='obd' needs fisher, a tensor of shape {shape}; compute it with diagonal_fisher()."
        )
    if tuple(fisher.shape) != shape:
        raise CalibrationError(f"{name}: fisher must have the weight's shape {shape}, got {tuple(fisher.shape)}.")
    if not fisher.is_meta and not bool((torch.isfinite(fisher) & (fisher >= 0)).all()):
        raise CalibrationError(f"{name}: fisher holds negative, NaN or infinite values; it is a mean of squares.")
    return fisher.detach().to(weight.device)


def keep_largest(scores: Tensor, kept: int) -> Tensor:
    """Return a bool tensor that marks the ``kept`` largest ``scores``; of equal ones the first stay."""
    flat = scores.flatten()
    # The quick selection is not deterministic on CUDA, where sorting is quick.
    nth = flat.numel() - kept
    threshold = flat.sort().values[nth] if flat.is_cuda else flat.kthvalue(nth + 1).values
    mask = flat >= threshold
    excess = 0 if mask.is_meta else int(mask.sum()) - kept
    if excess:
        mask[(flat == threshold).nonzero().flatten()[-excess:]] = False
    return mask.reshape(scores.shape)


def empty_mask(name: str, shape: tuple[int, ...], nonzeros: int, device: torch.device) -> Tensor:
    """Return a bool tensor of ``shape`` that marks nothing yet, for :func:`draw_mask_` to mark ``nonzeros`` entries.

    Args:
        name: Class of the layer, for messages.
        shape: Shape of the stored weight.
        nonzeros: How many entries are to be marked.
        device: Device of the tensor.

    Raises:
        OptionError: There are not so many entries, or none would be marked.
    """
    count = math.prod(shape)
    if not 1 <= nonzeros <= count:
        raise OptionError(
            f"{name}: nonzeros must be from 1 to the {count} entries of the stored weight, got {nonzeros!r}. Pass None "
            "for a layer without mask."
        )
    return torch.zeros(shape, dtype=torch.bool, device=device)


def draw_mask_(mask: Tensor, kept: int, units: Units | None = None) -> None:
    """Mark ``kept`` units at random, unless as many are marked: memory that comes late (``to_empty``) holds anything.

    Args:
        mask: A bool tensor; on the meta device nothing is drawn.
        kept: How many.
        units: The units; single entries if left out.
    """
    if mask.is_meta or int(mask.sum()) == kept * (1 if units is None else units.size):
        return
    grid = mask.shape if units is None else units.grid
    keep = keep_largest(torch.rand(grid, dtype=torch.float32, device=mask.device), kept)
    mask.copy_(keep if units is None else units.spread(keep, tuple(mask.shape)))


def bounding_window(positions: Tensor) -> Window | None:
    """Return the smallest rectangle around the marked ``positions``, shape ``(kh, kw)``; None on the meta device."""
    if positions.is_meta:
        return None
    rows, columns = positions.any(1).nonzero().flatten().tolist(), positions.any(0).nonzero().flatten().tolist()
    return (rows[0], columns[0], rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1)


def fill_window(window: Window, kernel_size: tuple[int, int], device: torch.device) -> Tensor:
    """Return a bool tensor of shape ``kernel_size`` that marks the positions of ``window``."""
    positions = torch.zeros(kernel_size, dtype=torch.bool, device=device)
    crop_window(positions, window).fill_(True)
    return positions


def best_window(scores: Tensor, sparsity: float) -> Window:
    """Return the rectangle of positions whose area is nearest to the share wanted, and among those the best.

    Args:
        scores: Score of each position, ``(kh, kw)``; minus infinity for positions that are gone already.
        sparsity: Share of the positions to drop. Of two areas equally near, the larger one is taken.
    """
    height, width = scores.shape
    wanted = (1 - sparsity) * height * width
    table = [[0.0] * width] * height if scores.is_meta else scores.double().tolist()

    def preference(window: Window) -> tuple[float, int, float]:
        top, left, rows, columns = window
        total = sum(sum(row[left : left + columns]) for row in table[top : top + rows])
        # Rounded, so that thirds and the like do not decide between areas equally near.
        return (round(abs(rows * columns - wanted), 9) if total > -math.inf else math.inf, -rows * columns, -total)

    return min(_rectangles(height, width), key=preference)


def _rectangles(height: int, width: int) -> Iterator[Window]:
    for rows in range(1, height + 1):
        for columns in range(1, width + 1):
            for top in range(height - rows + 1):
                for left in range(width - columns + 1):
                    yield (top, left, rows, columns)
