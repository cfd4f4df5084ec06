"""Symbols as weights, indices and gaps have them."""

import numpy as np
from hypothesis import strategies as st

BELL = np.exp(-((np.arange(256) - 127.5) ** 2) / 3200)
TWO_SIDED = np.exp(-abs(np.arange(16) - 7.5) / 2)
SPARSE = np.r_[0.7, 0.3 * TWO_SIDED[1:] / TWO_SIDED[1:].sum()]
GEOMETRIC = 0.8 ** np.arange(60)


def draw(count, shares, seed=0):
    """`count` symbols, each with a probability in proportion to its share."""
    shares = np.asarray(shares, float)
    return np.random.default_rng(seed).choice(len(shares), count, p=shares / shares.sum()).astype(np.uint8)


def any_symbols():
    """Hypothesis strategy: up to 5000 symbols of an alphabet of up to 256, even, steep, or with gaps."""
    shapes = (lambda s: 1 + 0 * s, lambda s: 0.9**s, lambda s: 0.5**s, lambda s: 0.01**s, lambda s: s % 7 == 3)

    def symbols(count, alphabet, shape, seed):
        shares = np.asarray(shape(np.arange(256.0)), float)[:alphabet]
        return draw(count, shares if shares.any() else shares + 1, seed)

    return st.builds(symbols, st.integers(1, 5000), st.integers(1, 256), st.sampled_from(shapes), st.integers(0, 999))
