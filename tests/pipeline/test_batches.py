"""How batches of users are read."""

import collections
import dataclasses
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lowrank_nn as lnn
from lowrank_nn.errors import CalibrationError, TrainingError
from lowrank_nn.graph import call_model
from lowrank_nn.graph.inputs import tensors
from lowrank_nn.pipeline.batches import loader_generators, logits_of, read_calibration, split_batch, to_device
from lowrank_nn.planning.calibration import model_inputs

CPU = torch.device("cpu")
X, Z, Y = torch.randn(4, 3), torch.randn(4, 2), torch.arange(4)


class Pair(NamedTuple):
    image: torch.Tensor
    label: torch.Tensor


@dataclasses.dataclass
class Output:
    loss: torch.Tensor
    scores: torch.Tensor


class Catch(nn.Module):
    """Returns what it was called with."""

    def forward(self, *args, **kwargs):
        return args, kwargs


def called_with(batch, example_inputs):
    inputs, targets = split_batch(batch, example_inputs)
    return *call_model(Catch(), inputs), targets


@pytest.mark.parametrize(
    ("batch", "example_inputs", "args", "kwargs", "targets"),
    [
        ((X, Y), X, (X,), {}, Y),
        ([X, Y], (X,), (X,), {}, Y),
        (Pair(X, Y), X, (X,), {}, Y),
        (Pair(X, Y), Pair(X, Y), (Pair(X, Y),), {}, None),
        (X, X, (X,), {}, None),
        ([X], X, (X,), {}, None),
        ((X, None), X, (X,), {}, None),
        (((X,), Y), X, (X,), {}, Y),
        (((X, Z), Y), (X, Z), (X, Z), {}, Y),
        ([X, Z, Y], (X, Z), (X, Z), {}, Y),
        ((X, Z), (X, Z), (X, Z), {}, None),
        (([X, Z], Y), ([X, Z],), ([X, Z],), {}, Y),
        (([X, Z], Y), ([X, Z], Y), ([X, Z], Y), {}, None),
        (({"a": X, "b": Z}, Y), {"a": X, "b": Z}, (), {"a": X, "b": Z}, Y),
        ({"a": X, "b": Z, "labels": Y}, {"a": X, "b": Z}, (), {"a": X, "b": Z}, Y),
        ({"a": X, "labels": Y}, {"a": X, "labels": Y}, (), {"a": X, "labels": Y}, Y),
        ({"image": X, "target": Y}, X, (X,), {}, Y),
        ({"a": X}, {"a": X}, (), {"a": X}, None),
        ({"a": X, "b": Z, "label": Y}, (X, Z), (), {"a": X, "b": Z}, Y),
        (({"a": X}, Y), ({"a": X},), ({"a": X},), {}, Y),
        ({"a": X, "labels": Y}, ({"a": X},), ({"a": X},), {}, Y),
        ({"a": X, "b": Z}, ({"a": X, "b": Z},), ({"a": X, "b": Z},), {}, None),
        (Output(X, Z), Output(X, Z), (Output(X, Z),), {}, None),
        ((Output(X, Z), Y), Output(X, Z), (Output(X, Z),), {}, Y),
    ],
)
def test_inputs_and_targets(batch, example_inputs, args, kwargs, targets):
    got_args, got_kwargs, got_targets = called_with(batch, example_inputs)
    assert len(got_args) == len(args)
    for got, expected in zip(got_args, args, strict=True):
        if isinstance(expected, (list, tuple)):
            assert all(map(torch.equal, got, expected))
        elif isinstance(expected, Output):
            assert got.loss is expected.loss
        elif isinstance(expected, dict):
            assert got["a"].equal(expected["a"])
        else:
            assert got.equal(expected)
    assert got_kwargs.keys() == kwargs.keys()
    assert all(got_kwargs[key].equal(value) for key, value in kwargs.items())
    assert got_targets is targets


@pytest.mark.parametrize(
    ("calibration", "example_inputs", "expected"),
    [
        ([{"image": X, "label": ["cat"]}], X, [(X,)]),
        ([{"a": X, "labels": Y}], {"a": X}, [{"a": X}]),
        ([{"a": X, "labels": Y}], {"a": X, "labels": Y}, [{"a": X, "labels": Y}]),
        ({"a": X, "labels": Y}, {"a": X}, [{"a": X}]),
        ([{"a": X, "b": Z, "target": Y}], ({"a": X, "b": Z},), [({"a": X, "b": Z},)]),
        (iter([(X, Y), X]), X, [(X,), X]),
        ([(X, Z), (X, Z, Y)], (X, Z), [(X, Z), (X, Z)]),
        ([Pair(X, Y)], (Pair(X, Y),), [Pair(X, Y)]),
        (X, X, X),
        (None, X, None),
    ],
)
def test_calibration_is_read_again_and_again(calibration, example_inputs, expected):
    read, model = read_calibration(calibration, example_inputs, CPU), Catch()
    if isinstance(expected, list):
        for _ in range(2):
            assert str([model_inputs(model, batch) for batch in read]) == str(expected)
        assert len(read) == len(expected)
    else:
        assert read is expected


