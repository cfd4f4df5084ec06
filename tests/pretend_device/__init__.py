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
    """Return what is ``torch.pretend``, as ``torch.cuda`` is for CUDA; its random numbers are those of the CPU."""
    module = ModuleType("torch.pretend")
    module.is_available = module.is_initialized = lambda: True
    module._is_in_bad_fork = lambda: False
    module.device_count, module.current_device = lambda: 1, lambda: 0
    module.get_rng_state = lambda device=None: torch.get_rng_state()
    module.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    module.manual_seed_all = lambda seed: None
    module.get_amp_supported_dtype = lambda: [torch.bfloat16]
    return module
