"""Symbols as weights, indices and gaps have them."""

import numpy as np

BELL = np.exp(-((np.arange(256) - 127.5) ** 2) / 3200)
TWO_SIDED = np.exp(-abs(np.arange(16) - 7.5) / 2)
SPARSE = np.r_[0.7, 0.3 * TWO_SIDED[1:] / TWO_SIDED[1:].sum()]
GEOMETRIC = 0.8 ** np.arange(60)


def draw(count, shares, seed=0):
    """`count` symbols, each with a probability in proportion to its share."""
    shares = np.asarray(shares, float)
    return np.random.default_rng(seed).choice(len(shares), count, p=shares / shares.sum()).astype(np.uint8)
