"""Functions of torch that need no rule: those that only look at a tensor, and those that are written in Python."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

from lowrank_nn.graph.rules import functions

LOOKED_AT = """
    shape dtype device ndim is_cuda is_cpu is_mps is_meta is_sparse is_quantized is_mkldnn is_nested layout is_leaf
    requires_grad grad_fn itemsize nbytes output_nr _version size dim numel nelement ndimension __len__ stride
    is_floating_point is_complex is_signed element_size is_contiguous data_ptr storage_offset untyped_storage
    get_device is_inference is_same_size is_pinned is_shared is_coalesced __repr__ __format__ __hash__ is_set_to is_neg
    is_conj _is_view result_type _assert
"""

LOOKS = frozenset(function for name in LOOKED_AT.split() for function in functions(name))
"""Functions that look at a tensor's form, not at its values (or that print it)."""


@functools.cache
def python_body(function: Any) -> Callable[..., Any] | None:
    """Return a function of torch that is written in Python, without the check that would call the mode again."""
    if not isinstance(function, types.FunctionType) or not function.__module__.startswith("torch"):
        return None
    checks = [name for name in function.__globals__ if name.startswith("has_torch_function")]
    checks = [name for name in function.__code__.co_names if name in checks]
    if not checks:
        return None
    space = {**function.__globals__, **dict.fromkeys(checks, lambda *_: False)}
    copy = types.FunctionType(function.__code__, space, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
