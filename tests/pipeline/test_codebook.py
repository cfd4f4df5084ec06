"""The step Codebook and the recipe "deep-compression" on small models."""

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

import lowrank_nn as lnn
from lowrank_nn.decompose import kmeans_1d
from lowrank_nn.planning import diagonal_fisher
from tests.storage.models import SmallNet, seeded

X = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)
BATCHES = [(X, torch.tensor([0, 1]))]


@pytest.fixture
def net():
    return seeded(SmallNet).eval()


def run(model, recipe, **options):
    return lnn.compress_model(model, X, recipe, progress=False, **options)


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def kinds(model):
    return {path: type(module).__name__ for path, module in model.named_modules() if path}


def test_layers_share_weights_by_their_kind(net):
    small = run(net, lnn.Codebook(2, conv_bits=3)).model
    assert {kinds(small)[path] for path in ("conv1", "conv2")} == {"CodebookConv2d"}
    assert (small.conv2.bits, small.fc.bits) == (3, 2)
    torch.testing.assert_close(small.fc.codebook, kmeans_1d(net.fc.weight, 4), rtol=0, atol=0)
    assert small.conv2.weight.unique().numel() == 8


def test_options_reach_the_layers(net):
    small = run(net, lnn.Codebook(2, init="random", where="fc"), seed=5).model
    torch.testing.assert_close(small.fc.codebook, kmeans_1d(net.fc.weight, 4, init="random", seed=5), rtol=0, atol=0)
    assert type(small.conv1) is nn.Conv2d


def test_fisher_information_weighs_the_squares(net):
    step = lnn.Codebook(2, where="fc", batches=BATCHES, loss=loss)
    fisher = diagonal_fisher(net, BATCHES, loss, paths=["fc"])["fc"]
    expected = kmeans_1d(net.fc.weight, 4, weights=fisher)
    torch.testing.assert_close(run(net, step).model.fc.codebook, expected, rtol=0, atol=0)
    assert repr(step) == "Codebook(bits=2, where='fc', loss=loss)"


def test_fisher_information_of_pruned_layers_is_that_of_what_is_left(net):
    pruned = run(net, lnn.Prune(0.5, where="conv2")).model
    small = run(pruned, lnn.Codebook(2, where="conv2", batches=BATCHES, loss=loss)).model
    fisher, mask = diagonal_fisher(pruned, BATCHES, loss, paths=["conv2"])["conv2"], pruned.conv2.mask
    expected = kmeans_1d(net.conv2.weight[mask], 4, weights=fisher[mask])
    torch.testing.assert_close(small.conv2.codebook, expected, rtol=0, atol=0)


def test_factors_and_pruned_layers(net):
    recipe = [lnn.Apply(lnn.SVDLinear, where="fc", rank=2), lnn.Prune(0.5, where="conv2"), lnn.Codebook(2)]
    small = run(net, recipe).model
    assert kinds(small)["fc.reduce"] == "CodebookLinear"
    assert (small.conv2.weight == 0).float().mean() == 0.5


def test_a_codebook_that_takes_more_than_it_saves_is_not_made():
    tiny = nn.Linear(8, 8)
    result = lnn.compress_model(tiny, torch.ones(1, 8), lnn.Codebook(8), progress=False)
    assert type(result.model) is nn.Linear
    assert any("CodebookLinear(bits=8" in reason and "would save nothing" in reason for reason in result.report.left)


def test_plan_and_result_have_the_same_bytes(net):
    recipe = [lnn.Prune(0.5), lnn.Codebook(3)]
    planned = lnn.plan(net, X, recipe)
    assert planned.after == run(net, recipe).report.after


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 0}, "bits must be a whole number from 1 to 8, got 0"),
        ({"conv_bits": 9}, "conv_bits must be .* got 9"),
        ({"batches": BATCHES}, "batches and loss go together"),
        ({"loss": loss}, "batches and loss go together"),
    ],
)
def test_what_cannot_be(options, message):
    with pytest.raises(lnn.OptionError, match=message):
        lnn.Codebook(**options)


def test_layers_that_the_loss_does_not_see_are_named(net):
    step = lnn.Codebook(2, where="fc", batches=BATCHES, loss=lambda model, batch: model.conv1(batch[0]).sum())
    with pytest.raises(lnn.LowRankError, match=r"does not depend on"):
        run(net, step)


def test_the_recipe_by_name():
    model = nn.Sequential(nn.Conv2d(3, 64, 5), nn.Flatten(), nn.Linear(1024, 10))
    small = run(model, "deep-compression").model
    assert [(layer.bits, layer.nonzeros) for layer in (small[0], small[2])] == [(8, 480), (5, 1024)]


def test_the_recipe_with_training():
    retrain = lnn.FineTune(BATCHES, epochs=1)
    names = [type(step).__name__ for step in lnn.deep_compression(retrain)]
    assert names == ["Prune", "FineTune", "Codebook", "FineTune"]
    tune = lnn.FineTune(BATCHES, epochs=2)
    assert lnn.deep_compression(retrain, tune)[3] is tune
    assert lnn.deep_compression(retrain)[3] is retrain
    assert [type(step).__name__ for step in lnn.deep_compression()] == ["Prune", "Codebook"]
    with pytest.raises(lnn.OptionError, match="two FineTune steps"):
        lnn.deep_compression(lnn.FineTune(BATCHES, epochs=1, checkpoint="run.pt"))


def test_training_moves_centroids_and_nothing_else(net):
    recipe = [lnn.Prune(0.5), lnn.Codebook(2)]
    before = run(net, recipe).model
    after = run(net, [*recipe, lnn.FineTune(BATCHES, epochs=3, lr=1e-2)]).model
    for path in ("conv2", "fc"):
        old, new = before.get_submodule(path), after.get_submodule(path)
        assert torch.equal(old.indices, new.indices)
        assert torch.equal(old.mask, new.mask)
        assert not torch.equal(old.codebook, new.codebook)


def test_deep_compression_of_a_trained_network(tmp_path):
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))
    batches = list(zip(images[:1200].split(100), labels[:1200].split(100), strict=True))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(25):
        for batch in batches:
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()
    retrain = lnn.FineTune(batches, epochs=10, lr=3e-3)
    small, untrained = (
        lnn.compress_model(model, images[:1], lnn.deep_compression(step, sparsity=0.8, bits=3), progress=False).model
        for step in (retrain, None)
    )

    def correct(net):
        return int((net(images[1200:]).argmax(1) == labels[1200:]).sum())

    assert correct(untrained) + 30 < correct(small)
    assert correct(small) >= correct(model) - 18  # of 597
    sizes = [lnn.save(net, tmp_path / "net.lrnn") for net in (model, small)]
    assert sizes[0] > 10 * sizes[1]
