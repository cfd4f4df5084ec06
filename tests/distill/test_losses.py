"""The logit loss against formulas written out in numpy and against torch's own losses."""

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_nn.distill import distill_loss
from lowrank_nn.errors import OptionError


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def log_softmax(z):
    z = z - z.max(axis=1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=1, keepdims=True))


def hinton(student, teacher, targets, temperature, alpha):
    """Numpy, classes in dimension 1, class indices, nothing ignored; one loss per position."""
    student, teacher = student.numpy(), teacher.numpy()
    log_s, log_t = log_softmax(student / temperature), log_softmax(teacher / temperature)
    kl = (np.exp(log_t) * (log_t - log_s)).sum(axis=1)
    ce = -np.take_along_axis(log_softmax(student), np.expand_dims(targets.numpy(), 1), axis=1).squeeze(1)
    return alpha * temperature**2 * kl + (1 - alpha) * ce


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    classes=st.integers(2, 7),
    temperature=st.floats(0.5, 20),
    alpha=st.floats(0, 1),
    ignored=st.booleans(),
    seed=st.integers(0, 100),
)
def test_matches_numpy_for_any_shape(shape, classes, temperature, alpha, ignored, seed):
    n, *rest = shape
    student, teacher = randn(n, classes, *rest, seed=seed), 3 * randn(n, classes, *rest, seed=seed + 1)
    targets = torch.randint(classes, (n, *rest), generator=torch.Generator().manual_seed(seed))
    per_position = hinton(student, teacher, targets, temperature, alpha)
    keep = np.ones(per_position.shape, dtype=bool)
    if ignored:
        keep = np.random.default_rng(seed).random(per_position.shape) < 0.5
        targets[torch.from_numpy(~keep)] = 255
    options = {"temperature": temperature, "alpha": alpha, "ignore_index": 255}
    each = np.where(keep, per_position, 0.0)
    total = each.sum()
    np.testing.assert_allclose(
        distill_loss(student, teacher, targets, **options).numpy(), total / max(1, keep.sum()), rtol=1e-9, atol=1e-12
    )
    np.testing.assert_allclose(
        distill_loss(student, teacher, targets, reduction="sum", **options).numpy(), total, rtol=1e-9, atol=1e-12
    )
    np.testing.assert_allclose(
        distill_loss(student, teacher, targets, reduction="none", **options).numpy(), each, rtol=1e-9, atol=1e-12
    )


def test_defaults_match_torch_losses():
    student, teacher, targets = randn(8, 10), randn(8, 10, seed=1), torch.arange(8)
    kl = F.kl_div(F.log_softmax(student / 4, 1), F.softmax(teacher / 4, 1), reduction="batchmean")
    expected = 0.9 * 16 * kl + 0.1 * F.cross_entropy(student, targets)
    torch.testing.assert_close(distill_loss(student, teacher, targets), expected)


def test_without_targets_is_the_divergence_alone():
    student, teacher = randn(8, 10), randn(8, 10, seed=1)
    kl = F.kl_div(F.log_softmax(student / 2, 1), F.softmax(teacher / 2, 1), reduction="batchmean")
    torch.testing.assert_close(distill_loss(student, teacher, temperature=2.0, alpha=0.3), 4 * kl)


def test_alpha_zero_is_cross_entropy():
    student, targets = randn(3, 5, 4, 4), torch.randint(5, (3, 4, 4), generator=torch.Generator().manual_seed(0))
    targets[:, 0] = -100
    loss = distill_loss(student, randn(3, 5, 4, 4, seed=1), targets, alpha=0.0)
    torch.testing.assert_close(loss, F.cross_entropy(student, targets))


def test_probability_targets():
    student, teacher, targets = randn(4, 5, 3), randn(4, 5, 3, seed=1), randn(4, 5, 3, seed=2).softmax(1)
    torch.testing.assert_close(distill_loss(student, teacher, targets, alpha=0.0), F.cross_entropy(student, targets))
    assert distill_loss(student, teacher, targets.float(), alpha=0.5).dtype == torch.float64


