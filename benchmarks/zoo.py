"""Which published architectures the library can compress: of torchvision all, of timm and transformers one a family.

python benchmarks/zoo.py --jobs 2 > table.md
python benchmarks/zoo.py resnet18 timm/convnext_atto transformers/llama

Random weights, small images. Every model goes through each part in a process of its own:

low-rank: every convolution and linear layer that a low-rank format can carry is replaced at full rank; the outputs have
to agree to 1e-4 of the largest (and how many layers are replaced, of how many the model calls);
filters: ``Prune(0.3, granularity="filter")`` removes 30 % of the filters for good, each group proven against masking;
the parameters have to fall by more than 20 %, and the model to run.

Detection models are run whole, from a list of images to boxes. Needs torchvision, timm and transformers for models of
these; where torchvision cannot be imported as it is, ``--before MODULE`` imports another module first.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import copy
import importlib
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from zoo_models import build, names

import lowrank_nn as lnn
from lowrank_nn.errors import LowRankError
from lowrank_nn.graph import Site, record, replace_module
from lowrank_nn.graph.inputs import call_model, tensors
from lowrank_nn.layers import LowRankLayer, read_layer

FORMATS: tuple[type[LowRankLayer], ...] = (lnn.TuckerConv2d, lnn.SVDLinear)
TOLERANCE = 1e-4


def count(model: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def low_rank(model: nn.Module, inputs: Any) -> str:
    """Replace every layer at full rank; return how many, or raise."""
    small, replaced = copy.deepcopy(model), 0
    sites = [site for site in record(small, inputs).sites if isinstance(site.layer, (nn.Conv2d, nn.Linear))]
    for site in sites:
        new = at_full_rank(site)
        if new is not None:
            small, replaced = replace_module(small, site.path, new), replaced + 1
    for expected, found in zip(outputs(model, inputs), outputs(small, inputs), strict=True):
        error = float((expected - found).abs().max() / expected.abs().max())
        if not error <= TOLERANCE:
            raise AssertionError(f"outputs differ by {error:.1e} of the largest")
    return f"{replaced} of {len(sites)} layers"


def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    """Return the tensors that a model gives, in order."""
    return list(tensors(call_model(model, inputs)))


def at_full_rank(site: Site) -> LowRankLayer | None:
    """Return a low-rank layer of full rank, or None where no format carries the layer."""
    cls = next((cls for cls in FORMATS if isinstance(site.layer, cls.replaces)), None)
    if cls is None or not site.calls or site.tied_to:
        return None
    try:
        limits = cls.rank_problem(read_layer(site.layer, cls)).limits
        return cls.from_pretrained_layer(site.layer, rank=cls.rank_argument(limits, limits))
    except LowRankError:
        return None


@torch.no_grad()
def filters(model: nn.Module, inputs: Any) -> str:
    """Remove 30 % of the filters; return what that left of the parameters, or raise."""
    step = lnn.Prune(0.3, granularity="filter")
    small = lnn.compress_model(model, inputs, [step], progress=False).model
    before, after = ([tensor.shape[1:] for tensor in outputs(net, inputs)] for net in (model, small))
    if before != after:  # but for how many boxes are found
        raise AssertionError("outputs have other shapes")
    gone = 1 - count(small) / count(model)
    if gone <= 0.2:
        raise AssertionError(f"only {100 * gone:.1f} % of the parameters are gone")
    return f"{100 * gone:.1f} % fewer parameters"


PARTS: dict[str, Callable[[nn.Module, Any], str]] = {"low_rank": low_rank, "filters": filters}


def one(name: str, part: str) -> dict[str, Any]:
    """Put one model through one part."""
    warnings.simplefilter("ignore")
    model, inputs = build(name)
    start = time.perf_counter()
    try:
        found = [True, PARTS[part](model, inputs)]
    except Exception as error:
        found = [False, f"{type(error).__name__}: {error}".split("\n")[0]]
    return {"params": count(model), part: [*found, time.perf_counter() - start]}


def in_processes(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Put one model through, each part in a process of its own."""
    row = {"name": name}
    for part in PARTS:
        row |= in_a_process(name, part, arguments)
    return row


def in_a_process(name: str, part: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Put one model through one part in a process of its own."""
    before = ["--before", arguments.before] if arguments.before else []
    command = [sys.executable, __file__, "--only", name, part, *before]
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=arguments.timeout)
        return dict(json.loads(done.stdout.splitlines()[-1]))
    except subprocess.TimeoutExpired:
        problem = f"not done in {arguments.timeout} s"
    except (json.JSONDecodeError, IndexError):
        problem = f"the process ended: {done.stderr.splitlines()[-1] if done.stderr else done.returncode}"
    return {part: [False, problem, 0.0]}


def line(row: dict[str, Any]) -> str:
    """Return one row of the table."""
    cells = [row["name"], f"{row.get('params', 0) / 1e6:.3g} M"]
    for part in PARTS:
        passed, text, seconds = row[part]
        cells += [("yes: " if passed else "NO: ") + text.replace("|", "/")[:160], f"{seconds:.0f}"]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Print the table as it comes, and how many pass."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="names; all if left out")
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side")
    parser.add_argument("--timeout", type=int, default=900, help="seconds for one model")
    parser.add_argument("--before", metavar="MODULE", help="module to import before torchvision")
    parser.add_argument("--only", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.before:
        importlib.import_module(arguments.before)
    if arguments.only:
        print(json.dumps(one(*arguments.only)))
        return
    print("| model | parameters | low-rank at full rank | s | 30 % of the filters removed | s |\n|" + " --- |" * 6)
    rows = []
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        for row in pool.map(lambda name: in_processes(name, arguments), arguments.models or names()):
            rows.append(row)
            print(line(row), flush=True)
    for part in PARTS:
        passed = sum(row[part][0] for row in rows)
        print(f"\n{part}: {passed} of {len(rows)} ({100 * passed / len(rows):.0f} %)")


if __name__ == "__main__":
    main()
