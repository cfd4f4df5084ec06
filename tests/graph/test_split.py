"""Attentions of whole models split into linear layers, and what steps make of these."""

import copy
import logging

import pytest
import torch
from torch import nn

import lowrank_nn as lnn
from lowrank_nn.errors import FileFormatError, PlanError
from lowrank_nn.graph import record
from tests.zoo import ZOO

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


class Attentive(nn.Module):
    """Tokens of a few directions that attend to each other, twice: something to find with little rank."""

    def __init__(self, dim=16, **options):
        super().__init__()
        self.mix = nn.Linear(4, dim)
        self.first = nn.MultiheadAttention(dim, 4, batch_first=True, **options)
        self.second = nn.MultiheadAttention(dim, 4, batch_first=True)
        self.head = nn.Linear(dim, 3)

    def forward(self, x):
        x = self.mix(x)
        x = x + self.first(x, x, x)[0]
        return self.head(x + self.second(x, x, x, need_weights=False)[0])


def attentive(**options):
    torch.manual_seed(0)
    return Attentive(**options).eval()


def batch(seed=1, images=64):
    return torch.randn(images, 6, 4, generator=torch.Generator().manual_seed(seed))


def run(model, x):
    with torch.no_grad():
        return model(x)


def transformer():
    model, tokens = ZOO["transformer"]()
    return model.eval(), tokens


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # torch's own, on the given model
def test_same_outputs_and_the_model_is_not_changed():
    model, tokens = transformer()
    before, tokens[:, -2:] = copy.deepcopy(model.state_dict()), 0
    split = lnn.split_attention(model)
    for masked in (False, True):
        with torch.no_grad():
            expected, got = (net(tokens, mask_padding=masked) for net in (model, split))
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert type(model.encoder.layers[0].self_attn) is nn.MultiheadAttention
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not {p.data_ptr() for p in split.parameters()} & {p.data_ptr() for p in model.parameters()}


def test_every_projection_is_called():
    model, tokens = transformer()
    recording = record(lnn.split_attention(model), tokens)
    paths = {f"encoder.layers.{i}.self_attn.{name}" for i in (0, 1) for name in PROJECTIONS}
    called = {site.path: site for site in recording.sites if site.path in paths}
    assert called.keys() == paths
    assert all(len(site.calls) == 1 and type(site.layer) is nn.Linear for site in called.values())


def test_a_model_that_is_an_attention_and_one_that_has_none():
    attention = nn.MultiheadAttention(8, 2).eval()
    assert isinstance(lnn.split_attention(attention), lnn.SplitMultiheadAttention)
    with pytest.raises(PlanError, match=r"split_attention: Linear holds no nn\.MultiheadAttention"):
        lnn.split_attention(nn.Linear(2, 2))


def test_what_cannot_be_split_stays(caplog):
    model = attentive()
    model.second.in_proj_weight = model.first.in_proj_weight
    with caplog.at_level(logging.WARNING, "lowrank_nn"):
        split = lnn.split_attention(model)
    assert [type(split.first), type(split.second)] == [nn.MultiheadAttention] * 2
    assert [r.getMessage().split(" stays: ")[0] for r in caplog.records] == [
        "split_attention: first",
        "split_attention: second",
    ]
    assert "in_proj_weight of MultiheadAttention is shared" in caplog.text


def test_a_shared_attention_is_split_once():
    model = attentive()
    model.second = model.first
    split, x = lnn.split_attention(model), batch()
    assert split.first is split.second
    torch.testing.assert_close(run(split, x), run(model, x), atol=1e-5, rtol=1e-5)


def test_low_rank_reaches_every_projection():
    model, x = attentive(), batch()
    recipe = [lnn.Apply(lnn.SVDLinear, rank=3, where=["first.*", "second.*"])]
    result = lnn.compress_model(lnn.split_attention(model), x, recipe)
    for attention in (result.model.first, result.model.second):
        assert [type(attention.get_submodule(name)) for name in PROJECTIONS] == [lnn.SVDLinear] * 4
    # by hand: each projection cut to its three largest singular values, in torch's own attention
    by_hand = copy.deepcopy(model)
    with torch.no_grad():
        for attention in (by_hand.first, by_hand.second):
            for weight in (*attention.in_proj_weight.chunk(3), attention.out_proj.weight):
                u, s, vh = torch.linalg.svd(weight.double())
                weight.copy_((u[:, :3] * s[:3]) @ vh[:3])
    torch.testing.assert_close(run(result.model, x), run(by_hand, x), atol=1e-5, rtol=1e-5)


