"""What each step does, leaves and refuses, on small models."""

import pytest
import torch
from torch import nn

import lowrank_nn as lnn
from tests.storage.models import SmallNet, seeded
from tests.zoo import ZOO

X = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)
MATRICES = (lnn.SVDConv2d, lnn.SVDLinear, lnn.TuckerConv2d)


@pytest.fixture
def net():
    return seeded(SmallNet).eval()


def run(model, recipe, **options):
    return lnn.compress_model(model, X, recipe, **options)


def kinds(model):
    return {path: type(module).__name__ for path, module in model.named_modules() if path}


def reason(report, path):
    return next((text for text, paths in report.left.items() if path in paths), None)


def test_apply_by_pattern(net):
    recipe = [
        lnn.Apply(lnn.TuckerConv2d, where="conv2", rank=(4, 3)),
        lnn.Apply(lnn.SVDLinear, where="fc", rank=lnn.Params(0.8)),
    ]
    small = run(net, recipe).model
    expected = net.conv2, {"rank": (4, 3)}
    by_hand = lnn.TuckerConv2d.from_pretrained_layer(expected[0], **expected[1])
    assert small.conv2.weight.equal(by_hand.weight)
    assert small.fc.weight.equal(lnn.SVDLinear.from_pretrained_layer(net.fc, rank=lnn.Params(0.8)).weight)
    assert type(small.conv1) is nn.Conv2d


def test_apply_of_several_classes_takes_the_first_that_fits(net):
    small = run(net, lnn.Apply([lnn.SVDLinear, lnn.SVDConv2d], rank=2)).model
    assert [kinds(small)[name] for name in ("conv1", "conv2", "fc")] == ["SVDConv2d", "SVDConv2d", "SVDLinear"]


@pytest.mark.parametrize("order", ["spatial_first", "pointwise_first"])
def test_options_reach_the_layer(net, order):
    assert run(net, lnn.Apply(lnn.SVDConv2d, where="conv2", rank=3, order=order)).model.conv2.order == order


def test_formats_not_planned_by_default_have_to_be_named(net, monkeypatch):
    monkeypatch.setattr(lnn.SVDLinear, "planned_by_default", False)
    budget = lnn.Budget(params=0.95)
    with pytest.raises(lnn.PlanError, match=r"a kind that this step leaves alone: fc \(Linear\)"):
        run(net, lnn.LowRank(where="fc"), budget=budget)
    named = run(net, lnn.LowRank(where="fc", formats=[lnn.SVDLinear]), budget=budget)
    assert kinds(named.model)["fc"] == "SVDLinear"


def test_unknown_options_are_refused_at_once():
    with pytest.raises(lnn.PlanError, match=r"TuckerConv2d takes no option ranks; it takes rank"):
        lnn.Apply(lnn.TuckerConv2d, ranks=(4, 4))


@pytest.mark.parametrize(
    "step", [lnn.Apply(lnn.QuantConv2d, where="conv2", bits=9), lnn.Apply(lnn.QuantConv2d, bits=9)]
)
def test_errors_of_a_layer_say_where_it_is(net, step):
    with pytest.raises(lnn.OptionError, match=r"^conv\d: QuantConv2d: bits must be a whole number") as caught:
        run(net, step)
    assert caught.value.path == ("conv2" if step.where == "conv2" else "conv1")


def test_missing_options_are_refused_at_once():
    with pytest.raises(lnn.PlanError, match=r"TuckerConv2d needs rank: Apply\(TuckerConv2d, rank=\.\.\.\)"):
        lnn.Apply(lnn.TuckerConv2d, where="conv2")


def test_what_saves_nothing_stays_dense(net):
    result = run(net, lnn.Apply(lnn.TuckerConv2d, where="conv2", rank=(12, 8)))
    assert type(result.model.conv2) is nn.Conv2d
    assert "would save nothing" in reason(result.report, "conv2")
    assert result.report.after == result.report.before


