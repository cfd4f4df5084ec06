"""Filters as transforms of base filters: the transforms, the optimum where it is known, descent, recovery."""

import itertools

import numpy as np
import pytest
import torch

from lowrank_nn.decompose import tap_orders, transferred_filters, transferred_kernel
from lowrank_nn.errors import OptionError


def rebuilt(weight, count, transforms, **options):
    orders = tap_orders(weight.shape[2:], transforms)
    bases, scale, indices = transferred_filters(weight, count, orders, **options)
    return transferred_kernel(bases, orders, scale, indices)


def error(weight, *args, **options):
    return float((weight - rebuilt(weight, *args, **options)).square().sum())


def random_weight(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def all_transforms(plane):
    """The images of the last two dims under turns and reflections, by numpy."""
    turned = [np.rot90(plane, k, axes=(-2, -1)) for k in range(4)]
    return [*turned, *(np.flip(image, -1) for image in turned)]


def test_transforms_are_turns_and_reflections():
    plane = np.arange(9).reshape(3, 3)
    orders = tap_orders((3, 3), "dihedral")
    assert sorted(orders.tolist()) == sorted(image.ravel().tolist() for image in all_transforms(plane))
    assert orders[0].tolist() == list(range(9))
    flips = {tuple(image.ravel()) for image in (plane, plane[::-1], plane[:, ::-1], plane[::-1, ::-1])}
    assert {tuple(order) for order in tap_orders((3, 3), "flips").tolist()} == flips


@pytest.mark.parametrize(
    ("size", "transforms", "count"),
    [
        ((1, 1), "dihedral", 1),
        ((3, 1), "dihedral", 2),
        ((2, 3), "dihedral", 4),
        ((2, 2), "dihedral", 8),
        ((5, 5), "flips", 4),
        ((5, 5), "none", 1),
    ],
)
def test_transforms_that_do_the_same_count_once(size, transforms, count):
    assert len(tap_orders(size, transforms)) == count


@pytest.mark.parametrize("transforms", ["turns", np.array(["none", "flips"])], ids=str)
def test_unknown_transforms_are_refused(transforms):
    with pytest.raises(OptionError, match="transforms is one of 'dihedral', 'flips', 'none', got"):
        tap_orders((3, 3), transforms)


def test_one_base_without_transforms_is_the_best_of_rank_one():
    weight = random_weight(8, 3, 3, 3)
    tail = np.linalg.svd(weight.flatten(1).numpy(), compute_uv=False)[1:]
    assert error(weight, 1, "none") == pytest.approx(np.square(tail).sum(), rel=1e-10)


def test_near_the_best_of_all_choices():
    weight = random_weight(4, 2, 3, 3)
    best = np.inf
    images = [all_transforms(filter_) for filter_ in weight.numpy()]
    for choice in itertools.product(range(8), repeat=3):  # transforms of the others against those of the first
        matrix = np.stack([images[0][0], *(images[i + 1][t] for i, t in enumerate(choice))]).reshape(4, -1)
        best = min(best, np.square(np.linalg.svd(matrix, compute_uv=False)[1:]).sum())
    assert best - 1e-9 <= error(weight, 1, "dihedral") <= 1.1 * best


@pytest.mark.parametrize("transforms", ["dihedral", "flips", "none"])
def test_the_error_never_rises_and_the_end_is_a_local_minimum(transforms):
    weight = random_weight(24, 3, 3, 3)
    errors = [error(weight, 5, transforms, sweeps=sweeps) for sweeps in range(12)]
    assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(errors))
    assert errors[-1] < 0.98 * errors[0]
    orders = tap_orders((3, 3), transforms)
    bases, scale, indices = transferred_filters(weight, 5, orders)
    found = transferred_kernel(bases, orders, scale, indices)
    for filter_, now in zip(weight, found, strict=True):
        for base in bases.numpy():
            for image in all_transforms(base) if transforms == "dihedral" else [base]:
                unit = image / np.linalg.norm(image)
                product = (filter_.numpy() * unit).sum()
                assert float((filter_ - now).square().sum()) <= float(filter_.square().sum()) - product**2 + 1e-9


@pytest.mark.parametrize(("transforms", "copies"), [("dihedral", 8), ("flips", 4), ("none", 1)])
def test_filters_made_of_few_are_found(transforms, copies):
    bases = random_weight(3, 4, 3, 3).numpy()
    images = {"dihedral": all_transforms, "flips": lambda b: [b, b[..., ::-1], b[:, ::-1], b[:, ::-1, ::-1]]}
    images = [image for base in bases for image in images.get(transforms, lambda b: [b])(base)]
    assert len(images) == 3 * copies
    factors = random_weight(2 * len(images), seed=1)
    weight = torch.tensor(np.stack([*images, *images])) * factors[:, None, None, None]
    found = rebuilt(weight, 3, transforms)
    assert float((weight - found).norm()) < 1e-10 * float(weight.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_as_many_bases_as_filters_lose_nothing(dtype):
    weight = random_weight(10, 2, 3, 3).to(dtype)
    weight[3] = weight[5] = 0
    weight[7] = -2 * weight[1].flip(-1)
    found = rebuilt(weight, 10, "dihedral")
    assert found.dtype == dtype
    rounding = {torch.float32: 1e-6, torch.float64: 1e-13, torch.bfloat16: 1e-2}[dtype]
    assert float((weight - found).norm()) <= rounding * float(weight.norm())


def test_scales_of_a_base_have_a_mean_square_of_one():
    weight = random_weight(12, 2, 3, 3)
    orders = tap_orders((3, 3), "dihedral")
    _, scale, indices = transferred_filters(weight, 3, orders)
    for base in range(3):
        assert float(scale[indices // 8 == base].square().mean()) == pytest.approx(1)


def test_zeros_give_zeros():
    assert not rebuilt(torch.zeros(4, 2, 3, 3), 2, "dihedral").any()
