"""Pictures: what is drawn is what the report says, and nothing lies on top of something else."""

import itertools
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import lowrank_nn as lnn
from lowrank_nn.report.plots import candidates_figure, spectra_figure
from lowrank_nn.report.sweep_plot import sweep_figure
from tests.storage.models import seeded

matplotlib_text = pytest.importorskip("matplotlib.text")

MATRICES = (lnn.SVDConv2d, lnn.SVDLinear, lnn.TuckerConv2d)
X = torch.zeros(2, 3, 9, 9)


def make_net():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False),
        nn.Conv2d(16, 24, 3, bias=False),
        nn.Conv2d(24, 24, 1, bias=False),
        nn.Flatten(),
        nn.Linear(600, 20, bias=False),
    )


@pytest.fixture(scope="module")
def net():
    return seeded(make_net).eval()


@pytest.fixture(scope="module")
def report(net):
    return lnn.plan(net, X, lnn.LowRank(formats=MATRICES), budget=lnn.Budget(params=0.4))


def rows_of(report):
    return {row.path: row for row in report.rows}


def path_of(axes):
    return axes.get_title().split("\n")[0]


def texts_overlap(figure):
    """Pairs of texts of a figure whose boxes overlap."""
    figure.draw_without_rendering()
    found = {id(text): text for text in figure.findobj(matplotlib_text.Text)}.values()
    texts = [text for text in found if text.get_text().strip() and text.get_visible()]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
    apart = [(name, box) for name, box in boxes if box.width and box.height]
    return [(a, b) for (a, one), (b, two) in itertools.combinations(apart, 2) if one.overlaps(two)]


@pytest.mark.parametrize("ending", ["png", "pdf", "SVG"])
def test_files_are_written(net, report, tmp_path, ending):
    report.plot(tmp_path / f"candidates.{ending}")
    report.plot_spectra(str(tmp_path / f"spectra.{ending}"), net)
    lnn.plot_sweep([{"accuracy": 90, "params": 100}], tmp_path / f"sweep.{ending}")
    sizes = [path.stat().st_size for path in tmp_path.iterdir()]
    assert len(sizes) == 3
    assert min(sizes) > 2000


@pytest.mark.parametrize("cost", ["params", "macs", "bytes"])
def test_every_candidate_and_the_chosen_one(report, cost):
    figure = candidates_figure(report.choices, cost)
    assert [path_of(axes) for axes in figure.axes] == [row.path for row in report.rows]
    for axes, layer in zip(figure.axes, report.choices, strict=True):
        row = rows_of(report)[layer.path]
        star = next(line for line in axes.lines if line.get_marker() == "*" and len(line.get_xdata()))
        share = getattr(row.after, cost) / getattr(row.before, cost)
        assert star.get_xdata()[0] == pytest.approx(share)
        assert star.get_ydata()[0] == pytest.approx(row.error or 0.0)
        dots = np.concatenate([line.get_xydata() for line in axes.lines if line.get_marker() != "*"])
        dense = layer.candidates[0].cost
        expected = [(getattr(c.cost, cost) / getattr(dense, cost), c.error**0.5) for c in layer.candidates[1:]]
        np.testing.assert_allclose(sorted(map(tuple, dots)), sorted(expected))


def test_spectra_and_ranks(net, report):
    figure = spectra_figure(report.choices, net)
    assert [path_of(axes) for axes in figure.axes] == [row.path for row in report.rows]
    for axes, layer in zip(figure.axes, report.choices, strict=True):
        if layer.layer_class is not lnn.TuckerConv2d:
            continue
        weight = net.get_submodule(layer.path).weight.detach().numpy()
        curves = [line.get_ydata() for line in axes.lines if line.get_alpha() == 0.5]
        for curve, matrix in zip(curves, (weight, weight.swapaxes(0, 1)), strict=True):
            values = np.linalg.svd(matrix.reshape(len(matrix), -1), compute_uv=False)
            np.testing.assert_allclose(curve, values / values[0], rtol=1e-4)
        ranks = [
            limit if mode is None else mode for mode, limit in zip(layer.options["rank"], weight.shape, strict=False)
        ]
        dotted = [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == ":" and len(line.get_xdata())]
        assert dotted == [rank + 0.5 for rank in ranks]
    assert any(layer.layer_class is lnn.TuckerConv2d for layer in report.choices)


def test_the_result_draws_the_same(net, report):
    result = lnn.compress_model(net, X, lnn.LowRank(formats=MATRICES), budget=lnn.Budget(params=0.4))
    assert result.report.choices == result.plan.choices == report.choices


def test_no_text_lies_on_another(net, report):
    assert texts_overlap(candidates_figure(report.choices)) == []
    assert texts_overlap(spectra_figure(report.choices, net)) == []
    assert texts_overlap(candidates_figure(report.choices[1:2])) == []
    assert texts_overlap(candidates_figure(report.choices * 4)) == []
    rows = [{"method": name, "accuracy": 90 - i, "params": 3**i, "ms": 1 + i / 9} for i in range(12) for name in "ab"]
    assert texts_overlap(sweep_figure(rows)) == []