def test_fewer_parameters_at_more_operations_leave_the_layer_and_say_so():
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    result = lnn.compress_model(model, torch.ones(1, 64), lnn.Apply(lnn.TTLinear, cores=2, rank=8))
    assert type(result.model[0]) is nn.Linear
    macs = 8 * (8 * 8 * 8 + 8 * 8 * 8)  # each core, of 8 x 8 blocks, is applied to 8 slices
    assert f"would take {macs:,} MACs in place of 4,096" in reason(result.report, "0")


def test_ranks_out_of_range_leave_the_layer_and_say_so(net):
    result = run(net, lnn.Apply(lnn.SVDLinear, where="fc", rank=99))
    assert type(result.model.fc) is nn.Linear
    assert "must be from 1 to 10" in reason(result.report, "fc")


def test_strict_lists_all_that_cannot_be_replaced(net):
    with pytest.raises(lnn.PlanError, match=r"conv1: .*; conv2: "):
        run(net, lnn.Apply(lnn.SVDConv2d, rank=99, strict=True))
    run(net, lnn.Apply(lnn.SVDConv2d, rank=2, strict=True))


@pytest.mark.parametrize(
    "step",
    [
        lnn.Apply(lnn.SVDLinear, where="conv1", rank=2),
        lnn.LowRank(where="norm", rank=lnn.VBMF()),
        lnn.LowRank(but_not="layer9", rank=lnn.VBMF()),
        lnn.Prune(0.5, where="layer9"),
        lnn.Quantize(but_not=["fc", "layer9"]),
    ],
)
def test_a_pattern_that_matches_nothing_lists_the_paths(net, step):
    with pytest.raises(lnn.PlanError, match=r"pattern '(conv1|norm|layer9)' matches no layer .*There are: .*fc"):
        run(net, step)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            [lnn.Quantize("int8"), lnn.Quantize("int4")],
            r"Quantize: .*There are: none. .* leaves alone: conv1 \(QuantConv2d",
        ),
        ([lnn.Codebook(3), lnn.Prune(0.5)], r"Prune: .* leaves alone: conv1 \(CodebookConv2d\), norm \(BatchNorm2d\)"),
        (lnn.LowRank(rank=lnn.VBMF(), where="norm"), r"There are: conv1, .* leaves alone: norm \(BatchNorm2d\)"),
    ],
)
def test_a_pattern_that_matches_other_kinds_names_them(net, recipe, message):
    with pytest.raises(lnn.PlanError, match=message):
        run(net, recipe)


def test_a_model_compressed_before_is_reported_as_it_is(net):
    small = run(net, [lnn.Prune(0.3, granularity="filter"), lnn.Quantize("int8", where=["conv2", "fc"])]).model
    shown = str(run(small, lnn.Prune(0.3, granularity="filter")).report)
    assert "Conv2d (dense)" in shown
    assert "QuantConv2d bits=8" in " ".join(shown.split())  # not "(dense)"
    assert "Remove filters before: " in " ".join(shown.split())


def test_filters_behind_integers_go_where_they_can(net):
    recipe = [lnn.Quantize("int8", activations="int8", where="fc"), lnn.Prune(0.5, granularity="filter")]
    result = run(net, recipe, calibration=[X])
    assert result.model.conv1.out_channels == result.model.conv2.in_channels == 4
    assert result.model.conv2.out_channels == 12
    assert any(
        "Remove filters before" in remark and "conv2" in paths for remark, paths in result.report.remarks.items()
    )


def test_but_not_by_the_path_of_the_parent(net):
    small = run(net, [lnn.Apply(lnn.SVDLinear, rank=3), lnn.Quantize(but_not="fc")]).model
    assert kinds(small)["fc.reduce"] == kinds(small)["fc.expand"] == "Linear"
    assert kinds(small)["conv1"] == "QuantConv2d"


