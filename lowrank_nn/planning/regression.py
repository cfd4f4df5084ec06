"""The weight that makes most of the inputs a layer gets, judged by the outputs it is to have: least squares."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from lowrank_nn.planning.moments import add_squares_, symmetric_
from lowrank_nn.planning.patches import PatchSampler

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
HELD_OUT = 4  # every fourth image
NOISE = 1e-9  # share of the output's energy up to which a gain is rounding error, as where nothing ahead has changed


@dataclasses.dataclass(frozen=True)
class Moments:
    """First and second moments of a layer's input patches u and of targets t for its output, float64.

    Attributes:
        covariance: C = Cov(u), shape (groups, p, p), the features in the order of the weight's own dims.
        cross: D = Cov(t, u), shape (groups, o, p).
        mean: E[u], shape (groups, p).
        target_mean: E[t], shape (groups, o).
    """

    covariance: Tensor
    cross: Tensor
    mean: Tensor
    target_mean: Tensor

    def raw(self) -> Moments:
        """Return the moments about zero instead of the means, which are then zero."""
        return Moments(
            self.covariance + self.mean[:, :, None] * self.mean[:, None],
            self.cross + self.target_mean[:, :, None] * self.mean[:, None],
            torch.zeros_like(self.mean),
            torch.zeros_like(self.target_mean),
        )

    def left_by(self, weight: Tensor) -> Moments:
        """Return the moments of what a weight W (groups, o, p) leaves of the targets: t - W u in their place."""
        return dataclasses.replace(
            self,
            cross=self.cross - weight @ self.covariance,
            target_mean=self.target_mean - (weight @ self.mean[:, :, None])[..., 0],
        )

    def gain(self, weight: Tensor, curvature: Tensor | None) -> float:
        r"""Return by how much a weight lowers the error, E t^T H t - E (t - W u)^T H (t - W u), about the means.

        Args:
            weight: W, shape (groups, o, p).
            curvature: H, shape (groups, o, o); None for the identity.
        """
        weighted = weight if curvature is None else curvature @ weight
        return float((weighted * (2 * self.cross - weight @ self.covariance)).sum())

    def damped(self, ridge: float) -> Tensor:
        """Return C with ``ridge`` times its mean diagonal entry added to the diagonal."""
        size = self.covariance.diagonal(dim1=1, dim2=2).mean(1)
        size = size.clamp(min=1e-6 * float(size.max()) or 1e-12)  # groups whose inputs never change get a little too
        damped = self.covariance.clone()
        damped.diagonal(dim1=1, dim2=2).add_(ridge * size[:, None])
        return damped

    def least_squares(self, ridge: float) -> Tensor:
        """Return D (C + ridge)^-1, the weight that predicts the targets best, damped towards zero."""
        factor, _ = torch.linalg.cholesky_ex(self.damped(ridge))
        return torch.cholesky_solve(self.cross.mT, factor).mT


class MomentSums:
    """Sums over images, from which the moments come; every fourth image is counted apart.

    Products are computed in float32 (float64 for layers in float64) and added up in float64, about the means of the
    first images.

    Args:
        layer: The layer whose weight is looked for.
        seed: Seed of the positions.
        products: Whether second moments are wanted: 16 p (p + o) bytes per group.

    Attributes:
        images: Images so far.
        products: As given.
    """

    def __init__(self, layer: nn.Conv2d | nn.Linear, seed: int, *, products: bool = True) -> None:
        self._sampler = PatchSampler(layer, seed)
        self._single = 3 if isinstance(layer, nn.Conv2d) else 1  # dims of an input without a batch
        self.products = products
        self._counts = [0.0, 0.0]
        self.images = 0

    def add(self, x: Tensor, target: Tensor) -> None:
        """Take in what the layer is called with, and what it is to return."""
        if x.dim() == self._single:
            x, target = x[None], target[None]
        number = torch.arange(self.images, self.images + len(x), device=x.device)
        self.images += len(x)
        held = number % HELD_OUT == HELD_OUT - 1
        for part, chosen in enumerate((~held, held)):
            if bool(chosen.any()):
                self._add(part, x[chosen], target[chosen])

    @property
    def has_held_out(self) -> bool:
        """Whether there are images counted apart."""
        return self._counts[1] > 0

    def are_finite(self) -> bool:
        """Whether neither inputs nor targets held NaN or infinite values."""
        return bool(torch.isfinite(self._sum_u).all() & torch.isfinite(self._sum_t).all())

    def means(self) -> tuple[Tensor, Tensor]:
        """Return E[u] and E[t] over all images."""
        count = sum(self._counts)
        mean = self._shift_u + self._sum_u.sum(0) / count
        return self._sampler.in_weight_order(mean), self._shift_t + self._sum_t.sum(0) / count

    def moments(self, *parts: int) -> Moments:
        """Return the moments of the images in parts: 0 for those not held out, 1 for those held out; both if none."""
        chosen = list(parts or (0, 1))
        count = sum(self._counts[part] for part in chosen)
        mean, target_mean = (sums[chosen].sum(0) / count for sums in (self._sum_u, self._sum_t))
        covariance = symmetric_(self._uu[chosen].sum(0)) / count - mean[:, :, None] * mean[:, None]
        cross = self._tu[chosen].sum(0) / count - target_mean[:, :, None] * mean[:, None]
        order = self._sampler.in_weight_order
        return Moments(
            order(covariance),
            order(cross.flatten(0, 1)).reshape(cross.shape),
            order(mean + self._shift_u),
            target_mean + self._shift_t,
        )

    def _add(self, part: int, x: Tensor, target: Tensor) -> None:
        for inputs, outputs, weight in self._sampler.draw(x, target):
            assert outputs is not None
            if not sum(self._counts):
                self._start(inputs, outputs)
            u, t = inputs - self._shift_u[:, None].to(inputs), outputs - self._shift_t[:, None].to(outputs)
            self._counts[part] += weight * u.shape[1]
            self._sum_u[part].add_(u.sum(1), alpha=weight)
            self._sum_t[part].add_(t.sum(1), alpha=weight)
            if self.products:
                add_squares_(self._uu[part], u, weight)
                self._tu[part].add_(t.mT @ u, alpha=weight)

    def _start(self, u: Tensor, t: Tensor) -> None:
        # The shift is kept as it was subtracted: rounded to the dtype of the data.
        self._shift_u, self._shift_t = u.mean(1).double(), t.mean(1).double()
        (groups, p), o = self._shift_u.shape, self._shift_t.shape[1]
        new = self._shift_u.new_zeros
        self._sum_u, self._sum_t = new(2, groups, p), new(2, groups, o)
        if self.products:
            self._uu, self._tu = new(2, groups, p, p), new(2, groups, o, p)


def choose_ridge(sums: MomentSums, weight: Tensor, curvature: Tensor | None, *, about_zero: bool) -> float | None:
    """Return the ridge whose change of the weight, computed without the held-out images, is best on them.

    None where no change lowers their error, or where there are too few images to hold any out.

    Args:
        sums: Sums of the layer.
        weight: The trained weight, (groups, o, p).
        curvature: H, (groups, o, o), or None for the identity.
        about_zero: Whether nothing makes up for a changed mean output.
    """
    if not sums.has_held_out:
        return None
    seen, held = (sums.moments(part) for part in (0, 1))
    if about_zero:
        seen, held = seen.raw(), held.raw()
    weighted = weight if curvature is None else curvature @ weight
    best, most = None, NOISE * abs(float((weighted * held.cross).sum()))
    seen, held = seen.left_by(weight), held.left_by(weight)
    for ridge in RIDGES:
        gain = held.gain(seen.least_squares(ridge), curvature)
        if gain > most:
            best, most = ridge, gain
        elif best is not None:
            break
    return best
