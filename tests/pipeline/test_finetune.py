"""Fine-tuning against loops written by hand, with and without guidance; that it brings the student closer."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lowrank_nn as lnn
from lowrank_nn.errors import PlanError
from lowrank_nn.pipeline.finetune import warm_cosine
from tests.pipeline.finetuning import (
    BATCHES,
    TUCKER,
    Net,
    X,
    Y,
    compress,
    cross_entropy,
    distance,
    make_net,
    same_bits,
)


def hinton(student, teacher, targets, temperature, alpha):
    soft = torch.softmax(teacher / temperature, 1)
    kl = (soft * (torch.log(soft) - torch.log_softmax(student / temperature, 1))).sum(1).mean()
    return alpha * temperature**2 * kl + (1 - alpha) * nn.functional.cross_entropy(student, targets)


@pytest.mark.parametrize("with_targets", [True, False])
def test_default_is_distillation_as_a_loop_by_hand(with_targets):
    model, sgd = make_net(), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)
    batches = BATCHES if with_targets else [(x,) for x, _ in BATCHES]
    step = lnn.FineTune(batches, 2, optimizer=sgd, schedule=warm_cosine, temperature=3.0, alpha=0.7)
    result = compress(model, TUCKER, step)

    student = compress(model, TUCKER).train()
    optimizer = sgd(student.parameters())
    for step in range(8):
        factor = 1.0 if step < 1 else 0.5 * (1 + math.cos(math.pi * (step - 1) / 7))
        optimizer.param_groups[0]["lr"] = 0.1 * factor
        x, y = BATCHES[step % 4]
        alpha = 0.7 if with_targets else 1.0
        optimizer.zero_grad()
        hinton(student(x), model(x).detach(), y, 3.0, alpha).backward()
        optimizer.step()
    for name, value in student.state_dict().items():
        torch.testing.assert_close(result.state_dict()[name], value, rtol=1e-4, atol=1e-6, msg=name)
    assert distance(result, model) != distance(compress(model, TUCKER), model)


def test_own_loss_gives_the_weights_of_a_loop_by_hand_bit_for_bit():
    model = make_net()
    step = lnn.FineTune(
        BATCHES,
        1,
        loss=cross_entropy,
        optimizer=torch.optim.AdamW,
        schedule=lambda o, n: torch.optim.lr_scheduler.OneCycleLR(o, 0.01, n),
    )
    result = compress(model, TUCKER, step)
    student = compress(model, TUCKER).train()
    optimizer = torch.optim.AdamW(student.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, 4)
    for batch in BATCHES:
        optimizer.zero_grad()
        cross_entropy(student, batch).backward()
        optimizer.step()
        schedule.step()
    assert same_bits(result, student)


def test_shuffled_order_is_that_of_a_loop_with_the_seed_of_the_epoch():
    model, seed = make_net(), 11
    loader = DataLoader(TensorDataset(X, Y), batch_size=8, shuffle=True)
    result = compress(model, TUCKER, lnn.FineTune(loader, 2, loss=cross_entropy, schedule=constant), seed=seed)
    student = compress(model, TUCKER).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-4, weight_decay=1e-4)
    for epoch in range(2):
        torch.manual_seed(seed + 1 + epoch)
        for batch in loader:
            optimizer.zero_grad()
            cross_entropy(student, batch).backward()
            optimizer.step()
    assert same_bits(result, student)


def constant(optimizer, steps):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)


def test_learning_rates():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = warm_cosine(optimizer, 40)
    rates = []
    for _ in range(45):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:3] == [1.0, 2.0, 2.0]
    assert rates[21] == pytest.approx(1.0)
    assert rates[40:] == pytest.approx([0.0] * 5)
    assert sorted(rates[1:], reverse=True) == rates[1:]


def test_distillation_brings_the_student_closer_and_is_deterministic():
    model, loader = make_net(), DataLoader(TensorDataset(X, Y), batch_size=8, shuffle=True)
    step = lnn.FineTune(loader, 5, lr=3e-3, alpha=1.0)
    first, second = compress(model, TUCKER, step), compress(model, TUCKER, step)
    assert same_bits(first, second)
    assert not same_bits(first, compress(model, TUCKER, step, seed=1))
    assert distance(first, model) < 0.3 * distance(compress(model, TUCKER), model)


def test_autocast_runs_the_layers_in_bfloat16_and_keeps_the_parameters():
    model, seen = make_net(), set()

    class Watched(lnn.TuckerConv2d):
        def forward(self, input):
            y = super().forward(input)
            seen.add(y.dtype)
            return y

    small = compress(model, TUCKER)
    small.conv2.__class__ = Watched
    tuned = compress(small, lnn.FineTune(BATCHES, 5, lr=3e-3, alpha=1.0, teacher=model, autocast=torch.bfloat16))
    assert torch.bfloat16 in seen
    assert {parameter.dtype for parameter in tuned.parameters()} == {torch.float32}
    assert distance(tuned, model) < 0.5 * distance(compress(model, TUCKER), model)
    assert not torch.is_autocast_enabled("cpu")
    with pytest.raises(lnn.OptionError, match="float16 needs scaling"):
        lnn.FineTune(BATCHES, 1, autocast=torch.float16)


def test_guidance_by_paths_is_balanced_guidance_by_hand():
    model, sgd = make_net(), lambda p: torch.optim.SGD(p, lr=0.01)
    step = lnn.FineTune(BATCHES, 1, guidance=["conv2", "bn"], optimizer=sgd, schedule=constant)
    result = compress(model, TUCKER, step)
    student, teacher = compress(model, TUCKER).train(), copy.deepcopy(model)
    optimizer = sgd(student.parameters())
    features = {}
    for role, net in (("s", student), ("t", teacher)):
        for path in ("conv2", "bn"):
            key = (role, path)
            net.get_submodule(path).register_forward_hook(lambda m, a, out, key=key: features.__setitem__(key, out))
    for x, y in BATCHES:
        logits = teacher(x).detach()
        task = hinton(student(x), logits, y, 4.0, 0.9)
        pairs = [(features["s", path], features["t", path].detach()) for path in ("conv2", "bn")]
        guidance = sum(0.5 * (u - r).pow(2).sum() / len(x) for u, r in pairs)
        energy = sum(0.5 * r.pow(2).sum() / len(x) for _, r in pairs)
        weight = (task / torch.maximum(guidance, 0.01 * energy)).detach()
        optimizer.zero_grad()
        (task + weight * guidance).backward()
        optimizer.step()
    assert not any(m._forward_hooks for m in result.modules())
    for name, value in student.state_dict().items():
        torch.testing.assert_close(result.state_dict()[name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_guidance_by_function_trains_its_regressors_and_follows_the_schedule():
    made, start, progress = [], {}, []

    class Watched(lnn.Guidance):
        def set_progress(self, share):
            progress.append(share)
            super().set_progress(share)

    def make(teacher, student):
        assert teacher is not model
        assert student.training
        guidance = Watched(
            teacher, student, {"conv2": "fc"}, kind="hint", widths={"conv2": (4, 8)}, channel_dim=1, guidance_first=0.5
        )
        made.append(guidance)
        start.update(copy.deepcopy(guidance.state_dict()))
        return guidance

    class Segmenter(Net):
        def __init__(self):
            super().__init__()
            self.fc = nn.Conv2d(8, 4, 1)

        def forward(self, x):
            return self.fc(torch.relu(self.conv2(torch.relu(self.bn(self.conv1(x))))))

    model = Segmenter().eval()
    batches = [(x, y[:, None, None].expand(-1, 8, 8)) for x, y in BATCHES]
    compress(model, TUCKER, lnn.FineTune(batches, 2, guidance=make))
    assert progress == [i / 8 for i in range(8)]
    assert not list(made[0].recorders())
    assert start
    assert all(not torch.equal(value, start[key]) for key, value in made[0].state_dict().items())


def test_guidance_on_layers_that_are_not_there():
    with pytest.raises(PlanError, match="conv9"):
        lnn.plan(make_net(), X[:2], [lnn.FineTune(BATCHES, 1, guidance=["conv9", "conv2"])], progress=False)
