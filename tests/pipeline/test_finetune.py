"""Fine-tuning against hand-written loops, on every kind of layer, batch and output; what it leaves untouched."""

import copy
import dataclasses
import math
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lowrank_nn as lnn
from lowrank_nn.errors import PlanError, TrainingError
from lowrank_nn.pipeline.finetune import teacher_of, warm_cosine
from tests.zoo import ZOO

X = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(1))
Y = torch.randint(4, (32,), generator=torch.Generator().manual_seed(2))
BATCHES = [(X[i : i + 8], Y[i : i + 8]) for i in range(0, 32, 8)]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        x = self.conv2(torch.relu(self.bn(self.conv1(x))))
        return self.fc(torch.relu(x).mean((2, 3)))


def make_net(train=False):
    """The network, with normalisation that fits the data, as after training."""
    torch.manual_seed(0)
    net = Net()
    net.bn.momentum = 1.0
    with torch.no_grad():
        net.fc.weight *= 10
        net(X)
    net.bn.momentum = 0.1
    return net.train(train)


TUCKER = lnn.Apply(lnn.TuckerConv2d, where="conv2", rank=(4, 4))


def compress(model, *steps, example=None, **options):
    return lnn.compress_model(
        model, X[:2] if example is None else example, list(steps), progress=False, **options
    ).model


def same_bits(first, second):
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def cross_entropy(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def distance(model, teacher):
    with torch.no_grad():
        return float((model.eval()(X) - teacher(X)).pow(2).mean())


# --- against loops written by hand


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


# --- kinds of layers


def test_masks_survive():
    model = make_net()
    steps = [lnn.Prune(0.5), lnn.Apply(lnn.SVDLinear, where="fc", rank=2)]
    result, untrained = (compress(model, *steps[:1], *more) for more in ([lnn.FineTune(BATCHES, 3, lr=0.01)], []))
    for name in ("conv1", "conv2", "fc"):
        before, after = untrained.get_submodule(name), result.get_submodule(name)
        assert torch.equal(before.mask, after.mask)
        assert torch.equal(after.weight != 0, after.mask)
        assert not torch.equal(before.weight, after.weight)


@pytest.mark.parametrize("activations", [None, "int8"])
def test_quantized_layers_train_through_the_rounding_and_are_integers_again(activations):
    model = make_net()
    steps = [TUCKER, lnn.Prune(0.3, where="conv1"), lnn.Quantize("int4", activations=activations)]
    before = compress(model, *steps, calibration=[X])
    after = compress(model, *steps, lnn.FineTune(BATCHES, 10, lr=3e-3, alpha=1.0), calibration=[X])
    quantized = [path for path, m in after.named_modules() if isinstance(m, (lnn.QuantConv2d, lnn.QuantLinear))]
    assert len(quantized) == 5
    for path in quantized:
        layer = after.get_submodule(path)
        assert layer.frozen
        assert layer.weight_int.dtype is torch.int8
        assert not torch.equal(layer.weight, before.get_submodule(path).weight)
        assert layer.activation_bits == (activations and 8)
    assert (after.conv1.weight[~before.conv1.mask] == 0).all()
    assert distance(after, model) < 0.8 * distance(before, model)
    assert after.state_dict().keys() == before.state_dict().keys()


def test_only_the_factors_train():
    model = make_net().requires_grad_(False)
    model.conv2.requires_grad_(True)
    before, after = compress(model, TUCKER), compress(model, TUCKER, lnn.FineTune(BATCHES, 2))
    changed = {name for name, p in after.named_parameters() if not torch.equal(p, before.get_parameter(name))}
    assert changed == {name for name, _ in after.named_parameters() if name.startswith("conv2.")}
    assert {n for n, p in after.named_parameters() if p.requires_grad} == changed


def test_frozen_parameters_stay_frozen_through_quantization():
    model = make_net()
    model.conv1.requires_grad_(False)
    model.conv2.requires_grad_(False)
    steps = [TUCKER, lnn.Quantize("int8")]
    before, after = compress(model, *steps), compress(model, *steps, lnn.FineTune(BATCHES, 3, lr=0.02))
    for path in ("conv1", "conv2.reduce", "conv2.core", "conv2.expand"):
        old, new = before.get_submodule(path).state_dict(), after.get_submodule(path).state_dict()
        assert all(torch.equal(old[key], new[key]) for key in old)
    assert not torch.equal(before.fc.weight, after.fc.weight)
    assert not after.conv1.bias.requires_grad


def test_parameters_without_gradient():
    class Unused(Net):
        def __init__(self):
            super().__init__()
            self.spare = nn.Linear(3, 3)
            self.scale = nn.Parameter(torch.ones(2))

    model = Unused().eval()
    result = compress(model, TUCKER, lnn.FineTune(BATCHES, 1))
    assert torch.equal(result.spare.weight, model.spare.weight)
    assert all(p.grad is None for p in result.parameters())


# --- modes and flags


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


def snapshot(model):
    return {
        "values": {k: v.clone() for k, v in model.state_dict().items()},
        "modes": [m.training for m in model.modules()],
        "flags": [p.requires_grad for p in model.parameters()],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()],
        "attributes": [sorted(vars(m)) for m in model.modules()],
    }


