"""Training in several processes, as ``torchrun`` starts them; in one process all of this does nothing."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the process group that ``torchrun`` describes in the environment; leave one alone that is there already."""
    ours = dist.is_available() and not dist.is_initialized() and "TORCHELASTIC_RUN_ID" in os.environ
    if ours:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        if ours:
            dist.destroy_process_group()


def world_size() -> int:
    """Return the number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return which of them this is."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def wrap(model: nn.Module, device: torch.device, *, partly_used: bool) -> nn.Module:
    """Return the model as it is to be called for training: under DDP where there are several processes.

    Args:
        model: The model, on its device.
        device: That device.
        partly_used: Whether some parameters may get no gradient in a step.
    """
    if world_size() == 1:
        return model
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids, find_unused_parameters=partly_used)


def share_of_batches(loader: Iterable[Any], epoch: int) -> Iterable[Any]:
    """Return the batches of one epoch that are this process's.

    A loader with a ``DistributedSampler`` deals them out by itself; of any other, process r takes every n-th batch, and
    what is left over at the end is dropped, so that all processes take equally many steps.
    """
    sampler = getattr(loader, "sampler", None)
    if isinstance(sampler, DistributedSampler):
        sampler.set_epoch(epoch)
        return loader
    size = world_size()
    return loader if size == 1 else _every(loader, size, rank())


def steps_per_epoch(loader: Any) -> int:
    """Return how many steps an epoch has in each process."""
    dealt = isinstance(getattr(loader, "sampler", None), DistributedSampler)
    return len(loader) if dealt else len(loader) // world_size()


def synchronise_buffers(model: nn.Module) -> None:
    """Give every process the buffers (normalisation statistics) of the first; parameters are equal already."""
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def mean_over_processes(value: float, device: torch.device) -> float:
    """Return the mean of ``value`` over all processes."""
    if world_size() == 1:
        return value
    total = torch.tensor(value, dtype=torch.float32, device=device)
    dist.all_reduce(total)
    return float(total) / world_size()


def _every(loader: Iterable[Any], size: int, own: int) -> Iterator[Any]:
    batches = iter(loader)
    while len(group := list(itertools.islice(batches, size))) == size:
        yield group[own]
