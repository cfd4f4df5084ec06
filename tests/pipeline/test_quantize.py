"""Quantize: what the report says of the kernels, and layers that stay because they are faster in floating point."""

import dataclasses
import functools

import pytest
import torch
from torch import nn

import lowrank_nn as lnn
from lowrank_nn.graph import record
from lowrank_nn.graph.derive import meta_copy
from lowrank_nn.graph.timing import Profile, time_in_place
from lowrank_nn.layers import _kernel as kernels
from lowrank_nn.layers._onednn import is_exact
from lowrank_nn.pipeline import fastest
from lowrank_nn.pipeline.state import State

needs_kernels = pytest.mark.skipif(not is_exact(255, 127), reason="no exact integer kernels on this machine")
STEP = lnn.Quantize("int8", activations="int8", keep_fastest=True)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.narrow, self.fc = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 8, 3), nn.Linear(8 * 16, 4)

    def forward(self, x):
        return self.fc(self.narrow(self.wide(x).relu()).relu().flatten(1))


@pytest.fixture
def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net().eval(), torch.randn(2, 3, 8, 8)


def slow(*prefixes, whole=(1.0, 1.0, 1.0)):
    """A timer by which quantized layers at these paths take three times as long, and others half as long.

    Whole models, in floating point, mixed and in integers, take ``whole``.
    """

    def timer(models, example_inputs):
        timed.append([sorted(paths) for _, paths in models])
        if len(models) == 3:
            return [Profile(time, {}) for time in whole]
        return [Profile(1.0, {path: [time_of(model, path)] for path in paths}) for model, paths in models]

    def time_of(model, path):
        if not any(isinstance(part, lnn.QuantConv2d | lnn.QuantLinear) for part in model.get_submodule(path).modules()):
            return 1.0
        return 3.0 if path.startswith(prefixes) else 0.5

    timed = []
    timer.timed = timed
    return timer


def reasons(report, path):
    return [text for text, paths in report.left.items() if path in paths]


def test_layers_slower_in_integers_stay_and_the_report_says_so(net, monkeypatch):
    model, x = net
    timer = slow("narrow")
    monkeypatch.setattr(fastest.slower_layers, "__kwdefaults__", {"timer": timer})
    report = lnn.plan(model, x, STEP, calibration=[x], progress=False)
    result = lnn.compress_model(model, x, STEP, calibration=[x], progress=False)
    assert [type(layer) for layer in result.model.children()] == [lnn.QuantConv2d, nn.Conv2d, lnn.QuantLinear]
    expected = "Quantize: slower in integers: 3.000 ms, in floating point 1.000 ms"
    assert reasons(report, "narrow") == reasons(result.report, "narrow") == [expected]
    assert timer.timed == 2 * [[["fc", "narrow", "wide"]] * 2, [[]] * 3]


def test_factorised_layers_are_judged_as_a_whole_and_timed_once(net, monkeypatch):
    model, x = net
    timer = slow("narrow")
    monkeypatch.setattr(fastest.slower_layers, "__kwdefaults__", {"timer": timer})
    recipe = [lnn.Apply(lnn.TuckerConv2d, rank=(4, 4)), STEP]
    result = lnn.compress_model(model, x, recipe, calibration=[x], progress=False)
    assert [type(part) for part in result.model.narrow.children()] == 3 * [nn.Conv2d]
    assert {type(part) for part in result.model.wide.children()} <= {lnn.QuantConv2d}
    assert len(timer.timed) == 2


@pytest.mark.parametrize(
    ("whole", "stay", "why"),
    [
        ((1.0, 0.9, 0.8), set(), ""),
        (
            (0.5, 0.9, 0.8),
            {"wide", "narrow", "fc"},
            "the whole model is slower in integers: 0.900 ms, in floating point",
        ),
        ((1.0, 0.8, 0.9), {"narrow"}, "slower in integers: 3.000 ms"),
    ],
)
def test_the_fastest_whole_is_kept(net, monkeypatch, whole, stay, why):
    model, x = net
    monkeypatch.setattr(fastest.slower_layers, "__kwdefaults__", {"timer": slow("narrow", whole=whole)})
    report = lnn.plan(model, x, STEP, calibration=[x], progress=False)
    notes = {path: reason for reason, paths in report.left.items() for path in paths}
    assert set(notes) == stay
    assert all(reason.startswith(f"Quantize: {why}") for reason in notes.values())


