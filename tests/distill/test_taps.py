"""Taps on one layer: what is recorded and compared, hints and their regressors, layers of all kinds."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lowrank_nn.distill import FeatureTap, Guidance, attention_loss, distill_loss, guidance_loss
from lowrank_nn.errors import OptionError, TrainingError, UnsupportedLayerError
from tests.distill.tapped import Net, hooks, images, run


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


@pytest.mark.cuda
def test_on_cuda(device):
    teacher, student = Net(width=6).to(device), Net(width=4).to(device)
    guidance = Guidance(teacher, student, ["stem"], kind="hint", weight="balanced")
    logits = run(teacher, student, images().to(device))
    guidance.total(logits.square().mean()).backward()
    assert all(p.grad.device == device for p in guidance.parameters())
