"""Every class that is fitted under metrics, of every kind, on drawn layers: what all their fits have to keep."""

import copy
import dataclasses
import inspect

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from lowrank_nn.errors import OptionError, RankError
from lowrank_nn.layers import LAYERS, LowRankLayer, SpatialSVDConv2d, SVDConv2d, TuckerConv2d, read_layer
from lowrank_nn.testing import run_check
from lowrank_nn.testing.checks_metric import check_fit_under_a_metric, check_lossless_under_a_metric
from tests.layers.geometries import dense_conv
from tests.layers.metrics import random_covariances, random_metric
from tests.layers.test_contract_hypothesis import CASES

CLASSES = {name: cls for name, cls in LAYERS.items() if issubclass(cls, LowRankLayer)}
FORMATS = {name: [*cls.formats, *([{"factors": 4}] if name == "CPConv2d" else [])] for name, cls in CLASSES.items()}
SLACK = {name: 1e-5 if name == "CPConv2d" else 1e-7 for name in CLASSES}
"""Shares of ``scale_of`` that count as nothing: the search for CP terms ends there, the closed forms have a ridge."""

FITTED = {
    name: cls for name, cls in LAYERS.items() if "metric" in inspect.signature(cls.from_pretrained_layer).parameters
}
"""Quantized layers too."""

every_class = pytest.mark.parametrize("cls", list(CLASSES.values()), ids=list(CLASSES))
every_fitted_class = pytest.mark.parametrize("cls", list(FITTED.values()), ids=list(FITTED))


@st.composite
def metrics(draw, layer):
    """A metric for ``layer``: full, singular or diagonal, with and without curvature and outputs."""
    groups = getattr(layer, "groups", 1)
    kind = draw(st.sampled_from(["full", "singular", "diagonal", "diagonal with outputs", "unseen channel"]))
    metric = random_metric(
        layer,
        draw(st.integers(0, 99)),
        diagonal=kind.startswith("diagonal"),
        curvature=draw(st.booleans()),
        rank=draw(st.integers(1, 4)) if kind == "singular" else None,
    )
    if kind == "diagonal with outputs":
        generator = torch.Generator().manual_seed(1)
        outputs = random_covariances(groups, layer.weight.shape[0] // groups, generator)
        metric = dataclasses.replace(metric, outputs=outputs)
    if kind == "unseen channel":
        taps = layer.weight[0, 0].numel()
        metric.covariance[:, :taps] = metric.covariance[:, :, :taps] = metric.mean[:, :taps] = 0
    return metric


def drawn_layer(cls, data):
    """A layer in float32 or float64, the options of a format of any rank, and a metric."""
    case = data.draw(CASES[cls.replaces])
    layer = dataclasses.replace(case, dtype=data.draw(st.sampled_from([torch.float32, torch.float64]))).layer()
    options = data.draw(st.sampled_from(FORMATS[cls.__name__]))
    limits = cls.rank_problem(read_layer(layer, cls), **options).limits
    ranks = tuple(data.draw(st.integers(1, min(limit, 12))) for limit in limits)
    return layer, {**options, "rank": cls.rank_argument(ranks, limits)}, data.draw(metrics(layer))


def fitted_to_the_weight(cls, layer, options):
    try:
        return cls.from_pretrained_layer(layer, **options)
    except RankError:  # of Tucker's ranks one bounds the other
        assume(False)


def seen_by(layer, metric):
    return metric if layer.bias is not None else metric.with_mean()


def scale_of(layer, metric):
    """The error of a change as large as the weight, in about the direction that the metric weighs most."""
    curvature = 1.0 if metric.curvature is None else float(metric.curvature.norm())
    return curvature * float(metric.covariance.abs().max()) * float(layer.weight.detach().square().sum())


@every_class
@given(data=st.data())
def test_never_worse_than_the_fit_without(cls, data):
    layer, options, metric = drawn_layer(cls, data)
    plain = fitted_to_the_weight(cls, layer, options)
    fitted = cls.from_pretrained_layer(layer, **options, metric=metric)
    assume(metric.outputs is None)  # fits go by the outputs seen, which ``error`` does not know
    seen = seen_by(layer, metric)
    before, after = (seen.error(layer.weight - new.dense_weight()) for new in (plain, fitted))
    assert after <= (1 + 1e-4) * before + SLACK[cls.__name__] * scale_of(layer, seen)


@every_class
@given(data=st.data())
def test_full_rank_is_exact(cls, data):
    layer, _, metric = drawn_layer(cls, data)
    fitted = cls.from_pretrained_layer(layer, **cls.lossless_options(layer), metric=metric).requires_grad_(False)
    layer.requires_grad_(False)
    tolerance = 1e-5 if layer.weight.dtype == torch.float32 else 1e-10
    assert float((layer.weight - fitted.dense_weight()).norm()) <= tolerance * float(layer.weight.norm())
    if layer.bias is not None:
        shift = metric.mean.norm() * layer.weight.norm().double()
        assert float((layer.bias - fitted.bias).norm()) <= tolerance * float(shift + layer.bias.norm())


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (TuckerConv2d, {"rank": (None, 4)}),
        (SVDConv2d, {"rank": 4, "order": "pointwise_first"}),
        (SpatialSVDConv2d, {"rank": 4}),
    ],
)
def test_as_many_channels_as_the_kernel_reads_are_exact(cls, options):
    """Of a wide input few combinations are read: the largest rank is below the number of channels."""
    layer = dense_conv(in_channels=2 * 7, out_channels=2 * 2, kernel_size=(1, 2), groups=2)
    fitted = cls.from_pretrained_layer(layer, **options, metric=random_metric(layer, rank=1))
    torch.testing.assert_close(fitted.weight, layer.weight, rtol=0, atol=1e-12)


