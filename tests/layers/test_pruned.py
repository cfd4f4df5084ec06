"""PrunedConv2d and PrunedLinear: zeros that stay, units that go, windows that compute the same."""

import copy
import io
import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lowrank_nn.errors import CalibrationError, OptionError, UnsupportedLayerError
from lowrank_nn.layers import PrunedConv2d, PrunedLinear
from lowrank_nn.layers._window import check_window, crop_window, embed_window, explicit_padding, windowed_conv2d

SIZES = {"element": 1, "row": 3, "column": 3, "kernel": 9, "group": 6, "channel": 54, "filter": 36, "shape": 24}
GRANULARITIES = list(SIZES)
"""Each granularity with the scalars in a unit of the convolution below."""


def conv(seed=0, **options):
    arguments = {"in_channels": 4, "out_channels": 6, "kernel_size": 3, **options}
    layer = nn.Conv2d(**arguments)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        layer.weight.normal_(generator=generator)
    return layer


def linear(seed=0):
    layer = nn.Linear(8, 5)
    with torch.no_grad():
        layer.weight.normal_(generator=torch.Generator().manual_seed(seed))
    return layer


def pruned_layers():
    yield PrunedConv2d.from_pretrained_layer(conv(), sparsity=0.6), torch.randn(2, 4, 6, 6)
    yield PrunedConv2d.from_pretrained_layer(conv(), sparsity=0.5, granularity="kernel"), torch.randn(2, 4, 6, 6)
    yield PrunedConv2d.from_pretrained_layer(conv(), sparsity=1 / 3, granularity="window"), torch.randn(2, 4, 6, 6)
    yield PrunedConv2d(4, 6, 3, sparsity=0.5, granularity="group"), torch.randn(2, 4, 6, 6)
    yield PrunedLinear.from_pretrained_layer(linear(), sparsity=0.6), torch.randn(3, 8)
    yield PrunedLinear(8, 5, sparsity=0.5, granularity="channel"), torch.randn(3, 8)


def train(layer, x, optimizer, steps=5):
    for _ in range(steps):
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        optimizer.step()


# --- Zeros that stay ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
        lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.1),
        lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9),
    ],
)
def test_zeros_survive_training(optimizer):
    for layer, x in pruned_layers():
        before = layer.weight.detach().clone()
        train(layer, x, optimizer(layer.parameters()))
        assert torch.equal(layer.weight == 0, before == 0)
        assert bool((layer.weight != before)[before != 0].all())


def test_momentum_from_before_pruning_does_not_bring_zeros_back():
    layer, x = next(pruned_layers())
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    zeros = layer.weight == 0
    optimizer.state[layer.kernel]["momentum_buffer"] = torch.ones_like(layer.kernel)
    train(layer, x, optimizer)
    assert bool(layer.kernel[zeros].all())  # the stored numbers moved, the weight did not
    assert not layer.weight[zeros].any()
    assert not layer.to_dense_layer().weight[zeros].any()


def test_gradients_of_masked_entries_are_zero_even_if_others_are_infinite():
    layer, _ = next(pruned_layers())
    (layer(torch.full((1, 4, 6, 6), 3e38)).sum() * 1e10).backward()
    assert not layer.kernel.grad[~layer.mask].any()
    assert not layer.kernel.grad[layer.mask].isfinite().all()


def test_values_outside_the_mask_do_not_matter():
    for layer, x in pruned_layers():
        expected = layer(x)
        with torch.no_grad():
            layer.kernel[~layer.mask] = float("nan")
        assert torch.equal(layer(x), expected)
        assert bool(layer.weight.isfinite().all())


