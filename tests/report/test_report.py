"""Reports: what they say, against the models themselves, and how they look."""

import dataclasses
import html.parser
import json
import re

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import lowrank_nn as lnn
from lowrank_nn.cost import Cost
from lowrank_nn.graph import record
from lowrank_nn.report import Latency, Report, Row, make_report
from lowrank_nn.report.describe import describe
from lowrank_nn.report.render import count
from tests.storage.models import SmallNet, seeded
from tests.zoo import ZOO

MATRICES = (lnn.SVDConv2d, lnn.SVDLinear, lnn.TuckerConv2d)


@pytest.fixture(scope="module")
def case():
    model, inputs = ZOO["vit"]()
    recipe = [lnn.LowRank(formats=MATRICES, but_not="head")]
    return model, inputs, lnn.compress_model(model, inputs, recipe, budget=lnn.Budget(params=0.6))


def flops(model, inputs):
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    return counter.get_total_flops()


def test_totals_are_those_of_the_returned_model(case):
    model, inputs, result = case
    for net, cost in ((model, result.report.before), (result.model, result.report.after)):
        assert cost.params == cost.nonzeros == sum(p.numel() for p in net.parameters())
        assert 2 * cost.macs == flops(net, inputs)
        assert cost.bytes == sum(t.numel() * t.element_size() for t in net.state_dict().values())


def test_names_typed_at_a_prompt_show_what_matters(case):
    _, _, result = case
    assert repr(result.report) == str(result.report)
    ratio = result.report.before.params / result.report.after.params
    assert re.fullmatch(rf"Result\(\w+, smaller by: params {ratio:.2f}x, macs .*x, bytes .*x, file .*x\)", repr(result))


def test_rows_and_the_rest_add_up(case):
    _, _, result = case
    for report in (result.report, result.plan):
        assert sum((row.after for row in report.rows), report.rest) == report.after
        for name in ("params", "macs", "bytes", "nonzeros"):
            assert getattr(report.rest, name) >= 0


@pytest.mark.parametrize("name", ["tied", "transformer", "crnn", "mobilenet_v2"])
def test_nothing_counts_twice(name):
    model, inputs = ZOO[name]()
    recording = record(model, inputs)
    report = make_report("result", (model, recording), (model, recording), left={})
    assert report.before == report.after
    assert report.after.params == sum(p.numel() for p in model.parameters())
    assert sum((row.after for row in report.rows), report.rest) == report.after
    assert all(not row.replaced for row in report.rows)


def test_two_layers_of_one_weight_do_not_leave_less_than_nothing():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False))
    model[2].weight = model[0].weight
    recording = record(model, torch.ones(1, 4))
    report = make_report("result", (model, recording), (model, recording), left={})
    assert (report.after.params, report.rest.params) == (16, 0)
    assert sum((row.after for row in report.rows), report.rest) == report.after


def test_errors_are_measured(case):
    model, _, result = case
    for row in result.report.rows:
        old = model.get_submodule(row.path)
        new = result.model.get_submodule(row.path)
        if row.replaced:
            change = (new.weight.detach() - old.weight.detach()).norm() / old.weight.detach().norm()
            assert row.error == pytest.approx(float(change), rel=1e-4)
        else:
            assert row.error is None
            assert new.weight.equal(old.weight)


def test_planned_errors_foretell_the_measured(case):
    _, _, result = case
    for planned, measured in zip(result.plan.rows, result.report.rows, strict=True):
        if measured.error is not None:
            assert measured.error == pytest.approx(planned.error, rel=0.02)


def test_files_have_the_size_that_save_writes(case, tmp_path):
    model, _, result = case
    for net, size in zip((model, result.model), result.report.file_bytes, strict=True):
        lnn.save(net, tmp_path / "net.lrnn")
        assert (tmp_path / "net.lrnn").stat().st_size == size
    assert result.plan.file_bytes is None
    assert "file" not in result.plan.compression_rate
    assert "saved file" not in str(result.plan)


