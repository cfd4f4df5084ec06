"""The given model and the process are as they were, however the call ends; results repeat and are ordinary modules."""

import copy
import io
import pickle
import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import lowrank_nn as lnn
from tests.storage.models import assert_same_state, bits_of, seeded
from tests.untouched import assert_untouched, snapshot

MATRICES = (lnn.SVDConv2d, lnn.SVDLinear, lnn.TuckerConv2d)
X = torch.linspace(-1, 1, 4 * 3 * 8 * 8).reshape(4, 3, 8, 8)


class Net(nn.Module):
    """Norms, dropout, frozen and eval parts, a buffer that a forward changes: what must come back as it was."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1)
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(16, 12)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.calls += 1
        x = self.conv2(torch.relu(self.norm(self.conv1(x)))).relu()
        return self.fc(self.dropout(x.mean((2, 3))))


def make_net():
    net = seeded(Net)
    net.train()
    net.norm.eval()
    net.conv1.bias.requires_grad_(False)
    net.fc.weight.grad = torch.ones_like(net.fc.weight)
    return net


def chain():
    return [
        lnn.LowRank(formats=MATRICES),
        lnn.Prune(0.5, criterion="random"),
        lnn.FineTune([(X, torch.arange(4)), (X.flip(0), torch.arange(4))], epochs=1),
        lnn.Quantize("int8", activations="int8"),
    ]


def compress(model, recipe=None, **options):
    options = {"budget": lnn.Budget(params=0.6), "calibration": [X, 0.5 * X]} | options
    return lnn.compress_model(model, X, recipe or chain(), **options)


def test_after_success():
    model = make_net()
    model.conv2.register_forward_hook(lambda *_: None)
    before = snapshot(model)
    result = compress(model)
    assert_untouched(model, before)
    lnn.plan(model, X, chain(), budget=lnn.Budget(params=0.6), calibration=[X])
    assert_untouched(model, before)
    kept = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    memory = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    for tensor in (*result.model.parameters(), *result.model.buffers()):
        assert id(tensor) not in kept
        assert tensor.data_ptr() not in memory
    with torch.no_grad():
        for tensor in (*result.model.parameters(), *result.model.buffers()):
            tensor.zero_()
    assert_untouched(model, before)


@pytest.mark.parametrize("allocation", ["knapsack", "alds", "musco"])
def test_parametrizations_that_change_when_they_are_read(allocation):
    model = make_net()
    nn.utils.parametrizations.spectral_norm(model.conv2)  # in train mode every read of the weight is a power iteration
    before = snapshot(model)
    report = lnn.plan(model, X, [lnn.LowRank(allocation=allocation)], budget=lnn.Budget(params=1.0))
    assert_untouched(model, before)
    assert any("parametrized weight" in reason and "conv2" in paths for reason, paths in report.left.items())
    lnn.plan(model, X, [lnn.LowRank(rank=lnn.Energy(0.9))])
    assert_untouched(model, before)


@pytest.mark.parametrize("first", [lnn.LowRank(formats=MATRICES), lnn.Apply(lnn.SVDLinear, where="fc", rank=3)])
def test_no_memory_is_shared_with_the_result(first):
    model = make_net()
    before = snapshot(model)
    small = compress(model, [first], budget=lnn.Budget(params=0.99)).model
    with torch.no_grad():
        for tensor in (*small.parameters(), *small.buffers()):
            tensor.zero_()
    assert_untouched(model, before)


@pytest.mark.parametrize("cls", [lnn.TuckerConv2d, lnn.SVDConv2d, lnn.SVDLinear, lnn.PrunedConv2d, lnn.QuantConv2d])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, MemoryError])
def test_after_an_interrupt_half_way(monkeypatch, cls, error):
    """The factory of one layer class fails once the plan is done and other layers are replaced."""
    model = make_net()
    before = snapshot(model)
    recipe = [
        lnn.Apply(lnn.TuckerConv2d, where="conv2", rank=(4, 4)),
        lnn.Apply(lnn.SVDConv2d, where="conv1", rank=2),
        lnn.Apply(lnn.SVDLinear, where="fc", rank=3),
        lnn.Prune(0.5),
        lnn.Quantize("int8"),
    ]
    factory, raised = cls.from_pretrained_layer, []

    def failing(layer, **options):
        if not next(layer.parameters()).is_meta:
            torch.manual_seed(1234)
            random.random()
            raised.append(layer)
            raise error("half-way")
        return factory(layer, **options)

    monkeypatch.setattr(cls, "from_pretrained_layer", failing)
    with pytest.raises(error, match="half-way"):
        compress(model, recipe, budget=None)
    assert raised
    assert_untouched(model, before)


def test_after_an_interrupt_in_training():
    model = make_net()
    before = snapshot(model)

    def loss(student, batch):
        np.random.rand()  # noqa: NPY002
        warnings.simplefilter("ignore")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(model, [lnn.LowRank(formats=MATRICES), lnn.FineTune([X], epochs=1, loss=loss)])
    assert_untouched(model, before)


@pytest.mark.parametrize(
    ("recipe", "error"),
    [
        ([lnn.LowRank(formats=MATRICES, where="nothing")], lnn.PlanError),
        ([lnn.Quantize(activations="int8")], lnn.CalibrationError),
        ([lnn.FineTune([X * float("nan")], epochs=1)], lnn.TrainingError),
    ],
)
def test_after_errors(recipe, error):
    model = make_net()
    before = snapshot(model)
    with pytest.raises(error):
        compress(model, recipe, calibration=None, budget=None)
    assert_untouched(model, before)


def test_after_not_a_number(monkeypatch):
    def broken(self, weight, metric=None):
        self.reduce.weight.fill_(float("nan"))

    monkeypatch.setattr(lnn.SVDLinear, "approximate_", torch.no_grad()(broken))
    model = make_net()
    before = snapshot(model)
    with pytest.raises(lnn.LowRankError, match="NaN or infinite values where the dense one does not"):
        compress(model, [lnn.Apply(lnn.SVDLinear, where="fc", rank=3)], budget=None)
    assert_untouched(model, before)


def test_a_model_that_gives_nan_itself_is_not_blamed_on_compression():
    model = make_net()
    with torch.no_grad():
        model.fc.bias.fill_(float("nan"))
    small = compress(model, [lnn.Apply(lnn.TuckerConv2d, where="conv2", rank=(4, 4))], budget=None).model
    assert small(X).isnan().all()


def test_random_numbers_and_warnings_inside_of_a_step_stay_inside():
    model = make_net()
    before = snapshot(model)

    def loss(student, batch):
        random.random()
        np.random.rand()  # noqa: NPY002
        torch.rand(1)
        warnings.simplefilter("always")
        return student(batch).square().mean()

    compress(model, [lnn.FineTune([X], epochs=1, loss=loss)], budget=None)
    assert_untouched(model, before)


def test_same_inputs_same_bits():
    def run(seed, disturb):
        torch.manual_seed(disturb)
        random.seed(disturb)
        return compress(make_net(), seed=seed)

    with torch.random.fork_rng():
        state = random.getstate()
        one, other, third = run(7, 1), run(7, 2), run(8, 1)
        random.setstate(state)
    first, second = one.model.state_dict(), other.model.state_dict()
    assert list(first) == list(second)
    assert all(bits_of(first[key]) == bits_of(second[key]) for key in first)
    assert one.report == other.report
    assert one.plan == other.plan
    assert any(bits_of(first[key]) != bits_of(value) for key, value in third.model.state_dict().items() if key in first)


def filters(criterion, **options):
    return [lnn.Prune(0.3, granularity="filter", criterion=criterion, **options)]


@pytest.mark.parametrize(
    "recipe",
    [
        chain(),
        *(filters(criterion) for criterion in ("l1", "similar", "random", "activation", "lasso", "thinet", "obs")),
        filters("taylor", batches=[(X, torch.arange(4))], loss=lambda net, batch: net(batch[0]).logsumexp(1).mean()),
        [lnn.FoldBatchNorm(), lnn.Equalize(), lnn.Quantize("int4")],
        [lnn.Codebook(3), lnn.FineTune([(X, torch.arange(4))], 1, guidance=["conv2"])],
        [lnn.Apply(lnn.HashedConv2d, where="conv2", share=0.5), lnn.Apply(lnn.BinaryLinear, where="fc")],
        [lnn.Apply(lnn.TransferredConv2d, where="conv2", share=0.5), lnn.Apply(lnn.CirculantLinear, block_size=4)],
    ],
)
def test_a_default_device_of_the_user_changes_nothing(recipe):
    budget = lnn.Budget(params=0.6) if isinstance(recipe[0], lnn.LowRank) else None
    expected = compress(make_net(), recipe, budget=budget).model
    net = make_net()
    with torch.device("meta"):  # whatever were made there would hold no numbers
        small = compress(net, recipe, budget=budget).model
    assert_same_state(small, expected)


@pytest.mark.parametrize("recipe", [chain(), filters("obs")])
def test_autocast_of_the_caller_changes_nothing(recipe):
    budget = lnn.Budget(params=0.6) if isinstance(recipe[0], lnn.LowRank) else None
    expected = compress(make_net(), recipe, budget=budget).model
    with torch.autocast("cpu", torch.bfloat16):
        small = compress(make_net(), recipe, budget=budget).model
    assert_same_state(small, expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_calls_without_gradients_train_all_the_same(mode):
    recipe = [lnn.Apply(lnn.SVDLinear, where="fc", rank=3), lnn.FineTune([X], epochs=1)]
    expected, given = compress(make_net(), recipe, budget=None).model.state_dict(), make_net()
    with mode():
        inside, made_inside = compress(given, recipe, budget=None).model, copy.deepcopy(make_net())
    before = snapshot(made_inside)
    from_inside = compress(made_inside, recipe, budget=None).model
    assert_untouched(made_inside, before)
    for small in (inside, from_inside):
        assert all(bits_of(value) == bits_of(expected[key]) for key, value in small.state_dict().items())
        small.train()(X).sum().backward()


def test_modes_flags_and_hooks_carry_over():
    model, seen = make_net(), []
    handle = model.conv2.register_forward_hook(lambda *_: seen.append("conv2"))
    small = compress(model).model
    assert small.training
    assert not small.norm.training
    assert small.conv2.training
    assert small.dropout.training
    seen.clear()
    small(X)
    assert seen == ["conv2"]
    assert handle.id in model.conv2._forward_hooks


def test_frozen_layers_stay_frozen():
    model = make_net()
    model.conv2.requires_grad_(False)
    small = compress(model, [lnn.LowRank(formats=MATRICES)]).model
    assert isinstance(small.conv2, lnn.CompressedLayer)
    assert not any(p.requires_grad for p in small.conv2.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(dtype):
    model = make_net().to(dtype).eval()
    small = lnn.compress_model(model, X.to(dtype), [lnn.LowRank(formats=MATRICES)], budget=lnn.Budget(bytes=0.6)).model
    assert {p.dtype for p in small.parameters()} == {dtype}
    assert small(X.to(dtype)).dtype == dtype


@pytest.fixture(scope="module")
def small():
    return compress(make_net()).model.eval()


def test_deepcopy_and_pickle(small):
    for twin in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        with torch.no_grad():
            assert torch.equal(twin(X), small(X))


def test_state_dict_with_weights_only(small):
    file = io.BytesIO()
    torch.save(small.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    twin = copy.deepcopy(small)
    with torch.no_grad():
        for tensor in (*twin.parameters(), *twin.buffers()):
            tensor.zero_()
    twin.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(twin(X), small(X))


def test_save_and_load(small, tmp_path):
    lnn.save(small, tmp_path / "net.lrnn")
    with torch.no_grad():
        assert torch.equal(lnn.load(tmp_path / "net.lrnn", Net()).eval()(X), small(X))


@pytest.mark.filterwarnings("ignore")  # torch's own deprecations
def test_export(small):
    with torch.no_grad():
        exported = torch.export.export(copy.deepcopy(small), (X,))
        torch.testing.assert_close(exported.module()(X), small(X))


def test_the_result_can_be_trained():
    small = compress(make_net(), [lnn.LowRank(formats=MATRICES), lnn.Prune(0.5)]).model.train()
    small(X).square().mean().backward()
    assert all(p.grad is not None for p in small.parameters() if p.requires_grad)


def test_speed_is_measured_on_request():
    report = compress(make_net(), [lnn.LowRank(formats=MATRICES)], measure_speed=True).report
    assert report.speedup > 0
    assert report.latency.threads == torch.get_num_threads()
    assert "speed-up delta" in str(report)
    assert compress(make_net(), [lnn.LowRank(formats=MATRICES)]).report.speedup is None


def test_compare_any_two_models():
    model = make_net()
    result = compress(model, [lnn.LowRank(formats=MATRICES), lnn.Quantize("int8")])
    report = lnn.pipeline.compare(model, result.model, X)
    assert report.rows == result.report.rows
    assert report.file_bytes == result.report.file_bytes
    assert report.left == {}


class Listed(nn.Module):
    """Calls its layers from a list that is no ``nn.ModuleList``."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(12, 24), nn.Linear(24, 24), nn.Linear(24, 4)
        self.steps = [("first", self.first), ("second", self.second), ("last", self.last)]

    def forward(self, x):
        for _, layer in self.steps:
            x = layer(torch.relu(x))
        return x


def test_layers_called_from_a_list_are_the_new_ones(tmp_path):
    model, x = seeded(Listed), torch.linspace(-1, 1, 48).reshape(4, 12)
    result = lnn.compress_model(model, x, lnn.Apply(lnn.SVDLinear, where="second", rank=4), progress=False)
    assert result.report.after == result.plan.after
    assert result.model.steps[1][1] is result.model.second
    assert model.steps[1][1] is model.second
    by_hand = lnn.SVDLinear.from_pretrained_layer(model.second, rank=4)
    expected = model.last(torch.relu(by_hand(torch.relu(model.first(torch.relu(x))))))
    assert result.model(x).equal(expected)
    lnn.save(result.model, tmp_path / "small.lrnn")
    assert lnn.load(tmp_path / "small.lrnn", Listed())(x).equal(expected)
