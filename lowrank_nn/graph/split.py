"""Giving the attentions of a model linear layers for their projections."""

from __future__ import annotations

import logging
from collections import Counter

from torch import nn

from lowrank_nn.errors import PlanError, UnsupportedLayerError
from lowrank_nn.graph.attributes import MARK, mark_resized
from lowrank_nn.graph.derive import deep_copy
from lowrank_nn.graph.fold import uses_of
from lowrank_nn.graph.special import release_fast_path
from lowrank_nn.layers import SplitMultiheadAttention

logger = logging.getLogger(__name__)


def split_attention(model: nn.Module) -> nn.Module:
    """Return a copy of a model in which attentions have a linear layer for each projection.

    ``nn.MultiheadAttention`` keeps the projections of queries, keys and values as bare parameters and never calls its
    ``out_proj``, so no step of a recipe can act on them. In the copy each is a
    :class:`lowrank_nn.SplitMultiheadAttention`, which computes the same (up to rounding) with layers ``q_proj``,
    ``k_proj``, ``v_proj`` and ``out_proj``; these are compressed, pruned and quantized like any other. Torch's fused
    kernels for encoder layers do not apply to them: uncompressed, the copy may be slower than the model. A compressed
    copy is saved as usual, and loaded into a fresh model that is not split.

    An attention that overrides torch's forward, whose weights are computed before each call, or shared with another
    layer, stays as it is; which, and why, is logged.

    Args:
        model: Any module; not changed.

    Raises:
        PlanError: It holds no ``nn.MultiheadAttention``, or cannot be copied.
    """
    split = deep_copy(model, "split_attention")
    attentions = {path: module for path, module in split.named_modules() if isinstance(module, nn.MultiheadAttention)}
    if not attentions:
        raise PlanError(
            f"split_attention: {type(model).__name__} holds no nn.MultiheadAttention. Attentions of other classes call "
            "their projections: pass the model itself to compress_model."
        )
    uses = uses_of(split)
    for path, attention in attentions.items():
        try:
            _split_one_(attention, uses)
        except UnsupportedLayerError as error:
            logger.warning("split_attention: %s stays: %s", path, error.message)
    release_fast_path(split)
    return split


def _split_one_(attention: nn.MultiheadAttention, uses: Counter[int]) -> None:
    """Split one attention, in place.

    Args:
        attention: As for :meth:`lowrank_nn.SplitMultiheadAttention.split_`.
        uses: What :func:`lowrank_nn.graph.fold.uses_of` returned for the model that it is in.

    Raises:
        UnsupportedLayerError: It cannot be split, or a tensor that would be split is shared with another module.
    """
    shared = [name for name, p in attention.named_parameters(recurse=False) if uses[id(p)] > 1]
    if shared:
        raise UnsupportedLayerError(
            f"SplitMultiheadAttention: {', '.join(shared)} of {type(attention).__name__} is shared with another module."
        )
    SplitMultiheadAttention.split_(attention)
    if MARK in vars(attention):  # lost heads or channels, and so have the layers that its tensors now are
        for name in ("q_proj", "k_proj", "v_proj"):
            mark_resized(attention.get_submodule(name), ("in_features", "out_features"))
