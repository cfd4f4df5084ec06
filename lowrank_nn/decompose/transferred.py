r"""Filters that are transforms of few base filters: :math:`W_o = s_o T_{t(o)} B_{b(o)}`.

The transforms turn and reflect the kernel plane, the same for all input channels; the sign of the scale negates. Each
is a permutation of the taps, so that it keeps norms and inner products: for given bases the best one for a filter is
that of the largest \|inner product\|, and for given choices the best base is a singular vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from lowrank_nn.errors import OptionError

Transforms = Literal["dihedral", "flips", "none"]

_CHUNK = 2**25  # entries of the matrix of all transformed bases that are made at a time


def tap_orders(kernel_size: Sequence[int], transforms: Transforms) -> Tensor:
    """Return the transforms of a kernel plane as orders of its taps: ``plane.flatten()[order]`` is transformed.

    Transforms that do the same to this kernel count once; the first is the identity.

    Args:
        kernel_size: Height and width.
        transforms: ``"none"``; ``"flips"``, the reflections in both axes and both at once; ``"dihedral"``, for square
            kernels the quarter turns with and without reflection, eight in all, for others the flips.

    Returns:
        int64, shape ``(T, kh * kw)``, on the CPU.

    Raises:
        OptionError: ``transforms`` is none of these.
    """
    if not isinstance(transforms, str) or transforms not in get_args(Transforms):
        raise OptionError(f"transforms is one of {', '.join(map(repr, get_args(Transforms)))}, got {transforms!r}.")
    height, width = kernel_size
    taps = torch.arange(height * width, device="cpu").reshape(height, width)
    planes = [taps]
    if transforms != "none":
        planes += [taps.flip(0), taps.flip(1), taps.flip(0, 1)]
    if transforms == "dihedral" and height == width:
        planes += [plane.T for plane in planes]
    return torch.tensor(list(dict.fromkeys(tuple(plane.flatten().tolist()) for plane in planes)), device="cpu")


def transferred_kernel(bases: Tensor, orders: Tensor, scale: Tensor, indices: Tensor) -> Tensor:
    """Return the filters, shape ``(O, I, kh, kw)``; differentiable in ``bases`` and ``scale``.

    Args:
        bases: Shape ``(B, I, kh, kw)``.
        orders: The transforms, from :func:`tap_orders`, shape ``(T, kh * kw)``.
        scale: Shape ``(O,)``.
        indices: Base of each filter times T plus its transform, shape ``(O,)``.
    """
    chosen = bases.flatten(2).index_select(0, indices // len(orders))
    taps = orders.index_select(0, indices % len(orders))[:, None].expand_as(chosen)
    return (chosen.gather(2, taps) * scale[:, None, None]).reshape(len(indices), *bases.shape[1:])


@torch.no_grad()
def transferred_filters(
    weight: Tensor, count: int, orders: Tensor, *, sweeps: int = 100
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return bases, scales and indices of filters that are near to ``weight``.

    Base filters are first the filters that those before represent worst. Each sweep then chooses base, transform and
    scale of every filter, the best for the bases there are, and then every base, the best for these choices (the first
    singular vector of its filters, transformed back). The error never rises; the search ends when no choice changes, in
    a local minimum. Nothing is drawn at random. Weights that are transforms of ``count`` filters are found exactly.

    Args:
        weight: Shape ``(O, I, kh, kw)``, any floating dtype.
        count: Number of base filters B, from 1 to O.
        orders: The transforms, from :func:`tap_orders`, shape ``(T, kh * kw)``.
        sweeps: At most so many.

    Returns:
        ``bases`` (B, I, kh, kw) and ``scale`` (O,), in the dtype of ``weight``, and ``indices`` (O,), int64: base times
        T plus transform. The scales of the filters of one base have a mean square of 1.

    References:
        Cohen, Welling 2016, "Group Equivariant Convolutional Networks" (rotations and reflections of filters).
        Shang, Sohn, Almeida, Lee 2016, "Understanding and Improving Convolutional Neural Networks via Concatenated
        Rectified Linear Units" (filters that are negatives of each other).
    """
    shape = (count, *weight.shape[1:])
    if weight.is_meta:
        return weight.new_empty(shape), weight.new_empty(len(weight)), weight.new_empty(len(weight), dtype=torch.int64)
    filters = weight.double().flatten(2)
    orders = orders.to(weight.device)
    bases = _farthest_filters(filters, count, orders)
    indices, scale = _choose(filters, bases, orders)
    for _ in range(sweeps):
        bases = _best_bases(filters, bases, indices, orders)
        before, (indices, scale) = indices, _choose(filters, bases, orders)
        if torch.equal(indices, before):
            break
    bases, scale = _balanced(bases, scale, indices // len(orders))
    return bases.reshape(shape).to(weight.dtype), scale.to(weight.dtype), indices


def _farthest_filters(filters: Tensor, count: int, orders: Tensor) -> Tensor:
    """Return ``count`` unit filters: each is the one of which those before leave most."""
    energy = filters.square().sum((1, 2))
    left, chosen = energy.clone(), []
    for _ in range(count):
        unit = _unit(filters[left.argmax()])
        chosen.append(unit)
        products = torch.einsum("oik,tik->ot", filters, unit[:, orders].transpose(0, 1))
        left = torch.minimum(left, energy - products.square().amax(1))
    return torch.stack(chosen)


def _choose(filters: Tensor, bases: Tensor, orders: Tensor) -> tuple[Tensor, Tensor]:
    """Return the base and transform whose product with each filter is the largest in magnitude, and that product.

    A base that nothing chooses becomes, in place, the filter that is represented worst.
    """
    products = _products(filters, bases, orders)
    indices = products.abs().argmax(1)
    scale = products.gather(1, indices[:, None])[:, 0]
    left = filters.square().sum((1, 2)) - scale.square()
    for base in (torch.bincount(indices // len(orders), minlength=len(bases)) == 0).nonzero()[:, 0].tolist():
        worst = int(left.argmax())
        bases[base] = _unit(filters[worst])
        indices[worst], scale[worst], left[worst] = base * len(orders), filters[worst].norm(), 0
    return indices, scale


def _products(filters: Tensor, bases: Tensor, orders: Tensor) -> Tensor:
    """Return the inner products of filters and transformed bases, shape (O, B T)."""
    flat = filters.flatten(1)
    step = max(1, _CHUNK // (len(orders) * flat.shape[1]))
    parts = [flat @ _transformed(some, orders).flatten(2).flatten(0, 1).T for some in torch.split(bases, step)]
    return torch.cat(parts, 1)


def _transformed(bases: Tensor, orders: Tensor) -> Tensor:
    """Return every transform of every base, shape (B, T, I, K)."""
    return bases[:, :, orders].transpose(1, 2)


def _best_bases(filters: Tensor, bases: Tensor, indices: Tensor, orders: Tensor) -> Tensor:
    """Return for each base the first singular vector of the filters that chose it, transformed back."""
    back = orders.argsort(1)[indices % len(orders)]
    turned = filters.gather(2, back[:, None].expand_as(filters)).flatten(1)
    best = bases.clone()
    for base in range(len(bases)):
        mine = turned[indices // len(orders) == base]
        if len(mine):
            _, vectors = torch.linalg.eigh(mine @ mine.T)
            best[base] = _unit((vectors[:, -1] @ mine).reshape(bases.shape[1:]))
    return best


def _unit(x: Tensor) -> Tensor:
    """Return ``x`` over its norm; zeros stay zeros."""
    norm = x.norm()
    return x / torch.where(norm > 0, norm, 1)


def _balanced(bases: Tensor, scale: Tensor, owners: Tensor) -> tuple[Tensor, Tensor]:
    """Give the bases the root mean square of their filters' scales, and divide the scales by it."""
    squares = scale.new_zeros(len(bases)).index_add(0, owners, scale.square())
    counts = torch.bincount(owners, minlength=len(bases)).clamp(min=1)
    size = (squares / counts).sqrt()
    size = torch.where(size > 0, size, 1)
    return bases * size[:, None, None], scale / size[owners]
