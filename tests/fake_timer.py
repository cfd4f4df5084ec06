"""A timer whose times are a formula, so that plans under a latency budget come out the same everywhere."""

import math
import zlib

from torch import nn

from lowrank_nn.cost import dense_macs
from lowrank_nn.graph import record
from lowrank_nn.graph.timing import Profile
from lowrank_nn.layers import CompressedLayer

CALL, PER_MAC, BETWEEN, REST = 0.01, 1e-6, 0.002, 0.05
"""Milliseconds of a call, of a multiply-accumulate, between the stages of a layer, and outside of all layers."""


class FakeTimer:
    """Stands in for `time_in_place`: output channels cost whole vectors of 16.

    Args:
        surprise: Every kind of call takes up to this share longer or shorter than by the formula, by its name.
        penalty: Factor on the rest of a model that holds compressed layers.
    """

    def __init__(self, surprise=0.0, penalty=1.0):
        self.surprise, self.penalty = surprise, penalty
        self.timed = []

    def __call__(self, models, example_inputs):
        self.timed.append([sorted(paths) for _, paths in models])
        return [self.profile(model, paths, example_inputs) for model, paths in models]

    def profile(self, model, paths, example_inputs):
        recording = record(model, example_inputs)
        sites = [recording[path] for path in paths]
        calls = {site.path: [self.call(site.layer, call.input_shape) for call in site.calls] for site in sites}
        compressed = any(isinstance(site.layer, CompressedLayer) for site in sites)
        rest = REST * (self.penalty if compressed else 1.0)
        return Profile(rest + sum(sum(times) for times in calls.values()), calls)

    def call(self, layer, input_shape):
        if isinstance(layer, CompressedLayer) and any(True for _ in layer.stages()):
            return BETWEEN
        dense = layer
        if isinstance(layer, CompressedLayer):
            dense = layer.replaces(**layer.dense_arguments(), device="meta")
        time = CALL + PER_MAC * _padded_macs(dense, input_shape)
        luck = zlib.crc32(f"{layer!r}{input_shape}".encode()) / 2**31 - 1
        return time * (1 + self.surprise * luck)


def _padded_macs(layer, input_shape):
    if isinstance(layer, (nn.RNNBase, nn.RNNCellBase)):
        return math.prod(input_shape[:-1]) * sum(p.numel() for p in layer.parameters() if p.dim() == 2)
    return dense_macs(layer, input_shape) * _padding(layer)


def _padding(layer):
    if isinstance(layer, nn.Linear):
        return -(-layer.out_features // 16) * 16 / layer.out_features
    if layer.groups == layer.in_channels:
        return 1.0
    out = layer.out_channels // layer.groups
    return -(-out // 16) * 16 / out
