"""The first promises of the contract on drawn layers: configurations that no list of cases thought of."""

import warnings

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from lowrank_nn.layers import LAYERS
from lowrank_nn.testing import Case, run_check
from lowrank_nn.testing.checks_function import check_equals_dense_weight, check_lossless, check_output_contract
from lowrank_nn.testing.checks_module import check_config, check_cost

CHECKS = (check_lossless, check_equals_dense_weight, check_output_contract, check_config, check_cost)
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16])


@st.composite
def linear_cases(draw):
    features = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    dtype = draw(DTYPES)
    # Of few numbers much may cancel, and factors round in between.
    leading = draw(st.sampled_from([(8,), (2, 4)] if dtype == torch.bfloat16 else [(), (3,), (2, 3)]))
    arguments = {"in_features": features[0], "out_features": features[1], "bias": draw(st.booleans())}
    return Case("drawn", nn.Linear, arguments, (*leading, features[0]), dtype=dtype, training=draw(st.booleans()))


@st.composite
def conv_cases(draw):
    def pair(low, high):
        return draw(st.integers(low, high)), draw(st.integers(low, high))

    groups = draw(st.sampled_from([1, 1, 2, 3]))
    channels = groups * draw(st.integers(1, 4)), groups * draw(st.integers(1, 4))
    kernel, dilation, size = pair(1, 4), pair(1, 2), pair(7, 10)
    padding = draw(st.sampled_from(["same", "valid", None])) or pair(0, 3)
    stride = (1, 1) if padding == "same" else pair(1, 3)
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    arguments = {
        "in_channels": channels[0],
        "out_channels": channels[1],
        "kernel_size": kernel,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "bias": draw(st.booleans()),
        "padding_mode": mode,
    }
    batch = draw(st.sampled_from([(), (1,), (2,)]))
    case = Case(
        "drawn",
        nn.Conv2d,
        arguments,
        (*batch, channels[0], *size),
        dtype=draw(DTYPES),
        training=draw(st.booleans()),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            case.layer()(case.input())
        except RuntimeError:
            assume(False)  # torch itself cannot run it
    return case


CASES = {nn.Conv2d: conv_cases(), nn.Linear: linear_cases()}


@pytest.mark.parametrize("cls", list(LAYERS.values()), ids=list(LAYERS))
@given(data=st.data())
def test_drawn_layers_keep_the_promises(cls, data):
    case = data.draw(CASES[cls.replaces])
    served = [run_check(cls, case, check) for check in CHECKS]
    assert all(served) or not any(served)
