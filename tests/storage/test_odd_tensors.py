"""Tensors and names that models rarely have, and that come back all the same."""

import pytest
import torch
from torch import nn

from lowrank_nn.storage import load, save

N = torch.Generator().manual_seed(0)


def holding(**buffers):
    model = nn.Module()
    for name, value in buffers.items():
        model.register_buffer(name, value)
    return model


def loaded(model, fresh, folder):
    save(model, folder / "a.lrnn")
    return load(folder / "a.lrnn", fresh).state_dict()


def test_conjugated_and_negated_views_are_not_what_they_are_of(tmp_path):
    c = torch.randn(4, 5, dtype=torch.complex64, generator=N)
    views = {"plain": c, "conjugated": c.conj(), "real": c.real, "imaginary": c.imag, "negated": c.conj().imag}
    assert views["conjugated"].data_ptr() == c.data_ptr()
    assert views["negated"].is_neg()
    fresh = holding(**{name: torch.zeros(4, 5, dtype=view.dtype) for name, view in views.items()})
    back = loaded(holding(**views), fresh, tmp_path)
    assert all(torch.equal(back[name], view) for name, view in views.items())


def test_expanded_buffers_of_a_fresh_model_get_memory(tmp_path):
    model = holding(positions=torch.arange(6).expand(1, -1), rows=torch.randn(1, 5, generator=N).expand(3, 5))
    fresh = holding(positions=torch.zeros(6).long().expand(1, -1), rows=torch.zeros(1, 5).expand(3, 5))
    back = loaded(model, fresh, tmp_path)
    assert all(torch.equal(back[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["__metadata__", "__lowrank_nn__", "", "a\nb", "\0", "\ud800", "x" * 5000])
@pytest.mark.parametrize("size", [3, 10_000])
def test_names(name, size, tmp_path):
    # As a class may that fills its table of buffers by itself.
    model, fresh = nn.Module(), nn.Module()
    model._buffers[name], fresh._buffers[name] = torch.randn(size, generator=N), torch.zeros(size)
    assert torch.equal(loaded(model, fresh, tmp_path)[name], model._buffers[name])