def test_stand_ins_are_timed_and_nothing_is_drawn_from_the_users_generator(net):
    model, x = net
    state = State(model, model, record(model, x), x, calibration=[x])
    before, after = torch.get_rng_state(), []

    def timer(models, example_inputs):
        with torch.no_grad():
            after.extend(kernels.kernel_for(m.wide, example_inputs) for m, _ in models[1:] if len(models) == 2)
        return [Profile(1.0, {path: [1.0] for path in paths}) for _, paths in models]

    dry = dataclasses.replace(state, model=meta_copy(model), dry=True)
    decisions = lnn.Quantize("int8", activations="int8").decide(dry)
    notes = fastest.slower_layers(dry, decisions, timer=timer)
    assert set(notes) == {"wide", "narrow", "fc"}  # as fast is not faster
    assert torch.equal(torch.get_rng_state(), before)
    if is_exact(255, 127):
        assert after[0] is not None


@needs_kernels
def test_the_timing_itself(net, monkeypatch):
    model, x = net
    timer = functools.partial(time_in_place, seconds=0.1)
    monkeypatch.setattr(fastest.slower_layers, "__kwdefaults__", {"timer": timer})
    result = lnn.compress_model(model, x, STEP, calibration=[x], progress=False)
    left = [path for reason, paths in result.report.left.items() for path in paths if "slower in integers" in reason]
    kept = [path for path, layer in result.model.named_children() if not isinstance(layer, lnn.QuantConv2d)]
    assert set(left) <= {"wide", "narrow", "fc"}
    assert set(left) - {"fc"} == set(kept) - {"fc"}


def test_it_needs_activations():
    with pytest.raises(lnn.OptionError, match="keep_fastest=True has no effect without activations"):
        lnn.Quantize("int8", keep_fastest=True)
    assert repr(STEP) == "Quantize('int8', activations='int8', scheme='symmetric', keep_fastest=True)"


def test_the_report_says_where_kernels_are_missing(net, monkeypatch):
    model, x = net
    monkeypatch.setattr(kernels, "is_exact", lambda *_: False)
    step = lnn.Quantize("int8", activations="int8")
    result = lnn.compress_model(model, x, step, calibration=[x], progress=False)
    reason = "Quantize: simulated in floating point: this machine has no exact integer kernels"
    assert result.report.remarks == {reason: ("wide", "narrow", "fc")}
    with torch.no_grad():
        assert torch.equal(result.model.wide(x), result.model.wide.simulate(x))
    double = lnn.compress_model(model.double(), x.double(), step, calibration=[x.double()], progress=False)
    reason = "Quantize: simulated in floating point: integer kernels are for layers in float32"
    assert list(double.report.remarks) == [reason]
    plain = lnn.compress_model(model.float(), x, lnn.Quantize("int8"), progress=False)
    assert not plain.report.remarks


class Deep(nn.Module):
    """Residual, with norms, and a factorised layer to be: what rounding on data has to cope with."""

    def __init__(self):
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.conv1, self.norm1 = nn.Conv2d(12, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.norm2 = nn.Conv2d(16, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.fc = nn.Linear(12, 5)

    def forward(self, x):
        x = torch.relu(self.stem_norm(self.stem(x)))
        y = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        return self.fc(torch.relu(x + y).mean((2, 3)))


def images(count, seed):
    noise = torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(seed))
    mix = torch.tensor([[1.0, 0.8, 0.6], [0.1, 0.5, 0.2], [0.0, 0.1, 0.2]])
    return nn.functional.avg_pool2d(torch.einsum("nchw,cd->ndhw", noise, mix), 3, 1, 1) + 0.3


BATCHES, TEST = images(240, 0).split(48), images(100, 1)


@pytest.fixture(scope="module")
def deep():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Deep()
        for norm in (model.stem_norm, model.norm1, model.norm2):
            norm.momentum = None
        with torch.no_grad():
            model.train()(images(256, 7))
    return model.eval()


@torch.no_grad()
def change(model, steps, calibration=BATCHES, **options):
    """The relative change of the centred outputs, and the result."""
    steps = [*steps, lnn.Quantize(**options)]
    result = lnn.compress_model(model, TEST[:1], steps, calibration=calibration, progress=False)
    expected = model(TEST) - model(TEST).mean(0)
    return float((result.model(TEST) - model(TEST)).square().sum() / expected.square().sum()), result


@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
@pytest.mark.parametrize("folded", [True, False])
def test_rounding_on_data_keeps_the_output_and_each_part_helps(deep, scheme, folded):
    steps = [lnn.FoldBatchNorm()] if folded else []
    nearest, alone, whole = (
        change(deep, steps, weights="int3", scheme=scheme, **options)[0]
        for options in ({"data_aware": False}, {"reconstruct": False}, {})
    )
    assert alone < 0.5 * nearest
    assert whole < alone


def test_with_eight_bits_or_without_data_weights_are_the_nearest(deep):
    plain = lnn.QuantConv2d.from_pretrained_layer(deep.conv1, bits=8)
    _, result = change(deep, [], weights="int8")
    assert torch.equal(result.model.conv1.weight_int, plain.weight_int)
    _, result = change(deep, [], weights="int8", data_aware=True)
    assert not torch.equal(result.model.conv1.weight_int, plain.weight_int)
    plain = lnn.QuantConv2d.from_pretrained_layer(deep.conv1, bits=4)
    _, result = change(deep, [], weights="int4", calibration=None)
    assert torch.equal(result.model.conv1.weight_int, plain.weight_int)


def test_rounding_on_data_needs_data(deep):
    with pytest.raises(lnn.CalibrationError, match="Quantize: data_aware needs calibration batches"):
        lnn.plan(deep, TEST[:1], lnn.Quantize("int4", data_aware=True), progress=False)


def test_pruned_layers_and_factors_are_rounded_on_data_too(deep):
    pruned, factorised = lnn.Prune(0.5, where="conv*"), lnn.Apply(lnn.TuckerConv2d, where="conv1", rank=(12, 10))
    for steps in ([lnn.FoldBatchNorm(), pruned], [factorised, lnn.FoldBatchNorm()]):
        start = lnn.compress_model(deep, TEST[:1], steps, progress=False).model
        nearest, _ = change(start, [], weights="int3", data_aware=False)
        on_data, result = change(start, [], weights="int3")
        assert on_data < 0.5 * nearest
        assert not result.report.remarks
        for path, layer in start.named_modules():
            if isinstance(layer, lnn.PrunedConv2d):
                assert (result.model.get_submodule(path).weight[layer.weight == 0] == 0).all()


def test_rounding_on_data_is_repeatable_and_leaves_the_model_alone(deep):
    before = {name: tensor.clone() for name, tensor in deep.state_dict().items()}
    first, second = (change(deep, [], weights="int4", activations="int8")[1].model for _ in range(2))
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])
    assert all(torch.equal(tensor, before[name]) for name, tensor in deep.state_dict().items())