def test_calibration_data_help():
    split, seen, fresh = lnn.split_attention(attentive()), batch(1), batch(2)
    errors = []
    for calibration in (None, [seen]):
        budget = lnn.Budget(params=0.45)
        result = lnn.compress_model(split, seen, [lnn.LowRank(but_not="head")], budget=budget, calibration=calibration)
        assert any("_proj" in row.path and row.replaced for row in result.report.rows)
        errors.append(float((run(result.model, fresh) - run(split, fresh)).norm()))
    assert errors[1] < 0.6 * errors[0]


def test_a_report_counts_what_the_model_itself_has():
    model, x = attentive(), batch()
    dense = lnn.plan(model, x, [lnn.Quantize("int8")]).before
    split = lnn.plan(lnn.split_attention(model), x, [lnn.Quantize("int8")]).before
    assert split == dense


RECIPES = {
    "nothing": None,
    "low rank": [lnn.Apply(lnn.SVDLinear, rank=3, where=["first.*", "second.out_proj"])],
    "chain": [lnn.Apply(lnn.SVDLinear, rank=4, where="*_proj"), lnn.Prune(0.3), lnn.Quantize("int8")],
    "integers": [lnn.Quantize("int8", activations="int8")],
    "heads": [lnn.Prune(0.5, granularity="filter", where="*_proj")],
}


@pytest.mark.parametrize("name", list(RECIPES))
def test_a_file_is_loaded_into_a_model_that_is_not_split(name, tmp_path):
    model, x = lnn.split_attention(attentive(add_bias_kv=True)), batch()
    if RECIPES[name] is not None:
        model = lnn.compress_model(model, x, RECIPES[name], calibration=[x]).model
    lnn.save(model, tmp_path / "net.lrnn")
    for fresh in (attentive(add_bias_kv=True), lnn.split_attention(attentive(add_bias_kv=True))):
        loaded = lnn.load(tmp_path / "net.lrnn", fresh)
        assert torch.equal(run(loaded, x), run(model, x))
    assert model.first.num_heads == (2 if name == "heads" else 4)


def test_heads_removed_first_then_split(tmp_path):
    model, x = attentive(), batch()
    narrow = lnn.compress_model(model, x, [lnn.Prune(0.5, granularity="filter", where=["first*", "second*"])]).model
    assert type(narrow.first) is lnn.NarrowMultiheadAttention
    split = lnn.split_attention(narrow)
    torch.testing.assert_close(run(split, x), run(narrow, x), atol=1e-5, rtol=1e-5)
    small = lnn.compress_model(split, x, [lnn.Apply(lnn.SVDLinear, rank=3, where=["first.q_proj", "second.*"])]).model
    lnn.save(small, tmp_path / "net.lrnn")
    assert torch.equal(run(lnn.load(tmp_path / "net.lrnn", attentive()), x), run(small, x))


def test_a_file_of_a_split_model_does_not_fit_an_altered_one(tmp_path):
    class Doubled(nn.MultiheadAttention):
        def forward(self, *args, **kwargs):
            return (2 * super().forward(*args, **kwargs)[0], None)

    lnn.save(lnn.split_attention(attentive()), tmp_path / "net.lrnn")
    fresh = attentive()
    fresh.first.__class__ = Doubled
    state = copy.deepcopy(fresh.state_dict())
    with pytest.raises(FileFormatError, match=r"'first' is split in the file: .*Doubled overrides"):
        lnn.load(tmp_path / "net.lrnn", fresh)
    assert type(fresh.second) is nn.MultiheadAttention
    assert all(torch.equal(value, state[key]) for key, value in fresh.state_dict().items())


def test_the_report_of_a_model_that_is_not_split_says_what_to_do():
    report = lnn.plan(attentive(), batch(), [lnn.Apply(lnn.SVDLinear, rank=2)])
    (reason,) = (reason for reason, paths in report.left.items() if "first.out_proj" in paths)
    assert "never calls it: pass split_attention(model)" in reason


def test_decoders_attend_to_an_encoder_and_to_the_past():
    torch.manual_seed(0)
    model = nn.Transformer(16, 4, 1, 2, 32, dropout=0.0, batch_first=True).eval()
    source, target = torch.randn(2, 7, 16), torch.randn(2, 5, 16)
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    split = lnn.split_attention(model)
    for module in (model, split):
        module.train()  # where torch uses no fused kernel either
    got, expected = (net(source, target, tgt_mask=mask, tgt_is_causal=True) for net in (split, model))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    inputs = {"src": source, "tgt": target, "tgt_mask": mask}
    result = lnn.compress_model(split, inputs, [lnn.LowRank()], budget=lnn.Budget(params=0.6), calibration=[inputs])
    replaced = {row.path for row in result.report.rows if row.replaced}
    assert {f"decoder.layers.{i}.multihead_attn.{name}" for i in (0, 1) for name in PROJECTIONS} & replaced