def test_pruning_and_quantizing_reach_the_factors(net):
    recipe = [lnn.Apply(lnn.TuckerConv2d, where="conv2", rank=(4, 3)), lnn.Prune(0.5), lnn.Quantize("int4")]
    small = run(net, recipe).model
    assert type(small.conv2) is lnn.TuckerConv2d
    assert {type(stage) for stage in small.conv2.stages()} == {lnn.QuantConv2d}
    assert all(stage.bits == 4 for stage in small.conv2.stages())
    for stage in small.conv2.stages():  # half of each factor is zero, also after rounding
        assert (stage.weight == 0).sum() >= stage.weight.numel() // 2
    assert kinds(small)["fc"] == "QuantLinear"


@pytest.mark.parametrize("first", [lnn.Prune(0.5), lnn.Quantize("int8")])
def test_low_rank_after_what_it_would_destroy(net, first):
    result = run(net, [first, lnn.LowRank(rank=lnn.Energy(0.5))])
    assert "low-rank steps first" in reason(result.report, "fc")
    with pytest.raises(lnn.BudgetError, match="put LowRank first"):
        run(net, [first, lnn.LowRank(formats=MATRICES)], budget=lnn.Budget(params=0.5))


def test_low_rank_leaves_low_rank_layers_alone(net):
    recipe = [lnn.Apply(lnn.SVDLinear, where="fc", rank=3), lnn.LowRank(rank=lnn.Energy(0.5))]
    small = run(net, recipe).model
    assert type(small.fc) is lnn.SVDLinear
    assert small.fc.rank == 3
    assert type(small.fc.reduce) is nn.Linear


def test_low_rank_with_a_rule_takes_tucker_and_the_svd():
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 1), nn.Flatten(), nn.Linear(576, 9)))
    small = run(model, lnn.LowRank(rank=lnn.Energy(0.4))).model
    assert [type(layer).__name__ for layer in small] == ["TuckerConv2d", "SVDConv2d", "Flatten", "SVDLinear"]


def test_low_rank_needs_a_budget_or_a_rule(net):
    with pytest.raises(lnn.PlanError, match=r"no budget to share out.*Budget\(params=0\.3\)"):
        run(net, lnn.LowRank())
    with pytest.raises(lnn.OptionError, match=r"rank must be a rule .*Apply\(TuckerConv2d, rank=...\)"):
        lnn.LowRank(rank=4)


def test_low_rank_recovers_what_is_of_low_rank():
    def make():
        model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten())
        with torch.no_grad():
            model[2].weight.copy_(torch.einsum("oa,abhw,bi->oihw", *map(torch.randn, ((16, 3), (3, 4, 3, 3), (4, 16)))))
        return model

    model = seeded(make)
    small = lnn.compress_model(model, X, budget=lnn.Budget(params=0.5)).model
    with torch.no_grad():
        torch.testing.assert_close(small(X), model(X), rtol=1e-3, atol=1e-3)


def test_layers_that_are_never_called_stay(net):
    net.spare = nn.Linear(30, 20)
    for recipe in (lnn.LowRank(rank=lnn.Energy(0.5)), lnn.Prune(0.5), lnn.Quantize("int8")):
        result = run(net, recipe)
        assert type(result.model.spare) is nn.Linear
        assert "the model never calls it" in reason(result.report, "spare")


@pytest.mark.parametrize("recipe", [lnn.LowRank(rank=lnn.Energy(0.5)), lnn.Prune(0.5), lnn.Quantize("int8")])
def test_tied_weights_stay_tied_and_reused_layers_stay_one(recipe):
    model, tokens = ZOO["tied"]()
    result = lnn.compress_model(model, tokens, recipe)
    small = result.model
    assert small.output.weight is small.embed.weight
    assert "its weight is shared with embed.weight" in reason(result.report, "output")
    assert isinstance(small.mix, lnn.CompressedLayer)


