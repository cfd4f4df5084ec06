"""Fine-tuning of every kind of layer and of the models of the zoo: what trains, and what stays as it is."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lowrank_nn as lnn
from tests.pipeline.finetuning import (
    BATCHES,
    TUCKER,
    Net,
    X,
    Y,
    compress,
    distance,
    make_net,
    same_bits,
)
from tests.untouched import assert_untouched, snapshot
from tests.zoo import ZOO


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


class TwoHeads(Net):
    def __init__(self):
        super().__init__()
        self.size = nn.Linear(8, 3)
        self.spare = nn.Linear(8, 3)  # never called: nothing to say of it

    def forward(self, x):
        x = torch.relu(self.conv2(torch.relu(self.bn(self.conv1(x))))).mean((2, 3))
        return {"kind": self.fc(x), "size": self.size(x)}


def both_heads(model, batch):
    out = model(batch[0])
    return nn.functional.cross_entropy(out["kind"], batch[1]) + out["size"].square().mean()


@pytest.mark.parametrize(
    ("options", "named"),
    [({}, ["size"]), ({"loss": both_heads}, []), ({"loss": lambda m, b: m(b[0])["size"].sum()}, ["fc"])],
)
def test_the_report_names_the_heads_that_the_loss_does_not_train(options, named):
    model = TwoHeads().eval()
    recipe = [TUCKER, lnn.Quantize("int8"), lnn.FineTune(BATCHES, 1, **options)]
    report = lnn.compress_model(model, X[:2], recipe, progress=False).report
    assert [path for remark, paths in report.remarks.items() if "not trained" in remark for path in paths] == named


def test_a_finished_checkpoint_says_nothing_of_untrained_layers(tmp_path):
    for _ in range(2):  # the second time no step is taken
        recipe = [TUCKER, lnn.FineTune(BATCHES, 1, checkpoint=tmp_path / "run.pt")]
        assert not lnn.compress_model(make_net(), X[:2], recipe, progress=False).report.remarks


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
def test_batches_on_the_cpu_and_the_model_on_cuda(pin, device):
    model = make_net().to(device)
    loader = DataLoader(TensorDataset(X, Y), batch_size=8, shuffle=True, pin_memory=pin)
    random = torch.get_device_module(device)
    state = random.get_rng_state()
    steps = [TUCKER, lnn.Quantize("int8"), lnn.FineTune(loader, 3, lr=3e-3, guidance=["conv2"])]
    result = lnn.compress_model(model, X[:2].to(device), steps, progress=False).model
    assert all(p.device == device for p in result.parameters())
    assert torch.equal(state, random.get_rng_state())


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
