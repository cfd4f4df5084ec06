"""Guidance over many layers: the sum, its weight against the task, the schedule, training with it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lowrank_nn.distill import FeatureTap, Guidance, distill_loss, guidance_loss
from lowrank_nn.errors import LowRankError, OptionError
from tests.distill.tapped import Net, images, run


def test_guidance_is_the_sum_over_taps(models):
    teacher, student = models
    paths = ["stem", "block.0", "block", "head"]
    expected = 0
    for path in paths:
        with FeatureTap(teacher.get_submodule(path), student.get_submodule(path)) as tap:
            run(teacher, student, images())
            expected += tap()
    guidance = Guidance(teacher, student, iter(paths), weight=0.25)
    logits = run(teacher, student, images())
    task = logits.square().mean()
    torch.testing.assert_close(guidance.total(task), task + 0.25 * expected)
    assert list(guidance.parameters()) == []


def test_mapped_paths_whole_model_and_shared_layers(models):
    teacher, student = models
    student.other_name = student.stem
    x = images()
    guidance = Guidance(teacher, student, {"stem": "other_name", "": ""})
    logits = run(teacher, student, x)
    expected = guidance_loss(student.stem(x), teacher.stem(x)) + guidance_loss(logits, teacher(x))
    guidance.clear()
    run(teacher, student, x)
    torch.testing.assert_close(guidance(), expected)


def test_hint_over_many_layers():
    teacher, student = Net(width=6), Net(width=4)
    guidance = Guidance(teacher, student, ["stem", "block"], kind="hint", widths={"block": (4, 6)})
    assert sorted(guidance.state_dict()) == [
        f"taps.{i}.regressor.{name}" for i in (0, 1) for name in ("bias", "weight")
    ]
    run(teacher, student, images())
    guidance().backward()
    assert all(p.grad.abs().sum() > 0 for p in guidance.parameters())


@settings(max_examples=60, deadline=None)
@given(
    task=st.floats(0, 1e6),
    scale=st.sampled_from([0.0, 1e-12, 1e-3, 1.0, 1e3, 1e9]),
    distance=st.sampled_from([0.0, 1e-6, 1e-3, 0.1, 1.0, 100.0]),
    kind=st.sampled_from(["guidance", "attention"]),
)
def test_balanced_guidance_is_never_above_the_task(task, scale, distance, kind):
    r = scale * images().double()
    teacher, student = nn.Identity(), nn.Identity()
    tap = FeatureTap(teacher, student, kind=kind, weight="balanced")
    u = (r + distance * scale * images(seed=1)).requires_grad_()
    run(teacher, student, r)
    tap.clear()
    teacher(r)
    student(u)
    total = tap.total(torch.tensor(task, dtype=torch.float64))
    share = total.item() - task
    assert -1e-9 * task <= share <= task * (1 + 1e-9)
    if kind == "guidance" and scale >= 1e-3 and distance >= 0.2:  # noise of 20 % is above the floor
        assert share == pytest.approx(task, rel=1e-9)
    total.backward()
    assert torch.isfinite(u.grad).all()


def test_balanced_rule_by_hand():
    teacher, student = nn.Identity(), nn.Identity()
    tap = FeatureTap(teacher, student, weight="balanced")

    def share(u, r, task):
        teacher(torch.tensor([r]))
        student(torch.tensor([u]))
        return tap.total(torch.tensor(task)).item() - task

    assert share([3.0, 0.0], [1.0, 0.0], 7.0) == pytest.approx(7.0)  # lambda g = task
    # distance 5 %: g = 0.0025 e and the floor is 0.01 e, so lambda g = task / 4
    assert share([1.05, 0.0], [1.0, 0.0], 8.0) == pytest.approx(2.0, rel=1e-4)
    assert share([1.0, 0.0], [1.0, 0.0], 8.0) == 0
    assert share([3e-22, 0.0], [1e-22, 0.0], 7.0) == 0  # the quotient overflows
    assert share([3.0, 0.0], [0.0, 0.0], 7.0) == pytest.approx(7.0)
    assert share([0.0, 0.0], [0.0, 0.0], 7.0) == 0
    assert share([3.0, 0.0], [1.0, 0.0], -7.0) == 0


def test_lambda_is_a_constant_for_the_gradient(models):
    teacher, student = models
    fixed, balanced = (Guidance(teacher, student, ["block"], weight=w) for w in (1.0, "balanced"))
    logits = run(teacher, student, images())
    task = 1e-3 * logits.square().mean()
    weight = student.block[0].weight
    task_part = torch.autograd.grad(task, weight, retain_graph=True)[0]
    guidance = fixed()
    guidance_part = torch.autograd.grad(guidance, weight, retain_graph=True)[0]
    total_part = torch.autograd.grad(balanced.total(task), weight)[0]
    torch.testing.assert_close(total_part, task_part + (task / guidance).detach() * guidance_part)


def test_guidance_first_then_joint(models):
    teacher, student = models
    guidance = Guidance(teacher, student, ["block"], weight=2.0, guidance_first=0.5)
    raw = Guidance(teacher, student, ["block"])
    for progress, share in [(0.0, 0.0), (0.25, 0.0), (0.49, 0.0), (0.5, 1.0), (1.0, 1.0)]:
        guidance.set_progress(progress)
        student.zero_grad()
        task = run(teacher, student, images()).square().mean()
        total = guidance.total(task)
        torch.testing.assert_close(total, share * task + 2 * raw())
        total.backward()
        assert student.head.weight.grad is not None  # DistributedDataParallel wants a gradient everywhere
        assert (student.head.weight.grad.abs().sum() > 0) == bool(share)


def test_joint_from_the_start_by_default(models):
    guidance = Guidance(*models, ["stem"])
    task = run(*models, images()).square().mean()
    assert guidance.total(task) > task


def test_training_with_guidance_brings_the_student_to_the_teacher(models):
    teacher, student = models
    raw = Guidance(teacher, student, ["stem", "block"])
    with Guidance(teacher, student, ["stem", "block"], weight="balanced", guidance_first=0.5) as guidance:
        optimizer = torch.optim.Adam(student.parameters(), 1e-2)
        values = []
        for step in range(60):
            guidance.set_progress(step / 60)
            with torch.no_grad():
                soft = teacher(images())
            loss = guidance.total(distill_loss(student(images()), soft))
            values.append(raw().item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert values[-1] < 0.2 * values[0]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda t, s: Guidance(t, s, []), "paths is empty"),
        (
            lambda t, s: Guidance(t, s, ["stem", "blok.0", "tail"]),
            r"teacher has no module at \['blok.0', 'tail'\]. Close: .*block.0.* Its modules: stem, block, block.0",
        ),
        (lambda t, s: Guidance(t, s, {"stem": "stm"}), r"student has no module at \['stm'\]"),
        (lambda t, s: Guidance(t, s, "step"), r"no module at \['step'\]"),
        (lambda t, s: Guidance(t, t, ["stem"]), "stem: .*share this layer"),
        (lambda t, s: Guidance(t, s, ["stem"], kind="fsp"), r"kind must be one of \('guidance', .* got 'fsp'"),
        (lambda t, s: Guidance(t, s, ["stem"], widths={"stem": (4, 4)}), "widths are for"),
        (lambda t, s: Guidance(t, s, ["stem"], kind="hint", widths={"x": (4, 4)}), r"not tapped: \['x'\]"),
        (lambda t, s: Guidance(t, s, ["stem"], weight=-1.0), 'weight must be "balanced" or .* got -1.0'),
        (lambda t, s: Guidance(t, s, ["stem"], weight="even"), "got 'even'"),
        (lambda t, s: Guidance(t, s, ["stem"], weight=float("nan")), "got nan"),
        (lambda t, s: Guidance(t, s, ["stem"], guidance_first=3), "share of the training, from 0 to 1, got 3"),
        (lambda t, s: Guidance(t, s, ["stem"]).set_progress(1.5), "progress must be from 0 to 1, got 1.5"),
        (lambda t, s: Guidance(t, s, ["stem"]).total(torch.ones(3)), r"scalar, got shape \(3,\)"),
    ],
)
def test_errors(models, make, words):
    with pytest.raises(OptionError, match=words):
        make(*models)


def test_features_that_do_not_fit_name_the_path():
    teacher, student = Net(width=6), Net(width=4)
    guidance = Guidance(teacher, student, ["head", "stem"])
    run(teacher, student, images())
    with pytest.raises(LowRankError, match=r'^stem: guidance: .* \(4, 4, 6, 6\) and \(4, 6, 6, 6\). Use kind="hint"'):
        guidance()


def test_repr(models):
    text = repr(Guidance(*models, ["stem"], weight="balanced"))
    assert "paths=['stem']" in text
    assert "kind='guidance'" in text
