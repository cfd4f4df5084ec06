"""Checks of what a layer computes."""

from __future__ import annotations

import copy

import torch

from lowrank_nn.layers import CompressedLayer
from lowrank_nn.testing._tools import (
    TOLERANCE,
    bias_of,
    built,
    compress,
    dense_output,
    expect,
    expect_acts_as_dense_weight,
    expect_close,
    options_for,
    storages,
    weight_error,
)
from lowrank_nn.testing.cases import Case


def check_output_contract(cls: type[CompressedLayer], case: Case) -> None:
    """The output has the shape, dtype, device and memory format of the dense layer's; the input is not changed."""
    layer, dense = built(cls, case), case.layer()
    x = case.input()
    before = x.clone()
    y, expected = layer(x), dense(x)
    expect(torch.equal(x, before), "the input was changed")
    expect(y.shape == expected.shape, f"output shape {tuple(y.shape)}, expected {tuple(expected.shape)}")
    expect(y.dtype == expected.dtype, f"output dtype {y.dtype}, expected {expected.dtype}")
    expect(y.device == expected.device, f"output device {y.device}, expected {expected.device}")
    strides = [[s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1] for t in (y, expected)]
    expect(strides[0] == strides[1], f"output strides {y.stride()}, expected {expected.stride()}")
    predicted = layer.output_shape(case.input_shape)
    expect(predicted == tuple(y.shape), f"output_shape() says {predicted}, the output has {tuple(y.shape)}")
    weight = layer.dense_weight()
    source = dense.get_parameter("weight")
    expect(weight.shape == source.shape, f"dense_weight() has shape {tuple(weight.shape)}, not {tuple(source.shape)}")
    expect(weight.dtype == source.dtype, f"dense_weight() is {weight.dtype}, expected {source.dtype}")


def check_lossless(cls: type[CompressedLayer], case: Case) -> None:
    """With ``lossless_options`` weight and output are the dense layer's, in both modes; usual ones keep no more."""
    dense = case.layer()
    options = cls.lossless_options(dense)
    if options is None:
        return
    layer = compress(cls, dense, options)
    x, tolerance = case.input(), TOLERANCE[case.dtype]
    for training in (True, False):
        expect_close(layer.train(training)(x), dense(x), tolerance, f"lossless output (training={training})")
    expect_close(layer.dense_weight(), dense.get_parameter("weight"), tolerance, "lossless dense_weight()")
    usual, lossless = built(cls, case).cost(case.input_shape), layer.cost(case.input_shape)
    expect(usual.nonzeros <= lossless.nonzeros, f"usual options keep {usual.nonzeros}, lossless {lossless.nonzeros}")


def check_equals_dense_weight(cls: type[CompressedLayer], case: Case) -> None:
    """The output is that of the dense layer with the weight ``dense_weight()``, in both modes."""
    layer, x = built(cls, case), case.input()
    for training in (True, False):
        layer.train(training)
        expect_acts_as_dense_weight(layer, case, x, TOLERANCE[case.dtype], f"training={training}")


def check_to_dense_layer(cls: type[CompressedLayer], case: Case) -> None:
    """``to_dense_layer`` returns torch's own layer that computes the same, with flags kept and memory of its own."""
    layer, source, x = built(cls, case), case.layer(), case.input()
    dense = layer.to_dense_layer()
    expect(type(dense) is cls.replaces, f"it is a {type(dense).__name__}, expected {cls.replaces.__name__}")
    expect(repr(dense) == repr(source), f"it is {dense!r}, the source was {source!r}")
    expect(dense.training == source.training, "train/eval mode is lost")
    expect_close(dense(x), layer(x), TOLERANCE[case.dtype], "output of to_dense_layer()")
    expect(next(dense.parameters()).dtype == case.dtype, "dtype is lost")
    expect(not storages(dense) & storages(layer), "the dense layer shares memory with the compressed one")


def check_fixed_point(cls: type[CompressedLayer], case: Case) -> None:
    """``approximate_(dense_weight())`` does not change the layer's weight."""
    layer = built(cls, case)
    weight = layer.dense_weight().detach().clone()
    layer.approximate_(weight.clone())
    expect_close(layer.dense_weight(), weight, TOLERANCE[case.dtype], "dense_weight() after approximating it")


def check_error_below_one(cls: type[CompressedLayer], case: Case) -> None:
    """The usual options lose less than all of the weight: the relative error is below 1."""
    error = weight_error(built(cls, case), case)
    expect(error < 1, f"the relative error of the weight at usual options is {error:.2f}")


def check_batching(cls: type[CompressedLayer], case: Case) -> None:
    """A batch of one, a sample without batch dimension, and the sample inside a batch give the same output."""
    layer, x = built(cls, case).eval(), case.input(batched=True)
    tolerance = TOLERANCE[case.dtype]
    whole, single = layer(x), layer(x[0])
    expect_close(single, whole[0], tolerance, "sample without batch dimension")
    expect_close(layer(x[:1])[0], whole[0], tolerance, "batch of one")


def check_casts(cls: type[CompressedLayer], case: Case) -> None:
    """``.to(bfloat16)``, ``.double()`` and autocast work, and the layer still acts as its ``dense_weight()``."""
    layer, x = built(cls, case).eval(), case.input()
    for dtype in (torch.bfloat16, torch.float64):
        cast = copy.deepcopy(layer).to(dtype)
        expect(cast.dense_weight().dtype == dtype, f".to({dtype}): dense_weight() is {cast.dense_weight().dtype}")
        y = cast(x.to(dtype))
        expect(y.dtype == dtype, f".to({dtype}): the output is {y.dtype}")
        expect_acts_as_dense_weight(cast, case, x.to(dtype), TOLERANCE[dtype], f".to({dtype})")
    if case.dtype == torch.float32:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, expected = layer(x), case.layer()(x)
        expect(y.dtype == expected.dtype, f"autocast: the output is {y.dtype}, the dense layer's {expected.dtype}")
        expected = dense_output(case, x, layer.dense_weight(), bias_of(layer))
        expect_close(y, expected, TOLERANCE[torch.bfloat16], "autocast: output")


def check_accelerator(cls: type[CompressedLayer], case: Case) -> None:
    """Built from a layer on a GPU it stays there and is as near to the layer; moved there it computes the same."""
    device = torch.accelerator.current_accelerator()
    expect(device is not None, "torch finds no accelerator")
    dense, x = case.layer().to(device), case.input().to(device)
    layer, on_cpu = compress(cls, dense, options_for(cls, case, dense)), built(cls, case)
    places = {tensor.device for tensor in layer.state_dict().values()}
    expect(places == {x.device}, f"tensors are on {sorted(map(str, places))}, expected {x.device}")
    # Searches may end in another optimum where the arithmetic is another.
    error, error_on_cpu = weight_error(layer, case), weight_error(on_cpu, case)
    expect(abs(error - error_on_cpu) <= 1e-3, f"the weight's error is {error:.3g}, built on the CPU {error_on_cpu:.3g}")
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        tolerance = max(TOLERANCE[case.dtype], 1e-4)
        y, moved = layer(x), copy.deepcopy(on_cpu).to(device)
        expect(y.device == x.device, f"output device {y.device}, expected {x.device}")
        expect_close(y.cpu(), copy.deepcopy(layer).cpu()(case.input()), tolerance, "output against that on the cpu")
        expect_close(moved(x).cpu(), on_cpu(case.input()), tolerance, "output of the layer moved to the device")
