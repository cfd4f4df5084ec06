"""What fine-tuning leaves as it was, also after an error: the given model, its modes, the random states, the recipe."""

import random

import numpy as np
import pytest
import torch

import lowrank_nn as lnn
from lowrank_nn.errors import TrainingError
from lowrank_nn.pipeline.finetune import teacher_of
from tests.pipeline.finetuning import (
    BATCHES,
    TUCKER,
    Net,
    X,
    compress,
    cross_entropy,
    make_net,
)
from tests.untouched import assert_untouched, snapshot


def test_modes_are_kept_and_a_model_in_train_mode_keeps_them_while_training():
    during = []

    def loss(model, batch):
        during.append([m.training for m in model.modules()])
        return cross_entropy(model, batch)

    result = compress(make_net(), lnn.FineTune(BATCHES, 1, loss=loss))
    assert not any(m.training for m in result.modules())
    assert all(all(modes) for modes in during)
    assert not torch.equal(result.bn.running_mean, make_net().bn.running_mean)

    model = make_net(train=True)
    model.bn.eval()
    result = compress(model, lnn.FineTune(BATCHES, 2, loss=cross_entropy, evaluate=lambda _: 0.0))
    assert result.training
    assert not result.bn.training
    assert torch.equal(result.bn.running_mean, model.bn.running_mean)


class Counting(Net):
    """Changes a buffer, a list and an attribute in every forward."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.seen, self.last = [], 0

    def forward(self, x):
        self.calls += 1
        self.seen.append(len(x))
        self.last = len(x)
        return super().forward(x)


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("train", [True, False])
def test_the_given_model_and_the_random_states_are_untouched(error, train):
    model = Counting().train(train)
    model.conv1.requires_grad_(False)
    model.bn.train(not train)
    model.fc.register_forward_hook(lambda module, args, output: None)
    cross_entropy(model, BATCHES[0]).backward()
    model.seen.clear()
    torch.manual_seed(3)
    before = snapshot(model)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    steps = 0

    def loss(student, batch):
        nonlocal steps
        steps += 1
        if error and steps == 3:
            raise error
        random.random()
        np.random.rand()  # noqa: NPY002
        return cross_entropy(student, batch) + 0 * torch.rand(())

    def run():
        step = lnn.FineTune(BATCHES, 1, loss=loss, guidance=["conv2"])
        compress(model, lnn.Quantize("int8"), step)

    if error:
        with pytest.raises(error):
            run()
    else:
        run()
    assert_untouched(model, before)
    assert len(model.seen) <= 2  # of the recordings; no forward of the teacher
    assert torch.equal(states[0], torch.get_rng_state())
    assert (states[1] == np.random.get_state()[1]).all()  # noqa: NPY002
    assert states[2] == random.getstate()


def test_a_failing_step_leaves_the_state_of_the_recipe_consistent():
    from lowrank_nn.graph import record
    from lowrank_nn.pipeline.state import State

    model = make_net()
    small = compress(model, TUCKER, lnn.Quantize("int8"))
    state = State(small, model, record(model, X[:2]), X[:2], progress=False)
    steps = 0

    def loss(student, batch):
        nonlocal steps
        steps += 1
        return cross_entropy(student, batch) * (float("nan") if steps == 3 else 1)

    for guidance in (["conv2"], lambda teacher, student: 1 / 0):
        modes = [m.training for m in small.modules()]
        with pytest.raises((TrainingError, ZeroDivisionError)):
            lnn.FineTune(BATCHES, 1, loss=loss, guidance=guidance).execute(state, [])
        assert [m.training for m in small.modules()] == modes
        assert all(m.frozen for m in small.modules() if isinstance(m, (lnn.QuantConv2d, lnn.QuantLinear)))
        assert all(p.grad is None for p in small.parameters())
        assert not any(m._forward_hooks for m in small.modules())


def test_the_teacher_shares_the_weights_and_nothing_else():
    model = Counting().train()
    model.also_fc = model.fc
    teacher = teacher_of(model)
    for name, parameter in model.named_parameters():
        assert teacher.get_parameter(name).data_ptr() == parameter.data_ptr()
        assert not teacher.get_parameter(name).requires_grad
        assert parameter.requires_grad
    assert teacher.also_fc is teacher.fc
    assert not any(m.training for m in teacher.modules())
    assert all(m.training for m in model.modules())
    teacher(X)
    assert model.calls == 0
    assert model.seen == []
