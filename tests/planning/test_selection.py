"""Channel selection against brute force, scikit-learn and numpy, on data rather than on moments."""

import itertools

import numpy as np
import pytest
import torch
from sklearn.linear_model import Lasso
from torch import nn

from lowrank_nn.decompose import Metric
from lowrank_nn.planning import collect_metrics
from lowrank_nn.planning.lasso_path import lasso_path
from lowrank_nn.planning.selection import Reader, gram, greedy_scores, lasso_scores, obs_scores

GENERATOR = torch.Generator().manual_seed(0)


def normal(*shape):
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


class Case:
    """Data (n, units * f) with correlated units, a weight and a curvature."""

    def __init__(self, units=7, size=2, outputs=4, samples=300, curvature=True):
        self.units, self.size = units, size
        p = units * size
        self.x = normal(samples, p) @ normal(p, p) + 0.3 * normal(samples, 1)
        self.weight = normal(outputs, p)
        root = normal(outputs, outputs)
        self.h = root @ root.T if curvature else torch.eye(outputs, dtype=torch.float64)
        order = torch.randperm(p, generator=GENERATOR)
        self.features = order.reshape(units, size)
        covariance = (self.x.T @ self.x / samples)[None]
        self.reader = Reader(self.weight[None], covariance, self.h[None] if curvature else None, self.features)

    def kept(self, units):
        mask = torch.zeros(self.units * self.size, dtype=torch.bool)
        mask[self.features[list(units)].flatten()] = True
        return mask

    def error(self, weight):
        """Mean over the data of (y - y')^T H (y - y')."""
        change = self.x @ (self.weight - weight).T
        return float((change @ self.h * change).sum(1).mean())

    def cut_error(self, units):
        """Error of dropping all but ``units``, the weights as they are."""
        return self.error(self.weight * self.kept(units))

    def refitted_error(self, units):
        """The same with the weights of least squares on the data, by numpy."""
        mask = self.kept(units).numpy()
        solution = np.linalg.lstsq(self.x.numpy()[:, mask], (self.x @ self.weight.T).numpy(), rcond=None)[0]
        weight = torch.zeros_like(self.weight)
        weight[:, mask] = torch.from_numpy(solution.T)
        return self.error(weight)


def removed_first(scores, count):
    return set(scores.argsort()[:count].tolist())


def test_gram_is_the_inner_products_of_contributions():
    case = Case()
    contributions = [case.x * case.kept([u]) @ case.weight.T for u in range(case.units)]
    expected = torch.tensor([[float((a @ case.h * b).sum(1).mean()) for b in contributions] for a in contributions])
    torch.testing.assert_close(case.reader.gram(), expected.double(), rtol=1e-6, atol=1e-8)
    other = Case()
    torch.testing.assert_close(gram([case.reader, other.reader]), case.reader.gram() + other.reader.gram())


def test_reader_of_a_convolution_finds_the_features_of_its_channels():
    conv = nn.Conv2d(4, 3, (2, 3))
    metric = Metric(torch.eye(24, dtype=torch.float64)[None], torch.zeros(1, 24, dtype=torch.float64))
    reader = Reader.of(conv.weight, metric, torch.tensor([[3], [1]]))
    assert reader.features.tolist() == [list(range(18, 24)), list(range(6, 12))]
    expected = conv.weight.detach().double().square().sum((0, 2, 3))[[3, 1]]
    torch.testing.assert_close(reader.gram(), torch.diag(expected))
    flat = Reader.of(torch.zeros(2, 24), metric, torch.tensor([[0, 1], [22, 23]]))
    assert flat.features.tolist() == [[0, 1], [22, 23]]


def test_grouped_convolution_and_diagonal_covariance():
    conv = nn.Conv2d(4, 6, 3, groups=2, bias=False).double()
    x = normal(64, 4, 5, 5)
    (metric,) = collect_metrics(conv, [x], [""], curvature=False).values()
    reader = Reader.of(conv.weight, metric.with_mean(), torch.tensor([[0], [1]]))
    with torch.no_grad():
        whole = conv(x)
        for unit in (0, 1):
            cut = nn.Conv2d(4, 6, 3, groups=2, bias=False).double()
            cut.weight.copy_(conv.weight)
            cut.weight[:, unit] = 0
            expected = float((whole - cut(x)).square().sum(1).mean())
            assert float(reader.gram()[unit, unit]) == pytest.approx(expected, rel=1e-3)
    diagonal = Metric(metric.covariance.diagonal(dim1=1, dim2=2), metric.mean)
    products = Reader.of(conv.weight, diagonal, torch.tensor([[0], [1]])).gram()
    assert float(products[0, 1]) == 0


@pytest.mark.parametrize("select", [lasso_scores, greedy_scores, obs_scores])
def test_a_reader_with_a_diagonal_counts_as_one_without_correlations(select):
    case, wide = Case(units=5, size=2), Case(units=5, size=3)
    diagonal = wide.reader.covariance.diagonal(dim1=1, dim2=2)
    short = Reader(wide.reader.weight, diagonal, wide.reader.curvature, wide.features)
    full = Reader(wide.reader.weight, torch.diag_embed(diagonal), wide.reader.curvature, wide.features)
    torch.testing.assert_close(short.gram(), full.gram())
    torch.testing.assert_close(select([case.reader, short]), select([case.reader, full]))


def test_units_that_nothing_comes_from():
    case = Case()
    reader = Reader(torch.zeros_like(case.reader.weight), case.reader.covariance, None, case.features)
    for select in (lasso_scores, greedy_scores, obs_scores):
        assert float(select([reader]).max()) < 1e-300


