"""Patterns on paths: what they match, and what is said where they match nothing."""

import pytest
import torch

from lowrank_nn.errors import PlanError
from lowrank_nn.graph import record
from lowrank_nn.pipeline.select import select
from tests.storage.models import compressed_net
from tests.zoo import ZOO


@pytest.fixture(scope="module")
def sites():
    return record(compressed_net(), torch.ones(1, 3, 8, 8)).sites


@pytest.fixture(scope="module")
def tied_sites():
    return record(*ZOO["tied"]()).sites


def paths(found):
    return [site.path for site in found]


@pytest.mark.parametrize(
    ("where", "but_not", "expected"),
    [
        ("*", (), "conv1 norm conv2 conv2.reduce conv2.core conv2.expand fc fc.reduce fc.expand"),
        ("conv?", (), "conv1 conv2 conv2.reduce conv2.core conv2.expand"),
        ("conv[1]", (), "conv1"),
        ("*.core", (), "conv2.core"),
        (["fc", "norm"], (), "norm fc fc.reduce fc.expand"),
        ("*", "conv2", "conv1 norm fc fc.reduce fc.expand"),
        ("*", ["*.core", "fc*"], "conv1 norm conv2 conv2.reduce conv2.expand"),
        ("fc", "fc.reduce", "fc fc.expand"),
    ],
)
def test_patterns(sites, where, but_not, expected):
    assert sorted(paths(select(sites, where, but_not, "Step"))) == sorted(expected.split())


def test_order_is_that_of_the_sites(sites):
    assert paths(select(sites, ["fc", "conv1"], (), "Step"))[0] == "conv1"


@pytest.mark.parametrize("name", ["block1.conv", "block2.conv", "block2.*"])
def test_every_name_of_a_shared_layer_matches(tied_sites, name):
    assert "block1.conv" in paths(select(tied_sites, name, (), "Step"))
    assert "block1.conv" not in paths(select(tied_sites, "*", name, "Step"))


@pytest.mark.parametrize(("where", "but_not"), [("layer9", ()), ("*", "layer9"), (["fc", "layer9"], ())])
def test_a_pattern_that_matches_nothing_lists_the_paths(sites, where, but_not):
    with pytest.raises(
        PlanError, match=r"Step: the pattern 'layer9' matches no layer .*There are: conv1, .*conv2\.core"
    ):
        select(sites, where, but_not, "Step")


def test_patterns_see_the_case_of_letters(sites):
    with pytest.raises(PlanError, match="'FC'"):
        select(sites, "FC", (), "Step")


def test_long_lists_are_cut(sites):
    with pytest.raises(PlanError, match=r"and \d+ more"):
        select(list(sites) * 20, "nothing", (), "Step")


def test_no_layers_at_all():
    with pytest.raises(PlanError, match="There are: none"):
        select([], "*", (), "Step")