@pytest.mark.parametrize("kind", ["indices", "probabilities", "none"])
def test_unbatched_equals_a_batch_of_one(kind):
    student, teacher = randn(5), randn(5, seed=1)
    targets = {"indices": torch.tensor(3), "probabilities": randn(5, seed=2).softmax(0), "none": None}[kind]
    batched = None if targets is None else targets[None]
    for reduction in ("mean", "sum"):
        torch.testing.assert_close(
            distill_loss(student, teacher, targets, reduction=reduction),
            distill_loss(student[None], teacher[None], batched, reduction=reduction),
        )
    assert distill_loss(student, teacher, targets, reduction="none").shape == ()


@pytest.mark.parametrize("class_dim", [0, 1, 2, -1, -3])
@pytest.mark.parametrize("probabilities", [False, True])
def test_class_dim(class_dim, probabilities):
    student, teacher = randn(3, 5, 4), randn(3, 5, 4, seed=1)
    targets = randn(3, 5, 4, seed=2).softmax(1) if probabilities else torch.tensor([[0, 1, 2, 3]] * 3)
    target_moved = targets.movedim(1, class_dim) if probabilities else targets
    expected = distill_loss(student, teacher, targets, reduction="none")
    if class_dim == 0 and not probabilities:
        student, teacher = student.movedim(1, 0), teacher.movedim(1, 0)
    else:
        student, teacher = student.movedim(1, class_dim), teacher.movedim(1, class_dim)
    torch.testing.assert_close(
        distill_loss(student, teacher, target_moved, class_dim=class_dim, reduction="none"), expected
    )


def test_only_the_student_gets_gradients():
    student, teacher = randn(4, 5).requires_grad_(), randn(4, 5, seed=1).requires_grad_()
    targets = torch.tensor([0, 1, 2, -100])
    distill_loss(student, teacher, targets).backward()
    assert teacher.grad is None
    assert student.grad[:3].abs().min() > 0
    assert student.grad[3].abs().max() == 0


def test_gradient_is_right():
    teacher, targets = randn(2, 3, 2, seed=1), torch.tensor([[0, -100], [2, 1]])
    student = randn(2, 3, 2).requires_grad_()
    torch.autograd.gradcheck(lambda z: distill_loss(z, teacher, targets, alpha=0.6, temperature=3.0), student)


def test_temperature_leaves_the_gradient_its_size():
    """For large T the gradient tends to that of half the squared distance of the centred logits, over C."""
    student, teacher = randn(1, 6).requires_grad_(), randn(1, 6, seed=1)
    distill_loss(student, teacher, temperature=1e4).backward()
    difference = student.detach() - teacher
    torch.testing.assert_close(student.grad, (difference - difference.mean()) / 6, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(3, 4), (2, 4, 3, 3), (0, 4)])
