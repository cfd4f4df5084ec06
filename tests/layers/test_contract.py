"""Every registered layer class, on every awkward dense layer, held to every promise of the contract.

`PYTHONPATH=. python tests/layers/test_contract.py` writes state_keys.json anew: do so only when a class is added, or
when its keys change on purpose, with a migration for files that were saved before.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lowrank_nn.layers import LAYERS
from lowrank_nn.testing import ACCELERATOR_CHECKS, CASES, CHECKS, SLOW_CHECKS, layer_checks, refuses, run_check
from lowrank_nn.testing._tools import built
from lowrank_nn.testing.checks_module import check_export

STATE_KEYS = Path(__file__).parent / "state_keys.json"

REFUSED: dict[str, set[str]] = {}
"""The cases that a class refuses; everything else it must serve."""

ALWAYS_ROUNDS = {
    f"{name}{kind}" for name in ("BFloat16", "Binary", "Codebook", "Hashed", "Quant") for kind in ("Conv2d", "Linear")
}
"""Classes without lossless options."""

VARIANTS: dict[str, dict[str, dict[str, object]]] = {
    "SVDConv2d": {"pointwise_first": {"order": "pointwise_first"}},
    "TuckerConv2d": {"tucker1_out": {"rank": (2, None)}, "tucker1_in": {"rank": (None, 2)}},
    "CPConv2d": {"four": {"factors": 4}, "als": {"epc": False}},
    "KroneckerConv2d": {"shape": {"shape": (2, 3), "rank": 3}},
    "KroneckerLinear": {"shape": {"shape": (9, 2), "rank": 4}},
    "TTConv2d": {"one_number": {"rank": 3}},
    "TTLinear": {"two_cores": {"cores": 2, "rank": 3}, "four_cores": {"cores": 4, "rank": 2}},
    "PrunedConv2d": {
        **{name: {"granularity": name} for name in ("row", "column", "kernel", "group", "shape", "channel", "filter")},
        "window": {"granularity": "window", "sparsity": 1 / 3},
        "random": {"criterion": "random"},
    },
    "PrunedLinear": {name: {"granularity": name} for name in ("channel", "filter")},
    "BinaryConv2d": {"training": {"frozen": False}, "binary_inputs": {"binary_inputs": True}},
    "BinaryLinear": {"training": {"frozen": False}, "binary_inputs": {"binary_inputs": True}},
    "CodebookConv2d": {"one_bit": {"bits": 1}, "eight_bits": {"bits": 8}, "linear": {"init": "linear"}},
    "CodebookLinear": {"one_bit": {"bits": 1}, "density": {"init": "density"}, "random": {"init": "random"}},
    "CirculantConv2d": {"large": {"block_size": 8}},
    "TransferredConv2d": {"flips": {"transforms": "flips"}, "two": {"share": None, "base_filters": 2}},
    "HashedConv2d": {"eighth": {"share": 1 / 8}, "seeded": {"share": None, "buckets": 20, "seed": 3}},
    "HashedLinear": {"eighth": {"share": 1 / 8}},
    "QuantConv2d": {
        "affine": {"scheme": "affine"},
        "three_bits": {"bits": 3},
        "training": {"frozen": False},
        "integer_inputs": {"activation_bits": 8, "input_range": (-3.0, 3.0)},
    },
    "QuantLinear": {
        "affine": {"scheme": "affine"},
        "three_bits": {"bits": 3},
        "training": {"frozen": False},
        "integer_inputs": {"activation_bits": 8, "input_range": (-3.0, 3.0)},
    },
}
"""Options beside the usual ones that the contract is checked with, {class: {name: options}}, on VARIED cases."""

VARIED = ("conv_stride_padding_dilation", "conv_groups", "linear_plain")

ROUNDED_INPUTS = dict.fromkeys(
    ("check_equals_dense_weight", "check_to_dense_layer", "check_casts", "check_zeros_stay"),
    "the inputs are rounded too, which no dense weight does",
)
BINARY_INPUTS = {check: reason for check, reason in ROUNDED_INPUTS.items() if check != "check_zeros_stay"}
STRAIGHT_THROUGH = {"check_dense_weight_derivative": "rounding is a staircase; its gradient is straight-through"}
FEW_BITS = {"check_initial_variance": "so many entries round to zero that those kept are larger than torch's default"}

KNOWN_EXCEPTIONS: dict[str, dict[str, str]] = {
    "QuantConv2d-integer_inputs": ROUNDED_INPUTS,
    "QuantLinear-integer_inputs": ROUNDED_INPUTS,
    "BinaryConv2d-binary_inputs": BINARY_INPUTS,
    "BinaryLinear-binary_inputs": BINARY_INPUTS,
    "BinaryConv2d-training": STRAIGHT_THROUGH,
    "BinaryLinear-training": STRAIGHT_THROUGH,
    "QuantConv2d-training": STRAIGHT_THROUGH,
    "QuantLinear-training": STRAIGHT_THROUGH,
    "QuantConv2d-three_bits": FEW_BITS,
    "QuantLinear-three_bits": FEW_BITS,
}
"""Broken promises, {class or class-variant: {check: reason}}; a check that holds after all fails the suite."""


def contract(checks):
    """One test for each class, case and check, and for each variant of a class, case and check."""
    triples = list(layer_checks(checks=checks))
    for name, variants in VARIANTS.items():
        for variant, options in variants.items():
            cases = [
                replace(case, name=f"{case.name}-{variant}", options=options) for case in CASES if case.name in VARIED
            ]
            triples += layer_checks([LAYERS[name]], cases=cases, checks=checks)
    return [parameter(*triple) for triple in triples if triple[1].name not in REFUSED.get(triple[0].__name__, ())]


def parameter(cls, case, check):
    _, _, variant = case.name.partition("-")
    key = f"{cls.__name__}-{variant}" if variant else cls.__name__
    reason = KNOWN_EXCEPTIONS.get(key, {}).get(check.__name__)
    marks = [pytest.mark.xfail(reason=reason, strict=True, raises=AssertionError)] if reason else []
    return pytest.param(cls, case, check, id=f"{cls.__name__}-{case.name}-{check.__name__[6:]}", marks=marks)


@pytest.mark.parametrize(("cls", "case", "check"), contract(CHECKS))
def test_promise(cls, case, check):
    assert run_check(cls, case, check), "refused, and not in REFUSED"


@pytest.mark.parametrize(
    ("cls", "case"),
    [(cls, case) for cls, case, _ in layer_checks(checks=[check_export]) if case.name.endswith("_plain")],
)
def test_plain_layers_export(cls, case):
    assert run_check(cls, case, check_export)


@pytest.mark.slow
@pytest.mark.parametrize(("cls", "case", "check"), contract(SLOW_CHECKS))
def test_slow_promise(cls, case, check):
    assert run_check(cls, case, check), "refused, and not in REFUSED"


@pytest.mark.cuda
@pytest.mark.parametrize(("cls", "case", "check"), contract(ACCELERATOR_CHECKS))
def test_promise_on_a_gpu(cls, case, check, device):
    assert run_check(cls, case, check), "refused, and not in REFUSED"


@pytest.mark.parametrize("cls", list(LAYERS.values()), ids=list(LAYERS))
def test_refuses_only_the_cases_declared(cls):
    cases = [case for case in CASES if case.kind is cls.replaces]
    assert {case.name for case in cases if refuses(cls, case)} == REFUSED.get(cls.__name__, set())
    assert len(REFUSED.get(cls.__name__, ())) < len(cases) / 4


def test_only_the_classes_declared_have_no_lossless_options():
    plain = [case for case in CASES if case.name.endswith("_plain")]
    without = {
        name
        for name, cls in LAYERS.items()
        for case in plain
        if case.kind is cls.replaces and cls.lossless_options(case.layer()) is None
    }
    assert without == ALWAYS_ROUNDS


def test_tables_name_things_that_exist():
    names = {case.name for case in CASES}
    assert len(names) == len(CASES)
    assert set().union(*REFUSED.values()) <= names
    assert {*REFUSED, *VARIANTS, *ALWAYS_ROUNDS} <= set(LAYERS)
    variants = {f"{name}-{variant}" for name, variants in VARIANTS.items() for variant in variants}
    assert set(KNOWN_EXCEPTIONS) <= set(LAYERS) | variants
    assert set(VARIED) <= names
    assert {check for checks in KNOWN_EXCEPTIONS.values() for check in checks} <= {
        check.__name__ for check in CHECKS + SLOW_CHECKS + ACCELERATOR_CHECKS
    }


def test_every_class_has_cases_and_every_check_a_promise():
    kinds = {case.kind for case in CASES}
    assert all(cls.replaces in kinds for cls in LAYERS.values())
    assert all(check.__doc__ for check in CHECKS + SLOW_CHECKS + ACCELERATOR_CHECKS)


def state_keys():
    plain = {case.kind: case for case in CASES if case.name.endswith("_plain")}
    return {
        name: {key: str(value.dtype) for key, value in built(cls, plain[cls.replaces]).state_dict().items()}
        for name, cls in sorted(LAYERS.items())
    }


def test_state_dict_keys_are_those_of_saved_files():
    assert state_keys() == json.loads(STATE_KEYS.read_text())


if __name__ == "__main__":
    STATE_KEYS.write_text(json.dumps(state_keys(), indent=2) + "\n")