def test_zeros_survive_loading_copying_casting_and_flags():
    for layer, x in pruned_layers():
        zeros, expected = layer.weight == 0, layer(x)
        file = io.BytesIO()
        torch.save(layer.state_dict(), file)
        file.seek(0)
        loaded = type(layer)(**json.loads(json.dumps(layer.config())))
        loaded.load_state_dict(torch.load(file, weights_only=True))
        frozen = copy.deepcopy(layer).requires_grad_(False).eval().requires_grad_(True).train()
        for twin in (loaded, copy.deepcopy(layer), frozen):
            assert torch.equal(twin(x), expected)
            assert torch.equal(twin.weight == 0, zeros)
            assert twin.config() == layer.config()
        for dtype in (torch.float16, torch.bfloat16, torch.float64):
            cast = copy.deepcopy(layer).to(dtype)
            assert cast.mask.dtype == torch.bool
            assert cast.weight.dtype == dtype
            train(
                cast, x.to(dtype), torch.optim.SGD(cast.parameters(), lr=1e-3, momentum=0.9, weight_decay=0.1), steps=2
            )
            assert not cast.weight[zeros].any()


def test_resetting_draws_weights_and_keeps_the_mask():
    for layer, _ in pruned_layers():
        mask, before = layer.mask.clone(), layer.weight.detach().clone()
        layer.reset_parameters()
        assert torch.equal(layer.mask, mask)
        assert not layer.kernel[~mask].any()
        assert bool((layer.weight != before)[before != 0].all())


