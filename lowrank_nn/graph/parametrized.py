"""Layers whose weights are computed before each call: parametrizations, weight norm, spectral norm."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.utils import parametrize


def parametrized(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield the paths of layers whose weights are computed from others, with the reason to leave them alone."""
    for path, module in model.named_modules():
        names = [type(hook).__name__ for hook in module._forward_pre_hooks.values()]
        names = [name for name in names if name in ("WeightNorm", "SpectralNorm")]
        if parametrize.is_parametrized(module):
            lists = module.parametrizations.values()
            names += [type(one).__name__.lstrip("_") for several in lists for one in several]
        if names:
            yield path, f"{path} is parametrized by {', '.join(names)}: remove that first"