@pytest.mark.parametrize(("layers", "grid"), [(1, (1, 1)), (6, (1, 6)), (7, (2, 4)), (19, (4, 5)), (56, (7, 8))])
def test_many_layers_are_spread_over_rows(report, layers, grid):
    figure = candidates_figure([report.choices[1]] * layers, most=60)
    assert len(figure.axes) == layers
    specs = {axes.get_gridspec().get_geometry() for axes in figure.axes}
    assert specs == {grid}


def test_the_largest_layers_are_taken(net, report):
    figure = candidates_figure(report.choices, most=2)
    assert [path_of(axes) for axes in figure.axes] == ["1", "4"]
    assert "2 of 4 layers" in figure.get_suptitle()
    assert [path_of(axes) for axes in spectra_figure(report.choices, net, most=2).axes] == ["1", "4"]


@pytest.mark.parametrize("most", [0, -1, 2.5])
def test_a_number_of_layers_below_one_is_refused(net, report, most):
    for draw in (
        lambda: candidates_figure(report.choices, most=most),
        lambda: spectra_figure(report.choices, net, most),
    ):
        with pytest.raises(lnn.OptionError, match="plot: most must be"):
            draw()


def test_rank_rules_have_spectra_and_no_candidates(net, tmp_path):
    report = lnn.plan(net, X, lnn.LowRank(rank=lnn.Energy(0.5)))
    assert len(spectra_figure(report.choices, net).axes) == len([row for row in report.rows if row.replaced])
    with pytest.raises(lnn.OptionError, match="there are no candidates to draw"):
        report.plot(tmp_path / "none.png")


def test_a_rank_of_no_matrix_is_drawn_without_one(net):
    report = lnn.plan(net, X, lnn.Apply(lnn.CPConv2d, where="1", rank=6))
    (axes,) = spectra_figure(report.choices, net).axes
    assert axes.get_title() == "1\nCP rank 6"
    assert len([line for line in axes.lines if line.get_alpha() == 0.5]) == 2
    assert not any(line.get_linestyle() == ":" for line in axes.lines)


def test_pictures_of_nothing(net, tmp_path):
    report = lnn.plan(net, X, lnn.Quantize("int8"))
    with pytest.raises(lnn.OptionError, match="there is no layer to draw"):
        report.plot_spectra(tmp_path / "none.png", net)


def test_spectra_of_another_model(net, report, tmp_path):
    compressed = lnn.compress_model(net, X, lnn.Apply(lnn.CPConv2d, where="1", rank=6)).model
    for model in (nn.Linear(3, 3), compressed):
        with pytest.raises(lnn.OptionError, match=r"no dense layer \d\. Pass the model that was to be compressed"):
            report.plot_spectra(tmp_path / "none.png", model)


def test_what_cannot_be_drawn(report, tmp_path):
    with pytest.raises(lnn.OptionError, match="cost must be one of params, macs, bytes, latency, got 'flops'"):
        report.plot(tmp_path / "a.png", cost="flops")
    with pytest.raises(lnn.OptionError, match="latency only with a budget of it"):
        report.plot(tmp_path / "a.png", cost="latency")
    with pytest.raises(lnn.OptionError, match=r"a\.docx' must end in one of \..*\.png"):
        report.plot(tmp_path / "a.docx")


def test_a_sweep():
    rows = [{"method": "dense", "accuracy": 92.0, "params": 1000, "macs": 5e6, "ms": 2.0}]
    rows += [
        {"method": name, "accuracy": top - 100 / size, "params": size, "macs": 5e3 * size, "ms": size / 500}
        for name, top in (("knapsack", 92), ("uniform", 91))
        for size in (500, 100, 300)
    ]
    figure = sweep_figure(rows)
    assert [axes.get_xlabel() for axes in figure.axes] == ["parameters", "multiply-accumulates", "latency (ms)"]
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    np.testing.assert_allclose(lines["knapsack"].get_xdata(), [100, 300, 500])
    np.testing.assert_allclose(lines["uniform"].get_ydata(), [90, 91 - 1 / 3, 90.8])
    assert lines["dense"].get_ydata()[0] == 92
    assert len({line.get_color() for line in lines.values()}) == len({*lines}) - 1  # the star is as grey as the level
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["knapsack", "uniform", "dense"]


def test_a_sweep_of_another_metric():
    figure = sweep_figure([{"IoU": 0.5, "bytes": 10}, {"IoU": 0.6, "bytes": 20}], metric="IoU")
    assert [axes.get_ylabel() for axes in figure.axes] == ["IoU"]
    assert figure.legends == []


@pytest.mark.parametrize(
    "rows", [[], [{"accuracy": 1}], [{"params": 1}], [{"accuracy": 1, "params": 2}, {"accuracy": 1, "macs": 2}]]
)
def test_sweeps_that_cannot_be_drawn(rows):
    with pytest.raises(lnn.OptionError, match="every row needs 'accuracy' and the same of 'params', 'macs'"):
        sweep_figure(rows)


def test_without_matplotlib(report, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(lnn.MissingExtraError, match=r"pip install 'lowrank_nn\[plots\]'") as raised:
        report.plot(tmp_path / "a.png")
    assert isinstance(raised.value, ImportError)
    assert not list(tmp_path.iterdir())


def test_it_is_imported_only_when_drawing():
    sources = [path.read_text() for path in Path(lnn.__file__).parent.rglob("*.py")]
    assert not any(re.search(r"^(import|from) matplotlib", source, re.MULTILINE) for source in sources)
