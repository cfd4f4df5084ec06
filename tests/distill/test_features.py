"""Feature distances against numpy."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lowrank_nn.distill import HintRegressor, attention_loss, guidance_loss
from lowrank_nn.errors import OptionError


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 5), (2, 4, 5, 6), (7,)])
def test_guidance_is_half_the_squared_distance_per_sample(shape):
    u, r = randn(*shape), randn(*shape, seed=1)
    expected = np.mean([0.5 * np.linalg.norm((a - b).numpy().ravel()) ** 2 for a, b in zip(u, r, strict=True)])
    np.testing.assert_allclose(guidance_loss(u, r).numpy(), expected)


def test_guidance_gradient_is_the_difference():
    u, r = randn(4, 3).requires_grad_(), randn(4, 3, seed=1).requires_grad_()
    guidance_loss(u, r).backward()
    torch.testing.assert_close(u.grad, (u - r).detach() / 4)
    assert r.grad is None


def numpy_attention(u, r):
    def unit(a):
        q = (a.numpy() ** 2).sum(axis=1).reshape(len(a), -1)
        return q / np.linalg.norm(q, axis=1, keepdims=True)

    return 0.5 * ((unit(u) - unit(r)) ** 2).sum(axis=1).mean()


@pytest.mark.parametrize("size", [(5,), (5, 6), (3, 4, 2)])
def test_attention_with_other_widths(size):
    u, r = randn(3, 4, *size), randn(3, 7, *size, seed=1)
    np.testing.assert_allclose(attention_loss(u, r, channel_dim=1).numpy(), numpy_attention(u, r))


def test_attention_does_not_see_scale_and_gives_the_teacher_no_gradient():
    u, r = randn(3, 4, 5, 5).requires_grad_(), randn(3, 4, 5, 5, seed=1).requires_grad_()
    loss = attention_loss(u, 100 * r)
    torch.testing.assert_close(loss, attention_loss(u, r))
    loss.backward()
    assert r.grad is None
    assert u.grad.abs().sum() > 0
    assert attention_loss(3 * r, r).item() < 1e-25


@pytest.mark.parametrize(("student_size", "teacher_size"), [((8, 8), (4, 4)), ((4, 4), (8, 8)), ((4, 8), (8, 4))])
def test_attention_pools_to_the_smaller_map(student_size, teacher_size):
    u, r = randn(2, 3, *student_size), randn(2, 5, *teacher_size, seed=1)

    def pooled(a):
        q = a.square().sum(1)
        for dim in (1, 2):
            if q.shape[dim] == 8:
                q = q.unflatten(dim, (4, 2)).mean(dim + 1)
        return F.normalize(q.flatten(1))

    expected = 0.5 * (pooled(u) - pooled(r)).square().sum(1).mean()
    torch.testing.assert_close(attention_loss(u, r), expected)


def test_attention_of_tokens_has_the_channels_last():
    u, r = randn(2, 9, 4), randn(2, 9, 6, seed=1)
    torch.testing.assert_close(attention_loss(u, r), attention_loss(u.mT, r.mT, channel_dim=1))
    images = randn(2, 3, 4, 5), randn(2, 3, 4, 7, seed=1)
    np.testing.assert_allclose(
        attention_loss(*images, channel_dim=-1).numpy(), numpy_attention(*(a.movedim(-1, 1) for a in images))
    )


def test_dead_maps_and_empty_batches_give_finite_losses_and_gradients():
    u = torch.zeros(2, 3, 4, 4, requires_grad=True)
    loss = attention_loss(u, torch.zeros(2, 3, 4, 4))
    loss.backward()
    assert loss.item() == 0
    assert torch.isfinite(u.grad).all()
    empty = torch.zeros(0, 3, 4, 4)
    assert attention_loss(empty, empty).item() == guidance_loss(empty, empty).item() == 0


@pytest.mark.parametrize("loss", [guidance_loss, attention_loss])
def test_half_precision_is_widened(loss):
    u, r = (300 * randn(2, 8, 16, 16)).half(), (300 * randn(2, 8, 16, 16, seed=1)).half()
    value = loss(u, r)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(u.float(), r.float()))


@pytest.mark.parametrize("dims", [2, 3, 4, 5])
def test_regressor_is_a_1x1_convolution(dims):
    regressor = HintRegressor(3, 5, dtype=torch.float64)
    shape = (2, 3, *[4, 6, 2][: dims - 2]) if dims >= 4 else (2, *[4][: dims - 2], 3)
    x = randn(*shape)
    if dims >= 4:
        conv = {4: F.conv2d, 5: F.conv3d}[dims]
        expected = conv(x, regressor.weight[(...,) + (None,) * (dims - 2)], regressor.bias)
    else:
        expected = F.linear(x, regressor.weight, regressor.bias)
    torch.testing.assert_close(regressor(x), expected)


def test_regressor_of_a_sequence_with_channels_first():
    regressor, x = HintRegressor(3, 5, channel_dim=1, dtype=torch.float64), randn(2, 3, 7)
    torch.testing.assert_close(regressor(x), F.conv1d(x, regressor.weight[..., None], regressor.bias))


def test_regressor_draws_the_same_and_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    one, two = HintRegressor(3, 5), HintRegressor(3, 5)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one.weight, two.weight)
    assert one.weight.std() > 0.1


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: guidance_loss(randn(2, 3), randn(2, 4)), r"same shape, got \(2, 3\) and \(2, 4\)"),
        (lambda: attention_loss(randn(2, 3), randn(2, 3)), "three or more"),
        (lambda: attention_loss(randn(2, 3, 4), randn(3, 3, 4)), "same batch size"),
        (lambda: attention_loss(randn(2, 3, 4, 4), randn(2, 3, 4)), "same number of dimensions"),
        (lambda: attention_loss(randn(2, 3, 4), randn(2, 3, 4), channel_dim=0), "after the batch's"),
        (lambda: attention_loss(randn(2, 3, 4), randn(2, 3, 4), channel_dim=3), "channel_dim .* got 3"),
        (lambda: attention_loss(randn(1, 1, 2, 2, 2, 2), randn(1, 1, 2, 2, 2, 3)), "equal sizes"),
        (lambda: HintRegressor(3, 5)(randn(2, 4)), r"expects 3 channels .* \(2, 4\)"),
    ],
)
def test_errors(call, words):
    with pytest.raises(OptionError, match=words):
        call()
