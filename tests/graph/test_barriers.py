"""What channels are not followed through, and how a user says what his own operators do."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from lowrank_nn.errors import OptionError, UnsupportedLayerError
from lowrank_nn.graph import find_groups, register_rule
from lowrank_nn.graph.rules import RULES
from tests.graph.test_groups import IMAGE, Call, checked, free, sequential
from tests.graph.test_rules import settled


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "old weight_norm", "old spectral_norm"])
def test_parametrized_weights_are_refused_by_name(kind):
    wrap = getattr(nn.utils if "old" in kind else parametrizations, kind.removeprefix("old "))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        conv = wrap(nn.Conv2d(6, 6, 1))
    groups = find_groups(sequential(conv), IMAGE.float())
    assert not free(groups)
    name = "WeightNorm" if "weight" in kind else "SpectralNorm"
    assert all(f"1 is parametrized by {name}" in group.frozen for group in groups if group.name[0] in "01")
    assert {group.name.split(".")[0] for group in groups} == {"0", "1", "4"}


def test_pruning_masks_of_torch_are_followed():
    model = sequential(nn.Conv2d(6, 6, 1))
    prune.l1_unstructured(model[1], "weight", amount=0.5)
    groups = find_groups(model, IMAGE.float())
    assert free(groups) == {"0": 6, "1.weight_orig": 6}
    assert ("1.weight_mask", 1) in {(member.name, member.dim) for member in groups[0].members}


def scripted(build):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scripting is deprecated, but users have scripted code
        return torch.jit.script(build)


def twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2 + 1


def test_code_that_cannot_be_watched_is_a_barrier():
    groups = find_groups(sequential(Call(scripted(twice))), IMAGE.float())
    assert groups[0].frozen == "used by code that cannot be watched, in 1"
    with pytest.raises(UnsupportedLayerError, match="compiled or scripted"):
        find_groups(scripted(nn.ReLU()), IMAGE)


@pytest.mark.parametrize("function", [torch.vmap(torch.relu), torch.func.grad(lambda x: x.sin().sum())])
def test_transforms_of_functions_are_barriers(function):
    groups = find_groups(sequential(Call(function)), IMAGE.float())
    assert groups[0].frozen == "goes into torch.func, in 1"


def test_layers_within_transforms_of_functions_keep_their_outputs():
    class PerSample(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.head(torch.vmap(self.inner)(x))

    groups = find_groups(PerSample(), torch.randn(3, 4))
    assert {group.name: group.frozen for group in groups} == {
        "inner": "comes out of torch.func, in inner",
        "head": "reaches the output of the model",
    }


def test_memory_shared_with_numpy_is_a_barrier():
    groups = find_groups(sequential(Call(lambda x: torch.from_numpy(x.numpy()) + x)), IMAGE.float())
    assert groups[0].frozen == "no rule for torch.Tensor.numpy, called in 1"


@torch.library.custom_op("lowrank_nn_tests::gate", mutates_args=())
def gate(x: torch.Tensor) -> torch.Tensor:
    return x * x.sigmoid()


def test_rules_for_operators_of_the_users_own(monkeypatch):
    operator = torch.ops.lowrank_nn_tests.gate
    monkeypatch.setitem(RULES, operator, None)  # taken out again afterwards
    model = settled(sequential(Call(lambda x: gate(x))))
    assert find_groups(model, IMAGE)[0].frozen == "no rule for lowrank_nn_tests.gate.default, called in 1"
    register_rule(operator, like=torch.relu)
    assert free(checked(model, IMAGE)) == {"0": 6}
    register_rule(operator, lambda call: None)
    assert find_groups(model, IMAGE)[0].frozen.startswith("no rule for")
    register_rule(operator, lambda call: call.no_such_thing)
    assert find_groups(model, IMAGE)[0].frozen.startswith("no rule for")


@pytest.mark.parametrize("arguments", [{}, {"rule": lambda call: [[]], "like": torch.relu}, {"like": torch.linalg.qr}])
def test_bad_registrations(arguments):
    with pytest.raises(OptionError, match="register_rule"):
        register_rule(gate, **arguments)
