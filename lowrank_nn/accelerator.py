"""The accelerator of this process, of whatever kind: CUDA, XPU, MPS or one of a vendor's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch


def used_accelerator() -> torch.device | None:
    """Return the accelerator if this process has used it; asking it for anything would start it otherwise."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None:
        return None
    module = torch.get_device_module(accelerator)
    # Some, such as MPS, need no start.
    started = module.is_initialized() if hasattr(module, "is_initialized") else module.is_available()
    return accelerator if started else None


def generators_kept() -> AbstractContextManager[None]:
    """Return a context that restores torch's global generators on exit: the CPU's and those of the accelerator."""
    accelerator = used_accelerator()
    if accelerator is None:
        return torch.random.fork_rng([])
    devices = range(torch.get_device_module(accelerator).device_count())
    return torch.random.fork_rng(devices, device_type=accelerator.type)


def device_types() -> list[str]:
    """Return the types of the devices that may be in use, such as ``["cpu", "cuda"]``."""
    accelerator = used_accelerator()
    return ["cpu"] if accelerator is None else ["cpu", accelerator.type]


@contextmanager
def full_precision() -> Iterator[None]:
    """Switch off an autocast that the caller is in; as a decorator too."""
    with ExitStack() as stack:
        for kind in filter(torch.is_autocast_enabled, device_types()):
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def has_float64(device: torch.device) -> bool:
    """Whether tensors of float64 can be on ``device``; MPS, for one, has none."""
    try:
        torch.empty(0, dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):
        return False
    return True
