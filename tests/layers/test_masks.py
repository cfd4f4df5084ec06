"""Units, scores and masks against loops over numpy arrays."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowrank_nn.errors import CalibrationError, OptionError, UnsupportedLayerError
from lowrank_nn.layers._masks import (
    Units,
    best_window,
    bounding_window,
    check_sparsity,
    keep_largest,
    unit_scores,
)

SHAPE, GROUPS = (6, 4, 3, 2), 2
GRANULARITIES = ["element", "row", "column", "kernel", "group", "channel", "filter", "shape"]


def unit_of(granularity, position, groups=GROUPS, out=SHAPE[0]):
    """The name of the unit that an entry [o, i, h, w] belongs to, from the definitions in words."""
    o, i, h, w = position
    block = o // (out // groups)
    return {
        "element": (o, i, h, w),
        "row": (o, i, h),
        "column": (o, i, w),
        "kernel": (o, i),
        "group": (block, i, h, w),
        "channel": (block, i),
        "filter": (o,),
        "shape": (h, w),
    }[granularity]


def units_by_hand(granularity, groups=GROUPS):
    units = {}
    for position in itertools.product(*map(range, SHAPE)):
        units.setdefault(unit_of(granularity, position, groups), []).append(position)
    return units


def weight(seed=0, shape=SHAPE):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_units_are_those_of_the_definition(granularity, groups):
    units = Units.of("Layer", granularity, SHAPE, groups)
    by_hand = units_by_hand(granularity, groups)
    assert units.count == len(by_hand)
    assert {units.size} == {len(members) for members in by_hand.values()}


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("criterion", ["l1", "l2", "obd"])
def test_the_lowest_units_go_whole(granularity, groups, sparsity, criterion):
    w, fisher = weight(), weight(1).square()
    units = Units.of("Layer", granularity, SHAPE, groups)
    scores = unit_scores("Layer", units, w, criterion, fisher if criterion == "obd" else None)
    mask = units.spread(keep_largest(scores, units.kept(sparsity)), SHAPE).numpy()
    values = {"l1": w.abs(), "l2": w.square(), "obd": fisher * w.square() / 2}[criterion].numpy()
    by_hand = units_by_hand(granularity, groups)
    order = sorted(by_hand, key=lambda unit: sum(values[p] for p in by_hand[unit]))
    pruned = min(int(sparsity * len(order) + 0.5), len(order) - 1)
    expected = np.ones(SHAPE, dtype=bool)
    for unit in order[:pruned]:
        for position in by_hand[unit]:
            expected[position] = False
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize("granularity", ["element", "channel", "filter"])
def test_matrices(granularity):
    w = weight(shape=(5, 4))
    units = Units.of("Layer", granularity, (5, 4))
    mask = units.spread(keep_largest(unit_scores("Layer", units, w, "l1"), units.kept(0.4)), (5, 4)).numpy()
    size = np.abs(w.numpy())
    if granularity == "channel":
        gone = np.argsort(size.sum(0))[:2]
        expected = np.ones((5, 4), dtype=bool)
        expected[:, gone] = False
    elif granularity == "filter":
        gone = np.argsort(size.sum(1))[:2]
        expected = np.ones((5, 4), dtype=bool)
        expected[gone] = False
    else:
        expected = size > np.sort(size.ravel())[7]
    np.testing.assert_array_equal(mask, expected)


@given(
    values=st.lists(st.sampled_from([0.0, 1.0, 2.0, -np.inf]), min_size=1, max_size=30),
    share=st.floats(0, 1),
)
def test_keep_largest_breaks_ties_by_place(values, share):
    kept = max(1, round(share * len(values)))
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    expected = [i in order[:kept] for i in range(len(values))]
    assert keep_largest(torch.tensor(values), kept).tolist() == expected


@given(sparsity=st.floats(0, 0.9999), count=st.integers(1, 200))
def test_rounding_to_whole_units(sparsity, count):
    kept = Units.of("Layer", "filter", (count, 1, 1, 1)).kept(sparsity)
    assert kept == 1 or abs((count - kept) - sparsity * count) <= 0.5 + 1e-9
    assert 1 <= kept <= count


@pytest.mark.parametrize("criterion", ["l1", "l2", "obd"])
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_choice_does_not_depend_on_scale(criterion, scale):
    w, fisher = weight().float(), weight(1).square().float() if criterion == "obd" else None
    units = Units.of("Layer", "kernel", SHAPE)

    def chosen(factor):
        scaled = None if fisher is None else fisher * factor
        return keep_largest(unit_scores("Layer", units, w * factor, criterion, scaled), 10)

    assert torch.equal(chosen(scale), chosen(1.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_of_half_precision_do_not_overflow(dtype):
    w = torch.full(SHAPE, 3e4).to(dtype)
    w[0] = 1e4
    for criterion in ("l1", "l2"):
        scores = unit_scores("Layer", Units.of("Layer", "filter", SHAPE), w, criterion)
        assert scores.isfinite().all()
        assert scores.flatten().argmin() == 0


def test_random_has_a_seed_and_leaves_the_global_state_alone():
    units, w = Units.of("Layer", "element", SHAPE), weight()
    before = torch.get_rng_state()
    draws = [unit_scores("Layer", units, w, "random", seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_random_takes_every_unit_equally_often():
    units = Units.of("Layer", "filter", SHAPE)
    kept = sum(
        keep_largest(unit_scores("Layer", units, weight(), "random", seed=seed), 3).flatten().int()
        for seed in range(400)
    )
    assert kept.sum() == 1200
    assert (kept - 200).abs().max() < 50  # five standard deviations


@given(st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=3, max_size=3))
def test_bounding_window_is_the_smallest_around_the_positions(rows):
    positions = np.array(rows)
    if not positions.any():
        return
    top, left, height, width = bounding_window(torch.from_numpy(positions))
    outside = positions.copy()
    outside[top : top + height, left : left + width] = False
    assert not outside.any()
    inside = positions[top : top + height, left : left + width]
    assert inside[0].any()
    assert inside[-1].any()
    assert inside[:, 0].any()
    assert inside[:, -1].any()


@given(
    size=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    sparsity=st.sampled_from([0.0, 0.2, 1 / 3, 0.5, 2 / 3, 0.9]),
    seed=st.integers(0, 99),
)
def test_best_window_against_all_rectangles(size, sparsity, seed):
    scores = np.random.default_rng(seed).random(size)
    window = best_window(torch.from_numpy(scores), sparsity)
    wanted = (1 - sparsity) * scores.size
    rectangles = [
        (t, s, h, w) for t, s in np.ndindex(*size) for h in range(1, size[0] - t + 1) for w in range(1, size[1] - s + 1)
    ]

    def total(r):
        return scores[r[0] : r[0] + r[2], r[1] : r[1] + r[3]].sum()

    nearest = min(abs(r[2] * r[3] - wanted) for r in rectangles)
    area = max(r[2] * r[3] for r in rectangles if abs(r[2] * r[3] - wanted) <= nearest + 1e-6)
    assert window[2] * window[3] == area
    assert total(window) == pytest.approx(max(total(r) for r in rectangles if r[2] * r[3] == area))


@pytest.mark.parametrize("value", [-0.1, 1, 1.5, float("nan"), "half", True, None])
def test_sparsity_out_of_range(value):
    with pytest.raises(OptionError, match="Layer: sparsity must be a share"):
        check_sparsity("Layer", value)


def test_unknown_granularity_and_criterion():
    with pytest.raises(OptionError, match=r"granularity must be one of 'element'.*got 'block'"):
        Units.of("Layer", "block", SHAPE)
    with pytest.raises(UnsupportedLayerError, match="no units of granularity 'row'"):
        Units.of("Layer", "row", (3, 4))
    with pytest.raises(OptionError, match=r"criterion must be 'l1'.*got 'l3'"):
        unit_scores("Layer", Units.of("Layer", "row", SHAPE), weight(), "l3")


@pytest.mark.parametrize(
    ("fisher", "match"),
    [
        (None, "needs fisher, a tensor of shape"),
        (torch.ones(6, 4), "must have the weight's shape"),
        (-torch.ones(SHAPE), "negative"),
        (torch.full(SHAPE, float("nan")), "NaN"),
        (torch.full(SHAPE, float("inf")), "infinite"),
    ],
)
def test_bad_fisher(fisher, match):
    with pytest.raises(CalibrationError, match=match):
        unit_scores("Layer", Units.of("Layer", "row", SHAPE), weight(), "obd", fisher)


def test_fisher_that_nobody_reads():
    with pytest.raises(OptionError, match="fisher is used by criterion='obd' alone"):
        unit_scores("Layer", Units.of("Layer", "row", SHAPE), weight(), "l1", weight().square())
