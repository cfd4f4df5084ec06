"""Distillation of a compressed CIFAR network from a dense one, as the benchmarks do it."""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from cifar_data import Augmented, accuracy
from torch import Tensor, nn
from torch.optim import Optimizer

import lowrank_nn as lnn


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """Add what :func:`distil` reads."""
    parser.add_argument("--epochs", type=int, default=0, help="epochs of distillation, instead of the table")
    parser.add_argument("--epoch-images", type=int, default=50_000, help="training images per epoch")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--optimizer", choices=["adamw", "soap"], default="adamw", help="soap: of pytorch_optimizer")
    parser.add_argument("--temperature", type=float, default=4.0, help="of the distillation")
    parser.add_argument("--bf16", action="store_true", help="train in mixed precision")
    parser.add_argument("--checkpoint", type=Path, help="file to go on from after an interruption; one network per run")


def distil(
    small: lnn.Result,
    teacher: nn.Module,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    arguments: argparse.Namespace,
) -> None:
    """Train the small network on the outputs of the teacher; print its accuracy before and after every epoch.

    Augmented training images, 0.9 distillation and 0.1 cross-entropy, AdamW or SOAP, warm-up and cosine.
    """
    rate = small.report.compression_rate
    before = accuracy(small.model, *test)
    print(f"{rate['params']:.2f}x params, {rate['macs']:.2f}x MACs; without training {before:.2f} %", flush=True)
    start = time.perf_counter()

    def report(model: nn.Module) -> float:
        value = accuracy(model, *test)
        print(f"{value:.2f} % after {time.perf_counter() - start:.0f} s", flush=True)
        return value

    count = arguments.epoch_images
    images = train[0][:count].contiguous(memory_format=torch.channels_last)
    tune = lnn.FineTune(
        Augmented(images, train[1][:count], 128),
        arguments.epochs,
        lr=arguments.lr,
        optimizer=soap(arguments.lr) if arguments.optimizer == "soap" else None,
        temperature=arguments.temperature,
        teacher=teacher.to(memory_format=torch.channels_last),
        autocast=torch.bfloat16 if arguments.bf16 else None,
        evaluate=report,
        checkpoint=arguments.checkpoint,
    )
    model = small.model.to(memory_format=torch.channels_last)
    lnn.compress_model(model, test[0][:1], [tune], seed=arguments.seed)


def soap(lr: float) -> Callable[[Iterable[nn.Parameter]], Optimizer]:
    """Return what makes SOAP (Vyas et al. 2024), Adam in the eigenbases of Shampoo's preconditioners."""
    from pytorch_optimizer import SOAP  # an extra of this benchmark alone: pip install pytorch_optimizer

    return functools.partial(SOAP, lr=lr, weight_decay=1e-4)