# --- Units --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("criterion", ["l1", "l2"])
def test_kept_weights_are_the_sources_and_whole_units_go(granularity, groups, criterion):
    dense = conv(groups=groups)
    layer = PrunedConv2d.from_pretrained_layer(dense, sparsity=0.4, granularity=granularity, criterion=criterion)
    w, kept = dense.weight.detach().numpy(), (layer.weight != 0).numpy()
    np.testing.assert_array_equal(layer.weight.detach().numpy(), np.where(kept, w, 0))
    size = np.abs(w) if criterion == "l1" else w.astype(np.float64) ** 2
    blocks, alive = (a.reshape(groups, 6 // groups, 4 // groups, 3, 3) for a in (size, kept))
    spans = {
        "element": (),
        "row": (4,),
        "column": (3,),
        "kernel": (3, 4),
        "group": (1,),
        "channel": (1, 3, 4),
        "filter": (2, 3, 4),
        "shape": (0, 1, 2),
    }[granularity]
    np.testing.assert_array_equal(alive.any(spans), alive.all(spans))
    scores, alive = blocks.sum(spans).ravel(), alive.all(spans).ravel()
    assert (~alive).sum() == int(0.4 * scores.size + 0.5)
    assert scores[alive].min() > scores[~alive].max()
    assert layer.nonzeros == kept.sum()
    assert layer.density == pytest.approx(kept.mean())


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_from_scratch_prunes_random_whole_units(granularity):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [PrunedConv2d(4, 6, 3, sparsity=0.5, granularity=granularity) for _ in range(2)]
    for layer in layers:
        assert int((layer.weight != 0).sum()) == layer.nonzeros == int(layer.mask.sum())
        expected = PrunedConv2d.from_pretrained_layer(layer.to_dense_layer(), sparsity=0.5, granularity=granularity)
        assert torch.equal(expected.weight, layer.weight)
    assert not torch.equal(layers[0].weight != 0, layers[1].weight != 0)


@pytest.mark.parametrize("granularity", ["element", "channel", "filter"])
def test_linear_units(granularity):
    dense = linear()
    layer = PrunedLinear.from_pretrained_layer(dense, sparsity=0.4, granularity=granularity)
    size = dense.weight.detach().abs().numpy()
    kept = (layer.weight != 0).numpy()
    if granularity == "element":
        assert (~kept).sum() == 16
        assert size[kept].min() > size[~kept].max()
    else:
        axis = 0 if granularity == "channel" else 1
        order = np.argsort(size.sum(axis))
        gone = order[: int(0.4 * len(order) + 0.5)]
        expected = np.ones_like(kept)
        expected[(slice(None), gone) if granularity == "channel" else gone] = False
        np.testing.assert_array_equal(kept, expected)


def test_a_pruned_filter_gives_its_bias():
    dense = conv()
    layer = PrunedConv2d.from_pretrained_layer(dense, sparsity=0.5, granularity="filter")
    gone = ~(layer.weight != 0).flatten(1).any(1)
    y = layer(torch.randn(2, 4, 5, 5))
    assert gone.sum() == 3
    assert torch.equal(y[:, gone], dense.bias[gone][None, :, None, None].expand(2, 3, 3, 3))


def test_optimal_brain_damage_prefers_what_the_loss_needs():
    dense = conv()
    fisher = torch.ones_like(dense.weight)
    fisher[2] = 1e-6
    layer = PrunedConv2d.from_pretrained_layer(
        dense, sparsity=1 / 6, granularity="filter", criterion="obd", fisher=fisher
    )
    assert (layer.weight != 0).flatten(1).any(1).tolist() == [True, True, False, True, True, True]
    with pytest.raises(CalibrationError, match="PrunedConv2d: criterion='obd' needs fisher"):
        PrunedConv2d.from_pretrained_layer(dense, sparsity=0.5, criterion="obd")


def test_random_pruning_is_seeded():
    dense, state = conv(), torch.get_rng_state()
    first, second, other = (
        PrunedConv2d.from_pretrained_layer(dense, sparsity=0.5, criterion="random", seed=seed) for seed in (3, 3, 4)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.mask, second.mask)
    assert not torch.equal(first.mask, other.mask)


def test_at_least_one_unit_stays():
    layer = PrunedConv2d.from_pretrained_layer(conv(), sparsity=0.999, granularity="filter")
    assert layer.nonzeros == 36


def test_equal_scores_prune_the_last_units():
    dense = conv()
    with torch.no_grad():
        dense.weight.fill_(0.5)
    layer = PrunedConv2d.from_pretrained_layer(dense, sparsity=0.5, granularity="filter")
    assert (layer.weight != 0).flatten(1).any(1).tolist() == [True] * 3 + [False] * 3


@pytest.mark.parametrize("granularity", [*GRANULARITIES, "window"])
def test_meta_layers_cost_what_real_ones_cost(granularity):
    dense = conv()
    real = PrunedConv2d.from_pretrained_layer(dense, sparsity=1 / 3, granularity=granularity)
    shadow = PrunedConv2d.from_pretrained_layer(dense.to("meta"), sparsity=1 / 3, granularity=granularity)
    costs = shadow.cost((2, 4, 8, 8)), real.cost((2, 4, 8, 8))
    if granularity == "shape":  # which positions stay, and so the window, is known from the numbers alone
        assert costs[0].macs >= costs[1].macs
        assert costs[0].nonzeros == costs[1].nonzeros
    else:
        assert costs[0] == costs[1]


def test_pattern_tells_what_is_left():
    dense = conv()
    with torch.no_grad():
        dense.weight[:, :, 2] *= 1e-3
        dense.weight[5] *= 1e-6
    layer = PrunedConv2d.from_pretrained_layer(dense, sparsity=1 / 3, granularity="row")
    lines = layer.pattern.splitlines()
    assert lines[0] == "row: 48 of 72 units kept, 144 of 216 scalars"
    counts = [[int(v) for v in line.split()] for line in lines[-3:]]
    np.testing.assert_array_equal(counts, (layer.weight != 0).sum((0, 1)))
    window = PrunedConv2d.from_pretrained_layer(dense, sparsity=1 / 3, granularity="window")
    assert window.pattern.splitlines()[-3:] == ["24 24 24", "24 24 24", " 0  0  0"]
    assert PrunedLinear.from_pretrained_layer(linear(), sparsity=0.5).pattern.count("\n") == 1


# --- Pruning further ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("then", ["same", "element"])
def test_gradual_pruning_is_monotone(granularity, then):
    layer = PrunedConv2d.from_pretrained_layer(conv(), sparsity=0.3, granularity=granularity)
    with torch.no_grad():  # the zeros would not be the smallest any more
        layer.kernel.mul_(1e-3)
    for total in (0.5, 0.625, 0.75):
        unit = granularity if then == "same" else "element"
        further = PrunedConv2d.from_pretrained_layer(layer, sparsity=total, granularity=unit)
        kept = further.weight != 0
        assert not further.weight[layer.weight == 0].any()
        assert torch.equal(further.weight, torch.where(kept, layer.weight, 0))
        assert int(kept.sum()) == further.nonzeros
        units = layer.weight.numel() // SIZES[unit]
        assert abs(1 - further.density - total) <= 0.5 / units + 1e-9
        layer = further


def test_an_already_pruned_layer_keeps_its_zeros_even_where_others_are_smaller():
    dense = conv()
    first = PrunedConv2d.from_pretrained_layer(dense, sparsity=0.5, criterion="random")
    second = PrunedConv2d.from_pretrained_layer(first, sparsity=0.75, criterion="random", seed=9)
    assert bool((second.mask <= first.mask).all())
    assert second.nonzeros == 54


def test_windows_shrink_inside_windows():
    dense = conv(kernel_size=5)
    first = PrunedConv2d.from_pretrained_layer(dense, sparsity=1 - 12 / 25, granularity="window")
    second = PrunedConv2d.from_pretrained_layer(first, sparsity=1 - 6 / 25, granularity="window")
    sparse = PrunedConv2d.from_pretrained_layer(second, sparsity=0.9)
    for bigger, smaller in ((dense, first), (first, second), (second, sparse)):
        assert not smaller.weight[bigger.weight == 0].any()
        assert torch.equal(smaller.weight, torch.where(smaller.weight != 0, bigger.weight, 0))
    assert first.kernel[0, 0].numel() == 12
    assert second.kernel[0, 0].numel() == 6
    assert sparse.window == second.window
    assert sparse.nonzeros == int((sparse.weight != 0).sum()) == 60


def test_flags_follow_a_pruned_source():
    dense = conv()
    dense.weight.requires_grad_(False)
    first = PrunedConv2d.from_pretrained_layer(dense.eval(), sparsity=0.3)
    second = PrunedConv2d.from_pretrained_layer(first, sparsity=0.5)
    for layer in (first, second):
        assert (layer.kernel.requires_grad, layer.bias.requires_grad, layer.training) == (False, True, False)


def test_pruning_back_and_mixing_units_are_refused():
    layer = PrunedConv2d.from_pretrained_layer(conv(), sparsity=0.5, granularity="row")
    with pytest.raises(OptionError, match=r"sparsity is the total afterwards.*0\.5 already, got 0\.2"):
        PrunedConv2d.from_pretrained_layer(layer, sparsity=0.2, granularity="row")
    for granularity in ("filter", "window"):
        with pytest.raises(UnsupportedLayerError, match=f"pruned already with granularity 'row'.*got '{granularity}'"):
            PrunedConv2d.from_pretrained_layer(layer, sparsity=0.8, granularity=granularity)
    whole = PrunedConv2d.from_pretrained_layer(conv(), sparsity=0)
    assert PrunedConv2d.from_pretrained_layer(whole, sparsity=0.5, granularity="filter").nonzeros == 108


# --- Windows ------------------------------------------------------------------------------------------------------


@st.composite
def geometries(draw):
    size = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    height, width = draw(st.integers(1, size[0])), draw(st.integers(1, size[1]))
    top, left = draw(st.integers(0, size[0] - height)), draw(st.integers(0, size[1] - width))
    small = st.tuples(st.integers(1, 3), st.integers(1, 3))
    padding = draw(st.one_of(st.sampled_from(["same", "valid"]), st.tuples(st.integers(0, 4), st.integers(0, 4))))
    geometry = {
        "kernel_size": size,
        "stride": (1, 1) if padding == "same" else draw(small),
        "padding": padding,
        "dilation": draw(small),
        "groups": draw(st.sampled_from([1, 2])),
        "padding_mode": draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
    }
    return (top, left, height, width), geometry, draw(st.integers(1, 9)), draw(st.integers(1, 9)), draw(st.booleans())


@settings(max_examples=400)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@given(geometries())
def test_a_window_computes_what_the_dense_convolution_with_zeros_does(drawn):
    window, geometry, height, width, batched = drawn
    generator = torch.Generator().manual_seed(height * 10 + width)
    dense = nn.Conv2d(4, 6, **geometry, dtype=torch.float64)
    kernel = torch.randn(6, 4 // geometry["groups"], *window[2:], generator=generator, dtype=torch.float64)
    x = torch.randn(*((2,) if batched else ()), 4, height, width, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        dense.weight.zero_()
        crop_window(dense.weight, window).copy_(kernel)
    assert torch.equal(embed_window(kernel, window, geometry["kernel_size"]), dense.weight)
    try:
        expected = dense(x)
    except RuntimeError:  # the input is too small for the kernel, or for the padding mode
        if geometry["padding_mode"] == "zeros":
            with pytest.raises(RuntimeError):
                windowed_conv2d(x, kernel, dense.bias, window=window, **geometry)
        assume(False)
    actual = windowed_conv2d(x, kernel, dense.bias, window=window, **geometry)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@given(geometries())
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_without_window_it_is_torchs_own_convolution_bit_for_bit(drawn):
    _, geometry, height, width, batched = drawn
    dense = nn.Conv2d(4, 6, **geometry)
    pads = [2 * [p] for p in reversed(dense.padding)] if isinstance(dense.padding, tuple) else None
    if pads is not None:
        assert explicit_padding(dense.kernel_size, dense.padding, dense.dilation) == tuple(itertools.chain(*pads))
    x = torch.randn(*((2,) if batched else ()), 4, height, width)
    try:
        expected = dense(x)
    except RuntimeError:
        assume(False)
    for window in (None, (0, 0, *dense.kernel_size)):
        assert torch.equal(windowed_conv2d(x, dense.weight, dense.bias, window=window, **geometry), expected)


@pytest.mark.parametrize(
    "options", [{}, {"padding": 1}, {"padding": "same", "dilation": 2}, {"stride": 2, "groups": 2}]
)
@pytest.mark.parametrize("kept", [(2, 3), (3, 2)])
def test_three_by_three_becomes_two_by_three(options, kept):
    dense = conv(**options)
    with torch.no_grad():
        dense.weight[:, :, kept[0] :] *= 0.01
        dense.weight[:, :, :, kept[1] :] *= 0.01
    x = torch.randn(2, 4, 9, 8)
    for granularity in ("window", "shape"):
        layer = PrunedConv2d.from_pretrained_layer(dense, sparsity=1 / 3, granularity=granularity)
        assert layer.window == (0, 0, *kept)
        assert tuple(layer.kernel.shape[2:]) == kept
        torch.testing.assert_close(layer(x), layer.to_dense_layer()(x))
        costs = layer.cost(tuple(x.shape)), PrunedConv2d.from_pretrained_layer(dense, sparsity=0).cost(tuple(x.shape))
        assert costs[0].macs * 3 == costs[1].macs * 2
        assert costs[0].params == costs[1].params - 3 * 6 * dense.weight.shape[1]
        with FlopCounterMode(display=False) as counter:
            layer(x)
        assert counter.get_total_flops() == 2 * costs[0].macs


def test_the_window_taken_is_the_best_rectangle():
    dense = conv()
    layer = PrunedConv2d.from_pretrained_layer(dense, sparsity=5 / 9, granularity="window", criterion="l2")
    energy = dense.weight.detach().double().square().sum((0, 1)).numpy()
    totals = {(t, s, 2, 2): energy[t : t + 2, s : s + 2].sum() for t in (0, 1) for s in (0, 1)}
    assert layer.window == max(totals, key=totals.get)
    assert layer.granularity == "shape"
    assert layer.sparsity == pytest.approx(5 / 9)


def test_shapes_that_are_no_rectangle_are_masked_inside_the_smallest_one():
    dense = conv(kernel_size=5, padding=2)
    cross = torch.zeros(5, 5)
    cross[2, 1:4] = cross[1:4, 2] = 1
    with torch.no_grad():
        dense.weight.mul_(0.01 + cross)
    layer = PrunedConv2d.from_pretrained_layer(dense, sparsity=0.8, granularity="shape")
    assert layer.window == (1, 1, 3, 3)
    assert torch.equal((layer.weight != 0).all(0).all(0), cross.bool())
    x = torch.randn(2, 4, 7, 7)
    torch.testing.assert_close(layer(x), layer.to_dense_layer()(x))


def test_window_layers_project():
    layer = PrunedConv2d(4, 6, 3, sparsity=0.5, window=(0, 1, 3, 2))
    target = conv().weight.detach()
    layer.approximate_(target)
    inside = target[..., 1:].abs()
    kept = layer.mask
    assert int(kept.sum()) == 108
    assert inside[kept].min() > inside[~kept].max()
    assert not layer.weight[..., 0].any()


@pytest.mark.parametrize(
    "window",
    [(0, 0, 0, 3), (1, 0, 3, 3), (-1, 0, 2, 2), (0, 0, 3), (0, 0, 4, 3), (0.0, 0, 2, 2), (0, 0, True, 2), (0, 2, 2, 2)],
)
def test_windows_outside_the_kernel_are_refused(window):
    with pytest.raises(OptionError, match=r"PrunedConv2d: window must be \(top, left, height, width\)"):
        PrunedConv2d(4, 6, 3, sparsity=0.9, granularity="shape", window=window)


def test_windows_and_other_options_that_do_not_fit():
    assert check_window("Layer", [0, 0, 3, 3], (3, 3)) is None
    with pytest.raises(OptionError, match=r"holds 6 of the 9 units, fewer than the 9 that sparsity=0.0 keeps"):
        PrunedConv2d(4, 6, 3, sparsity=0.0, granularity="shape", window=(0, 0, 2, 3))
    with pytest.raises(OptionError, match="a window goes with granularity 'shape' or 'element', got 'row'"):
        PrunedConv2d(4, 6, 3, sparsity=0.9, granularity="row", window=(0, 0, 2, 3))
    with pytest.raises(OptionError, match="PrunedLinear: sparsity must be"):
        PrunedLinear.from_pretrained_layer(linear(), sparsity=1)
    with pytest.raises(
        UnsupportedLayerError, match="PrunedLinear: a linear layer has no units of granularity 'window'"
    ):
        PrunedLinear.from_pretrained_layer(linear(), sparsity=0.5, granularity="window")
    with pytest.raises(UnsupportedLayerError, match=r"PrunedLinear: expected an nn.Linear"):
        PrunedLinear.from_pretrained_layer(conv(), sparsity=0.5)


# --- Costs --------------------------------------------------------------------------------------------------------


def test_costs_by_hand():
    layer = PrunedConv2d.from_pretrained_layer(conv(stride=2).half(), sparsity=0.5)
    cost = layer.cost((2, 4, 9, 7))
    assert cost.params == 6 * 4 * 9 + 6
    assert cost.nonzeros == 108 + 6
    assert cost.bytes == 216 // 8 + (108 + 6) * 2
    assert cost.macs == 2 * 4 * 3 * 216
    small = PrunedLinear(3, 3, bias=False, sparsity=0.5, granularity="filter")
    assert small.cost((7, 3)).bytes == 2 + 3 * 4  # nine bits of mask, one row
    assert small.cost((7, 3)).macs == 63
    assert small.packing()["kernel"].mask == "mask"
