"""Which published architectures the library can compress: all of torchvision's, and one of each family of timm.

python benchmarks/zoo.py --jobs 2 > table.md
python benchmarks/zoo.py resnet18 timm/convnext_atto

Random weights, small images. Every model goes through each part in a process of its own:

low-rank: every convolution and linear layer that a low-rank format can carry is replaced at full rank; the outputs have
to agree to 1e-4 of the largest (and how many layers are replaced, of how many the model calls);
filters: ``Prune(0.3, granularity="filter")`` removes 30 % of the filters for good, each group proven against masking;
the parameters have to fall by more than 20 %, and the model to run.

Of detection models, whose operators a CPU build of torch leaves torchvision without, the backbones. Needs torchvision
and timm; where torchvision cannot be imported as it is, ``--before MODULE`` imports another module first.
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

import lowrank_nn as lnn
from lowrank_nn.errors import LowRankError
from lowrank_nn.graph import Site, record, replace_module
from lowrank_nn.graph.inputs import tensors
from lowrank_nn.layers import LowRankLayer, read_layer

TIMM = """vit_tiny_patch16_224 repvgg_a0 botnet26t_256 poolformer_s12 cait_xxs24_224 coat_lite_tiny coatnet_nano_rw_224
    convit_tiny convmixer_768_32 convnext_atto crossvit_tiny_240 cs3darknet_focus_s davit_tiny deit_tiny_patch16_224
    densenet121 dla34 dpn48b ese_vovnet19b_slim resnet10t edgenext_xx_small efficientformer_l1 efficientformerv2_s0
    efficientnet_lite0 efficientvit_b0 efficientvit_m0 fasternet_t0 fastvit_t8 mobilenetv3_small_050 focalnet_tiny_srf
    gcvit_xxtiny ghostnet_050 mixer_s32_224 gmlp_ti16_224 hardcorenas_a hgnetv2_b0 hiera_tiny_224 hrnet_w18_small
    inception_next_atto inception_v4 legacy_seresnet18 levit_128s mambaout_femto mobilevit_xxs mvitv2_tiny nest_tiny
    nf_regnet_b0 pit_ti_224 pvt_v2_b0 regnetx_002 repghostnet_050 repvit_m0_9 res2net50_14w_8s resnest14d resnetv2_18
    rexnet_100 selecsls42b skresnet18 starnet_s050 swiftformer_xs swin_tiny_patch4_window7_224 tiny_vit_5m_224
    tnt_s_patch16_224 twins_svt_small visformer_tiny xcit_nano_12_p16_224 xception41"""
SIZES = {"inception_v3": 96, "maxvit_t": 224, "vit": 64, "vit_h_14": 56, "alexnet": 96, "ssd300_vgg16": 300}
FORMATS: tuple[type[LowRankLayer], ...] = (lnn.TuckerConv2d, lnn.SVDLinear)
TOLERANCE = 1e-4


def names() -> list[str]:
    """Return all names, those of timm behind ``timm/``."""
    from torchvision import models

    modules = (models, models.segmentation, models.detection)
    return [n for m in modules for n in models.list_models(module=m)] + [f"timm/{name}" for name in TIMM.split()]


def build(name: str) -> tuple[nn.Module, Tensor]:
    """Return a model with random weights, in eval mode, and images for it."""
    torch.manual_seed(0)
    model, images = initialised(name)
    for parameter in model.parameters():
        if parameter.dim() > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.02)  # outputs that are zero would agree whatever happens
    return model.eval(), images


def initialised(name: str) -> tuple[nn.Module, Tensor]:
    """Return a model with the weights that its library draws, and images for it."""
    if name.startswith("timm/"):
        import timm

        model = timm.create_model(name.removeprefix("timm/"))
        settings = model.pretrained_cfg
        size = settings["input_size"][-1] if settings.get("fixed_input_size") else 96
        return model, torch.randn(2, 3, size, size)
    from torchvision import models

    size = SIZES.get(name, SIZES.get(name.split("_")[0], 64))
    options: dict[str, Any] = {"weights": None}
    if name.startswith("vit"):
        options["image_size"] = size
    if name in models.list_models(module=models.detection) or name in models.list_models(module=models.segmentation):
        options["weights_backbone"] = None
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    model = models.get_model(name, **options)
    model = model.backbone if name in models.list_models(module=models.detection) else model
    return model, torch.randn(2, 3, size, size)


def count(model: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def low_rank(model: nn.Module, images: Tensor) -> str:
    """Replace every layer at full rank; return how many, or raise."""
    small, replaced = copy.deepcopy(model), 0
    sites = [site for site in record(small, images).sites if isinstance(site.layer, (nn.Conv2d, nn.Linear))]
    for site in sites:
        new = at_full_rank(site)
        if new is not None:
            small, replaced = replace_module(small, site.path, new), replaced + 1
    for expected, found in zip(tensors(model(images)), tensors(small(images)), strict=True):
        error = float((expected - found).abs().max() / expected.abs().max())
        if not error <= TOLERANCE:
            raise AssertionError(f"outputs differ by {error:.1e} of the largest")
    return f"{replaced} of {len(sites)} layers"


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


def filters(model: nn.Module, images: Tensor) -> str:
    """Remove 30 % of the filters; return what that left of the parameters, or raise."""
    step = lnn.Prune(0.3, granularity="filter")
    small = lnn.compress_model(model, images, [step], progress=False).model
    with torch.no_grad():
        shapes = [[t.shape for t in tensors(net(images))] for net in (model, small)]
    if shapes[0] != shapes[1]:
        raise AssertionError("outputs have other shapes")
    gone = 1 - count(small) / count(model)
    if gone <= 0.2:
        raise AssertionError(f"only {100 * gone:.1f} % of the parameters are gone")
    return f"{100 * gone:.1f} % fewer parameters"


PARTS: dict[str, Callable[[nn.Module, Tensor], str]] = {"low_rank": low_rank, "filters": filters}


def one(name: str, part: str) -> dict[str, Any]:
    """Put one model through one part."""
    warnings.simplefilter("ignore")
    model, images = build(name)
    start = time.perf_counter()
    try:
        found = [True, PARTS[part](model, images)]
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
    cells = [row["name"], f"{row.get('params', 0) / 1e6:.1f} M"]
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
