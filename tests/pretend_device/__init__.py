"""A device for tests on machines without an accelerator, which refuses to be mixed with the CPU as real ones do."""

from __future__ import annotations

import functools
from pathlib import Path
from types import ModuleType

import torch


@functools.cache
def pretend_device() -> torch.device:
    """Build and register the device; needs a C++ compiler, and half a minute the first time.

    It stays registered until the process ends, and then is torch's current accelerator.
    """
    from torch.utils.cpp_extension import load  # needs setuptools, which only this asks for

    source = Path(__file__).with_name("pretend_device.cpp")
    extension = load("lowrank_nn_pretend_device", [str(source)], extra_cflags=["-O1"])
    torch.utils.rename_privateuse1_backend("pretend")
    torch._register_device_module("pretend", _module())
    torch.utils.generate_methods_for_privateuse1_backend()
    extension.register_hooks()
    torch.pretend.allow_float64 = extension.allow_float64
    return torch.device("pretend:0")


def _module() -> ModuleType:
    """Return what is ``torch.pretend``, as ``torch.cuda`` is for CUDA.

    Random numbers are drawn by the CPU's generator; the state kept here is only seeded, read and restored.
    """
    state = torch.zeros(1, dtype=torch.int64)
    module = ModuleType("torch.pretend")
    module.is_available = module.is_initialized = lambda: True
    module._is_in_bad_fork = lambda: False
    module.device_count, module.current_device = lambda: 1, lambda: 0
    module.get_rng_state = lambda device=None: state.clone()
    module.set_rng_state = lambda new, device=None: state.copy_(new)
    module.manual_seed_all = state.fill_
    module.get_amp_supported_dtype = lambda: [torch.bfloat16]
    return module
