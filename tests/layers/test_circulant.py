"""Circulant layers: blocks, the projection onto them, products through the Fourier transform."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from scipy import linalg
from sklearn.datasets import load_digits
from torch import nn

import lowrank_nn as lnn
from lowrank_nn.cost import fourier_macs
from lowrank_nn.storage import stored_bytes
from lowrank_nn.testing import ACCELERATOR_CHECKS, CHECKS, SLOW_CHECKS, Case, layer_checks, run_check


def dense_by_hand(values, rows, columns):
    """A matrix of circulant blocks, put together by scipy; ``values`` is (P, b, Q)."""
    blocks = [[linalg.circulant(values[p, :, q]) for q in range(values.shape[2])] for p in range(values.shape[0])]
    return np.block(blocks)[:rows, :columns]


@pytest.mark.parametrize(("out", "into", "size"), [(8, 12, 4), (9, 14, 4), (7, 7, 7), (10, 64, 10), (5, 6, 1)])
def test_blocks_are_circulant(out, into, size):
    layer = lnn.CirculantLinear(into, out, block_size=size, dtype=torch.float64)
    expected = dense_by_hand(layer.values.detach().numpy(), out, into)
    np.testing.assert_array_equal(layer.weight.detach().numpy(), expected)
    assert layer.values.numel() == -(-out // size) * -(-into // size) * size


def test_kernels_have_blocks_for_each_position_and_group():
    conv = lnn.CirculantConv2d(12, 10, (3, 2), groups=2, block_size=4, dtype=torch.float64)
    weight = conv.weight.detach().numpy()
    assert conv.values.shape == (2 * 2, 4, 2 * 3 * 2)
    for group, height, width in itertools.product(range(2), range(3), range(2)):
        values = conv.values.detach().numpy().reshape(4, 4, 2, 3, 2)[2 * group : 2 * group + 2, :, :, height, width]
        np.testing.assert_array_equal(weight[5 * group : 5 * group + 5, :, height, width], dense_by_hand(values, 5, 6))


@pytest.mark.parametrize(("out", "into", "size"), [(8, 8, 4), (9, 14, 4), (5, 7, 5)])
def test_the_projection_is_the_best_there_is(out, into, size):
    torch.manual_seed(0)
    linear = nn.Linear(into, out, dtype=torch.float64)
    layer = lnn.CirculantLinear.from_pretrained_layer(linear, block_size=size)
    shape = layer.values.shape
    columns = [dense_by_hand(unit.reshape(shape), out, into).ravel() for unit in np.eye(layer.values.numel())]
    weight = linear.weight.detach().numpy()
    best, *_ = np.linalg.lstsq(np.stack(columns, 1), weight.ravel())  # of least norm: values not shown are zero
    np.testing.assert_allclose(layer.values.detach().numpy().ravel(), best, atol=1e-12)


def test_circulant_weights_are_recovered():
    torch.manual_seed(0)
    conv = lnn.CirculantConv2d(9, 10, 3, padding=1, block_size=4).to_dense_layer()
    layer = lnn.CirculantConv2d.from_pretrained_layer(conv, block_size=4)
    torch.testing.assert_close(layer.weight, conv.weight, rtol=1e-6, atol=1e-7)


def test_small_layers_take_smaller_blocks():
    depthwise = lnn.CirculantConv2d.from_pretrained_layer(nn.Conv2d(8, 8, 3, groups=8), block_size=4)
    assert depthwise.block_size == 1
    assert lnn.CirculantLinear.from_pretrained_layer(nn.Linear(512, 10), block_size=64).block_size == 10


LARGE = (
    Case("plain", nn.Linear, {"in_features": 96, "out_features": 64}, (5, 96)),
    Case("cropped", nn.Linear, {"in_features": 101, "out_features": 75, "bias": False}, (2, 3, 101)),
    Case("unbatched", nn.Linear, {"in_features": 64, "out_features": 96}, (64,)),
    Case("eval", nn.Linear, {"in_features": 70, "out_features": 66}, (1, 70), training=False),
    Case("float64", nn.Linear, {"in_features": 64, "out_features": 64}, (2, 64), dtype=torch.float64),
    Case("bfloat16", nn.Linear, {"in_features": 64, "out_features": 64}, (2, 64), dtype=torch.bfloat16),
)
LARGE = tuple(dataclasses.replace(case, options={"block_size": size}) for case in LARGE for size in (32, 15))


@pytest.mark.parametrize(
    ("cls", "case", "check"),
    [
        pytest.param(*triple, id=f"{triple[1].name}-{triple[1].options['block_size']}-{triple[2].__name__[6:]}")
        for triple in layer_checks([lnn.CirculantLinear], cases=LARGE, checks=CHECKS + SLOW_CHECKS)
    ],
)
def test_contract_through_the_fourier_transform(cls, case, check):
    layer = cls.from_pretrained_layer(case.layer(), **case.options)
    dense = layer.in_features * layer.out_features
    assert (layer.cost((1, layer.in_features)).macs < dense) == (case.dtype in (torch.float32, torch.float64))
    assert run_check(cls, case, check)


@pytest.mark.cuda
@pytest.mark.parametrize("case", LARGE, ids=lambda case: f"{case.name}-{case.options['block_size']}")
def test_contract_on_cuda(case, device):
    assert run_check(lnn.CirculantLinear, case, ACCELERATOR_CHECKS[0])


@pytest.mark.parametrize("size", [1, 2, 3, 16, 100, 1000])
def test_transforms_cost_what_is_usually_counted(size):
    assert fourier_macs(size) == pytest.approx(2.5 * size * np.log2(size) / 2, abs=1)


def test_multiply_accumulates_are_far_fewer():
    cost = lnn.CirculantLinear(4096, 4096, block_size=64, device="meta").cost((32, 4096))
    products, transforms = 32 * 4 * 33 * 64 * 64, (64 * 64 + 32 * 128) * 480
    assert cost.macs == products + transforms
    assert cost.macs < 32 * 4096 * 4096 / 20


def test_what_is_kept_between_calls_follows_the_values():
    torch.manual_seed(0)
    layer, x = lnn.CirculantLinear(64, 64, block_size=32, bias=False).eval(), torch.randn(3, 64)
    with torch.no_grad():
        before = layer(x)
        torch.testing.assert_close(layer(x), before, rtol=0, atol=0)
        layer.values.mul_(2)
        torch.testing.assert_close(layer(x), 2 * before)
    layer(x).sum().backward()
    assert layer.values.grad is not None


def test_what_training_changes_through_data_is_noticed():
    torch.manual_seed(0)
    layer, x = lnn.CirculantLinear(64, 64, block_size=32, bias=False).eval(), torch.randn(3, 64)
    with torch.no_grad():
        before = layer(x)
        layer.train().values.data.mul_(2)  # as averages of models and older optimizers do; no version shows it
        torch.testing.assert_close(layer.eval()(x), 2 * before)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("gradients", [True, False])
def test_ensembles_by_vmap(training, gradients):
    torch.manual_seed(0)
    layers = [lnn.CirculantLinear(64, 64, block_size=32).train(training) for _ in range(3)]
    x = torch.randn(2, 64)
    with torch.set_grad_enabled(gradients):
        together = torch.func.vmap(lambda *state: torch.func.functional_call(layers[0], state, (x,)))(
            *torch.func.stack_module_state(layers)
        )
        torch.testing.assert_close(together, torch.stack([layer(x) for layer in layers]))


def test_other_dtypes_are_refused_as_by_dense_layers():
    with pytest.raises(RuntimeError, match="dtype"):
        lnn.CirculantLinear(64, 64, block_size=32)(torch.ones(2, 64, dtype=torch.int64))


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0)])
def test_empty_batches_give_empty_outputs(shape):
    assert lnn.CirculantLinear(64, 96, block_size=32)(torch.zeros(*shape, 64)).shape == (*shape, 96)


def test_autocast_and_tracing_put_the_weight_together():
    torch.manual_seed(0)
    layer, x = lnn.CirculantLinear(64, 64, block_size=32), torch.randn(3, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    program = torch.export.export(layer, (x,))
    operations = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any("linear" in name for name in operations)
    assert not any("fft" in name for name in operations)


def test_a_file_holds_the_values(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Flatten(), nn.Linear(16 * 16, 64))
    x = torch.randn(2, 3, 6, 6)
    recipe = lnn.Apply([lnn.CirculantConv2d, lnn.CirculantLinear], block_size=16)
    result = lnn.compress_model(model, x, recipe, progress=False)
    assert [result.model[i].block_size for i in (0, 2)] == [3, 16]
    sizes = stored_bytes(result.model)
    assert sizes["2.values"] == 256 * 64 * 4 // 16
    assert result.report.after.params == 6 * 3 * 9 + 16 + 256 * 64 // 16 + 64
    lnn.save(result.model, tmp_path / "small.lrnn")
    assert torch.equal(lnn.load(tmp_path / "small.lrnn", model)(x), result.model(x))


def test_a_sixteenth_of_the_weights_learns_digits():
    digits = load_digits()
    images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    torch.manual_seed(0)
    model = nn.Sequential(lnn.CirculantLinear(64, 256, block_size=16), nn.ReLU(), nn.Linear(256, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[:1200]), labels[:1200]).backward()
        optimizer.step()
    assert (model(images[1200:]).argmax(1) == labels[1200:]).float().mean() > 0.85


@pytest.mark.parametrize("size", [0, 9, 2.0, True])
def test_what_cannot_be(size):
    with pytest.raises(lnn.OptionError, match="CirculantLinear: block_size must be a whole number from 1 to 8"):
        lnn.CirculantLinear(8, 12, block_size=size)
    if size != 9:
        with pytest.raises(lnn.OptionError, match="CirculantLinear: block_size must be a whole number from 1, got"):
            lnn.CirculantLinear.from_pretrained_layer(nn.Linear(8, 12), block_size=size)
