"""What modules become whose forward takes a number of heads and a width for granted, when they have lost heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

NarrowForm = Callable[[Any], None]
"""``narrow(module)``: gives a module that lost heads or inputs, in place, a class that computes the rest of it."""

_FORMS: dict[str, NarrowForm] = {}


def register_narrow_form(cls: type[nn.Module] | str, narrow: NarrowForm) -> None:
    """Say what a module class becomes when heads are removed from it, if its own forward cannot do with fewer.

    For attention modules that compute the width of a head as ``embed_dim // num_heads``, which holds only as long as
    the heads fill the width of the inputs. ``nn.MultiheadAttention`` and the window attentions of torchvision's
    Swin transformers are registered.

    Args:
        cls: The class, or its qualified name (``"package.module.Class"``), which imports nothing. Subclasses are meant
            too, unless they have a forward of their own or are registered themselves.
        narrow: ``narrow(module)``, called when the tensors of the module are smaller already, and ``num_heads`` (or
            what it is called) too; in :func:`lowrank_nn.load` likewise. It reads sizes from the tensors, and sets the
            module's ``__class__`` to a subclass of ``nn.Module`` with the same parameters and buffers, where the
            class that it has cannot go on. Calling it twice does no harm. It may raise
            :class:`~lowrank_nn.errors.UnsupportedLayerError`.
    """
    _FORMS[cls if isinstance(cls, str) else _name(cls)] = narrow


def narrow_module(module: nn.Module) -> None:
    """Have a module that lost heads or inputs go on without them, if something is registered for its forward.

    Args:
        module: Changed in place.

    Raises:
        UnsupportedLayerError: It cannot do with fewer heads.
    """
    for cls in type(module).__mro__:
        if _name(cls) in _FORMS:
            _FORMS[_name(cls)](module)
            return
        if "forward" in vars(cls):  # what classes further up are registered for is another forward
            return


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
