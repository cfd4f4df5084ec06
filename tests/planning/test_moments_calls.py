"""How moments are collected: which calls count, what is refused, and that the model stays as it was."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lowrank_nn.errors import CalibrationError, PlanError
from lowrank_nn.planning import collect_metrics
from tests.planning.patches import all_patches, check
from tests.planning.seeded import randn, seeded
from tests.untouched import assert_untouched, snapshot


class Net(nn.Module):
    """A layer that is used twice, another under two names, a batch norm, dropout, one that is never called."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.again = nn.Conv2d(4, 4, 3, padding=1)
        self.drop = nn.Dropout()
        self.unused = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)
        self.alias = self.head

    def forward(self, x):
        x = self.again(F.relu(self.again(self.norm(self.conv(x)).relu()), inplace=True))
        return {"logits": self.head(input=self.drop(x.mean((2, 3)))), "labels": torch.arange(len(x))}


PATHS = ["conv", "again", "head", "alias", "unused"]


def calls(model, batches):
    """Inputs of every call of each layer, by forward hooks on a copy in eval mode."""
    model, seen = copy.deepcopy(model).eval(), {}
    for path, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, (nn.Conv2d, nn.Linear)):

            def hook(_, args, kwargs, path=path):
                seen.setdefault(path, []).append((*args, *kwargs.values())[0].detach())

            layer.register_forward_pre_hook(hook, with_kwargs=True)
    with torch.no_grad():
        for batch in batches:
            model(**batch) if isinstance(batch, dict) else model(batch)
    return {path: torch.cat(inputs) for path, inputs in seen.items()}


def test_reused_and_shared_layers_count_every_call():
    model, batches = seeded(Net), [randn(5, 3, 6, 6, seed=s) * (s + 1) for s in range(3)]
    metrics = collect_metrics(model, [{"x": batch} for batch in batches], PATHS)
    assert list(metrics) == ["conv", "again", "head", "alias"]  # the one that was never called is left out
    assert metrics["alias"] is metrics["head"]
    for path, inputs in calls(model, batches).items():
        check(metrics[path], all_patches(model.get_submodule(path), inputs))


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.positive, self.negative = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x):
        return self.positive(x) if x.mean() > 0 else self.negative(x)


def test_control_flow_that_depends_on_the_data():
    model, batches = seeded(Branches), [randn(4, 3, seed=s) + 3 * (-1) ** s for s in range(4)]
    metrics = collect_metrics(model, batches, ["positive", "negative"])
    check(metrics["positive"], all_patches(model.positive, torch.cat(batches[::2])))
    check(metrics["negative"], all_patches(model.negative, torch.cat(batches[1::2])))


def test_max_batches_takes_no_more():
    pulled = []

    def endless():
        while True:
            pulled.append(1)
            yield randn(4, 3), None

    layer = seeded(lambda: nn.Linear(3, 2))
    metric = collect_metrics(layer, endless(), [""], max_batches=2)[""]
    check(metric, all_patches(layer, randn(4, 3)))
    assert len(pulled) == 2


def test_nested_and_empty_inputs():
    layer = nn.Linear(5, 3)
    parts = [randn(n, 5, seed=n, dtype=torch.float32) for n in (2, 7)]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged)
    metric = collect_metrics(layer, nested, [""])[""]
    check(metric, all_patches(layer, torch.cat(parts).double()), rtol=1e-5)
    again = collect_metrics(layer, [torch.zeros(0, 5), nested], [""])[""]
    assert again.covariance.equal(metric.covariance)


class Interrupted(Net):
    """Stops as Ctrl-C does, on the first call or in the probe that follows it."""

    in_probe = False

    def forward(self, x):
        output = super().forward(x)
        if torch.is_grad_enabled() == self.in_probe:
            raise KeyboardInterrupt
        return output


@pytest.mark.parametrize("case", ["fine", "nan", "shape", "interrupt", "interrupted probe"])
def test_the_model_is_left_as_it_was_also_after_an_error(case):
    model = seeded(Interrupted if "interrupt" in case else Net).train()
    model.in_probe = "probe" in case
    model.head.eval()
    model.conv.weight.requires_grad_(False)
    model.again.weight.grad = kept = torch.ones_like(model.again.weight)
    model.norm.forward = own = model.norm.forward
    batch = {"nan": randn(2, 3, 6, 6) * float("nan"), "shape": randn(2, 5)}.get(case, randn(2, 3, 6, 6))
    expected = {"fine": (), "nan": CalibrationError, "shape": CalibrationError}.get(case, KeyboardInterrupt)
    before = snapshot(model)
    try:
        collect_metrics(model, [batch], PATHS)
    except expected:
        pass
    else:
        assert case == "fine"
    assert_untouched(model, before)
    assert model.norm.forward is own
    assert model.again.weight.grad is kept
    assert bool((kept == 1).all())


BAD_CALLS = [
    ([], PATHS, CalibrationError, "calibration: there are no batches"),
    ([randn(0, 3, 4, 4)], PATHS, CalibrationError, "calibration: nothing is in the tensors of 1 batches"),
    ([randn(1, 3, 4, 4)], ["cnv"], PlanError, "calibration: no layer at 'cnv'. There are: conv, norm, again"),
    (
        [randn(1, 3, 4, 4)],
        ["norm"],
        PlanError,
        "norm: calibration: expected an nn.Conv2d or nn.Linear, got BatchNorm2d",
    ),
    ([randn(1, 3, 4, 4) * 1e150], ["conv"], CalibrationError, "conv: calibration: values of "),
    (
        [randn(1, 3, 4, 4), randn(1, 3, 4, 4) / 0],
        PATHS,
        CalibrationError,
        "conv: calibration: there are NaN or infinite values",
    ),
    ([randn(1, 3, 4, 4), randn(1, 4)], PATHS, CalibrationError, "calibration: the forward failed on batch 2"),
]


@pytest.mark.parametrize(("batches", "paths", "error", "message"), BAD_CALLS)
def test_bad_calls_are_refused(batches, paths, error, message):
    with pytest.raises(error, match="^" + re.escape(message)):
        collect_metrics(seeded(Net), batches, paths)


def test_layers_inside_the_fused_encoder_are_seen():
    encoder, x = seeded(lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)).eval(), randn(6, 5, 8)
    metrics = collect_metrics(encoder, [x], ["linear1", "linear2", "self_attn.out_proj"])
    assert list(metrics) == ["linear1", "linear2"]  # torch reads the weight of the third, and never calls it
    inputs = calls(encoder, [x])
    check(metrics["linear1"], all_patches(encoder.linear1, inputs["linear1"]))
