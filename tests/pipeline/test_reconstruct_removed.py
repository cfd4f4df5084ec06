"""Reconstruction of layers that lost inputs: they make up for these with what is left."""

import copy

import pytest
import torch
from torch import nn

from lowrank_nn.graph import find_links
from lowrank_nn.layers import TuckerConv2d
from lowrank_nn.pipeline.reconstruct import reconstruct
from tests.pipeline.reconstruction import error, images


@torch.no_grad()
def without_channels(dense, producer, norm, reader, gone):
    """A copy in which the channels between two convolutions are fewer."""
    small = copy.deepcopy(dense)
    kept = torch.tensor([i for i in range(dense.get_submodule(producer).out_channels) if i not in gone])
    for path in (producer, norm):
        module = small.get_submodule(path)
        for name in ("weight", "bias", "running_mean", "running_var"):
            tensor = getattr(module, name, None)
            if tensor is not None:
                tensor.data = tensor.data[kept]
    small.get_submodule(producer).out_channels = small.get_submodule(norm).num_features = len(kept)
    layer = small.get_submodule(reader)
    layer.weight.data = layer.weight.data[:, kept]
    layer.in_channels = len(kept)
    return small, kept


def body(bias=False):
    torch.manual_seed(0)
    dense = nn.Sequential(
        nn.Conv2d(4, 12, 3, padding=1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 8, 3, padding=1, bias=bias),
        nn.Sequential() if bias else nn.BatchNorm2d(8),
    )
    return dense.eval()


@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_makes_up_for_removed_inputs_that_the_others_tell(bias):
    dense = body(bias)
    with torch.no_grad():
        dense[0].weight[9:] = dense[0].weight[:3]  # the last three channels say nothing new
        dense[0].bias[9:] = dense[0].bias[:3]
    x = images(12, 4, 8)
    small, _ = without_channels(dense, "0", "1", "3", {9, 10, 11})
    before = error(dense, small, [x])
    assert reconstruct(dense, small, [x[:6], x[6:]], ["3"], links=find_links(dense, x)) == {}
    assert error(dense, small, [x]) < 1e-5 * before


def test_a_removed_constant_channel_goes_into_the_mean():
    dense = body()
    with torch.no_grad():
        dense[1].weight[3], dense[1].bias[3] = 0, 2.0
    x = images(8, 4, 8)
    dense[3].padding = small_padding = (0, 0)  # at a padded border the channel is not constant
    small, _ = without_channels(dense, "0", "1", "3", {3})
    assert small[3].padding == small_padding
    weight = small[3].weight.detach().clone()
    before = error(dense, small, [x])
    reconstruct(dense, small, [x], ["3"], links=find_links(dense, x))
    assert error(dense, small, [x]) < 1e-8 * before
    torch.testing.assert_close(small[3].weight.detach(), weight, rtol=0, atol=1e-3)


def test_least_squares_of_a_cut_layer_are_numpys():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 4)).double()
    x = torch.randn(500, 6, dtype=torch.float64)
    small = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4)).double()
    kept = torch.tensor([0, 3, 4, 8])
    with torch.no_grad():
        small[0].weight.copy_(dense[0].weight[kept])
        small[0].bias.copy_(dense[0].bias[kept])
        small[1].weight.copy_(dense[1].weight[:, kept])
        reconstruct(dense, small, [x], ["1"], links=find_links(dense, x))
        inputs = torch.cat([small[0](x), torch.ones(500, 1, dtype=torch.float64)], dim=1)
        solution = torch.linalg.lstsq(inputs, dense(x)).solution
        best = float((inputs @ solution - dense(x)).square().mean())
        assert error(dense, small, [x]) == pytest.approx(best, rel=1e-4)


class Joined(nn.Module):
    """A sum whose two sides, and their reader, lose the same channels."""

    def __init__(self, width=8):
        super().__init__()
        self.stem, self.branch = nn.Conv2d(4, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Conv2d(width, 3, 1)

    def forward(self, x):
        x = self.stem(x)
        return self.head(x + self.branch(x))


def test_layers_that_lost_outputs_too_are_refitted_on_those_left_and_repair_the_sum():
    torch.manual_seed(0)
    dense, small = Joined(), Joined(5)
    kept = torch.tensor([0, 2, 3, 5, 7])
    with torch.no_grad():
        for name in ("stem", "branch", "head"):
            old, new = dense.get_submodule(name), small.get_submodule(name)
            weight = old.weight if name == "head" else old.weight[kept]
            new.weight.copy_(weight if name == "stem" else weight[:, kept])
            new.bias.copy_(old.bias if name == "head" else old.bias[kept])
    x = images(12, 4, 8)
    links, before = find_links(dense, x), error(dense, small, [x])
    assert links["branch"].shortcut is not None
    notes = reconstruct(dense, small, [x], ["branch", "head"], links=links, outputs={"branch": kept})
    assert notes == {}
    assert error(dense, small, [x]) < 0.5 * before


def test_a_low_rank_layer_that_lost_inputs_is_refitted():
    dense = body()
    dense[3] = TuckerConv2d.from_pretrained_layer(dense[3], rank=(6, 6))
    x = images(12, 4, 8)
    small = copy.deepcopy(dense)
    kept = torch.arange(10)
    with torch.no_grad():
        for tensor in (small[0].weight, small[0].bias, *small[1].parameters(), *list(small[1].buffers())[:2]):
            tensor.data = tensor.data[kept]
        small[0].out_channels = small[1].num_features = small[3].in_channels = small[3].reduce.in_channels = 10
        small[3].reduce.weight.data = small[3].reduce.weight.data[:, kept]
    before = error(dense, small, [x])
    assert reconstruct(dense, small, [x], ["3"], links=find_links(dense, x)) == {}
    assert error(dense, small, [x]) < 0.6 * before