@pytest.mark.parametrize(
    ("model", "example_inputs", "args", "kwargs", "batches"),
    [
        (lambda x: None, X, (X,), {}, [X, (X, Y), {"image": X, "label": Y}]),
        (lambda a, b: None, (X, Z), (X, Z), {}, [(X, Z), (X, Z, Y), ((X, Z), Y)]),
        (lambda a, b=None: None, (X, Z), (X, Z), {}, [(X, Z), (X, Z, Y), ((X, Z), Y)]),
        (lambda *inputs: None, (X, Z), (X, Z), {}, [(X, Z), (X, Z, Y), ((X, Z), Y)]),
        (
            lambda a, b: None,
            {"a": X, "b": Z},
            (),
            {"a": X, "b": Z},
            [{"a": X, "b": Z}, {"a": X, "b": Z, "labels": Y}, ({"a": X, "b": Z}, Y)],
        ),
        (
            lambda inputs: None,
            ({"a": X, "b": Z},),
            ({"a": X, "b": Z},),
            {},
            [{"a": X, "b": Z}, {"a": X, "b": Z, "labels": Y}, ({"a": X, "b": Z}, Y)],
        ),
    ],
)
def test_the_table_of_the_guide(model, example_inputs, args, kwargs, batches):
    module = nn.Module()
    module.forward = model
    for batch, read in zip(batches, read_calibration(batches, example_inputs, CPU), strict=True):
        for inputs in (model_inputs(module, read), split_batch(batch, example_inputs)[0]):
            assert str(call_model(Catch(), inputs)) == str((args, kwargs))


def test_generators_of_a_calibration_loader_are_put_back():
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    read = read_calibration(DataLoader(TensorDataset(X, Y), shuffle=True, generator=generator), X, CPU)
    first, _ = [batch.inputs[0] for batch in read], next(iter(read))
    assert torch.equal(generator.get_state(), before)
    assert all(map(torch.equal, first, [batch.inputs[0] for batch in read]))
    assert not torch.cat(first).equal(X)


@pytest.mark.parametrize("calibration", [X, [X], [(X, Y)], [{"a": X, "labels": Y}], DataLoader(TensorDataset(X, Y), 2)])
def test_calibration_moves_to_the_device_of_the_model(calibration):
    batches = read_calibration(calibration, X, torch.device("meta"))
    for batch in [batches] if isinstance(batches, torch.Tensor) else batches:
        assert {tensor.device.type for tensor in tensors(batch)} == {"meta"}


def test_a_batch_that_is_on_the_device_in_parts_stays_as_it_is():
    batch = (X.to("meta"), Y)
    (read,) = read_calibration([batch], batch, torch.device("meta"))
    assert [tensor.device.type for tensor in tensors(read)] == ["meta", "cpu"]


def test_calibration_that_is_no_iterable():
    with pytest.raises(CalibrationError, match=r"iterable of what the model is called with, got int.*a DataLoader"):
        read_calibration(8, X, CPU)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x, scale=None):
        return self.second(torch.relu(self.first(x if scale is None else x * scale)))


def test_an_optional_input_of_the_example_is_one_of_the_calibration_data():
    torch.manual_seed(0)
    model, x = Scaled(), torch.linspace(-1, 1, 32).reshape(4, 8)
    for scale in (torch.tensor(1.0), torch.tensor(10.0)):
        recipe = lnn.Quantize("int8", activations="int8")
        small = lnn.compress_model(model, (x, scale), recipe, calibration=[(x, scale)], progress=False).model
        assert torch.allclose(small(x, scale), model(x, scale), atol=0.02 * float(scale))


class TakesDict(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 10)

    def forward(self, batch):
        return self.head(torch.relu(self.a(batch["x"]) + self.b(batch["y"])))


