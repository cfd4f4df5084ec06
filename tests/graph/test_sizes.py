"""Sizes that a forward reads from attributes of its modules follow what is removed."""

import copy
import functools
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lowrank_nn as lnn
from lowrank_nn.graph import find_groups
from lowrank_nn.graph.proof import prove
from lowrank_nn.graph.sizes import Attribute, TracedSize
from lowrank_nn.graph.surgery import Removal, remove_units
from tests.zoo._seeded import seeded

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


class Uneven(nn.Module):
    """Splits the output of a layer into parts of 8, 2 and 6 channels."""

    def __init__(self, sizes, split):
        super().__init__()
        self.sizes, self.split = sizes, split
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 4)

    def forward(self, x):
        a, b, c = self.split(self.first(x), self.sizes)
        return self.last(torch.cat([a.relu(), b.sigmoid(), c.tanh()], -1))


class Reshaped(nn.Module):
    """Two heads of ``width`` channels: the spelling ``how`` of the way there."""

    def __init__(self, how):
        super().__init__()
        self.how, self.width, self.inner = how, 5, (2, 5)
        self.first, self.last = nn.Linear(6, 10), nn.Linear(5, 4)

    def forward(self, x):
        return self.last(self.how(self, self.first(x)).relu().sum(1))


SPLITS = {
    "split": lambda x, sizes: torch.split(x, sizes, dim=-1),
    "method": lambda x, sizes: x.split(sizes, -1),
    "with sizes": lambda x, sizes: torch.split_with_sizes(x, sizes, dim=1),
    "named": lambda x, sizes: torch.split(tensor=x, split_size_or_sections=sizes, dim=1),
}
RESHAPES = {
    "view": lambda net, x: x.view(-1, 2, net.width),
    "reshape": lambda net, x: x.reshape((len(x), 2, net.width)),
    "unflatten": lambda net, x: x.unflatten(-1, net.inner),
    "function": lambda net, x: torch.unflatten(x, dim=1, sizes=(-1, net.width)),
}


def removals_of(model, count=1):
    return [Removal(group, tuple(range(count))) for group in find_groups(model, X) if not group.frozen]


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("kind", [tuple, list])
def test_unequal_parts_lose_channels_each_on_its_own(split, kind):
    model, _ = seeded(lambda: (Uneven(kind((8, 2, 6)), split), None))()
    removals = removals_of(model)
    assert [removal.group.size for removal in removals] == [8, 2, 6]
    assert removals[1].group.sizes == ((Attribute("", "sizes", 1), 1),)
    assert prove(model, removals, X).proven == tuple(removals)
    undo = remove_units(model, removals)
    assert (model.sizes, model.first.out_features) == (kind((7, 1, 5)), 13)
    undo()
    assert model.sizes == kind((8, 2, 6))


class Grouped(Uneven):
    """Two parts have the same attribute for a size."""

    def __init__(self):
        super().__init__((), None)
        self.query, self.key = 8, 4

    def forward(self, x):
        a, b, c = self.first(x).split([self.query, self.key, self.key], -1)
        return self.last(torch.cat([a.relu(), b.sigmoid(), c.tanh()], -1))


def test_parts_whose_sizes_are_one_attribute_lose_the_same():
    model, _ = seeded(lambda: (Grouped(), None))()
    removals = removals_of(model)
    assert [removal.group.size for removal in removals] == [8, 4]
    assert prove(model, removals, X).proven == tuple(removals)
    remove_units(model, removals)
    assert (model.query, model.key) == (7, 3)


class Sliced(Uneven):
    """The first 5 channels go one way, the others another."""

    def __init__(self, border=5):
        super().__init__((), None)
        self.near = border

    def forward(self, x):
        x = self.first(x)
        return self.last(torch.cat([x[:, : self.near].relu(), x[..., self.near :].sigmoid()], 1))


def test_slices_that_begin_or_end_at_an_attribute():
    model, _ = seeded(lambda: (Sliced(), None))()
    removals = removals_of(model, 2)
    assert [removal.group.size for removal in removals] == [5, 11]
    assert [removal.group.sizes for removal in removals] == [((Attribute("", "near"), 1),), ()]
    assert prove(model, removals, X).proven == tuple(removals)
    remove_units(model, removals)
    assert (model.near, model.first.out_features, model.last.in_features) == (3, 12, 12)


@pytest.mark.parametrize("border", [0, 16, 20])
def test_channels_of_which_a_slice_takes_none_stay(border):
    model, _ = seeded(lambda: (Sliced(border), None))()
    first, _ = find_groups(model, X)
    assert (first.name, first.size) == ("first", 16)
    assert first.frozen == "mixed by __getitem__ in the model itself, which reads by number"


def test_slices_between_attributes_are_read_by_number():
    class Middle(Uneven):
        def __init__(self):
            super().__init__((), None)
            self.low, self.high = 3, 8

        def forward(self, x):
            x = self.first(x)
            return self.last(torch.cat([x[:, self.low : self.high], x[:, self.low :][:, : -self.low]], 1).repeat(1, 2))

    model = Middle()
    model.last = nn.Linear(30, 4)
    assert "which reads by number" in find_groups(model, X)[0].frozen


@pytest.mark.parametrize("how", RESHAPES.values(), ids=RESHAPES)
def test_widths_that_a_reshape_takes(how):
    model, _ = seeded(lambda: (Reshaped(how), None))()
    (removal,) = removals_of(model)
    assert removal.group.size == 5
    assert prove(model, [removal], X).proven == (removal,)
    remove_units(model, [removal])
    assert 4 in (model.width, model.inner[1])
    assert model(X).shape == (3, 4)


