"""Whole recipes for a model on an accelerator: everything stays there, and the result is that of the CPU."""

import copy

import pytest
import torch
from torch import nn

import lowrank_nn as lnn
from tests.storage.models import seeded

pytestmark = pytest.mark.cuda


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.second, self.grouped = nn.Conv2d(16, 24, 3, padding=1), nn.Conv2d(24, 24, 3, groups=2)
        self.last = nn.Linear(24, 10)

    def forward(self, x):
        x = torch.relu(self.norm(self.first(x)))
        x = torch.relu(self.grouped(torch.relu(self.second(x))))
        return self.last(x.mean((2, 3)))


def data(seed):
    """Batches on the CPU, wherever the model is."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(32, 3, 12, 12, generator=generator)
    return list(zip(x.split(8), torch.randint(10, (32,), generator=generator).split(8), strict=True))


CALIBRATION, TRAINING = data(0), data(1)


def cross_entropy(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def importance(device):
    """Batches of a criterion, which are the user's to place."""
    return [(x.to(device), y.to(device)) for x, y in TRAINING]


RECIPES = {
    "low_rank": lambda _: [lnn.LowRank()],
    "low_rank_of_weights": lambda _: [lnn.LowRank(data_aware=False)],
    "tuned": lambda _: [lnn.LowRank(formats=[lnn.TuckerConv2d]), lnn.FineTune(TRAINING, 2, guidance=["second"])],
    "tuned_integers": lambda _: [
        lnn.LowRank(formats=[lnn.SVDConv2d]),
        lnn.Quantize("int8", activations="int8"),
        lnn.FineTune(TRAINING, 1, loss=cross_entropy),
    ],
    "filters": lambda _: [lnn.Prune(granularity="filter", criterion="obs")],
    "filters_by_gradients": lambda device: [
        lnn.Prune(granularity="filter", criterion="taylor", batches=importance(device), loss=cross_entropy)
    ],
    "everything": lambda _: [
        lnn.FoldBatchNorm(),
        lnn.Prune(granularity="filter"),
        lnn.LowRank(),
        lnn.Equalize(),
        lnn.Quantize("int8", activations="int8"),
    ],
    "codebook": lambda _: [lnn.Prune(granularity="filter"), lnn.Codebook(4)],
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name, device, tmp_path):
    model = seeded(Net).eval()
    x = CALIBRATION[0][0]
    options = {"budget": lnn.Budget(params=0.6), "calibration": CALIBRATION, "progress": False}
    on_cpu = lnn.compress_model(model, x, RECIPES[name]("cpu"), **options).model
    result = lnn.compress_model(copy.deepcopy(model).to(device), x.to(device), RECIPES[name](device), **options)
    assert {tensor.device for tensor in result.model.state_dict().values()} == {device}
    with torch.no_grad():
        expected = on_cpu(x)
        y = result.model(x.to(device))
        assert float((y.cpu() - expected).norm() / expected.norm()) < 0.02
        lnn.save(result.model, tmp_path / "net.lrnn")
        reloaded = lnn.load(tmp_path / "net.lrnn", Net(), device=device).eval()
        torch.testing.assert_close(reloaded(x.to(device)), y, rtol=1e-4, atol=1e-5)


def test_speed_and_latency(device):
    model, x = seeded(Net).eval().to(device), CALIBRATION[0][0].to(device)
    plan = lnn.plan(model, x, [lnn.LowRank()], budget=lnn.Budget(params=0.6), calibration=CALIBRATION, progress=False)
    result = lnn.compress_model(model, x, [lnn.LowRank()], budget=lnn.Budget(params=0.6), measure_speed=True)
    assert plan.compression_rate["params"] > 1.6
    assert result.report.latency.device == str(device)
    assert result.report.latency.before > 0


def test_a_device_without_float64(device):
    if device.type != "pretend":
        pytest.skip("GPUs have it")
    torch.pretend.allow_float64(False)
    try:
        with pytest.raises(lnn.PlanError, match=r"pretend:0, which has no float64, .* Move the model"):
            lnn.plan(nn.Linear(8, 8, device=device), torch.ones(2, 8, device=device))
    finally:
        torch.pretend.allow_float64(True)