def test_nothing_kept_gives_zero_with_a_graph(shape):
    student = randn(*shape).requires_grad_()
    targets = torch.full((shape[0], *shape[2:]), -100)
    loss = distill_loss(student, randn(*shape, seed=1), targets)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(student.grad, torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    student, teacher = ((50 * randn(4, 9, seed=s)).to(dtype) for s in (0, 1))
    targets = torch.arange(4)
    loss = distill_loss(student, teacher, targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, distill_loss(student.float(), teacher.float(), targets))
    assert distill_loss(student, teacher.double()).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_small_integer_targets(dtype):
    student, teacher, targets = randn(4, 9), randn(4, 9, seed=1), torch.arange(4)
    assert torch.equal(distill_loss(student, teacher, targets.to(dtype)), distill_loss(student, teacher, targets))


def test_equal_logits_have_no_divergence():
    logits = 1e4 * randn(5, 7)
    assert distill_loss(logits, logits).item() == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"alpha": 1.5}, r"alpha must be from 0 .* got 1\.5"),
        ({"alpha": float("nan")}, "alpha"),
        ({"temperature": 0.0}, r"temperature must be .* above 0, got 0\.0"),
        ({"temperature": float("inf")}, "temperature"),
        ({"reduction": "average"}, r"reduction must be one of \('mean', 'sum', 'none'\), got 'average'"),
        ({"class_dim": 2}, r"class_dim must be a dimension .* \(4, 5\), got 2"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(OptionError, match=words):
        distill_loss(randn(4, 5), randn(4, 5), **options)


@pytest.mark.parametrize(
    ("student", "teacher", "targets", "words"),
    [
        (randn(4, 5), randn(4, 6), None, r"same shape.*\(4, 5\) and \(4, 6\)"),
        (randn(1)[0], randn(1)[0], None, "one dimension or more"),
        (torch.ones(4, 5, dtype=torch.int64), randn(4, 5), None, "student_logits must be floating-point"),
        (randn(4, 1, 6), randn(4, 1, 6), None, r"one class in dimension 1 .* \(4, 1, 6\).*FineTune\(loss="),
        (randn(4, 5), (randn(4, 5),), None, "teacher_logits must be a tensor, got tuple"),
        (randn(4, 5), randn(4, 5), torch.zeros(5, dtype=torch.int64), r"indices .* shape \(4,\) .* got \(5,\)"),
        (randn(4, 5), randn(4, 5), torch.zeros(4), r"probabilities .* shape \(4, 5\) .* got \(4,\)"),
    ],
)
def test_tensors_that_do_not_fit(student, teacher, targets, words):
    with pytest.raises(OptionError, match=words):
        distill_loss(student, teacher, targets)


def test_class_out_of_range_is_an_error_of_torch():
    with pytest.raises(IndexError, match="out of bounds"):
        distill_loss(randn(2, 5), randn(2, 5), torch.tensor([0, 7]))


def test_there_is_one_instance():
    assert copy.deepcopy(distill_loss) is distill_loss
    assert pickle.loads(pickle.dumps(distill_loss)) is distill_loss
    assert repr(distill_loss) == "lowrank_nn.distill.distill_loss"


def test_classes_that_the_teacher_rules_out_count_nothing():
    student, teacher = randn(3, 5), randn(3, 5, seed=1)
    teacher[:, 3:] = -torch.inf  # the largest logits alone were kept, or an action is not allowed
    log_s, log_t = log_softmax(student.numpy() / 4), log_softmax(teacher.numpy()[:, :3] / 4)
    expected = 16 * (np.exp(log_t) * (log_t - log_s[:, :3])).sum(axis=1)
    student.requires_grad_()
    loss = distill_loss(student, teacher, reduction="none")
    np.testing.assert_allclose(loss.detach().numpy(), expected)
    loss.sum().backward()
    assert torch.isfinite(student.grad).all()
    masked = torch.where(teacher == -torch.inf, teacher, student.detach()).requires_grad_()
    loss = distill_loss(masked, teacher)
    torch.testing.assert_close(loss, distill_loss(masked[:, :3], teacher[:, :3]))
    loss.backward()
    assert torch.isfinite(masked.grad).all()


def test_losses_of_samples_by_vmap():
    student, teacher = randn(4, 5), randn(4, 5, seed=1)
    targets = torch.tensor([0, 4, 2, 2])
    each = torch.func.vmap(distill_loss)(student, teacher, targets)
    torch.testing.assert_close(each, distill_loss(student, teacher, targets, reduction="none"))


def test_compiles_without_breaks():
    student, teacher, targets = randn(4, 5), randn(4, 5, seed=1), torch.arange(4)
    compiled = torch.compile(distill_loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(student, teacher, targets), distill_loss(student, teacher, targets))


@pytest.mark.cuda
def test_same_on_cuda(device):
    student, teacher, targets = randn(4, 5, 3), randn(4, 5, 3, seed=1), torch.zeros(4, 3, dtype=torch.int64)
    loss = distill_loss(student.to(device), teacher.to(device), targets.to(device))
    torch.testing.assert_close(loss.cpu(), distill_loss(student, teacher, targets))