@pytest.mark.parametrize("labelled", [False, True])
def test_a_model_that_takes_one_dict(labelled):
    batch = {"x": torch.linspace(-1, 1, 32).reshape(4, 8), "y": torch.linspace(0, 1, 32).reshape(4, 8)}
    batches = [batch | {"labels": Y}] * 2 if labelled else [(batch,)] * 2
    recipe = [
        lnn.LowRank(formats=[lnn.SVDLinear]),
        lnn.FineTune(batches, epochs=1),
        lnn.Quantize("int8", activations="int8"),
    ]
    budget = lnn.Budget(params=0.7)
    small = lnn.compress_model(TakesDict(), (batch,), recipe, budget=budget, calibration=batches, progress=False).model
    assert small(batch).shape == (4, 10)


@pytest.mark.parametrize("batch", [(X, Z, Y), (X, [Y]), (X, {"boxes": Z}), ([X, Z], [Y, Y]), {"a": X, "labels": [1]}])
def test_unreadable_batches_are_refused(batch):
    with pytest.raises(TrainingError, match="loss="):
        split_batch(batch, X)


def test_loaders_of_torch():
    batch = next(iter(DataLoader(TensorDataset(X, Z, Y), batch_size=4)))
    args, _, targets = called_with(batch, (X, Z))
    assert torch.equal(args[0], X)
    assert torch.equal(args[1], Z)
    assert torch.equal(targets, Y)
    args, _, targets = called_with(next(iter(DataLoader(TensorDataset(X), batch_size=4))), X)
    assert torch.equal(args[0], X)
    assert targets is None


def test_logits():
    loss = torch.zeros(())
    named = collections.namedtuple("named", "logits aux")(Z, X)
    assert logits_of(X) is X
    assert logits_of(named) is Z
    assert logits_of({"loss": loss, "logits": Z}) is Z
    assert logits_of({"out": Z, "aux": X}) is Z
    assert logits_of((loss, Z, X)) is Z
    assert logits_of(Output(loss, Z)) is Z
    assert logits_of([[Y, Z]]) is Z
    for nothing in (None, {}, {"loss": loss}, (Y,), "text"):
        with pytest.raises(TrainingError, match="no logits"):
            logits_of(nothing)


def test_to_device_keeps_every_container():
    packed = nn.utils.rnn.pack_sequence([torch.ones(3), torch.ones(2)])
    batch = {
        "pair": Pair(X, Y),
        "list": [X, "text", 3, None],
        "ordered": collections.OrderedDict(a=X),
        "user": collections.UserDict(a=X),
        "data": Output(X, Z),
        "size": X.shape,
    }
    moved = to_device(batch, torch.device("meta"))
    assert isinstance(moved["pair"], Pair)
    assert moved["pair"].image.is_meta
    assert moved["list"][0].is_meta
    assert moved["list"][1:] == ["text", 3, None]
    assert type(moved["ordered"]) is collections.OrderedDict
    assert moved["user"]["a"].is_meta
    assert moved["data"].scores.is_meta
    assert moved["size"] == X.shape
    assert batch["user"]["a"] is X
    assert batch["ordered"]["a"] is X
    assert torch.equal(to_device(packed, torch.device("cpu")).data, packed.data)


@pytest.mark.cuda
def test_a_model_on_a_gpu_takes_calibration_from_the_cpu(device):
    model = nn.Sequential(nn.Linear(3, 32), nn.ReLU(), nn.Linear(32, 3)).to(device)
    loader = DataLoader(TensorDataset(torch.randn(64, 3), torch.zeros(64)), 16)
    result = lnn.compress_model(model, X.to(device), budget=lnn.Budget(params=0.8), calibration=loader)
    assert next(result.model.parameters()).device == device


@pytest.mark.cuda
def test_to_device_cuda(device):
    packed = nn.utils.rnn.pack_sequence([torch.ones(3), torch.ones(2)])
    moved = to_device([packed, X], device)
    assert moved[0].data.device == device
    assert moved[0].batch_sizes.device.type == "cpu"
    assert moved[1].device == device


def test_generators_of_a_loader():
    generator = torch.Generator()
    assert loader_generators([X]) == []
    assert loader_generators(DataLoader(TensorDataset(X), shuffle=True)) == []
    assert loader_generators(DataLoader(TensorDataset(X), shuffle=True, generator=generator)) == [generator]
    sampler = torch.utils.data.BatchSampler(
        torch.utils.data.RandomSampler(TensorDataset(X), generator=generator), 2, drop_last=False
    )
    assert loader_generators(DataLoader(TensorDataset(X), batch_sampler=sampler)) == [generator]
