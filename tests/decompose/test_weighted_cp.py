"""CP under a metric: against brute force, against the decomposition without one, and its promises."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from lowrank_nn.decompose import (
    Metric,
    cp,
    cp_als,
    cp_full_rank,
    cp_sensitivity,
    cp_tensor,
    weighted_cp,
    weighted_cp_errors,
)
from lowrank_nn.decompose._cp_objective import CPObjective
from tests.decompose.test_cp import border_rank_two, random_factors, random_tensor


def random_metric(groups, out, size, *, seed=0, diagonal=False, curvature=True):
    covariance = covariances(groups, size, seed)
    if diagonal:
        covariance = covariance.diagonal(dim1=1, dim2=2).clone()
    mean = torch.zeros(groups, size, dtype=torch.float64)
    return Metric(covariance, mean, covariances(groups, out, seed + 1) if curvature else None)


def covariances(groups, size, seed):
    mixing = random_tensor(groups, size, size, seed=seed + 100)
    return mixing @ mixing.mT / size + 0.1 * torch.eye(size, dtype=torch.float64)


def identity_metric(weight):
    size = weight[0].numel()
    return Metric(torch.ones(1, size, dtype=torch.float64), torch.zeros(1, size, dtype=torch.float64))


def kernel(*shape, seed=0, dtype=torch.float64):
    """A kernel whose outputs differ in size, as trained ones do."""
    scales = torch.arange(1, shape[0] + 1).reshape(-1, *[1] * (len(shape) - 1)) ** -0.5
    return random_tensor(*shape, seed=seed, dtype=dtype) * scales.to(dtype)


def rebuild(factors):
    """The weight that factors with a group dim stand for."""
    return torch.cat([cp_tensor([factor[group] for factor in factors]) for group in range(len(factors[0]))])


def relative_error(factors, weight, metric):
    """e(change) / e(weight), with numpy, group by group."""
    errors = []
    for tensor in (weight.double() - rebuild([factor.double() for factor in factors]), weight.double()):
        total = 0.0
        for group, delta in enumerate(tensor.reshape(metric.groups, -1, metric.mean.shape[1]).numpy()):
            covariance = metric.covariance[group].numpy()
            covariance = np.diag(covariance) if metric.is_diagonal else covariance
            curvature = np.eye(len(delta)) if metric.curvature is None else metric.curvature[group].numpy()
            total += np.trace(curvature @ delta @ covariance @ delta.T)
        errors.append(total)
    return errors[0] / errors[1]


def stacked(parts):
    return [torch.stack(factor) for factor in zip(*parts, strict=True)]


@pytest.mark.parametrize("modes", [(5, 6), (5, 2, 3)])
@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("weight_of_penalty", [0.0, 0.3])
def test_value_and_gradient_of_the_objective(modes, diagonal, weight_of_penalty):
    """Against the joint function of all factors, its first factor found by least squares, through autograd."""
    tensor, metric = random_tensor(4, *modes), random_metric(1, 4, 30, diagonal=diagonal)
    covariance = metric.covariance[0].diag() if diagonal else metric.covariance[0]
    objective = CPObjective(tensor, metric.covariance[0], metric.curvature[0], torch.float64)
    point = random_tensor(3 * sum(modes), seed=3).requires_grad_()
    others = objective.split(point)
    scaled = [others[0] / objective.deviations[:, None], *others[1:]]
    Z = torch.stack([cp_tensor([factor[:, [r]] for factor in scaled]).flatten() for r in range(3)], dim=1)
    normal = Z.T @ covariance @ Z
    ridged = normal + weight_of_penalty * normal.diagonal().diag()
    first = torch.linalg.solve(ridged, Z.T @ covariance @ tensor.flatten(1).T).T
    change = first @ Z.T - tensor.flatten(1)
    H = metric.curvature[0]
    penalty = ((first.T @ H @ first).diagonal() * normal.diagonal()).sum()
    value = (torch.trace(H @ change @ covariance @ change.T) + weight_of_penalty * penalty) / objective.size
    value.backward()
    value, penalty = float(value.detach()), float(penalty.detach())
    state = objective.reweighted(objective.evaluate(point.detach()), weight_of_penalty)
    assert objective.size == pytest.approx(metric.error(tensor))
    assert state.value == pytest.approx(value, rel=1e-8)
    assert state.penalty == pytest.approx(penalty / objective.size, rel=1e-8)
    torch.testing.assert_close(state.gradient, point.grad, rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(cp_tensor(objective.factors(state)).flatten(1), (first @ Z.T).detach())


@pytest.mark.parametrize(("shape", "rank"), [((5, 4, 3), 1), ((5, 4, 3), 3), ((4, 3, 2, 2), 2)])
def test_error_is_near_that_of_brute_force(shape, rank):
    """L-BFGS on all factors at once, from many random starts; one start may miss the global optimum by a little."""
    ratios = []
    for seed in range(3):
        tensor = random_tensor(*shape, seed=seed)
        metric = random_metric(1, shape[0], tensor[0].numel(), seed=seed)
        best = min(brute_force(tensor, metric, random_factors(shape, rank, seed=10 * run)) for run in range(5))
        ratios.append(relative_error(weighted_cp(tensor, metric, rank, iterations=200), tensor, metric) / best)
    assert np.mean(ratios) < 1.05
    assert max(ratios) < 1.2


def brute_force(tensor, metric, start):
    """Relative error that ``torch.optim.LBFGS`` on all factors ends at."""
    variables = [factor.requires_grad_() for factor in start]
    optimizer = torch.optim.LBFGS(variables, max_iter=100, history_size=20, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        change = (cp_tensor(variables) - tensor).flatten(1)
        loss = ((metric.curvature[0] @ change) * (change @ metric.covariance[0])).sum() / metric.error(tensor)
        loss.backward()
        return loss

    optimizer.step(closure)
    return float(closure().detach())


@pytest.mark.parametrize(
    ("shape", "rank"), [((16, 16, 9), 10), ((16, 16, 9), 20), ((12, 10, 3, 3), 4), ((16, 16, 3, 3), 10)]
)
def test_a_tensor_of_this_rank_is_recovered(shape, rank):
    tensor = cp_tensor(random_factors(shape, rank, seed=7))
    metric = random_metric(1, shape[0], tensor[0].numel())
    assert relative_error(weighted_cp(tensor, metric, rank, iterations=400), tensor, metric) < 1e-12


CASES = [((20, 12, 9), 1), ((12, 10, 3, 3), 1), ((24, 6, 9), 4), ((9, 20, 9), 1), ((12, 5, 3, 2), 2), ((8, 8, 1), 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize(("shape", "groups"), CASES)
def test_error_is_below_that_of_the_decomposition_without_a_metric(shape, groups, diagonal, dtype):
    weight = kernel(*shape, dtype=dtype)
    metric = random_metric(groups, shape[0] // groups, weight[0].numel(), diagonal=diagonal)
    for rank in (1, 4, 10):
        without = stacked([cp_als(tensor, rank) for tensor in weight.chunk(groups)])
        factors = weighted_cp(weight, metric, rank)
        assert [factor.shape for factor in factors] == [factor.shape for factor in without]
        assert relative_error(factors, weight, metric) <= relative_error(without, weight, metric) * (1 + 1e-3) + 1e-12


@pytest.mark.parametrize(
    ("shape", "rank"), [((20, 16, 9), 12), ((16, 12, 3, 3), 8), ((9, 30, 9), 40), ((24, 20, 9), 30)]
)
def test_the_identity_gives_the_ordinary_decomposition(shape, rank):
    tensor = kernel(*shape)
    (found,) = (relative_error(weighted_cp(tensor, identity_metric(tensor), rank), tensor, identity_metric(tensor)),)
    factors = cp_als(tensor, rank)
    expected = float((cp_tensor(factors) - tensor).square().sum() / tensor.square().sum())
    assert found < expected * 1.005


def test_groups_are_fitted_one_by_one():
    weight, metric = kernel(12, 4, 9), random_metric(3, 4, 36)
    factors = weighted_cp(weight, metric, 5)
    for group in range(3):
        part = Metric(metric.covariance[[group]], metric.mean[[group]], metric.curvature[[group]])
        alone = weighted_cp(weight[4 * group : 4 * group + 4], part, 5)
        for factor, expected in zip(factors, alone, strict=True):
            torch.testing.assert_close(factor[group], expected[0], rtol=0, atol=0)


def test_a_diagonal_covariance_is_that_matrix():
    weight, metric = kernel(10, 8, 9), random_metric(1, 10, 72, diagonal=True)
    full = Metric(torch.diag_embed(metric.covariance), metric.mean, metric.curvature)
    first, second = (rebuild(weighted_cp(weight, which, 6, iterations=15)) for which in (metric, full))
    torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_scales_do_not_matter(scale):
    weight, metric = kernel(10, 8, 9), random_metric(1, 10, 72)
    scaled = Metric(metric.covariance / scale, metric.mean, metric.curvature * scale**2)
    plain = relative_error(weighted_cp(weight, metric, 8), weight, metric)
    assert relative_error(weighted_cp(weight * scale, scaled, 8), weight * scale, scaled) == pytest.approx(plain)
    # Input channels in other units: the weights make up for them, and the outputs are the same.
    units = torch.logspace(-2, 2, 8, dtype=torch.float64)
    inputs = units.repeat_interleave(9)
    metric_in_units = Metric(metric.covariance * inputs[:, None] * inputs, metric.mean, metric.curvature)
    weight_in_units = weight / units[:, None]
    factors = weighted_cp(weight_in_units, metric_in_units, 8)
    assert relative_error(factors, weight_in_units, metric_in_units) == pytest.approx(plain, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dead_inputs_cost_nothing(dtype):
    weight, alive = kernel(12, 9, 9, dtype=dtype), torch.arange(9) != 4
    small = random_metric(1, 12, 72)
    covariance = torch.zeros(1, 81, 81, dtype=torch.float64)
    rows = alive.repeat_interleave(9).nonzero().squeeze(1)
    covariance[0, rows[:, None], rows] = small.covariance[0]
    metric = Metric(covariance, torch.zeros(1, 81, dtype=torch.float64), small.curvature)
    factors = weighted_cp(weight, metric, 12)
    assert all(factor.isfinite().all() for factor in factors)
    assert max(float(factor.abs().max()) for factor in factors) < 10
    expected = relative_error(weighted_cp(weight[:, alive], small, 12), weight[:, alive], small)
    assert relative_error(factors, weight, metric) == pytest.approx(expected, rel=0.05)


def test_few_outputs_that_matter():
    """A curvature of rank two, as before a classifier of three classes, and a covariance of rank ten."""
    weight, directions, inputs = kernel(12, 8, 9), random_tensor(12, 2, seed=4), random_tensor(72, 10, seed=5)
    metric = Metric(
        (inputs @ inputs.T)[None], torch.zeros(1, 72, dtype=torch.float64), (directions @ directions.T)[None]
    )
    factors = weighted_cp(weight, metric, 15)
    assert all(factor.isfinite().all() for factor in factors)
    without = [factor[None] for factor in cp_als(weight, 15)]
    assert relative_error(factors, weight, metric) < 0.1 * relative_error(without, weight, metric)


def test_nothing_to_see():
    metric = random_metric(1, 6, 45)
    nothing = Metric(torch.zeros(1, 45, 45, dtype=torch.float64), metric.mean)
    for factor, expected in zip(weighted_cp(kernel(6, 5, 9), nothing, 3), cp(kernel(6, 5, 9), 3), strict=True):
        assert torch.equal(factor[0], expected)
    zero = torch.zeros(6, 5, 9)
    assert not rebuild(weighted_cp(zero, metric, 3)).any()
    assert weighted_cp_errors(zero, metric, [1, 3]) == [0.0, 0.0]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-12), (torch.float64, 1e-24)])
def test_full_rank_is_exact(dtype, bound):
    for shape in ((6, 5, 9), (4, 7, 3, 3)):
        weight = kernel(*shape, dtype=dtype)
        metric = random_metric(1, shape[0], weight[0].numel())
        assert relative_error(weighted_cp(weight, metric, cp_full_rank(shape)), weight, metric) < bound


@pytest.mark.parametrize("noise", [1e-3, 1e-2])
def test_terms_stay_bounded_on_a_degenerate_tensor(noise):
    """Rank-2 tensors approach this one without end, as their two terms grow against one another."""
    tensor, metric = border_rank_two(noise=noise), random_metric(1, 12, 144)
    plain, corrected = (
        [weighted_cp(tensor, metric, 2, iterations=steps, epc=epc) for steps in (20, 400)] for epc in (False, True)
    )
    grown, kept = ([cp_sensitivity([factor[0] for factor in run]) for run in runs] for runs in (plain, corrected))
    assert grown[1] > 10 * grown[0]
    assert kept[1] < 2.5 * kept[0]
    assert kept[1] < 0.05 * grown[1]
    assert relative_error(corrected[1], tensor, metric) < 1.05 * relative_error(plain[1], tensor, metric)


@pytest.mark.parametrize(("shape", "rank"), [((20, 16, 9), 20), ((16, 12, 3, 3), 12)])
def test_correction_lowers_the_sensitivity_at_about_the_same_error(shape, rank):
    tensor = kernel(*shape)
    metric = random_metric(1, shape[0], tensor[0].numel())
    plain, corrected = (weighted_cp(tensor, metric, rank, iterations=100, epc=epc) for epc in (False, True))
    assert relative_error(corrected, tensor, metric) < 1.05 * relative_error(plain, tensor, metric)
    sensitivities = [cp_sensitivity([factor[0] for factor in run]) for run in (plain, corrected)]
    assert sensitivities[1] < 0.8 * sensitivities[0]


def test_terms_have_equal_norms_in_all_factors():
    weight = kernel(10, 8, 3, 3)
    norms = torch.stack([factor[0].norm(dim=0) for factor in weighted_cp(weight, random_metric(1, 10, 72), 5)])
    torch.testing.assert_close(norms, norms[:1].expand_as(norms))


def test_the_first_factor_is_the_best_for_the_others():
    weight, metric = kernel(10, 8, 9), random_metric(1, 10, 72)
    first, *others = (factor[0] for factor in weighted_cp(weight, metric, 6, iterations=5, epc=False))
    root = np.linalg.cholesky(metric.covariance[0].numpy())
    Z = np.stack([np.kron(others[0][:, r], others[1][:, r]) for r in range(6)], axis=1)
    expected = np.linalg.lstsq(root.T @ Z, root.T @ weight.flatten(1).T.numpy(), rcond=None)[0].T
    np.testing.assert_allclose(first.numpy(), expected, rtol=1e-6, atol=1e-8)


def test_a_start_is_never_made_worse_and_usually_better():
    weight, metric = kernel(12, 10, 9), random_metric(1, 12, 90)
    start = weighted_cp(weight, metric, 8, iterations=15)
    changed = weight + 0.1 * random_tensor(12, 10, 9, seed=5)
    other = random_metric(1, 12, 90, seed=3)
    refitted = weighted_cp(changed, other, 8, start=start, iterations=20)
    assert relative_error(refitted, changed, other) < 0.9 * relative_error(start, changed, other)
    for iterations in (1, 10):
        converged = weighted_cp(weight, metric, 8, iterations=500, epc=False)
        again = weighted_cp(weight, metric, 8, start=converged, iterations=iterations)
        assert relative_error(again, weight, metric) <= relative_error(converged, weight, metric)


def test_errors_of_short_fits_bracket_those_of_long_ones():
    weight = torch.cat([kernel(16, 8, 9), kernel(16, 8, 9, seed=1)])
    metric, ranks = random_metric(2, 16, 72), [2, 5, 10, 20, 30]
    errors = weighted_cp_errors(weight, metric, ranks)
    assert all(after < before for before, after in pairwise(errors))
    for rank, error in zip(ranks, errors, strict=True):
        full = relative_error(weighted_cp(weight, metric, rank), weight, metric) * metric.error(weight)
        assert full * 0.999 < error < 1.25 * full


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(dtype):
    weight, metric = kernel(12, 10, 9), random_metric(1, 12, 90)
    narrow = relative_error(weighted_cp(weight.to(dtype), metric, 8), weight, metric)
    assert narrow == pytest.approx(relative_error(weighted_cp(weight, metric, 8), weight, metric), rel=0.03)


def test_same_bits_twice_and_no_side_effects():
    weight, metric = kernel(12, 10, 9, dtype=torch.float32).requires_grad_(), random_metric(1, 12, 90)
    state, copies = torch.get_rng_state(), [weight.detach().clone(), metric.covariance.clone()]
    first, second = weighted_cp(weight, metric, 7), weighted_cp(weight, metric, 7)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(weight, copies[0])
    assert torch.equal(metric.covariance, copies[1])


def test_meta_tensors_give_shapes():
    weight = torch.empty(64, 16, 3, 3, device="meta", dtype=torch.bfloat16)
    factors = weighted_cp(weight, random_metric(2, 32, 144), 10)
    assert [tuple(factor.shape) for factor in factors] == [(2, 32, 10), (2, 16, 10), (2, 3, 10), (2, 3, 10)]
    assert all(factor.is_meta for factor in factors)


@pytest.mark.cuda
@pytest.mark.parametrize("shape", [(20, 16, 9), (12, 10, 3, 3)])
def test_cuda(shape, device):
    weight = kernel(*shape, dtype=torch.float32)
    metric = random_metric(1, shape[0], weight[0].numel())
    there = Metric(metric.covariance.to(device), metric.mean.to(device), metric.curvature.to(device))
    found = [factor.cpu() for factor in weighted_cp(weight.to(device), there, 6)]
    expected = relative_error(weighted_cp(weight, metric, 6), weight, metric)
    assert relative_error(found, weight, metric) == pytest.approx(expected, rel=0.02)
    assert weighted_cp_errors(weight.to(device), there, [3]) == pytest.approx(
        weighted_cp_errors(weight, metric, [3]), rel=0.02
    )
