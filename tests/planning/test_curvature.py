"""The output curvature against Jacobians by brute force, with the probes that the network's output really got."""

import dataclasses
import logging

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lowrank_nn.planning import collect_metrics
from lowrank_nn.planning.moments import CURVATURE_IMAGES


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def seeded(build):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build().double()


class Spy(torch.autograd.Function):
    """The identity, which keeps the gradients that pass through it."""

    @staticmethod
    def forward(ctx, x, kept):
        ctx.kept = kept
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.kept.append(gradient.clone())
        return gradient, None


class Spied(nn.Module):
    """A network whose probes are kept, output by output."""

    def __init__(self, net):
        super().__init__()
        self.net, self.kept = net, {}

    def forward(self, x):
        output = self.net(x)
        if isinstance(output, torch.Tensor):
            return Spy.apply(output, self.kept.setdefault(0, []))
        return [Spy.apply(part, self.kept.setdefault(i, [])) for i, part in enumerate(output)]

    def probes(self):
        return [torch.cat(parts) for parts in self.kept.values()]


def jacobians(net, layer, x):
    """Derivative of the flattened outputs for one image in the outputs of every call of a layer, one after another."""
    forward, shapes, shifts = layer.forward, [], []

    def shifted(*args):
        y = forward(*args)
        shapes.append(y.shape)
        return y + shifts[len(shapes) - 1] if shifts else y

    def outputs(*values):
        shifts[:], shapes[:] = values, []
        found = net(x[None])
        return torch.cat([part.flatten() for part in ([found] if isinstance(found, torch.Tensor) else found)])

    layer.forward = shifted
    try:
        with torch.no_grad():
            net(x[None])
        zeros = tuple(torch.zeros(shape, dtype=x.dtype) for shape in shapes)
        return torch.autograd.functional.jacobian(outputs, zeros)
    finally:
        del layer.forward


def by_position(layer, jacobian):
    """Bring the Jacobian of one call into the shape (outputs, groups, o, positions)."""
    if isinstance(layer, nn.Linear):
        return jacobian.flatten(1, -2).movedim(1, -1)[:, None]
    return jacobian[:, 0].unflatten(1, (layer.groups, -1)).flatten(3)


def ridged(matrices, share=1e-4):
    size = np.trace(matrices, axis1=1, axis2=2) / matrices.shape[1]
    return matrices + share * size[:, None, None] * np.eye(matrices.shape[1])


def brute_force(net, layer, x, probes):
    total = 0
    for index, image in enumerate(x):
        v = torch.cat([probe[index].flatten() for probe in probes])
        for jacobian in jacobians(net, layer, image):
            g = torch.einsum("k,kgop->gop", v, by_position(layer, jacobian))
            total = total + torch.einsum("gop,gqp->goq", g, g)
    return ridged((total / len(x)).numpy())


class Reused(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.conv, self.head = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 3)

    def forward(self, x):
        x = self.conv(self.conv(self.first(x)).relu()).relu()
        return self.head(x.mean((2, 3)))


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(2, 3, 1)
        self.norm, self.drop = nn.BatchNorm2d(3), nn.Dropout(0.5)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x):
        y = self.left(x)
        y += nn.functional.relu(self.right(x), inplace=True)
        return self.drop(self.norm(y.relu_())).flatten(1)