ALL = [f"int{bits}" for bits in range(2, 9)]


def bits_of(model):
    kinds = (lnn.QuantConv2d, lnn.QuantLinear)
    return {path: layer.bits for path, layer in model.named_modules() if isinstance(layer, kinds)}


@pytest.mark.parametrize("calibration", [BATCHES, None])
def test_bits_are_shared_out_under_a_budget_of_bytes(deep, calibration):
    def compressed(weights, share):
        result = lnn.compress_model(
            deep,
            TEST[:1],
            [lnn.FoldBatchNorm(), lnn.Quantize(weights)],
            budget=lnn.Budget(bytes=share),
            calibration=calibration,
            progress=False,
        )
        with torch.no_grad():
            return float((result.model(TEST) - deep(TEST)).square().sum()), result

    uniform, even = compressed("int4", 1.0)
    share = even.report.after.bytes / even.report.before.bytes
    mixed, result = compressed(ALL, share)
    assert result.report.after.bytes <= even.report.after.bytes
    assert result.report.after.bytes == result.plan.after.bytes
    assert len(set(bits_of(result.model).values())) > 1
    if calibration is not None:
        assert mixed < 1.1 * uniform
    generous = compressed(["int4", "int8"], 1.0)[1]
    assert set(bits_of(generous.model).values()) == {8}
    rows = {row.path: row for row in result.report.rows}
    assert all(f"bits={bits}" in str(rows[path]) for path, bits in bits_of(result.model).items())


def test_bits_of_factors_and_after_low_rank_fit_the_whole_budget(deep):
    for first in (lnn.Apply(lnn.TuckerConv2d, where="conv1", rank=(8, 8)), lnn.LowRank(formats=[lnn.SVDConv2d])):
        result = lnn.compress_model(
            deep,
            TEST[:1],
            [first, lnn.FoldBatchNorm(), lnn.Quantize(ALL)],
            budget=lnn.Budget(bytes=0.11),
            calibration=BATCHES,
            progress=False,
        )
        assert 0.09 < result.report.after.bytes / result.report.before.bytes <= 0.11
        assert len(bits_of(result.model)) >= 4


def test_what_cannot_be_shared_out_is_refused(deep):
    step = lnn.Quantize(["int4", "int8"])
    assert repr(step) == "Quantize(['int4', 'int8'], scheme='symmetric')"
    with pytest.raises(lnn.PlanError, match=r"shared out under a budget of bytes\. Pass budget=Budget\(bytes"):
        lnn.plan(deep, TEST[:1], step)
    with pytest.raises(lnn.BudgetError, match=r"bytes=0\.05 cannot be met with 4 to 8 bits \(least possible 0\.[12]"):
        lnn.plan(deep, TEST[:1], step, budget=lnn.Budget(bytes=0.05))
    with pytest.raises(lnn.OptionError, match="must name at least one width"):
        lnn.Quantize([])
    with pytest.raises(lnn.OptionError, match="weights must be 'int2' to 'int8'"):
        lnn.Quantize(["int4", "int9"])
