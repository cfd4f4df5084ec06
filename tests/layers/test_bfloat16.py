"""BFloat16Conv2d and BFloat16Linear: rounded weights, kernels that compute what rounded inputs give."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

import lowrank_nn as lnn
from lowrank_nn.layers import BFloat16Conv2d, BFloat16Linear, bfloat16
from lowrank_nn.layers.bfloat16 import KERNELS, bfloat16_obstacle
from tests.layers.geometries import AWKWARD, dense_conv

needs_kernels = pytest.mark.skipif(not bfloat16._has_kernels(), reason="no bfloat16 kernels on this machine")


def randn(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def linear(in_features=12, out_features=9):
    layer = nn.Linear(in_features, out_features, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        layer.weight.copy_(randn(out_features, in_features))
        layer.bias.copy_(randn(out_features))
    return layer


def rounded(x):
    return x.to(torch.bfloat16).double()


@torch.no_grad()
def assert_kernel_agrees(layer, dense, x):
    """Equal to the product of rounded numbers, but for the last rounding, to bfloat16."""
    assert KERNELS.of(layer) is not None
    reference = copy.deepcopy(dense).double()
    for parameter in reference.parameters():
        parameter.copy_(rounded(parameter))
    expected = reference(rounded(x))
    found = layer(x)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=1e-5 * float(expected.abs().max()))
    assert not torch.equal(found, layer.simulate(x))


@needs_kernels
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("geometry", AWKWARD.values(), ids=AWKWARD)
def test_convolutions_run_on_the_kernels(geometry):
    dense = dense_conv(torch.float32, **geometry)
    layer = BFloat16Conv2d.from_pretrained_layer(dense).eval()
    x = randn(2, 4, 11, 9)
    for one in (x, x[0], x[:, :, :7].contiguous(), x.to(memory_format=torch.channels_last)):
        assert_kernel_agrees(layer, dense, one)
        with torch.no_grad():
            assert layer(one).is_contiguous() == one.is_contiguous()


@needs_kernels
@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 3, 12)])
def test_linear_layers_run_on_the_kernels(shape):
    dense = linear()
    assert_kernel_agrees(BFloat16Linear.from_pretrained_layer(dense).eval(), dense, randn(*shape))


def test_weights_are_the_nearest_and_take_two_bytes():
    dense = linear()
    layer = BFloat16Linear.from_pretrained_layer(dense)
    assert torch.equal(layer.weight, dense.weight.bfloat16().float())
    assert layer.cost((1, 12)).bytes == 2 * 108 + 4 * 9
    assert list(layer.state_dict()) == ["bias", "kernel"]
    assert layer.double().weight.dtype is torch.float64
    assert torch.equal(layer.weight, dense.weight.bfloat16().double())


def test_casts_leave_the_weight_in_two_bytes_and_whole():
    dense = linear()
    layer = BFloat16Linear.from_pretrained_layer(dense)
    with torch.no_grad():
        layer.kernel[0, 0] = 2.0**-30  # half precision would make it zero
    kernel = layer.kernel.clone()
    for dtype, width in ((torch.float16, 2), (torch.float64, 8), (torch.float32, 4)):
        layer.to(dtype)
        assert layer.kernel.dtype is torch.bfloat16
        assert torch.equal(layer.kernel, kernel)
        assert layer.weight.dtype is layer.bias.dtype is dtype
        assert layer.cost((1, 12)).bytes == 2 * 108 + width * 9


@needs_kernels
def test_kernels_are_for_evaluation_and_follow_the_layer():
    layer, x = BFloat16Conv2d.from_pretrained_layer(dense_conv(torch.float32, kernel_size=3)).eval(), randn(1, 4, 6, 6)
    assert torch.equal(layer(x), layer.simulate(x))
    with torch.no_grad():
        first = layer(x)
        assert not torch.equal(first, layer.simulate(x))
        assert torch.equal(layer.train()(x), layer.simulate(x))
        layer.eval().bias.add_(1)
        torch.testing.assert_close(layer(x), first + 1, rtol=0.01, atol=0.02)
        layer.train().bias.data += 1  # as old optimizers do
        torch.testing.assert_close(layer.eval()(x), first + 2, rtol=0.01, atol=0.02)
        twin = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
        assert torch.equal(twin(x), layer(x))
        assert layer.double()(x.double()).dtype is torch.float64
    assert bfloat16_obstacle(layer) == "bfloat16 kernels are for layers in float32"


@needs_kernels
@pytest.mark.parametrize("linear_layer", [False, True])
def test_packed_weights_do_not_keep_the_layer(linear_layer):
    dense, x = (
        (linear(12, 6), randn(2, 12)) if linear_layer else (dense_conv(torch.float32, kernel_size=3), randn(2, 4, 7, 7))
    )
    layer = (BFloat16Linear if linear_layer else BFloat16Conv2d).from_pretrained_layer(dense).eval()
    with torch.no_grad():
        layer(x)
    gone = weakref.ref(layer)
    del layer
    gc.collect()
    assert gone() is None


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = dense_conv(torch.float32, kernel_size=3), linear(8 * 36, 5)

    def forward(self, x):
        return self.fc(self.conv(x).relu().flatten(1))


def test_the_step_saves_half_and_changes_little(tmp_path):
    model, x = Net().eval(), randn(2, 4, 8, 8)
    result = lnn.compress_model(model, x, lnn.Quantize("bf16"), progress=False)
    assert [type(layer) for layer in result.model.children()] == [BFloat16Conv2d, BFloat16Linear]
    assert lnn.plan(model, x, lnn.Quantize("bf16")).after == result.report.after
    assert result.report.compression_rate["bytes"] > 1.9
    assert result.report.file_bytes[1] < 0.6 * result.report.file_bytes[0]
    lnn.save(result.model, tmp_path / "net.lrnn")
    loaded = lnn.load(tmp_path / "net.lrnn", Net()).eval()
    assert loaded.conv.kernel.dtype is torch.bfloat16
    with torch.no_grad():
        assert torch.equal(loaded(x), result.model(x))
        assert float((loaded(x) - model(x)).norm() / model(x).norm()) < 0.01


def test_the_factors_of_low_rank_layers_too():
    model, x = Net().eval(), randn(2, 4, 8, 8)
    recipe = [lnn.Apply(lnn.TuckerConv2d, where="conv", rank=(4, 3)), lnn.Quantize("bf16")]
    small = lnn.compress_model(model, x, recipe, progress=False).model
    assert {type(part) for part in small.conv.children()} == {BFloat16Conv2d}


def test_the_report_says_where_it_is_simulated(monkeypatch):
    monkeypatch.setattr(bfloat16, "_has_kernels", lambda: False)
    model, x = Net().eval(), randn(2, 4, 8, 8)
    result = lnn.compress_model(model, x, lnn.Quantize("bf16"), progress=False)
    reason = "Quantize: simulated in floating point: this machine does not multiply bfloat16"
    assert result.report.remarks == {reason: ("conv", "fc")}
    with torch.no_grad():
        assert torch.equal(result.model.conv(x), result.model.conv.simulate(x))


def test_other_options_go_with_integers():
    others = {
        "activations": "int8",
        "scheme": "affine",
        "observer": "mse",
        "keep_fastest": True,
        "data_aware": True,
        "reconstruct": False,
    }
    for name, value in others.items():
        with pytest.raises(lnn.OptionError, match="'bf16' takes no option but where and but_not"):
            lnn.Quantize("bf16", **{name: value})
    assert repr(lnn.Quantize("bf16")) == "Quantize(weights='bf16')"


@pytest.mark.cuda
def test_simulated_on_cuda(device):
    layer, x = BFloat16Conv2d.from_pretrained_layer(dense_conv(torch.float32, kernel_size=3)).eval(), randn(1, 4, 6, 6)
    expected = layer.simulate(x)
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        torch.testing.assert_close(layer.to(device)(x.to(device)).cpu(), expected, rtol=1e-4, atol=1e-4)