def test_numbers_in_the_code_cannot_follow():
    model, _ = seeded(lambda: (Uneven((8, 2, 6), lambda x, _: x.split((8, 2, 6), 1)), None))()
    assert "split into parts of 8, 2, 6" in find_groups(model, X)[0].frozen


def test_what_one_number_is_the_size_of_goes_together():
    """The same attribute says how wide two tensors are."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.width = 5
            self.one, self.two, self.last = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(10, 4)

        def forward(self, x):
            one, two = (layer(x).view(len(x), self.width) for layer in (self.one, self.two))
            return self.last(torch.cat([one, two], 1))

    model, _ = seeded(lambda: (Twice(), None))()
    proof = prove(model, removals_of(model), X)
    assert [(removal.group.name, removal.group.size) for removal in proof.proven] == [("one", 5)]
    assert not proof.refused


def test_numbers_from_a_cache_that_another_module_filled():
    """Its key are the values: the second block gets the number object of the first."""

    @functools.cache
    def pattern(width):
        return (-1, 2, width)

    class Block(Reshaped):
        def __init__(self):
            super().__init__(lambda net, x: x.reshape(pattern(net.width)))

    model, _ = seeded(lambda: (nn.Sequential(Block(), nn.Linear(4, 6), Block()), None))()
    removals = [removal for removal in removals_of(model) if removal.group.name.endswith("first")]
    assert [removal.group.sizes for removal in removals] == [((Attribute("0", "width"), 1),), ()]
    assert [removal.group.name for removal in prove(model, removals, X).proven] == ["0.first"]


def test_numbers_from_a_cache_that_another_model_filled():
    """What was traced for one model says nothing of the next, which has no such attribute."""

    @functools.cache
    def pattern(width):
        return (-1, 2, width)

    first, _ = seeded(lambda: (Reshaped(lambda net, x: x.reshape(pattern(net.width))), None))()
    second, _ = seeded(lambda: (Reshaped(lambda net, x: x.reshape(pattern(net.columns))), None))()
    second.columns = second.__dict__.pop("width")
    (one,) = removals_of(first)
    (two,) = removals_of(second)
    assert (len(one.group.sizes), two.group.sizes) == (1, ())
    assert "the forward fails" in prove(second, [two], X).refused["first"]


def test_copies_of_traced_numbers_are_plain():
    size = TracedSize(4, Attribute("block", "width"))
    assert size == 4
    assert [type(copied) for copied in (copy.deepcopy(size), pickle.loads(pickle.dumps(size)))] == [int, int]


def test_code_that_takes_plain_numbers_only():
    def how(net, x):
        if type(net.width) is not int:
            raise TypeError("width must be a number")
        return x.view(-1, 2, net.width)

    model, _ = seeded(lambda: (Reshaped(how), None))()
    assert [(group.size, group.sizes) for group in find_groups(model, X)] == [(5, ()), (4, ())]


def test_finding_groups_leaves_attributes_alone():
    model, _ = seeded(lambda: (Uneven((8, 2, 6), SPLITS["split"]), None))()
    before = model.sizes
    find_groups(model, X)
    assert model.sizes is before
    assert [type(size) for size in model.sizes] == [int] * 3


def test_a_file_holds_the_sizes(tmp_path):
    model, _ = seeded(lambda: (Uneven([8, 2, 6], SPLITS["split"]), None))()
    fresh = copy.deepcopy(model)
    small = lnn.compress_model(model, X, [lnn.Prune(0.5, granularity="filter")], progress=False).model
    assert (small.sizes, model.sizes) == ([4, 1, 3], [8, 2, 6])
    lnn.save(small, tmp_path / "small.lrnn")
    loaded = lnn.load(tmp_path / "small.lrnn", fresh)
    assert loaded.sizes == [4, 1, 3]
    assert torch.equal(loaded(X), small(X))


def test_a_group_shows_its_sizes():
    model, _ = seeded(lambda: (Uneven((8, 2, 6), SPLITS["split"]), None))()
    assert "  sizes[0]      attribute       1 per unit" in str(find_groups(model, X)[0])


class Cached(nn.Module):
    """Keeps what it computes of a parameter in a dict, as timm's attentions with biases do."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.bias, self.cache = nn.Linear(6, 8), nn.Linear(8, 4), nn.Parameter(torch.ones(8)), {}

    def forward(self, x):
        if "bias" not in self.cache:
            self.cache["bias"] = F.softplus(self.bias.detach())
        return self.last((self.first(x) * self.cache["bias"]).relu())


def test_caches_of_a_run_are_gone_after_it():
    model, _ = seeded(lambda: (Cached(), None))()
    small = lnn.compress_model(model, X, [lnn.Prune(0.5, granularity="filter")], progress=False).model
    assert (small.first.out_features, small(X).shape, model.cache) == (4, (3, 4), {})


def test_dicts_without_tensors_stay_the_same_objects():
    model, _ = seeded(lambda: (Cached(), None))()
    shared = {"depth": 2}
    model.config = model.first.config = shared
    remove_units(model, removals_of(model))
    assert model.config is model.first.config is shared


def test_caches_do_not_outlive_what_they_were_computed_of():
    model, _ = seeded(lambda: (Cached(), None))()
    removals = removals_of(model)
    before = model(X)
    cached = model.cache["bias"]
    undo = remove_units(model, removals)
    assert model.cache == {}
    assert model(X).shape == (3, 4)
    undo()
    assert model.cache["bias"] is cached
    assert torch.equal(model(X), before)