@every_class
@given(data=st.data())
def test_a_refit_is_never_worse_than_the_factors_there_are(cls, data):
    layer, options, metric = drawn_layer(cls, data)
    fitted = fitted_to_the_weight(cls, layer, options)
    assume(metric.outputs is None)
    with torch.no_grad():
        layer.weight.add_(layer.weight.roll(1, 0), alpha=0.2)
    seen = seen_by(layer, metric)
    before = seen.error(layer.weight - fitted.dense_weight())
    fitted.refit_(layer.weight.detach(), seen)
    after = seen.error(layer.weight - fitted.dense_weight())
    assert after <= (1 + 1e-4) * before + SLACK[cls.__name__] * scale_of(layer, seen)


@every_class
@given(data=st.data())
def test_drawn_layers_keep_the_promises_under_the_metric_of_their_inputs(cls, data):
    case = data.draw(CASES[cls.replaces])
    for check in (check_fit_under_a_metric, check_lossless_under_a_metric):
        assert run_check(cls, case, check)


def usual_layer(cls):
    return torch.nn.Linear(12, 9) if cls.replaces is torch.nn.Linear else dense_conv(torch.float32, kernel_size=3)


@pytest.mark.parametrize("share", [1e-7, 1e-4])
@every_fitted_class
def test_a_covariance_that_rounding_made_indefinite(cls, share):
    """As when it was added up in float32, of fewer patches than a patch has entries."""
    layer = usual_layer(cls)
    metric = random_metric(layer, rank=3)
    noise = torch.randn(metric.covariance.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    metric.covariance.add_(noise + noise.mT, alpha=share * float(metric.covariance.diagonal(dim1=1, dim2=2).mean()))
    assert torch.linalg.eigvalsh(metric.covariance)[0, 0] < 0
    plain = cls.from_pretrained_layer(layer, **cls.usual_options(layer))
    fitted = cls.from_pretrained_layer(layer, **cls.usual_options(layer), metric=metric)
    before, after = (metric.error(layer.weight - new.dense_weight()) for new in (plain, fitted))
    assert after <= before


@pytest.mark.parametrize(
    ("cls", "options"), [(TuckerConv2d, {}), (SVDConv2d, {"order": "pointwise_first"}), (SpatialSVDConv2d, {})]
)
def test_a_table_under_a_covariance_that_is_none_is_refused(cls, options):
    layer = dense_conv(kernel_size=3)
    metric = random_metric(layer)
    metric.covariance.copy_(2 * torch.eye(36) - 1)
    problem = cls.rank_problem(read_layer(layer, cls), **options)
    with pytest.raises(OptionError, match=r"the covariance is not positive semidefinite\. Collect it again"):
        problem.table(metric)


@every_fitted_class
def test_a_fit_touches_nothing_and_draws_nothing(cls):
    layer = usual_layer(cls)
    metric = random_metric(layer)
    source, given_metric, drawn = copy.deepcopy(layer), copy.deepcopy(metric), torch.get_rng_state()
    first, second = (cls.from_pretrained_layer(layer, **cls.usual_options(layer), metric=metric) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), source.parameters(), strict=True))
    for field in ("covariance", "mean", "curvature"):
        assert torch.equal(getattr(metric, field), getattr(given_metric, field))
    assert all(parameter.requires_grad and parameter.grad is None for parameter in first.parameters())
