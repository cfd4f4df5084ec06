"""Networks with folded batch norms come back on a fresh instance; nothing else is taken for a fold."""

import pytest
import torch
from torch import nn

import lowrank_nn as lnn
from lowrank_nn.errors import FileFormatError
from tests.zoo import ZOO
from tests.zoo.resnet import ResNet


def small_net(bias=False, norm=None):
    norm = nn.BatchNorm2d(6) if norm is None else norm
    layers = [nn.Conv2d(3, 6, 3, bias=bias), norm, nn.ReLU(), nn.Identity(), nn.ConvTranspose2d(6, 4, 3, bias=False)]
    return nn.Sequential(*layers, nn.BatchNorm2d(4)).eval()


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def assert_comes_back(model, fresh, path, x):
    lnn.save(model, path)
    loaded = lnn.load(path, fresh).eval()
    state, expected = loaded.state_dict(), model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
    return loaded


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_plain_layers(device, tmp_path):
    model = lnn.fold_batchnorm(small_net(), X)
    fresh = small_net().to(device)
    fresh[0].weight.requires_grad_(False)
    loaded = assert_comes_back(model, fresh, tmp_path / "a.lrnn", X)
    assert type(loaded[1]) is type(loaded[5]) is nn.Identity
    assert not loaded[0].bias.requires_grad
    assert loaded[4].bias.requires_grad


@pytest.mark.parametrize(
    "steps",
    [
        [lnn.Apply(lnn.TuckerConv2d, where="layer*", rank=(8, 8)), lnn.FoldBatchNorm()],
        [lnn.FoldBatchNorm(), lnn.Quantize("int8")],
        [lnn.Apply(lnn.CPConv2d, where="layer3*", rank=20), lnn.FoldBatchNorm(), lnn.Prune(0.5)],
    ],
    ids=["factorised", "quantized", "factorised and pruned"],
)
def test_with_other_steps(steps, tmp_path):
    model, x = ZOO["resnet20"]()
    result = lnn.compress_model(model, x, steps, progress=False)
    assert result.report.file_bytes is not None
    assert_comes_back(result.model, ResNet(20), tmp_path / "a.lrnn", x)


def test_a_fold_into_something_else_is_refused_and_leaves_the_model_alone(tmp_path):
    lnn.save(lnn.fold_batchnorm(small_net(), X), tmp_path / "a.lrnn")
    for norm, message in ((nn.GroupNorm(2, 6), "the model has GroupNorm"), (nn.Tanh(), "the model has Tanh")):
        fresh = small_net(norm=norm)
        with pytest.raises(FileFormatError, match=message):
            lnn.load(tmp_path / "a.lrnn", fresh)
        assert fresh[0].bias is None
        assert fresh[1] is norm
    with pytest.raises(FileFormatError, match="no module there"):
        lnn.load(tmp_path / "a.lrnn", small_net()[:5])


def test_biases_come_with_folds_only(tmp_path):
    lnn.save(small_net(bias=True), tmp_path / "dense.lrnn")
    with pytest.raises(FileFormatError, match=r"'0.bias' is in the file, but not in the model"):
        lnn.load(tmp_path / "dense.lrnn", small_net())
    low = small_net(bias=True)
    low[0] = lnn.TuckerConv2d.from_pretrained_layer(low[0], rank=(2, 2))
    lnn.save(low, tmp_path / "low.lrnn")
    with pytest.raises(FileFormatError, match="bias=True in the file, False in the model"):
        lnn.load(tmp_path / "low.lrnn", small_net())


def test_a_dense_file_does_not_fit_a_folded_model(tmp_path):
    lnn.save(small_net(), tmp_path / "a.lrnn")
    with pytest.raises(FileFormatError, match=r"'1.running_mean' is in the file, but not in the model"):
        lnn.load(tmp_path / "a.lrnn", lnn.fold_batchnorm(small_net(), X))