class Tokens(nn.Module):
    """Linear layers with extra dims, and outputs of several shapes."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer, self.pooled = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 5)

    def forward(self, x):
        hidden = self.inner(x).tanh()
        return [self.outer(hidden), self.pooled(hidden.mean(1))]


NETS = {
    "linear": (lambda: nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)), (5,)),
    "relu": (lambda: nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), (5,)),
    "one output": (lambda: nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 1)), (5,)),
    "conv": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2),
            nn.ReLU(),
            nn.Conv2d(4, 6, 2, groups=2),
            nn.ReLU(inplace=True),
            nn.Flatten(),
            nn.Linear(24, 3),
        ),
        (2, 7, 7),
    ),
    "dense prediction": (lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 1)), (2, 5, 5)),
    "reused": (Reused, (2, 4, 4)),
    "in place": (InPlace, (2, 3, 3)),
    "tokens": (Tokens, (4, 3)),
}


@pytest.mark.parametrize("name", NETS)
def test_curvature_is_that_of_the_jacobians(name):
    build, shape = NETS[name]
    net, x = seeded(build), randn(9, *shape, seed=3)
    model = Spied(net).train()
    layers = {path: m for path, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    metrics = collect_metrics(model, x.split(4), layers)
    probes = model.probes()
    assert all(len(probe) == 9 for probe in probes)
    net.eval()
    for path, layer in layers.items():
        expected = brute_force(net, layer, x, probes)
        np.testing.assert_allclose(metrics[path].curvature.numpy(), expected, rtol=1e-9, atol=1e-12)


def test_probes_are_standard_normal_and_without_mean_for_logits_alone():
    x = randn(20000, 3, dtype=torch.float32)
    logits = Spied(nn.Linear(3, 4))
    collect_metrics(logits, x, ["net"])
    (v,) = logits.probes()
    np.testing.assert_allclose(v.mean(1), 0, atol=1e-6)
    np.testing.assert_allclose(np.cov(v.T), np.eye(4) - 0.25, atol=0.05)
    tokens = Spied(nn.Linear(3, 4))
    collect_metrics(tokens, x.reshape(5000, 4, 3), ["net"])
    (v,) = tokens.probes()
    np.testing.assert_allclose(np.cov(v.reshape(5000, 16).T), np.eye(16), atol=0.1)
    single = Spied(nn.Linear(3, 1))
    collect_metrics(single, x, ["net"])
    np.testing.assert_allclose(single.probes()[0].var(), 1, atol=0.05)


def projection(size):
    return np.eye(size) - 1 / size


def test_the_error_is_the_expected_squared_change_of_a_linear_network():
    model, x = seeded(lambda: nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))), randn(20000, 6) @ randn(6, 6, seed=1)
    metrics = collect_metrics(model, x, ["0", "1"])
    J = model[1].weight.detach().numpy()
    np.testing.assert_allclose(metrics["0"].curvature[0].numpy(), J.T @ projection(4) @ J, atol=0.05)
    np.testing.assert_allclose(metrics["1"].curvature[0].numpy(), projection(4), atol=0.05)
    centred = x - x.mean(0)
    for seed in range(3):
        change = randn(5, 6, seed=seed)
        after = (centred @ change.T).numpy() @ J.T @ projection(4)
        assert metrics["0"].error(change) == pytest.approx((after**2).sum(1).mean(), rel=0.04)
        change = randn(4, 5, seed=seed)
        after = ((centred @ model[0].weight.T) @ change.T).detach().numpy() @ projection(4)
        assert metrics["1"].error(change) == pytest.approx((after**2).sum(1).mean(), rel=0.04)


def test_the_error_adds_up_over_uncorrelated_positions():
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4 * 9, 5)))
    x = randn(8000, 3, 3, 3)  # patches of a 1 x 1 convolution, independent from position to position
    metric = collect_metrics(model, x, ["0"])["0"]
    change = randn(4, 3, 1, 1, seed=1)
    with torch.no_grad():
        after = model[2](nn.functional.conv2d(x, change).flatten(1)) - model[2].bias
    after = after - after.mean(0) - (after - after.mean(0)).mean(1, keepdim=True)
    assert metric.error(change) == pytest.approx(float(after.square().sum(1).mean()), rel=0.06)


def test_outputs_in_any_container():
    @dataclasses.dataclass
    class Output:
        logits: torch.Tensor
        rest: dict

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = seeded(NETS["relu"][0])

        def forward(self, x):
            z = self.net(x)
            return Output(z, {"same": z, "classes": z.argmax(1), "name": "net", "count": len(x)})

    model, x = Wrapped(), randn(12, 5)
    expected = collect_metrics(model.net, x, ["0"])["0"].curvature
    assert torch.equal(collect_metrics(model, x, ["net.0"])["net.0"].curvature, expected)


def test_only_the_first_images_are_probed():
    model = Spied(nn.Linear(3, 2))
    collect_metrics(model, randn(20 * 80, 3, dtype=torch.float32).split(80), ["net"])
    assert len(model.probes()[0]) == -(-CURVATURE_IMAGES // 80) * 80


class Stopped(nn.Module):
    """Gradients end between two layers."""

    def __init__(self, stop):
        super().__init__()
        self.first, self.last, self.stop = nn.Linear(4, 4), nn.Linear(4, 3), stop

    def forward(self, x):
        return self.last(self.stop(self.first(x)))


class Underived(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise NotImplementedError("no derivative")


@torch.no_grad()
def without_grad(x):
    return x * 2


STOPS = {
    "detach": torch.detach,
    "no_grad": without_grad,
    "rounded to integers": lambda x: x.int().double(),
    "no derivative": Underived.apply,
}


@pytest.mark.parametrize("name", STOPS)
def test_layers_that_no_gradient_reaches_have_no_curvature(name, caplog):
    model, x = seeded(lambda: Stopped(STOPS[name])), randn(10, 4)
    with caplog.at_level(logging.INFO, "lowrank_nn"):
        metrics = collect_metrics(model, x.split(4), ["first", "last"])
    assert metrics["first"].curvature is None
    alone = collect_metrics(seeded(lambda: Stopped(lambda x: x)), x, ["last"])["last"]
    torch.testing.assert_close(metrics["last"].curvature, alone.curvature)
    message = "no curvature of first: a change of their own outputs counts as it is"
    assert [r.levelname for r in caplog.records if message in r.getMessage()] == ["INFO"]
    assert ("no derivative" in caplog.text) == (name == "no derivative")


class Outside(nn.Module):
    """Cannot run with gradients at all, or gives nothing that has one."""

    def __init__(self, how):
        super().__init__()
        self.layer, self.how = nn.Linear(4, 3), how

    def forward(self, x):
        return self.how(self.layer(x))


NO_GRADIENTS = {
    "numpy": lambda y: torch.from_numpy(y.numpy().copy()),
    "classes": lambda y: y.argmax(1),
    "nothing": lambda y: None,
    "detached": lambda y: y.detach(),
    "nan": lambda y: y * (y * 0).sqrt(),  # derivative 0 * inf
}


@pytest.mark.parametrize("name", NO_GRADIENTS)
def test_models_without_gradients_have_their_moments_all_the_same(name):
    model, x = seeded(lambda: Outside(NO_GRADIENTS[name])), randn(10, 4)
    metric = collect_metrics(model, x, ["layer"])["layer"]
    assert metric.curvature is None
    expected = collect_metrics(model.layer, x, [""], curvature=False)[""]
    assert torch.equal(metric.covariance, expected.covariance)


def test_inference_mode_in_the_model_and_around_the_call():
    class Inference(Outside):
        @torch.inference_mode()
        def forward(self, x):
            return super().forward(x)

    x = randn(10, 4)
    expected = collect_metrics(seeded(lambda: Outside(torch.sin)), x, ["layer"])["layer"].covariance
    inside = collect_metrics(seeded(lambda: Inference(torch.sin)), x.split(4), ["layer"])["layer"]
    assert inside.curvature is None
    assert not inside.covariance.is_inference()
    torch.testing.assert_close(inside.covariance, expected)
    with torch.inference_mode():
        around = collect_metrics(seeded(lambda: Outside(torch.sin)), x, ["layer"])["layer"]
    assert torch.equal(around.covariance, expected)


def test_frozen_parameters_and_inputs_with_gradients_make_no_difference():
    model, x = seeded(Reused), randn(10, 2, 4, 4)
    expected = collect_metrics(model, x, ["first", "conv", "head"])
    model.conv.requires_grad_(False)
    model.first.bias.requires_grad_(False)
    watched = x.clone().requires_grad_()
    for batch in (x, watched, watched * 1):
        found = collect_metrics(model, batch, ["first", "conv", "head"])
        for path, metric in expected.items():
            assert torch.equal(found[path].curvature, metric.curvature)
            assert not found[path].covariance.requires_grad
            assert not found[path].curvature.requires_grad
    assert watched.grad is None


def test_checkpointed_models():
    class Checkpointed(Reused):
        def forward(self, x):
            x = checkpoint(lambda x: self.conv(self.conv(x).relu()).relu(), self.first(x), use_reentrant=False)
            return self.head(x.mean((2, 3)))

    x = randn(6, 2, 4, 4)
    plain = collect_metrics(seeded(Reused), x, ["first", "conv"])
    again = collect_metrics(seeded(Checkpointed), x, ["first", "conv"])
    for path in plain:
        torch.testing.assert_close(again[path].curvature, plain[path].curvature)
        torch.testing.assert_close(again[path].covariance, plain[path].covariance)


def test_a_batch_without_a_batch_dim_counts_as_one_image():
    model = seeded(lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(-3), nn.Linear(100, 3)))
    one, x = Spied(model), randn(6, 2, 7, 7)
    metric = collect_metrics(one, list(x), ["net.0"])["net.0"]
    (v,) = one.probes()
    g = 0
    for image, direction in zip(x, v.split(3), strict=True):
        y = model[0](image).detach().requires_grad_()
        (gradient,) = torch.autograd.grad(model[1:](y), y, direction)
        g = g + gradient.flatten(1) @ gradient.flatten(1).T
    np.testing.assert_allclose(metric.curvature.numpy(), ridged(g[None].numpy() / 6), rtol=1e-9, atol=1e-12)


def test_a_layer_with_too_many_outputs_has_no_curvature():
    model, x = seeded(lambda: nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4))), randn(10, 3)
    metrics = collect_metrics(model, x, ["0", "2"], max_features=7)
    assert metrics["0"].curvature is None
    assert metrics["2"].curvature.shape == (1, 4, 4)
    assert metrics["2"].is_diagonal
    assert metrics["2"].outputs.shape == (1, 4, 4)


def test_without_curvature_no_gradient_is_computed():
    model = Spied(seeded(NETS["relu"][0]))
    metrics = collect_metrics(model, randn(5, 5), ["net.0"], curvature=False)
    assert metrics["net.0"].curvature is None
    assert model.kept == {0: []}


def test_narrow_models():
    model, x = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)), randn(400, 5, dtype=torch.float32)
    wide = collect_metrics(model, x, ["0"])["0"].curvature
    narrow = collect_metrics(model.bfloat16(), x.bfloat16(), ["0"])["0"].curvature
    assert narrow.dtype == torch.float64
    torch.testing.assert_close(narrow, wide, rtol=0.05, atol=0.05 * float(wide.max()))
