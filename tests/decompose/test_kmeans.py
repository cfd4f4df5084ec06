"""k-means of numbers against brute force and scikit-learn."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from lowrank_nn import OptionError
from lowrank_nn.decompose import kmeans as module
from lowrank_nn.decompose import kmeans_1d, nearest_centroid

INITS = ("optimal", "linear", "density", "random")


def error(values, centroids, weights=None):
    squares = (values[:, None] - centroids[None]).square().amin(1)
    return float((squares if weights is None else squares * weights).sum())


def brute_force(values, weights, k):
    """The least weighted error over all ways to cut the sorted values into at most k intervals."""
    order = np.argsort(values)
    x, w = np.asarray(values)[order], np.asarray(weights)[order]
    least = np.inf
    for cuts in itertools.combinations(range(1, len(x)), min(k, len(x)) - 1):
        total = 0.0
        for part in zip(np.split(x, cuts), np.split(w, cuts), strict=True):
            if part[1].sum() > 0:
                total += (part[1] * (part[0] - np.average(part[0], weights=part[1])) ** 2).sum()
        least = min(least, total)
    return least


def heavy_tailed(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(n, generator=generator, dtype=torch.float64)
    return normal * torch.randn(n, generator=generator, dtype=torch.float64).exp() * 0.05


@given(
    st.lists(st.tuples(st.integers(-40, 40), st.integers(0, 5)), min_size=1, max_size=9).filter(
        lambda points: any(weight for _, weight in points)
    ),
    st.integers(1, 5),
)
def test_optimal_is_the_least_of_all_partitions(points, k):
    values = torch.tensor([x / 7 for x, _ in points], dtype=torch.float64)
    weights = torch.tensor([w for _, w in points], dtype=torch.float64)
    found = error(values, kmeans_1d(values, k, weights=weights), weights)
    assert found == pytest.approx(brute_force(values.numpy(), weights.numpy(), k), abs=1e-9)


@pytest.mark.parametrize("k", [2, 7, 16, 64])
def test_optimal_is_not_above_scikit_learn(k):
    values = heavy_tailed(1500)
    theirs = KMeans(k, n_init=3, random_state=0).fit(values.numpy()[:, None])
    assert error(values, kmeans_1d(values, k)) <= theirs.inertia_ * (1 + 1e-9)


@pytest.mark.parametrize("k", [2, 16, 64])
def test_many_values_are_near_the_optimum(k, monkeypatch):
    values = heavy_tailed(6000)
    grouped = error(values, kmeans_1d(values, k))
    monkeypatch.setattr(module, "POINTS", 6000)
    assert grouped <= error(values, kmeans_1d(values, k)) * (1 + 2e-3)


def test_an_outlier_does_not_spoil_the_groups():
    values = torch.cat([heavy_tailed(5000).clamp(-0.2, 0.2), torch.tensor([1e6], dtype=torch.float64)])
    found = kmeans_1d(values, 17)
    assert found[-1] == 1e6
    assert error(values, found) <= 1.002 * error(values[:-1], kmeans_1d(values[:-1], 16))


@pytest.mark.parametrize("init", INITS)
def test_what_lloyd_ends_with_is_a_fixed_point(init):
    values, weights = heavy_tailed(4000), heavy_tailed(4000, seed=1).square()
    centroids = kmeans_1d(values, 12, weights=weights, init=init)
    assert torch.equal(centroids, centroids.sort().values)
    cluster = nearest_centroid(values, centroids)
    assert torch.equal(cluster, (values[:, None] - centroids).abs().argmin(1))
    total = torch.zeros(12, dtype=torch.float64).index_add(0, cluster, weights)
    means = torch.zeros(12, dtype=torch.float64).index_add(0, cluster, weights * values) / total
    torch.testing.assert_close(centroids[total > 0], means[total > 0], rtol=1e-9, atol=1e-12)


def test_the_optimum_is_below_every_other_start():
    values = heavy_tailed(2000)
    errors = {init: error(values, kmeans_1d(values, 16, init=init)) for init in INITS}
    assert errors["optimal"] <= min(errors.values()) * (1 + 1e-12)
    assert errors["density"] > 1.02 * errors["optimal"]  # the trap that the dynamic program is there to avoid


def test_lloyd_against_scikit_learn_from_the_same_start():
    values = heavy_tailed(3000)
    start = torch.linspace(float(values.min()), float(values.max()), 6, dtype=torch.float64)
    theirs = KMeans(6, init=start.numpy()[:, None], n_init=1, max_iter=1000, tol=0).fit(values.numpy()[:, None])
    ours = kmeans_1d(values, 6, init="linear")
    torch.testing.assert_close(ours, torch.from_numpy(np.sort(theirs.cluster_centers_[:, 0])), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("init", INITS)
def test_few_distinct_values_are_all_kept(init):
    values = torch.tensor([0.3, -1.0, 0.3, 2.0], dtype=torch.float16)
    found = kmeans_1d(values, 5, init=init)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor([-1.0, 0.3, 2.0, 2.0, 2.0]).half().float(), rtol=0, atol=0)
    assert nearest_centroid(values, found).tolist() == [1, 0, 1, 2]


def test_weights_draw_centroids():
    values = torch.tensor([0.0, 1.0, 10.0])
    assert kmeans_1d(values, 2, weights=torch.tensor([1.0, 3.0, 1.0])).tolist() == [0.75, 10.0]
    assert kmeans_1d(values, 2, weights=torch.tensor([0.0, 3.0, 1.0])).tolist() == [1.0, 10.0]
    assert torch.equal(kmeans_1d(values, 2, weights=torch.zeros(3)), kmeans_1d(values, 2))
    assert kmeans_1d(values, 1, weights=torch.tensor([1e-30, 1.0, 1.0])).tolist() == [5.5]


def test_the_seed_decides_random_starts_alone():
    values, state = heavy_tailed(3000), torch.get_rng_state()
    first = kmeans_1d(values, 9, init="random", seed=1)
    assert torch.equal(first, kmeans_1d(values, 9, init="random", seed=1))
    assert not torch.equal(first, kmeans_1d(values, 9, init="random", seed=2))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k=0"),
        ({"k": 2, "init": "best"}, "'optimal', 'linear', 'density', 'random', got k=2, init='best'"),
        ({"k": 2, "weights": torch.ones(2)}, r"shape of the values, \(3,\), got \(2,\)"),
        ({"k": 2, "weights": torch.tensor([1.0, -1.0, 1.0])}, "not negative"),
        ({"k": 2, "weights": torch.tensor([1.0, torch.nan, 1.0])}, "finite"),
    ],
)
def test_what_cannot_be(options, message):
    with pytest.raises(OptionError, match=message):
        kmeans_1d(torch.arange(3.0), **options)
    with pytest.raises(OptionError, match="no values"):
        kmeans_1d(torch.empty(0), 2)


@pytest.mark.cuda
def test_on_a_gpu_as_on_the_cpu(device):
    values = heavy_tailed(3000)
    found = kmeans_1d(values.to(device), 8)
    assert found.device == device
    torch.testing.assert_close(found.cpu(), kmeans_1d(values, 8), rtol=0, atol=0)