def test_modules_under_two_names_become_one():
    conv = seeded(lambda: nn.Conv2d(3, 3, 3, padding=1))
    model = nn.Sequential(conv, nn.ReLU(), conv)
    small = run(model, lnn.Apply(lnn.SVDConv2d, where="2", rank=1)).model
    assert type(small[0]) is lnn.SVDConv2d
    assert small[0] is small[2]


@pytest.mark.parametrize("wrong", [0, 1, -0.5, 1.5, float("nan")])
def test_prune_amounts(wrong):
    with pytest.raises(lnn.OptionError, match="amount"):
        lnn.Prune(wrong)


def test_prune_obd():
    with pytest.raises(lnn.OptionError, match=r"needs batches=\.\.\. and loss"):
        lnn.Prune(0.5, criterion="obd")
    net, calls = seeded(SmallNet).eval(), []

    def loss(model, batch):
        calls.append(batch)
        return model(batch).square().mean()

    step = lnn.Prune(0.5, criterion="obd", batches=[X, X + 1], loss=loss)
    result = run(net, step)
    assert len(calls) == 4  # samples
    assert all((result.model.get_submodule(name).weight == 0).any() for name in ("conv1", "conv2", "fc"))
    assert not all(
        result.model.get_submodule(name).weight.equal(run(net, lnn.Prune(0.5)).model.get_submodule(name).weight)
        for name in ("conv1", "conv2", "fc")
    )
    assert all(p.grad is None for p in net.parameters())


def test_prune_leaves_layers_without_the_granularity(net):
    result = run(net, lnn.Prune(0.5, granularity="kernel"))
    assert type(result.model.fc) is nn.Linear
    assert "no units of granularity 'kernel'" in reason(result.report, "fc")


def test_unknown_names_of_granularity_and_criterion_are_errors(net):
    for options in ({"granularity": "molecule"}, {"criterion": "vibes"}):
        with pytest.raises(lnn.OptionError, match=r"molecule|vibes"):
            run(net, lnn.Prune(0.5, **options))


@pytest.mark.parametrize("wrong", ["int1", "int9", "int16", "fp8", "8", ""])
def test_quantize_names(wrong):
    with pytest.raises(lnn.OptionError, match="weights must be 'int2' to 'int8'"):
        lnn.Quantize(wrong)
    with pytest.raises(lnn.OptionError, match="activations must be 'int2' to 'int8'"):
        lnn.Quantize(activations=wrong)


def test_quantize_other_options_are_checked(net):
    for options in ({"scheme": "vague"}, {"observer": "telescope", "activations": "int8"}):
        with pytest.raises(lnn.OptionError, match=r"vague|telescope"):
            run(net, lnn.Quantize(**options), calibration=[X])


def test_activations_need_calibration(net):
    recipe = lnn.Quantize(activations="int8")
    with pytest.raises(lnn.CalibrationError, match="need calibration batches"):
        run(net, recipe)
    with pytest.raises(lnn.CalibrationError):
        run(net, recipe, calibration=[])
    with pytest.raises(lnn.CalibrationError, match="Quantize"):
        run(net, recipe, calibration=[torch.full_like(X, float("nan"))])


def test_calibration_by_an_iterator_serves_several_steps(net):
    recipe = [lnn.Quantize(activations="int8", where="fc"), lnn.Quantize(activations="int8", where="conv*")]
    once = run(net, recipe, calibration=iter([X, 2 * X])).model
    again = run(net, recipe, calibration=[X, 2 * X]).model
    with torch.no_grad():
        assert once(X).equal(again(X))


def test_recipes_by_name(net):
    by_name = run(net, "one-shot").report
    spelled = run(net, [lnn.LowRank(rank=lnn.VBMF())]).report
    assert by_name.rows == spelled.rows
    with pytest.raises(lnn.PlanError, match=r"no recipe 'two-shot'; there are: 'one-shot'"):
        run(net, ["two-shot"])
    with pytest.raises(lnn.PlanError, match="no steps"):
        run(net, [])
    with pytest.raises(lnn.PlanError, match="expected steps"):
        run(net, [lnn.LowRank])


