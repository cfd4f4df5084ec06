"""Feature taps and guidance over many layers: recording, weights, schedule, hooks."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lowrank_nn.distill import FeatureTap, Guidance, attention_loss, distill_loss, guidance_loss
from lowrank_nn.errors import LowRankError, OptionError, TrainingError, UnsupportedLayerError


class Net(nn.Module):
    """Two convolutions of a width, one activation that runs twice and works in place, a head."""

    def __init__(self, width=4, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.stem = nn.Conv2d(3, width, 3, padding=1)
            self.block = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width))
            self.act = nn.ReLU(inplace=True)
            self.head = nn.Linear(width, 5)

    def forward(self, x):
        x = self.act(self.stem(x))
        return self.head(self.act(self.block(x)).mean((2, 3)))


def images(n=4, seed=0):
    return torch.randn(n, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


def run(teacher, student, x):
    with torch.no_grad():
        teacher(x)
    return student(x)


def hooks(model):
    return sum(len(module._forward_hooks) for module in model.modules())


@pytest.fixture
def models():
    return Net(seed=0), Net(seed=1)


def test_guidance_on_one_layer(models):
    teacher, student = models
    x = images()
    tap = distill_loss.from_pretrained_layer(teacher.stem, student.stem)
    assert isinstance(tap, FeatureTap)
    run(teacher, student, x)
    loss = tap()
    # The activation after the stem works in place: the tap must hold what the stem itself returned.
    torch.testing.assert_close(loss, guidance_loss(student.stem(x), teacher.stem(x)))
    loss.backward()
    assert student.stem.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in teacher.parameters())
    assert list(tap.parameters()) == []
    assert list(tap.modules()) == [tap]


def test_teacher_gets_no_gradient_even_with_gradients_enabled(models):
    teacher, student = models
    tap = FeatureTap(teacher.block, student.block)
    teacher(images())
    student(images())
    tap().backward()
    assert all(p.grad is None for p in teacher.parameters())


def test_teacher_in_inference_mode(models):
    teacher, student = models
    for kind in ("guidance", "hint", "attention"):
        tap = FeatureTap(teacher.stem, student.stem, kind=kind)
        with torch.inference_mode():
            teacher(images())
        student(images())
        tap.total(torch.tensor(1.0)).backward()


def test_layers_that_run_several_times_are_compared_call_by_call(models):
    teacher, student = models
    tap = FeatureTap(teacher.act, student.act)
    x = images()
    run(teacher, student, x)
    expected = 0
    for u, r in zip(*(activations(model, x) for model in (student, teacher)), strict=True):
        expected += guidance_loss(u, r)
    torch.testing.assert_close(tap(), expected)


def activations(model, x):
    first = F.relu(model.stem(x))
    return first, F.relu(model.block(first))


def test_attention(models):
    teacher, student = Net(width=6), models[1]
    tap = FeatureTap(teacher.stem, student.stem, kind="attention")
    x = images()
    run(teacher, student, x)
    torch.testing.assert_close(tap(), attention_loss(student.stem(x), teacher.stem(x)))


def test_hint_has_a_trainable_regressor_where_the_widths_differ():
    teacher, student = Net(width=6), Net(width=4)
    tap = FeatureTap(teacher.stem, student.stem, kind="hint")
    assert {name: tuple(p.shape) for name, p in tap.named_parameters()} == {
        "regressor.weight": (6, 4),
        "regressor.bias": (6,),
    }
    x = images()
    run(teacher, student, x)
    loss = tap()
    mapped = F.conv2d(student.stem(x), tap.regressor.weight[..., None, None], tap.regressor.bias)
    torch.testing.assert_close(loss, guidance_loss(mapped, teacher.stem(x)))
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in [*tap.parameters(), student.stem.weight])


def test_hint_learns_a_teacher_that_is_a_linear_map_of_the_student():
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    student, teacher = nn.Linear(3, 3), nn.Linear(3, 8)
    tap = FeatureTap(teacher, student, kind="hint")
    optimizer = torch.optim.LBFGS([*tap.parameters(), *student.parameters()], max_iter=200)

    def closure():
        optimizer.zero_grad()
        run(teacher, student, x)
        loss = tap()
        loss.backward()
        return loss

    assert closure().item() > 0.1
    optimizer.step(closure)
    assert closure().item() < 1e-4


def test_hint_of_equal_widths_has_no_regressor(models):
    assert list(FeatureTap(models[0].stem, models[1].stem, kind="hint").parameters()) == []


def test_hint_on_blocks_needs_widths():
    teacher, student = Net(width=6), Net(width=4)
    with pytest.raises(OptionError, match=r"Sequential does not state the width .* widths=\(student, teacher\)"):
        FeatureTap(teacher.block, student.block, kind="hint")
    assert hooks(teacher) == hooks(student) == 0
    tap = FeatureTap(teacher.block, student.block, kind="hint", widths=(4, 6))
    run(teacher, student, images())
    assert tap().item() > 0


def test_hint_under_autocast_and_in_bfloat16():
    teacher, student = Net(width=6).bfloat16(), Net(width=4).bfloat16()
    tap = FeatureTap(teacher.stem, student.stem, kind="hint")
    run(teacher, student, images().bfloat16())
    assert tap.regressor.weight.dtype == tap().dtype == torch.float32
    teacher, student = Net(width=6), Net(width=4)
    tap = FeatureTap(teacher.stem, student.stem, kind="hint")
    with torch.autocast("cpu", torch.bfloat16):
        run(teacher, student, images())
    tap().backward()


def test_attach_later(models):
    teacher, student = models
    tap = distill_loss.from_pretrained_layer(teacher.stem)
    with pytest.raises(TrainingError, match=r"no student layer; call attach\(\)"):
        tap()
    assert tap.attach(student.block) is tap
    tap.attach(student.stem)
    assert len(student.block._forward_hooks) == 0
    run(teacher, student, images())
    assert tap().item() > 0


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(3, 4, batch_first=True)

    def forward(self, x):
        return self.rnn(x)[0]


def test_of_a_tuple_the_first_tensor_counts():
    teacher, student = Recurrent(), Recurrent()
    tap = FeatureTap(teacher.rnn, student.rnn)
    x = torch.randn(2, 7, 3)
    run(teacher, student, x)
    torch.testing.assert_close(tap(), guidance_loss(student(x), teacher(x)))


def test_inside_an_encoder_layer_whose_fast_path_skips_its_leaves():
    teacher, student = (nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True) for _ in range(2))
    guidance = Guidance(teacher.eval(), student, ["linear1", "norm2", "self_attn"])
    run(teacher, student, torch.randn(2, 5, 8))
    guidance().backward()
    assert student.linear1.weight.grad.abs().sum() > 0


def test_compiled_student(models):
    teacher, student = models
    x = images()
    with Guidance(teacher, student, ["stem", "block"]) as plain:
        run(teacher, student, x)
        expected = plain()
    compiled = torch.compile(student, backend="eager")
    guidance = Guidance(teacher, student, ["stem", "block"])
    recorders = list(guidance.recorders())
    for _ in range(2):
        run(teacher, compiled, x)
        torch.testing.assert_close(guidance(), expected)
    with guidance.paused():
        run(teacher, compiled, x)
    guidance.remove()
    run(teacher, compiled, x)
    assert all(recorder.take() == [] for recorder in recorders)


class Returns(nn.Module):
    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self):
        return self.output


@pytest.mark.parametrize("output", [{"out": torch.ones(2)}, (), None, ({"out": torch.ones(2)},)])
def test_other_outputs_are_refused(output):
    layer = Returns(output)
    words = f"Returns returned {type(output).__name__}, and a tap needs a"
    with FeatureTap(layer), pytest.raises(UnsupportedLayerError, match=words):
        layer()
    assert layer() is output


def test_one_model_alone_is_an_error_and_leaves_nothing_behind(models):
    teacher, student = models
    guidance = Guidance(teacher, student, ["stem", "block.0"])
    with pytest.raises(TrainingError, match=r"stem: .* ran 0 times and the student's 0 times"):
        guidance()
    student(images())
    with pytest.raises(TrainingError, match="the teacher's layer ran 0 times and the student's 1 times"):
        guidance.total(torch.tensor(1.0))
    with torch.no_grad():
        teacher(images())
    with pytest.raises(TrainingError, match="the teacher's layer ran 1 times and the student's 0 times"):
        guidance()
    run(teacher, student, images())
    first = guidance()
    with pytest.raises(TrainingError):
        guidance()  # used once, the record is gone
    run(teacher, student, images())
    torch.testing.assert_close(guidance(), first)


def test_evaluation_leaves_no_trace(models):
    teacher, student = models
    guidance = Guidance(teacher, student, ["stem"])
    with torch.no_grad():
        student(images(8))
    run(teacher, student, images())
    first = guidance()
    first.backward()
    with guidance.paused():
        run(teacher, student, images(9))
    run(teacher, student, images())
    torch.testing.assert_close(guidance(), first)
    run(teacher, student, images(8))
    guidance.clear()
    run(teacher, student, images())
    torch.testing.assert_close(guidance(), first)


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


# Weight and schedule


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


# Hooks


def test_hooks_are_removed(models):
    teacher, student = models
    with Guidance(teacher, student, ["stem", "block"]) as guidance:
        assert hooks(teacher) == hooks(student) == 2
    assert hooks(teacher) == hooks(student) == 0
    with pytest.raises(TrainingError, match="was removed; make a new one"):
        guidance()
    with pytest.raises(TrainingError, match="was removed"):
        guidance.taps[0].attach(student.stem)
    guidance.remove()  # twice is harmless


def test_models_pickle_after_removal_as_before(models):
    teacher, student = models
    before = pickle.dumps(student)
    guidance = Guidance(teacher, student, ["stem"])
    run(teacher, student, images())
    guidance.remove()
    student.load_state_dict(pickle.loads(before).state_dict())
    clone = copy.deepcopy(student)
    assert hooks(clone) == 0
    assert hooks(pickle.loads(pickle.dumps(student))) == 0


def test_copies_of_a_tapped_model_do_not_record(models):
    teacher, student = models
    guidance = Guidance(teacher, student, ["stem"])
    student(images())  # a record with a graph must not stop the copy either
    clone = copy.deepcopy(student)
    buffer = io.BytesIO()
    torch.save(student, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    guidance.clear()
    run(teacher, student, images())
    clone(images())
    loaded(images())
    guidance()


def test_a_copy_of_the_guidance_is_removed_and_keeps_its_regressors():
    teacher, student = Net(width=6), Net(width=4)
    guidance = Guidance(teacher, student, ["stem"], kind="hint")
    run(teacher, student, images())
    for clone in (copy.deepcopy(guidance), pickle.loads(pickle.dumps(guidance))):
        assert torch.equal(clone.taps[0].regressor.weight, guidance.taps[0].regressor.weight)
        with pytest.raises(TrainingError, match="was removed"):
            clone()
    assert hooks(teacher) == hooks(student) == 1
    guidance()


def test_a_failure_half_way_leaves_no_hooks():
    teacher, student = Net(width=6), Net(width=4)
    with pytest.raises(OptionError, match=r"^block: hint: Sequential does not state"):
        Guidance(teacher, student, ["stem", "block"], kind="hint")
    assert hooks(teacher) == hooks(student) == 0


def test_random_state_is_left_alone():
    teacher, student = Net(width=6), Net(width=4)
    before = torch.get_rng_state()
    Guidance(teacher, student, ["stem"], kind="hint")
    assert torch.equal(before, torch.get_rng_state())


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


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda():
    teacher, student = Net(width=6).cuda(), Net(width=4).cuda()
    guidance = Guidance(teacher, student, ["stem"], kind="hint", weight="balanced")
    logits = run(teacher, student, images().cuda())
    guidance.total(logits.square().mean()).backward()
    assert all(p.grad.is_cuda for p in guidance.parameters())
