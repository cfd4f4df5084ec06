"""Training in several processes, as ``torchrun`` starts them; in one process all of this does nothing."""

from __future__ import annotations

import atexit
import itertools
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler

from lowrank_nn.errors import TrainingError
from lowrank_nn.graph.preserve import random_states, seed_all, set_random_states


def join_processes(device: torch.device) -> None:
    """Join the processes that ``torchrun`` started; a group that the caller has joined already is left alone.

    The group stays until the process ends: destroying one while its threads still hold tensors can deadlock, and the
    next step would only build it again.
    """
    if dist.is_available() and dist.is_torchelastic_launched() and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(_leave)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def world_size() -> int:
    """Return the number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return which of them this is."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


class ParallelModel(DistributedDataParallel):
    """A model under ``DistributedDataParallel`` whose attributes can be read as those of the model itself.

    So a loss that looks at ``model.config`` is the same in one process and in several.
    """

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the wrapper, or else of the model."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


def wrap(model: nn.Module) -> nn.Module:
    """Return the model as it is to be called for training: under DDP where there are several processes.

    Every process starts with the first one's parameters and buffers. Parameters may be without gradient in a step:
    layers that are never called, branches that depend on data.
    """
    if world_size() == 1:
        return model
    broadcast(model.buffers())
    with warnings.catch_warnings():
        # Newer releases of torch have another name for broadcast_buffers, which older ones do not know.
        warnings.simplefilter("ignore", FutureWarning)
        # Buffers are averaged after each epoch: written in every forward, they would forbid two forwards in one step.
        wrapped = ParallelModel(model, find_unused_parameters=True, broadcast_buffers=False)
    # It warns once when all parameters did have a gradient. FineTune runs where the filters are restored afterwards.
    warnings.filterwarnings("ignore", "find_unused_parameters=True was specified", UserWarning)
    return wrapped


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Give every process the mean of the gradients of parameters that are not under DDP."""
    if world_size() == 1:
        return
    for parameter in parameters:
        if parameter.requires_grad:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.contiguous()
            dist.all_reduce(gradient)
            parameter.grad = gradient / world_size()


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Give every process the first one's values."""
    if world_size() == 1:
        return
    with torch.no_grad():
        for tensor in tensors:
            values = tensor.detach().contiguous()
            dist.broadcast(values, 0)
            tensor.copy_(values)


def wait_for_all() -> None:
    """Wait until every process is here."""
    if world_size() > 1:
        dist.barrier()


def synchronise_buffers(model: nn.Module) -> None:
    """Give every process the mean of the normalisation statistics, and all other buffers of the first process."""
    if world_size() == 1:
        return
    for module in model.modules():
        buffers = list(module.buffers(recurse=False))
        statistics = [b for b in buffers if isinstance(module, _NormBase) and b.is_floating_point()]
        for buffer in statistics:
            dist.all_reduce(buffer)
            buffer /= world_size()
        broadcast(b for b in buffers if not any(b is s for s in statistics))


def mean_over_processes(value: float, device: torch.device) -> float:
    """Return the mean of ``value`` over all processes, the same in each."""
    if world_size() == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return float(total) / world_size()


def require_equal(value: int, device: torch.device, what: str) -> None:
    """Refuse a number that is not the same in every process.

    Raises:
        TrainingError: It is not.
    """
    if world_size() == 1:
        return
    ends = torch.tensor([value, -value], device=device)
    dist.all_reduce(ends, dist.ReduceOp.MAX)
    largest, smallest = int(ends[0]), -int(ends[1])
    if largest != smallest:
        raise TrainingError(
            f"FineTune: {what} must be the same in all processes, and is from {smallest} to {largest} (here {value})."
        )


def steps_per_epoch(loader: Any) -> int:
    """Return how many steps an epoch has in each process."""
    return len(loader) if _sampler(loader) is not None else len(loader) // world_size()


def share_of_batches(loader: Iterable[Any], epoch: int, seed: int) -> Iterator[Any]:
    """Seed everything random and yield the batches of one epoch that are this process's.

    A loader with a ``DistributedSampler`` deals them out by itself; of any other, process r takes every n-th batch, and
    what is left over at the end is dropped, so that all processes take equally many steps. For this all processes
    must see the same order: the loader draws from the same random numbers in all of them, the training (dropout)
    from others in each.

    Args:
        loader: The loader.
        epoch: Number of the epoch, from 0.
        seed: Seed of this epoch, the same in all processes.
    """
    sampler = _sampler(loader)
    if sampler is not None:
        sampler.set_epoch(epoch)
    seed_all(seed)
    if world_size() == 1:
        yield from loader
        return
    loading = random_states()
    seed_all(seed + 1_000_003 * (rank() + 1))
    at_a_time = 1 if sampler is not None else world_size()
    batches = iter(())
    for number in itertools.count():
        training = random_states()
        set_random_states(loading)
        batches = iter(loader) if number == 0 else batches
        group = list(itertools.islice(batches, at_a_time))
        loading = random_states()
        set_random_states(training)
        if len(group) < at_a_time:
            return
        yield group[rank() % at_a_time]


def _sampler(loader: Any) -> DistributedSampler[Any] | None:
    """Return the sampler that deals out a loader's data to processes, if it has one."""
    for sampler in (getattr(loader, "sampler", None), getattr(getattr(loader, "batch_sampler", None), "sampler", None)):
        if isinstance(sampler, DistributedSampler):
            return sampler
    return None
