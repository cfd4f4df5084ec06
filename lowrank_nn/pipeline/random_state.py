"""Seeding everything random inside a block, and giving the caller's random states back after it."""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Iterator

import numpy as np
import torch

from lowrank_nn.graph.preserve import seed_all


@contextlib.contextmanager
def preserved_random_state(seed: int) -> Iterator[None]:
    """Seed Python's, numpy's and torch's generators; on exit restore them and the warnings filters."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 - loaders of users draw from it
    with warnings.catch_warnings(), torch.random.fork_rng(devices):
        seed_all(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002
