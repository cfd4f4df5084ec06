"""The caller's default dtype changes no result: what the library creates on its way has the dtype that it says."""

import contextlib

import pytest
import torch
from torch import nn

import lowrank_nn as lnn
from lowrank_nn.decompose import truncated_svd
from lowrank_nn.distill.regressor import HintRegressor
from lowrank_nn.planning.importance import FROM_WEIGHTS
from tests.pipeline.test_promises import X, chain, filters, make_net
from tests.storage.models import assert_same_state, seeded

BATCHES = [X, 0.5 * X]
LABELLED = [(X, torch.arange(4))]


def loss(net, batch):
    return net(batch[0]).logsumexp(1).mean()


def low_rank(*formats, **options):
    return [lnn.LowRank(formats=formats, **options)]


LOW_RANK = {
    "matrices": low_rank(lnn.TuckerConv2d, lnn.SVDConv2d, lnn.SVDLinear),
    "CP": low_rank(lnn.CPConv2d, lnn.SVDLinear),
    "spatial": low_rank(lnn.SpatialSVDConv2d, lnn.SVDLinear),
    "Kronecker": low_rank(lnn.KroneckerConv2d, lnn.KroneckerLinear),
    "tensor trains": low_rank(lnn.TTConv2d, lnn.TTLinear),
    "uniform": low_rank(lnn.SVDConv2d, lnn.SVDLinear, allocation="uniform"),
}
OTHERS = {
    "rules": [lnn.LowRank(rank=lnn.VBMF())],
    "masks": [lnn.Prune(0.5), lnn.Prune(0.3, granularity="shape", where="conv2")],
    **{name: filters(name) for name in (*FROM_WEIGHTS, "activation", "apoz", "lasso", "thinet", "obs")},
    **{name: filters(name, batches=LABELLED, loss=loss) for name in ("taylor", "obd")},
    "int8": [lnn.Quantize("int8", activations="int8")],
    **{f"int8 {name}": [lnn.Quantize("int8", activations="int8", observer=name)] for name in ("mse", "percentile")},
    "entropy": [lnn.Quantize("int8", activations="int8", observer="entropy")],
    "int4": [lnn.Quantize("int4")],
    "bf16": [lnn.Quantize("bf16")],
    "codebook": [lnn.Codebook(3), lnn.FineTune(LABELLED, 1, guidance=["conv2"])],
    "linear codebook": [lnn.Codebook(3, init="linear")],
    "density codebook": [lnn.Codebook(3, init="density")],
    "random codebook": [lnn.Codebook(3, init="random")],
    "folds": [lnn.FoldBatchNorm(), lnn.Equalize(absorb=True)],
    "hashed": [lnn.Apply(lnn.HashedConv2d, where="conv2", share=0.5), lnn.Apply(lnn.BinaryLinear, where="fc")],
    "structured": [
        lnn.Apply(lnn.TransferredConv2d, where="conv2", share=0.5),
        lnn.Apply(lnn.CirculantLinear, block_size=4),
    ],
}


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def agree(recipe, dtype, path, **options):
    """Compress, save and load under both defaults, on the very same weights, and compare bits."""
    net, fresh = make_net(), make_net()
    expected = lnn.compress_model(net, X, recipe, progress=False, **options)
    lnn.save(expected.model, path / "expected.lrnn")
    with default_dtype(dtype):
        found = lnn.compress_model(net, X, recipe, progress=False, **options)
        lnn.save(found.model, path / "found.lrnn")
        loaded = lnn.load(path / "expected.lrnn", fresh)
    assert_same_state(found.model, expected.model)
    assert_same_state(loaded, expected.model)
    assert found.report == expected.report
    assert found.plan == expected.plan
    assert (path / "found.lrnn").read_bytes() == (path / "expected.lrnn").read_bytes()


@pytest.mark.parametrize("data", [None, BATCHES])
@pytest.mark.parametrize("name", LOW_RANK)
def test_low_rank(name, data, tmp_path):
    agree(LOW_RANK[name], torch.float64, tmp_path, calibration=data, budget=lnn.Budget(params=0.6))


@pytest.mark.parametrize("name", OTHERS)
def test_other_steps(name, tmp_path):
    agree(OTHERS[name], torch.float64, tmp_path, calibration=BATCHES)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_chain(dtype, tmp_path):
    agree(chain(), dtype, tmp_path, calibration=BATCHES, budget=lnn.Budget(params=0.6))


def test_factors_of_a_large_matrix(monkeypatch):
    monkeypatch.setattr("lowrank_nn.decompose.svd._EXACT_LIMIT", 100)
    weight = torch.randn(120, 130, generator=torch.Generator().manual_seed(0))
    expected = truncated_svd(weight, 16)
    with default_dtype(torch.float64):
        found = truncated_svd(weight, 16)
    assert all(map(torch.equal, found, expected))


def test_fresh_layers_of_a_given_dtype():
    """Where masks and levels are drawn beside the weights."""

    def fresh():
        layers = (
            lnn.PrunedLinear(8, 8, sparsity=0.5, dtype=torch.float32),
            lnn.CodebookLinear(8, 8, bits=2, dtype=torch.float32),
        )
        return nn.Sequential(*layers, HintRegressor(8, 4))

    expected = seeded(fresh)
    with default_dtype(torch.float64):
        assert_same_state(seeded(fresh), expected)