def example(rows=3, path="layer{}.conv", latency=True, left=None, options="rank=(8, 4) bits=8", nonzeros=300):
    before, after = Cost(1000, 2000, 4000, 1000), Cost(400, 500, 1000, nonzeros)
    table = tuple(
        Row(path.format(i), "Conv2d", "TuckerConv2d+QuantConv2d", options, 0.125, before, after) for i in range(rows)
    )
    whole = Cost(rows * 1000, rows * 2000, rows * 4000, rows * 1000)
    small = Cost(rows * 400 + 10, rows * 500, rows * 1000 + 40, rows * nonzeros + 10)
    return Report(
        "result",
        table,
        Cost(10, 0, 40, 10),
        whole,
        small,
        (9000, 3000),
        left or {},
        Latency(3.0, 1.5, 2.1, 4, "cpu") if latency else None,
    )


def test_ratios():
    report = example(rows=1)
    assert report.compression_rate == {"params": 1000 / 410, "macs": 4.0, "bytes": 4000 / 1040, "file": 3.0}
    assert report.index_space_saving["macs"] == (2000 - 500) / 500
    assert report.index_space_saving["file"] == 2.0
    assert report.speedup == 2.1
    assert example(latency=False).speedup is None


def test_a_model_without_products_has_ratio_one():
    report = Report("plan", (), Cost(), Cost(), Cost(), None, {})
    assert report.compression_rate == {"params": 1.0, "macs": 1.0, "bytes": 1.0}
    assert str(report)
    assert report.to_markdown()


LONG = {
    "short": {},
    "many rows": {"rows": 300},
    "long paths": {"path": "encoder.blocks.{}." + "transformer.attention." * 8 + "projection"},
    "one long word": {"path": "x" * 300 + "{}"},
    "other scripts": {"path": "слой{}.свёртка_größe.層"},
    "long options": {"options": "rank=(1024, 1024, 1024, 1024) sparsity=0.125 unit=element bits=8 act=8" * 3},
    "long reasons": {"left": {"it " + "cannot be done " * 30: tuple(f"layer{i}.conv" for i in range(90))}},
    "unbroken reasons": {"left": {"r" * 400: ("p" * 500,)}},
}


@pytest.mark.parametrize("name", list(LONG))
def test_text_is_never_wider_than_a_page(name):
    report = example(**LONG[name])
    lines = str(report).splitlines()
    assert max(map(len, lines)) <= 120
    table = lines[2 : 6 + len(report.rows) + 1]
    ends = {len(line) for line in table if not line.startswith("---")}
    assert len(ends) == 1, "the last column is aligned"
    assert sum("TuckerConv2d" in line or ".." in line for line in table) >= len(report.rows)


def test_huge_numbers_stay_within_the_page():
    big = Cost(987_654_321_000, 987_654_321_000_000_000, 10**18, 123_456_789_000)
    row = Row("a" * 90, "Conv2d", "TuckerConv2d+QuantConv2d", "rank=(100, 100) bits=8 act=8", 0.123, big, big)
    report = Report("result", (row,), big, big, big, (10**18, 10**18), {}, None)
    assert max(map(len, str(report).splitlines())) <= 120


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (512, "512"),
        (9999, "9999"),
        (12_345, "12.3k"),
        (999_600, "1000k"),
        (1_050_000, "1.05M"),
        (12_600_000, "12.6M"),
        (3.2e9, "3.2G"),
        (4.5e13, "45T"),
    ],
)
def test_counts(number, text):
    assert count(number) == text


def test_what_is_in_the_text(case):
    _, _, result = case
    text = str(result.report)
    for row in result.report.rows:
        assert row.path in text
    assert re.search(r"head +Linear \(dense\) .* 330 +of 330", text)
    assert re.search(r"total .*of 32\.6k .*of 1\.11M", text)
    assert "compression rate alpha = a/a*: params 1.6" in text
    assert "left as they were (no step of the recipe acts on them): head" in text
    assert "speed-up" not in text
    assert "speed-up delta = s/s*: 2.10x (3.00 ms -> 1.50 ms, median, cpu, 4 threads)" in str(example())


def test_the_model_itself_as_the_layer():
    layer, inputs = seeded(lambda: nn.Linear(30, 20)), torch.ones(2, 30)
    result = lnn.compress_model(layer, inputs, lnn.Apply(lnn.SVDLinear, rank=3))
    assert "(model) SVDLinear rank=3" in " ".join(str(result.report).split())


