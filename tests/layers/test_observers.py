import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowrank_nn.errors import CalibrationError, OptionError
from lowrank_nn.layers._histogram import BINS, Histogram
from lowrank_nn.layers._observers import (
    EntropyObserver,
    MinMaxObserver,
    MSEObserver,
    PercentileObserver,
    make_observer,
)


def draw(seed, count=20_000, kind="normal", scale=1.0):
    rng = np.random.default_rng(seed)
    made = {
        "normal": rng.standard_normal(count),
        "relu": np.maximum(rng.standard_normal(count), 0),
        "heavy": rng.standard_t(2, count),
        "shifted": rng.standard_normal(count) + 6,
        "negative": -np.abs(rng.standard_normal(count)),
    }
    return made[kind] * scale


KINDS = ["normal", "relu", "heavy", "shifted", "negative"]


def observed(observer, x, parts=1):
    for part in np.array_split(x, parts):
        observer.observe(torch.from_numpy(part))
    return observer.range()


@pytest.mark.parametrize("kind", KINDS)
def test_minmax_is_the_range_of_all_values_and_zero(kind):
    x = draw(0, kind=kind)
    assert observed(MinMaxObserver(), x, 7) == (min(x.min(), 0), max(x.max(), 0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9, 100.0])
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e12])
def test_percentiles_are_numpys_to_the_width_of_a_bin(kind, percentile, scale):
    x = draw(1, kind=kind, scale=scale)
    low, high = observed(PercentileObserver(percentile), x, 5)
    bin_width = (max(x.max(), 0) - min(x.min(), 0)) / (BINS / 2 - 1)
    for end, share, bound in ((low, 100 - percentile, min), (high, percentile, max)):
        # Between two neighbouring values any number is the percentile.
        below, above = (np.percentile(x, share, method=method) for method in ("lower", "higher"))
        assert bound(below, 0) - 1.01 * bin_width <= end <= bound(above, 0) + 1.01 * bin_width


def test_zeros_count_in_percentiles_as_zeros():
    x = np.concatenate([np.zeros(990), np.full(10, 5.0)])
    assert observed(PercentileObserver(95.0), x) == (0, 0)


def brute_force_error(x, low, high, levels):
    step = (high - low) / levels
    zero = np.round(-low / step)
    return np.square((np.clip(np.round(x / step) + zero, 0, levels) - zero) * step - x).mean()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_mse_range_errs_as_little_as_the_best_one(kind, bits):
    x = draw(2, 4000, kind)
    levels = 2**bits - 1
    low, high = observed(MSEObserver(bits), x, 3)
    shares = np.linspace(0.02, 1, 50)
    lows = shares * min(x.min(), 0) if x.min() < 0 else [0.0]
    highs = shares * max(x.max(), 0) if x.max() > 0 else [0.0]
    best = min(brute_force_error(x, a, b, levels) for a in lows for b in highs)
    assert brute_force_error(x, low, high, levels) <= 1.05 * best


def test_the_mse_range_clips_an_outlier_at_few_bits_and_less_at_many():
    x = np.append(draw(3, 5000), 40.0)
    assert observed(MSEObserver(3), x)[1] < 0.25 * observed(MSEObserver(8), x)[1]


def migacz(counts, centers, low, high, levels):
    """The divergence of Migacz's slides, bin by bin: clipped values in the last bins, levels spread over their bins."""
    step = (high - low) / levels
    zero = round(-low / step)
    chosen = [j for j in range(len(counts)) if counts[j] and low <= centers[j] <= high]
    if not chosen:
        return math.inf
    p, groups = {j: counts[j] for j in chosen}, {}
    p[chosen[0]] += sum(counts[: chosen[0]])
    p[chosen[-1]] += sum(counts[chosen[-1] + 1 :])
    for j in chosen:
        groups.setdefault(min(max(round(centers[j] / step) + zero, 0), levels), []).append(j)
    q = {}
    for group in groups.values():
        q |= dict.fromkeys(group, sum(counts[i] for i in group) / len(group))
    all_p, all_q = sum(p.values()), sum(q.values())
    return sum(p[j] / all_p * math.log((p[j] / all_p) / (q[j] / all_q)) for j in chosen)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_the_entropy_range_is_that_of_migacz(kind, bits):
    x, levels = draw(4, 3000, kind), 2**bits - 1
    observer = EntropyObserver(bits)
    low, high = observed(observer, x, 3)
    edges, counts = observer.histogram.edges(), observer.histogram.counts.tolist()
    centers = ((edges[:-1] + edges[1:]) / 2).clip(x.min(), x.max()).tolist()
    bottom, top = min(x.min(), 0.0), max(x.max(), 0.0)
    tried = [migacz(counts, centers, share * bottom, share * top, levels) for share in np.linspace(0.02, 1, 99)]
    found = migacz(counts, centers, low, high, levels)
    assert found <= min(tried) + 1e-12
    if bottom == 0:  # only one end to choose
        assert high == pytest.approx(np.linspace(0.02, 1, 99)[int(np.argmin(tried))] * top)


