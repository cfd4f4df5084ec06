"""Modules of torch that read the weights of their layers instead of calling them."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

PLAIN = (nn.Linear, NonDynamicallyQuantizableLinear, nn.LayerNorm)


def release_fast_path(model: nn.Module) -> None:
    """Make encoder layers call the layers inside them that are no longer torch's own.

    In eval mode without gradients ``nn.TransformerEncoderLayer`` hands the weights of its layers to one fused kernel,
    which knows dense weights only, and ``nn.TransformerEncoder`` packs padded batches for it. Both are switched
    off on the instances that hold a layer of another class; all others keep them. The switch is no part of the state
    dict: call this again after loading weights into a rebuilt model. Calling it twice does no harm.

    Args:
        model: Changed in place.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and _is_altered(module):
            module.activation_relu_or_gelu = 0
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(_is_altered(layer) for layer in module.layers):
            module.use_nested_tensor = False


def _is_altered(layer: nn.Module) -> bool:
    if not isinstance(layer, nn.TransformerEncoderLayer):
        return False
    parts = (layer.linear1, layer.linear2, layer.self_attn.out_proj, layer.norm1, layer.norm2)
    return any(type(part) not in PLAIN for part in parts) or type(layer.self_attn) is not nn.MultiheadAttention
