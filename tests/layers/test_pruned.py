"""Masked layers: zeros that stay, units that go whole, pruning that goes on, costs."""

import copy
import io
import json

import numpy as np
import pytest
import torch

from lowrank_nn.errors import CalibrationError, OptionError, UnsupportedLayerError
from lowrank_nn.layers import PrunedConv2d, PrunedLinear
from tests.layers.pruning import conv, linear

SIZES = {"element": 1, "row": 3, "column": 3, "kernel": 9, "group": 6, "channel": 54, "filter": 36, "shape": 24}
GRANULARITIES = list(SIZES)


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