def assert_untouched(model, before):
    after = snapshot(model)
    assert before["values"].keys() == after["values"].keys()
    assert all(torch.equal(v, after["values"][k]) for k, v in before["values"].items())
    for a, b in zip(before["grads"], after["grads"], strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    for key in ("modes", "flags", "hooks", "attributes"):
        assert before[key] == after[key]


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


# --- batches, outputs, losses


class TwoInputs(Net):
    def forward(self, image, shift):
        return super().forward(image) + shift


@dataclasses.dataclass
class Answer:
    loss: torch.Tensor
    logits: torch.Tensor


class Answering(Net):
    form = "dict"

    def forward(self, x):
        y = super().forward(x)
        forms = {"dict": {"logits": y}, "tuple": (y, x), "dataclass": Answer(y.sum(), y), "nested": {"out": [y]}}
        return forms[self.form]


def test_forms_of_batches_and_outputs_give_the_same_training():
    model = make_net()
    expected = compress(model, TUCKER, lnn.FineTune(BATCHES, 1))
    for batches in (
        [{"x": x, "labels": y} for x, y in BATCHES],
        [((x,), y) for x, y in BATCHES],
        [({"x": x}, y) for x, y in BATCHES],
        DataLoader(TensorDataset(X, Y), batch_size=8),
    ):
        assert same_bits(expected, compress(model, TUCKER, lnn.FineTune(batches, 1)))
    for form in ("dict", "tuple", "dataclass", "nested"):
        other = Answering().eval()
        other.load_state_dict(model.state_dict())
        other.form = form
        assert same_bits(expected, compress(other, TUCKER, lnn.FineTune(BATCHES, 1)))


def test_several_inputs():
    torch.manual_seed(0)
    model, shift = TwoInputs().eval(), torch.ones(4)
    example = (X[:2], shift)
    flat = compress(model, TUCKER, lnn.FineTune([(x, shift, y) for x, y in BATCHES], 1), example=example)
    pair = compress(model, TUCKER, lnn.FineTune([((x, shift), y) for x, y in BATCHES], 1), example=example)
    keys = [{"image": x, "shift": shift, "target": y} for x, y in BATCHES]
    named = compress(model, TUCKER, lnn.FineTune(keys, 1), example={"image": X[:2], "shift": shift})
    assert same_bits(flat, pair)
    assert same_bits(flat, named)


def test_dense_prediction_with_positions_to_ignore():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 5, 3, padding=1)).eval()
    targets = torch.randint(5, (32, 8, 8))
    targets[:, :2] = 255
    step = lnn.Apply(lnn.TuckerConv2d, where="0", rank=(4, 2))

    batches = [(X[i : i + 8], targets[i : i + 8]) for i in range(0, 32, 8)]
    result = compress(model, step, lnn.FineTune(batches, 1, alpha=0.0, ignore_index=255))
    reference = compress(model, step).train()
    optimizer = torch.optim.AdamW(reference.parameters(), lr=3e-4, weight_decay=1e-4)
    schedule = warm_cosine(optimizer, 4)
    for x, y in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(reference(x), y, ignore_index=255).backward()
        optimizer.step()
        schedule.step()
    for a, b in zip(result.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_classes_in_the_last_dimension():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 5)).eval()
    x, y = torch.randn(4, 7, 6), torch.randint(5, (4, 7))
    svd = lnn.Apply(lnn.SVDLinear, where="0", rank=2)
    tokens = compress(model, svd, lnn.FineTune([(x, y)], 3, class_dim=-1), example=x)
    flat = compress(model, svd, lnn.FineTune([(x.flatten(0, 1), y.flatten())], 3), example=x)
    for a, b in zip(tokens.parameters(), flat.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(lnn.OptionError, match="class_dim"):
        compress(model, svd, lnn.FineTune([(x, y)], 1), example=x)


def test_outputs_without_logits():
    class Boxes(Net):
        def forward(self, x):
            return {"loss": super().forward(x).mean()}

    with pytest.raises(TrainingError, match="no logits"):
        compress(Boxes().eval(), TUCKER, lnn.FineTune(BATCHES, 1))
    compress(Boxes().eval(), TUCKER, lnn.FineTune(BATCHES, 1, loss=lambda model, batch: model(batch[0])["loss"]))


def test_batches_may_be_anything_with_a_loss_of_ones_own():
    seen = []

    def loss(model, batch):
        seen.append(batch)
        return model(X[:4]).sum() * 1e-3

    compress(make_net(), lnn.FineTune(["a", "b"], 1, loss=loss))
    assert seen == ["a", "b"]


# --- guidance


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


# --- on models of all kinds


# The model with control flow makes numbers of tensors, as users do.
@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
@pytest.mark.parametrize("name", sorted(ZOO))
def test_zoo(name):
    model, example = ZOO[name]()
    before = snapshot(model)
    step = lnn.FineTune([(example, None)], 1)
    result = lnn.compress_model(model, example, [lnn.Prune(0.3), lnn.Quantize("int8"), step], progress=False).model
    assert_untouched(model, before)
    untrained = lnn.compress_model(model, example, [lnn.Prune(0.3), lnn.Quantize("int8")], progress=False).model
    assert untrained.state_dict().keys() == result.state_dict().keys()
    assert not same_bits(untrained, result)
    assert all(m.frozen for m in result.modules() if isinstance(m, (lnn.QuantConv2d, lnn.QuantLinear)))


@pytest.mark.cuda
@pytest.mark.parametrize("pin", [False, True])
def test_batches_on_the_cpu_and_the_model_on_cuda(pin):
    model = make_net().cuda()
    loader = DataLoader(TensorDataset(X, Y), batch_size=8, shuffle=True, pin_memory=pin)
    state = torch.cuda.get_rng_state()
    steps = [TUCKER, lnn.Quantize("int8"), lnn.FineTune(loader, 3, lr=3e-3, guidance=["conv2"])]
    result = lnn.compress_model(model, X[:2].cuda(), steps, progress=False).model
    assert all(p.is_cuda for p in result.parameters())
    assert torch.equal(state, torch.cuda.get_rng_state())


def test_real_network_gets_better(data_dir):
    import pickle

    from safetensors.torch import load_file

    from tests.zoo.resnet import ResNet

    with (data_dir / "cifar-10-batches-py" / "data_batch_1").open("rb") as file:
        content = pickle.load(file, encoding="latin1")
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    images = (torch.from_numpy(content["data"][:512]).view(-1, 3, 32, 32) / 255 - mean) / std
    labels = torch.tensor(content["labels"][:512])
    model = ResNet(20).eval()
    model.load_state_dict(load_file(data_dir / "weights" / "cifar10_resnet20.safetensors"))
    with torch.no_grad():
        assert (model(images).argmax(1) == labels).float().mean() > 0.9
    train, held_out = slice(0, 384), slice(384, 512)
    loader = DataLoader(TensorDataset(images[train], labels[train]), batch_size=32, shuffle=True)

    def agreement(student):
        soft = torch.softmax(model(images[held_out]), 1)
        return float((soft * torch.log_softmax(student(images[held_out]), 1)).sum(1).mean())

    low_rank, budget = lnn.LowRank(), lnn.Budget(params=0.5)
    before = lnn.compress_model(model, images[:2], [low_rank], budget=budget, progress=False).model
    step = lnn.FineTune(loader, 2, lr=1e-3)
    after = lnn.compress_model(model, images[:2], [low_rank, step], budget=budget, progress=False).model
    with torch.no_grad():
        assert agreement(after) > 0.85 * agreement(before)


def test_another_teacher_is_followed_and_not_changed():
    torch.manual_seed(0)
    model, teacher = nn.Linear(6, 3), nn.Linear(6, 3)
    before = copy.deepcopy(teacher.state_dict())
    batches = [torch.randn(32, 6) for _ in range(8)]
    step = lnn.FineTune(batches, epochs=30, lr=0.05, teacher=teacher)
    result = lnn.compress_model(model, batches[0], [step], progress=False)
    x = torch.randn(64, 6)
    wanted = teacher(x).log_softmax(1)
    distance = [(wanted - net(x).log_softmax(1)).abs().mean() for net in (model, result.model)]
    assert distance[1] < 0.1 * distance[0]
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
