"""Seeding everything random inside a block, and giving the caller's random states back after it."""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Iterator

import numpy as np

from lowrank_nn.accelerator import generators_kept
from lowrank_nn.graph.preserve import seed_all


@contextlib.contextmanager
def preserved_random_state(seed: int) -> Iterator[None]:
    """Seed Python's, numpy's and torch's generators; on exit restore them and the warnings filters."""
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 - loaders of users draw from it
    with warnings.catch_warnings(), generators_kept():
        seed_all(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002