def test_steps_show_their_options():
    assert repr(lnn.Apply(lnn.SVDLinear, where="fc", rank=3)) == "Apply(layer_class=SVDLinear, where='fc', rank=3)"
    assert repr(lnn.Prune(0.5, but_not="fc")) == "Prune(amount=0.5, but_not='fc')"
    filters = lnn.Prune(0.5, granularity="filter", round_to=16)
    assert repr(filters) == "Prune(amount=0.5, granularity='filter', scope='layer', round_to=16, min_keep=0.1)"
    assert repr(lnn.LowRank()) == "LowRank()"
    assert repr(lnn.LowRank(rank=lnn.VBMF(), where=["a", "b"])) == "LowRank(where=['a', 'b'], rank=VBMF(weaken=1.0))"
    assert repr(lnn.LowRank(formats=[lnn.SVDLinear], at_most={"fc": 0.2})) == (
        "LowRank(formats=[SVDLinear], at_most={'fc': 0.2})"
    )
    assert repr(lnn.Quantize(activations="int4")) == "Quantize(weights='int8', activations='int4')"
    assert repr(lnn.FineTune([0], 2, lr=1e-3)) == "FineTune(epochs=2, lr=0.001)"
    assert repr(lnn.deep_compression()) == "[Prune(amount=0.9), Codebook(bits=5, conv_bits=8)]"


class Curious(SmallNet):
    def forward(self, x):
        return self.conv1(x) * self.conv1.transposed


def test_a_model_that_needs_what_its_layer_was():
    net = Curious()
    with pytest.raises(lnn.PlanError, match=r"compressed model does not run where the dense one does.*but_not"):
        run(net, lnn.Quantize(where="conv1"))


def test_layers_that_cannot_be_carried_over_say_why():
    model = seeded(lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(30, 20)), nn.Linear(20, 20)))
    for recipe in (lnn.LowRank(rank=lnn.Energy(0.5)), lnn.LowRank(formats=MATRICES), lnn.Prune(0.5), lnn.Quantize()):
        result = lnn.compress_model(model, torch.ones(2, 30), recipe, budget=lnn.Budget(bytes=0.9))
        assert "parametrized weight" in reason(result.report, "0")
        assert result.report.file_bytes is None  # save refuses parametrizations
        assert str(result.report)
        assert isinstance(result.model[1], lnn.CompressedLayer)


def test_a_given_model_with_compressed_layers_goes_on(net):
    first = run(net, lnn.Apply(lnn.SVDLinear, where="fc", rank=3)).model
    second = run(first, lnn.Quantize("int8")).model
    assert kinds(second)["fc.reduce"] == "QuantLinear"
    third = run(first, lnn.LowRank(formats=MATRICES), budget=lnn.Budget(params=0.8)).model
    assert kinds(third)["fc"] == "SVDLinear"


def test_a_model_without_anything_to_replace():
    model = seeded(lambda: nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU()))
    for recipe in (
        lnn.LowRank(rank=lnn.VBMF()),
        lnn.Prune(0.5),
        lnn.Quantize(),
        lnn.Apply(lnn.TuckerConv2d, rank=(2, 2)),
    ):
        with pytest.raises(lnn.PlanError, match=r"matches no layer that this step can act on\. There are: none"):
            lnn.compress_model(model, torch.ones(1, 3, 9), recipe)


def test_full_ranks_are_refused_under_strict_since_they_save_nothing(net):
    with pytest.raises(lnn.PlanError, match=r"conv2: .*would save nothing"):
        run(net, lnn.Apply(lnn.TuckerConv2d, where="conv2", rank=(12, 8), strict=True))