def test_lasso_path_is_that_of_scikit_learn():
    for _ in range(5):
        x, y = normal(200, 12) @ normal(12, 12), normal(200)
        y = x @ normal(12) + 2 * y
        scores = lasso_path(x.T @ x / 200, x.T @ y / 200).numpy()
        for level in np.quantile(scores, [0.1, 0.3, 0.5, 0.7, 0.9]) * 1.001:
            model = Lasso(alpha=level, fit_intercept=False, tol=1e-12, max_iter=100_000).fit(x.numpy(), y.numpy())
            inside = set(np.flatnonzero(np.abs(model.coef_) > 1e-9))
            # A coefficient that leaves and comes back is in until it leaves for good.
            assert inside <= set(np.flatnonzero(scores > level))
            assert len(inside) >= (scores > level).sum() - 1


def test_lasso_scores_select_what_the_penalised_regression_on_data_selects():
    case = Case(units=8, size=2)
    scores = lasso_scores([case.reader]).numpy()
    root = torch.linalg.cholesky(case.h)
    contributions = torch.stack(
        [((case.x * case.kept([u]) @ case.weight.T) @ root).flatten() for u in range(case.units)], dim=1
    )
    target = contributions.sum(1)
    for level in np.sort(scores)[[1, 3, 5]] * 1.0001:
        alpha = level * len(case.x) / len(target)
        model = Lasso(alpha=alpha, fit_intercept=False, tol=1e-12, max_iter=100_000)
        model.fit(contributions.numpy(), target.numpy())
        assert set(np.flatnonzero(np.abs(model.coef_) > 1e-9)) == set(np.flatnonzero(scores > level))


def test_lasso_keeps_one_of_two_equal_units():
    x = normal(100, 3)
    x = torch.cat([x, x[:, :1]], dim=1)  # unit 3 is unit 0 once more
    reader = Reader(torch.ones(1, 2, 4, dtype=torch.float64), (x.T @ x / 100)[None], None, torch.arange(4)[:, None])
    scores = lasso_scores([reader])
    assert torch.isfinite(scores).all()
    assert float(scores.max()) > 0


def test_greedy_removes_the_cheapest_unit_first_and_then_the_cheapest_pair_with_it():
    for _ in range(4):
        case = Case()
        scores = greedy_scores([case.reader])
        (first,) = removed_first(scores, 1)
        every = set(range(case.units))
        assert first == min(every, key=lambda u: case.cut_error(every - {u}))
        second = min(every - {first}, key=lambda u: case.cut_error(every - {first, u}))
        assert removed_first(scores, 2) == {first, second}


def test_obs_costs_are_those_of_least_squares_on_data():
    case = Case(units=6, size=2)
    scores = obs_scores([case.reader])
    every, gone, before = set(range(6)), set(), 0.0
    for unit in scores.argsort().tolist()[:-1]:
        best = min(every - gone, key=lambda u: case.refitted_error(every - gone - {u}))
        assert unit == best
        gone |= {unit}
        after = case.refitted_error(every - gone)
        assert float(scores[unit]) >= (after - before) * (1 - 1e-6)
        before = after
    assert scores.sort().values.diff().gt(0).all()


def test_obs_is_close_to_the_best_of_all_subsets_and_better_than_greedy():
    worse = []
    for _ in range(6):
        case = Case(units=8, size=1)
        best = min(case.refitted_error(kept) for kept in itertools.combinations(range(8), 4))
        errors = {}
        for name, select in (("obs", obs_scores), ("greedy", greedy_scores), ("lasso", lasso_scores)):
            kept = set(range(8)) - removed_first(select([case.reader]), 4)
            errors[name] = case.refitted_error(kept)
            assert errors[name] >= best * (1 - 1e-9)
        assert errors["obs"] <= 1.6 * best
        worse.append(errors["greedy"] / errors["obs"])
    assert np.mean(worse) >= 1


def test_inputs_that_belong_to_no_unit_stay_and_make_up_for_those_gone():
    case = Case(units=9, size=2)
    reader = Reader(case.reader.weight, case.reader.covariance, case.reader.curvature, case.features[[7, 0, 4, 2, 3]])
    scores = obs_scores([reader])
    units, gone = [7, 0, 4, 2, 3], []
    for place in scores.argsort().tolist():
        left = [u for u in range(9) if u not in gone]
        costs = {u: case.refitted_error([k for k in left if k != u]) for u in units if u in left}
        assert units[place] == min(costs, key=costs.get)
        gone.append(units[place])


def test_obs_of_several_readers_adds_their_costs():
    one, two = Case(units=5, size=1), Case(units=5, size=3)
    (first,) = removed_first(obs_scores([one.reader, two.reader]), 1)
    every = set(range(5))
    assert first == min(every, key=lambda u: one.refitted_error(every - {u}) + two.refitted_error(every - {u}))


@pytest.mark.cuda
@pytest.mark.parametrize("select", [lasso_scores, greedy_scores, obs_scores])
def test_cuda(select, device):
    case = Case()
    reader = Reader(
        *(tensor.to(device) for tensor in (case.reader.weight, case.reader.covariance, case.reader.curvature)),
        case.features.to(device),
    )
    torch.testing.assert_close(select([reader]).cpu(), select([case.reader]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("select", [obs_scores, greedy_scores, lasso_scores])
def test_second_moments_with_the_noise_of_float32(select):
    """One image, many inputs far from zero: eigenvalues of the sums are not all above it."""
    generator = torch.Generator().manual_seed(50)
    x = torch.rand(1, 64, generator=generator) + 6
    covariance = (x.T @ x).double()
    assert torch.linalg.eigvalsh(covariance)[0] < 0
    weight = torch.randn(1, 13, 64, generator=generator).double()
    scores = select([Reader(weight, covariance[None], None, torch.arange(64)[:, None])])
    assert torch.isfinite(scores).all()
    assert (scores >= 0).all()
