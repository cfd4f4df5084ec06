"""Zoo models get random weights under a fixed seed, without a trace in the global random state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Entry = tuple[nn.Module, Any]


def seeded(build: Callable[[], Entry]) -> Callable[[], Entry]:
    """Return ``build`` with the random state forked, seeded, and weights as after some training."""

    def entry() -> Entry:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # torch.manual_seed would reach the CUDA devices too
            model, inputs = build()
            model.apply(_settle)
        return model.eval(), inputs

    return entry


@torch.no_grad()
def _settle(module: nn.Module) -> None:
    """Keep signals at scale through deep networks without normalisation, and make batch statistics matter."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    if isinstance(module, nn.BatchNorm2d):
        for tensor, low, high in (
            (module.weight, 0.7, 1.3),
            (module.bias, -0.2, 0.2),
            (module.running_mean, -0.2, 0.2),
            (module.running_var, 0.7, 1.3),
        ):
            assert isinstance(tensor, Tensor)
            tensor.uniform_(low, high)