def test_the_entropy_range_clips_outliers_at_few_bits():
    x = np.append(draw(3, 5000), 40.0)
    assert observed(EntropyObserver(4), x)[1] < 10


@given(st.integers(0, 99), st.lists(st.integers(1, 3999), max_size=6), st.sampled_from(KINDS), st.floats(-20, 20))
def test_the_histogram_does_not_depend_on_batches_or_order(seed, cuts, kind, exponent):
    x = draw(seed, 4000, kind, 10.0**exponent)
    whole, parts = Histogram(), Histogram()
    whole.add(torch.from_numpy(x), x.min(), x.max())
    shuffled = np.random.default_rng(seed).permutation(x)
    for part in np.split(np.sort(x) if seed % 2 else shuffled, sorted(cuts)):
        if part.size:
            parts.add(torch.from_numpy(part), part.min(), part.max())
    assert (whole.exponent, whole.first, whole.zeros) == (parts.exponent, parts.first, parts.zeros)
    assert torch.equal(whole.counts, parts.counts)
    assert BINS / 2 - 1 <= whole.counts.numel() <= BINS
    expected, _ = np.histogram(x[x != 0], whole.edges())
    # numpy's last bin takes its right border in; no value lies on it here.
    np.testing.assert_array_equal(whole.counts.numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_dtypes_are_counted_exactly(dtype):
    x = torch.from_numpy(draw(5)).to(dtype)
    narrow, wide = PercentileObserver(99.0), PercentileObserver(99.0)
    narrow.observe(x)
    wide.observe(x.double())
    assert narrow.range() == wide.range()


@pytest.mark.parametrize("name", ["minmax", "percentile", "mse", "entropy"])
def test_degenerate_values_give_finite_ranges(name):
    for x, expected in (([0.0, 0.0], (0, 0)), ([3.0], (0, 3)), ([-2.0], (-2, 0)), ([0.0, 1e-40], (0, 1e-40))):
        observer = make_observer(name, 8)
        observer.observe(torch.tensor([]))
        observer.observe(torch.tensor(x))
        low, high = observer.range()
        assert low == pytest.approx(expected[0], rel=0.03)
        assert high == pytest.approx(expected[1], rel=0.03)


@pytest.mark.parametrize("name", ["minmax", "percentile", "mse", "entropy"])
def test_bad_values_are_refused(name):
    observer = make_observer(name, 8)
    with pytest.raises(CalibrationError, match=r"no values were seen\. Pass at least one"):
        observer.range()
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(CalibrationError, match=r"there are NaN or infinite values\. Look for"):
            observer.observe(torch.tensor([1.0, bad]))
    with pytest.raises(CalibrationError, match=r"expected floating-point tensors, got a tensor of torch\.int64"):
        observer.observe(torch.tensor([1]))
    with pytest.raises(CalibrationError, match="expected floating-point tensors, got list"):
        observer.observe([1.0])


def test_bad_options_are_refused():
    with pytest.raises(OptionError, match="must be one of 'minmax', 'percentile', 'mse', 'entropy', got 'median'"):
        make_observer("median", 8)
    with pytest.raises(OptionError, match="percentile: must be above 50 and at most 100, got 30"):
        PercentileObserver(30)