def test_zeros_are_reported_beside_the_params():
    model, inputs = seeded(SmallNet), torch.ones(2, 3, 8, 8)
    result = lnn.compress_model(model, inputs, lnn.Prune(0.75, where="fc"))
    row = result.report.rows[-1]
    assert (row.path, row.after.params, row.after.nonzeros) == ("fc", 130, 40)
    assert re.search(r"fc +PrunedLinear +sparsity=0.75 unit=element .* 130 nz 40 +of +130", str(result.report))


def test_layers_that_share_values_are_left_like_any_other():
    model = seeded(lambda: nn.Sequential(lnn.HashedLinear(8, 8, buckets=4), nn.Linear(8, 8)))
    left = lnn.plan(model, torch.ones(2, 8), lnn.Quantize("int8")).left
    assert left == {"no step of the recipe acts on them": ("0",)}


def test_markdown_is_a_table(case):
    _, _, result = case
    lines = result.report.to_markdown().splitlines()
    table = lines[: lines.index("")]
    assert {line.count("|") for line in table} == {10}
    assert len(table) == 2 + len(result.report.rows) + 2
    assert set(table[1]) <= set("|-: ")
    assert all(line.startswith("- ") for line in lines[lines.index("") + 1 :])


def test_pipes_in_names_do_not_break_the_markdown():
    first_row = example(path="a|b{}").to_markdown().splitlines()[2]
    assert "a\\|b0" in first_row


class Checker(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.cells, self.text = [], 0, ""

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.cells += tag == "td"

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_html_is_well_formed_and_escaped():
    report = example(path="<script>{}&")
    checker = Checker()
    checker.feed(report._repr_html_())
    checker.close()
    assert checker.open == []
    assert checker.cells == 9 * (3 + 2)
    assert "<script>0&" in checker.text
    assert "<script>" not in report._repr_html_()


def test_dict_goes_through_json(case):
    _, _, result = case
    for report in (result.report, result.plan, example()):
        values = json.loads(json.dumps(report.to_dict(), allow_nan=False))
        assert values["title"] == report.title
        assert [row["path"] for row in values["rows"]] == [row.path for row in report.rows]
        assert values["after"]["params"] == report.after.params
        assert values["compression_rate"] == report.compression_rate
        assert values["left"] == {reason: list(paths) for reason, paths in report.left.items()}


def test_layers_of_the_given_model_that_were_compressed_before():
    model, inputs = seeded(SmallNet), torch.ones(2, 3, 8, 8)
    once = lnn.compress_model(model, inputs, lnn.Apply(lnn.TuckerConv2d, where="conv2", rank=(4, 3))).model
    twice = lnn.compress_model(once, inputs, lnn.Quantize("int8", where="conv2"))
    row = next(row for row in twice.report.rows if row.path == "conv2")
    assert (row.was, row.became) == ("TuckerConv2d", "TuckerConv2d+QuantConv2d")
    assert row.replaced
    assert row.after.params == row.before.params
    assert row.after.bytes < row.before.bytes


def test_describe():
    conv = seeded(lambda: nn.Conv2d(16, 16, 3))
    tucker = lnn.TuckerConv2d.from_pretrained_layer(conv, rank=(8, 4))
    assert describe(conv) == ("Conv2d", "")
    assert describe(tucker) == ("TuckerConv2d", "rank=(8, 4)")
    tucker.core = lnn.QuantConv2d.from_pretrained_layer(tucker.core, bits=4)
    assert describe(tucker) == ("TuckerConv2d+QuantConv2d", "rank=(8, 4) bits=4")
    tucker.expand = lnn.QuantConv2d.from_pretrained_layer(tucker.expand, bits=8)
    assert describe(tucker) == ("TuckerConv2d+QuantConv2d", "rank=(8, 4) bits=4..8")
    pruned = lnn.PrunedConv2d.from_pretrained_layer(conv, sparsity=0.25)
    assert describe(pruned) == ("PrunedConv2d", "sparsity=0.25 unit=element")


def test_remarks_are_shown_everywhere():
    remark = "fitted against its own inputs (called twice)"
    report = dataclasses.replace(example(), remarks={remark: ("a.b", "c")})
    assert f"{remark}: a.b, c" in str(report)
    assert f"- {remark}: a.b, c" in report.to_markdown()
    assert f"<li>{remark}: a.b, c</li>" in report._repr_html_()
    assert report.to_dict()["remarks"] == {remark: ["a.b", "c"]}
