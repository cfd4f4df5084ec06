"""The moments of input patches against numpy on every patch that F.unfold gives."""

import copy
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lowrank_nn.errors import CalibrationError, PlanError
from lowrank_nn.planning import collect_metrics
from lowrank_nn.planning.moments import RunningCovariance
from lowrank_nn.planning.patches import PatchSampler


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def seeded(build):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build().double()


def all_patches(layer, x):
    """Every input patch of a call, (groups, n, p), from F.unfold of the explicitly padded input."""
    if isinstance(layer, nn.Linear):
        return x.reshape(1, -1, x.shape[-1]).numpy()
    x = x if x.dim() == 4 else x[None]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    columns = F.unfold(x, layer.kernel_size, layer.dilation, 0, layer.stride)
    return columns.unflatten(1, (layer.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2).numpy()


def covariances(patches):
    return np.stack([np.atleast_2d(np.cov(group.T, bias=True)) for group in patches])


def ridged(matrices, share=1e-5):
    size = np.trace(matrices, axis1=1, axis2=2) / matrices.shape[1]
    return matrices + share * size[:, None, None] * np.eye(matrices.shape[1])


def check(metric, patches, rtol=1e-10):
    expected = ridged(covariances(patches))
    assert metric.covariance.dtype == metric.mean.dtype == torch.float64
    np.testing.assert_allclose(metric.covariance.numpy(), expected, rtol=rtol, atol=rtol * abs(expected).max())
    np.testing.assert_allclose(metric.mean.numpy(), patches.mean(1), rtol=rtol, atol=rtol * abs(patches).max())


CONVOLUTIONS = [
    {"kernel_size": 3},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 2)},
    {"kernel_size": 1, "stride": 2},
    {"kernel_size": (1, 3), "padding": "same"},
    {"kernel_size": 4, "padding": "same", "dilation": (1, 2)},
    {"kernel_size": 3, "padding": "valid", "dilation": (2, 1)},
    {"kernel_size": 3, "padding": 1, "groups": 2},
    {"kernel_size": (2, 3), "padding": 1, "groups": 4},
    {"kernel_size": 3, "padding": (2, 1), "padding_mode": "reflect"},
    {"kernel_size": (4, 2), "padding": "same", "padding_mode": "circular", "dilation": 2, "groups": 2},
    {"kernel_size": 3, "padding": 2, "padding_mode": "replicate", "stride": 3},
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_convolutions_of_every_geometry(options, batched):
    layer = seeded(lambda: nn.Conv2d(4, 8, **options))
    x = randn(6, 4, 7, 6) + torch.arange(4.0).view(4, 1, 1)
    patches = all_patches(layer, x)
    metric = collect_metrics(layer, x.split(4) if batched else list(x), [""])[""]
    check(metric, patches)
    assert metric.covariance.shape == (layer.groups, *[layer.weight[0].numel()] * 2)
    # In the order of the weight: the covariance of the outputs is that of W u.
    outputs = layer(x).detach().movedim(1, 0).reshape(layer.groups, 8 // layer.groups, -1).numpy()
    expected = np.stack([np.cov(group, bias=True).reshape(len(group), -1) for group in outputs])
    weight = layer.weight.detach().reshape(layer.groups, -1, layer.weight[0].numel()).numpy()
    seen = weight @ covariances(patches) @ weight.transpose(0, 2, 1)
    np.testing.assert_allclose(seen, expected, atol=1e-10)


@pytest.mark.parametrize("shape", [(5,), (7, 5), (4, 6, 5), (3, 2, 4, 5)])
def test_linear_layers_of_any_rank(shape):
    layer = seeded(lambda: nn.Linear(5, 3))
    x = randn(3, *shape) * 3 + 1
    check(collect_metrics(layer, list(x), [""], curvature=False)[""], all_patches(layer, x))


class Net(nn.Module):
    """A layer that is used twice, another under two names, a batch norm, dropout, one that is never called."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.again = nn.Conv2d(4, 4, 3, padding=1)
        self.drop = nn.Dropout()
        self.unused = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)
        self.alias = self.head

    def forward(self, x):
        x = self.again(F.relu(self.again(self.norm(self.conv(x)).relu()), inplace=True))
        return {"logits": self.head(input=self.drop(x.mean((2, 3)))), "labels": torch.arange(len(x))}


PATHS = ["conv", "again", "head", "alias", "unused"]


def calls(model, batches):
    """Inputs of every call of each layer, by forward hooks on a copy in eval mode."""
    model, seen = copy.deepcopy(model).eval(), {}
    for path, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, (nn.Conv2d, nn.Linear)):

            def hook(_, args, kwargs, path=path):
                seen.setdefault(path, []).append((*args, *kwargs.values())[0].detach())

            layer.register_forward_pre_hook(hook, with_kwargs=True)
    with torch.no_grad():
        for batch in batches:
            model(**batch) if isinstance(batch, dict) else model(batch)
    return {path: torch.cat(inputs) for path, inputs in seen.items()}


def test_reused_and_shared_layers_count_every_call():
    model, batches = seeded(Net), [randn(5, 3, 6, 6, seed=s) * (s + 1) for s in range(3)]
    metrics = collect_metrics(model, [{"x": batch} for batch in batches], PATHS)
    assert list(metrics) == ["conv", "again", "head", "alias"]  # the one that was never called is left out
    assert metrics["alias"] is metrics["head"]
    for path, inputs in calls(model, batches).items():
        check(metrics[path], all_patches(model.get_submodule(path), inputs))


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.positive, self.negative = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x):
        return self.positive(x) if x.mean() > 0 else self.negative(x)


def test_control_flow_that_depends_on_the_data():
    model, batches = seeded(Branches), [randn(4, 3, seed=s) + 3 * (-1) ** s for s in range(4)]
    metrics = collect_metrics(model, batches, ["positive", "negative"])
    check(metrics["positive"], all_patches(model.positive, torch.cat(batches[::2])))
    check(metrics["negative"], all_patches(model.negative, torch.cat(batches[1::2])))


def same(left, right, rtol, names=("covariance", "mean", "curvature")):
    assert left.keys() == right.keys()
    for path in left:
        for name in names:
            torch.testing.assert_close(getattr(left[path], name), getattr(right[path], name), rtol=rtol, atol=1e-12)


def large():
    """Maps of 21 x 21 and 10 x 10, so that positions are drawn."""
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3, stride=2), nn.Flatten(), nn.Linear(400, 20))


def test_moments_do_not_depend_on_how_the_data_come_in_batches(monkeypatch):
    model, x = seeded(large), randn(24, 3, 23, 23)
    paths = ["0", "2", "4"]
    whole = collect_metrics(model, x, paths)
    same(whole, collect_metrics(model, x.split(7), paths), rtol=1e-8, names=("covariance", "mean"))
    same(whole, collect_metrics(model, x.split(1), paths), rtol=1e-8, names=("covariance", "mean"))
    monkeypatch.setattr("lowrank_nn.planning.patches.CHUNK", 5000)
    same(whole, collect_metrics(model, x, paths), rtol=1e-8)


def test_results_repeat_bit_for_bit_and_depend_on_the_seed():
    model, x = seeded(large), randn(4, 3, 23, 23)
    first = collect_metrics(model, x, ["0", "2"])
    torch.manual_seed(17)
    same(first, collect_metrics(model, x, ["0", "2"]), rtol=0)
    other = collect_metrics(model, x, ["0", "2"], seed=1)
    assert not torch.equal(first["0"].covariance, other["0"].covariance)
    assert not torch.equal(first["2"].curvature, other["2"].curvature)
    # What is asked for besides plays no part.
    same({"2": first["2"]}, collect_metrics(model, x, ["2"]), rtol=0)


def test_max_batches_takes_no_more():
    pulled = []

    def endless():
        while True:
            pulled.append(1)
            yield randn(4, 3), None

    layer = seeded(lambda: nn.Linear(3, 2))
    metric = collect_metrics(layer, endless(), [""], max_batches=2)[""]
    check(metric, all_patches(layer, randn(4, 3)))
    assert len(pulled) == 2


@pytest.mark.parametrize(
    ("size", "count"), [(1, 1), (64, 64), (65, 64), (256, 64), (784, 98), (1024, 128), (9999, 128)]
)
def test_how_many_positions_are_drawn(size, count):
    sampler = PatchSampler(nn.Linear(1, 1), 0)
    x = torch.arange(float(size)).reshape(1, size, 1).repeat(200, 1, 1)
    (patches,) = sampler.draw(x)
    drawn = patches.inputs.reshape(200, count)
    assert patches.weight * count == pytest.approx(size)
    hits = torch.bincount(drawn.flatten().long(), minlength=size)
    # Each position is drawn with the same probability, here up to 5 standard deviations.
    expected = 200 * count / size
    assert (hits - expected).abs().max() <= 5 * expected**0.5 + 1
    assert hits.sum() == 200 * count
    if count < size:
        assert len(drawn.unique(dim=0)) > 100  # other ones in every image


def test_drawn_positions_estimate_the_moments_without_bias():
    layer = seeded(lambda: nn.Conv2d(2, 1, 3, padding=1))
    place = torch.linspace(0, 3, 30, dtype=torch.float64)
    x = randn(300, 2, 30, 30) * (1 + place) + place[:, None] * torch.tensor([1.0, -2.0]).view(2, 1, 1)
    metric = collect_metrics(layer, x.split(50), [""], curvature=False)[""]
    patches = all_patches(layer, x)
    expected = covariances(patches)[0]
    size = np.trace(expected) / len(expected)
    assert abs(metric.covariance[0].numpy() - expected).max() < 0.03 * size
    assert abs(metric.mean.numpy() - patches.mean(1)).max() < 0.03 * size**0.5


class TwoMaps(nn.Module):
    def __init__(self):
        super().__init__()
        self.shared = nn.Conv2d(1, 2, 1)

    def forward(self, x):
        large, small = x[:, 0, None, None, None].expand(-1, 1, 16, 16), x[:, 1, None, None, None].expand(-1, 1, 4, 4)
        return [self.shared(large), self.shared(small)]


def test_drawn_positions_stand_for_all_of_their_map():
    model, x = seeded(TwoMaps), randn(50, 2) + torch.tensor([0.0, 5.0])
    metric = collect_metrics(model, x.split(20), ["shared"])["shared"]
    every = np.concatenate([np.repeat(x[:, 0].numpy(), 256), np.repeat(x[:, 1].numpy(), 16)])
    check(metric, every.reshape(1, -1, 1))


def test_a_large_mean_cancels_nothing():
    layer = nn.Linear(4, 2)
    x = randn(3000, 4, dtype=torch.float32) + torch.tensor([0.0, 100.0, -3000.0, 1.0])
    x[:100] = 0  # a first batch that tells nothing about the rest
    metric = collect_metrics(layer, x[100:].split(100), [""], curvature=False)[""]
    check(metric, all_patches(layer, x[100:].double()), rtol=1e-6)
    metric = collect_metrics(layer, x.split(100), [""], curvature=False)[""]
    check(metric, all_patches(layer, x.double()), rtol=1e-6)


def test_running_covariance_weighs_its_pieces():
    running, x = RunningCovariance(), randn(2, 30, 7)
    for part, weight in zip(x.split((4, 1, 25), 1), (1, 3, 2), strict=True):
        running.add(part.clone(), weight)
    weights = np.repeat([1, 3, 2], [4, 1, 25])
    expected = np.stack([np.cov(group.T, bias=True, fweights=weights) for group in x.numpy()])
    np.testing.assert_allclose(running.covariance().numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(running.covariance().numpy(), expected, atol=1e-12)  # asking changes nothing
    np.testing.assert_allclose(running.mean().numpy(), np.average(x.numpy(), 1, weights), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_models_are_widened(dtype):
    model, x = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)).to(dtype), randn(40, 5).to(dtype)
    metrics = collect_metrics(model, x, ["0", "2"])
    check(metrics["0"], all_patches(model[0], x.double()), rtol=1e-5)
    hidden = model[:2](x).detach().double()
    check(metrics["2"], all_patches(model[2], hidden), rtol=1e-5)
    assert metrics["0"].curvature.dtype == torch.float64


def test_long_patches_keep_the_variances_and_the_covariance_of_the_outputs():
    model = seeded(lambda: nn.Conv2d(6, 4, 3, padding=1, groups=2))
    x = randn(9, 6, 5, 5) + 1
    metric = collect_metrics(model, x.split(4), [""], max_features=26)[""]
    patches = all_patches(model, x)
    expected = covariances(patches)
    variances = np.diagonal(expected, axis1=1, axis2=2)
    assert metric.is_diagonal
    np.testing.assert_allclose(metric.covariance.numpy(), variances + 1e-5 * variances.mean(1, keepdims=True))
    np.testing.assert_allclose(metric.mean.numpy(), patches.mean(1))
    outputs = model(x).detach().movedim(1, 0).reshape(2, 2, -1).transpose(1, 2).numpy()
    np.testing.assert_allclose(metric.outputs.numpy(), ridged(covariances(outputs)))
    assert metric.curvature.shape == (2, 2, 2)
    full = collect_metrics(model, x, [""], max_features=27)[""]
    assert not full.is_diagonal
    assert full.outputs is None


def test_the_outputs_of_large_maps_are_drawn_where_the_inputs_are():
    model = nn.Linear(3, 3, bias=False)
    nn.init.eye_(model.weight)
    metric = collect_metrics(model, randn(4, 500, 3, dtype=torch.float32), [""], max_features=2)[""]
    assert metric.outputs is None  # 3 outputs are more than 2
    wide = nn.Linear(4, 3, bias=False)
    with torch.no_grad():
        wide.weight.copy_(torch.eye(3, 4))
    metric = collect_metrics(wide, randn(4, 500, 4, dtype=torch.float32), [""], max_features=3)[""]
    torch.testing.assert_close(metric.outputs[0].diagonal(), metric.covariance[0, :3], rtol=1e-4, atol=0)


def test_dead_inputs_leave_an_invertible_metric():
    layer = seeded(lambda: nn.Conv2d(4, 8, 1, groups=4))
    x = randn(20, 4, 3, 3)
    x[:, 1], x[:, 2] = 0, 5
    metric = collect_metrics(layer, x, [""])[""]
    eigenvalues = torch.linalg.eigvalsh(metric.covariance)
    assert eigenvalues[[0, 3]].min() > 0.5
    assert eigenvalues[1:3].min() > 0
    assert eigenvalues[1:3].max() < 1e-9
    assert torch.linalg.eigvalsh(metric.curvature).min() > 0
    nothing = collect_metrics(layer, torch.zeros_like(x), [""])[""]
    assert torch.linalg.eigvalsh(nothing.covariance).min() > 0


def test_nested_and_empty_inputs():
    layer = nn.Linear(5, 3)
    parts = [randn(n, 5, seed=n, dtype=torch.float32) for n in (2, 7)]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged)
    metric = collect_metrics(layer, nested, [""])[""]
    check(metric, all_patches(layer, torch.cat(parts).double()), rtol=1e-5)
    assert collect_metrics(layer, torch.zeros(0, 5), [""]) == {}


def snapshot(model):
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        [(name, module.training, sorted(vars(module))) for name, module in model.named_modules()],
        [(name, p.requires_grad, p.grad) for name, p in model.named_parameters()],
        torch.get_rng_state(),
    )


def assert_as_before(model, before):
    after = snapshot(model)
    assert all(torch.equal(after[0][name], before[0][name]) for name in before[0])
    assert after[1] == before[1]
    for (_, flag, gradient), (_, old_flag, old_gradient) in zip(after[2], before[2], strict=True):
        assert flag == old_flag
        assert gradient is old_gradient
    assert torch.equal(after[3], before[3])
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()
    assert torch.backends.mha.get_fastpath_enabled()


class Interrupted(Net):
    """Stops as Ctrl-C does, on the first call or in the probe that follows it."""

    in_probe = False

    def forward(self, x):
        output = super().forward(x)
        if torch.is_grad_enabled() == self.in_probe:
            raise KeyboardInterrupt
        return output


@pytest.mark.parametrize("case", ["fine", "nan", "shape", "interrupt", "interrupted probe"])
def test_the_model_is_left_as_it_was_also_after_an_error(case):
    model = seeded(Interrupted if "interrupt" in case else Net).train()
    model.in_probe = "probe" in case
    model.head.eval()
    model.conv.weight.requires_grad_(False)
    model.again.weight.grad = kept = torch.ones_like(model.again.weight)
    model.norm.forward = own = model.norm.forward
    batch = {"nan": randn(2, 3, 6, 6) * float("nan"), "shape": randn(2, 5)}.get(case, randn(2, 3, 6, 6))
    expected = {"fine": (), "nan": CalibrationError, "shape": CalibrationError}.get(case, KeyboardInterrupt)
    before = snapshot(model)
    try:
        collect_metrics(model, [batch], PATHS)
    except expected:
        pass
    else:
        assert case == "fine"
    assert_as_before(model, before)
    assert model.norm.forward is own
    assert model.again.weight.grad is kept
    assert bool((kept == 1).all())


BAD_CALLS = [
    ([], PATHS, CalibrationError, "calibration: there are no batches"),
    ([randn(1, 3, 4, 4)], ["cnv"], PlanError, "calibration: no layer at 'cnv'. There are: conv, norm, again"),
    (
        [randn(1, 3, 4, 4)],
        ["norm"],
        PlanError,
        "norm: calibration: expected an nn.Conv2d or nn.Linear, got BatchNorm2d",
    ),
    (
        [randn(1, 3, 4, 4), randn(1, 3, 4, 4) / 0],
        PATHS,
        CalibrationError,
        "conv: calibration: there are NaN or infinite values",
    ),
    ([randn(1, 3, 4, 4), randn(1, 4)], PATHS, CalibrationError, "calibration: the forward failed on batch 2"),
]


@pytest.mark.parametrize(("batches", "paths", "error", "message"), BAD_CALLS)
def test_bad_calls_are_refused(batches, paths, error, message):
    with pytest.raises(error, match="^" + re.escape(message)):
        collect_metrics(seeded(Net), batches, paths)


def test_layers_inside_the_fused_encoder_are_seen():
    encoder, x = seeded(lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)).eval(), randn(6, 5, 8)
    metrics = collect_metrics(encoder, [x], ["linear1", "linear2", "self_attn.out_proj"])
    assert list(metrics) == ["linear1", "linear2"]  # torch reads the weight of the third, and never calls it
    inputs = calls(encoder, [x])
    check(metrics["linear1"], all_patches(encoder.linear1, inputs["linear1"]))


@pytest.mark.cuda
def test_cuda_gives_what_the_cpu_gives():
    model, x = seeded(large), randn(8, 3, 23, 23)
    on_cpu = collect_metrics(model, x.split(3), ["0", "2", "4"])
    on_cuda = collect_metrics(model.cuda(), x.cuda().split(3), ["0", "2", "4"])
    assert all(m.covariance.is_cuda and m.mean.is_cuda and m.curvature.is_cuda for m in on_cuda.values())
    moved = {
        path: type(metric)(metric.covariance.cpu(), metric.mean.cpu(), metric.curvature.cpu())
        for path, metric in on_cuda.items()
    }
    same(on_cpu, moved, rtol=1e-6)
