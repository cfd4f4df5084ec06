"""How fast whole networks run: float32, bfloat16, int8, low rank, low rank in int8, and other engines beside them.

python benchmarks/speed.py --threads 1 --batch 1 --models resnet18 mobilenet_v2 --engines

The weights are random, with torch's variance for ReLU networks; the shapes are those of the papers. The low-rank
models have every k x k convolution (but the first, and grouped ones) as Tucker at half its channels. Batch norms are
folded in all but the float32 model that everything is compared to, which is the network as it is trained. bf16 and the
float low-rank model are in channels_last, which suits them; float32 is given both ways.

One round runs every model once, every other round in reverse, so that all meet the same machine; with one thread the
time counts that the thread runs. A cell is the median over rounds of the float32 time over the model's, and the fastest
milliseconds. Beside it the relative error of the logits; with random weights it compares ways to compute, not accuracy.

Set MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184: otherwise page faults of large activations dominate at
batch 8, most of all in float32.
"""

from __future__ import annotations

import argparse
import copy
import io
import time
import warnings
from collections.abc import Callable

import numpy as np
import torch
from models import ResNet18, mobilenet_v2, resnet50, vgg16
from torch import Tensor, nn

import lowrank_nn as lnn

MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": ResNet18,
    "resnet50": resnet50,
    "vgg16": vgg16,
    "mobilenet_v2": mobilenet_v2,
}
INT8 = lnn.Quantize("int8", activations="int8")
FASTEST = lnn.Quantize("int8", activations="int8", keep_fastest=True)

Forward = Callable[[Tensor], Tensor]


def half_tucker(model: nn.Module) -> list[lnn.Step]:
    """Return steps that make a Tucker layer of every k x k convolution but the first, half as many channels inside."""
    convolutions = {p: m for p, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    chosen = {p: m for p, m in list(convolutions.items())[1:] if m.groups == 1 and max(m.kernel_size) > 1}
    return [
        lnn.Apply(lnn.TuckerConv2d, where=path, rank=(conv.out_channels // 2, conv.in_channels // 2))
        for path, conv in chosen.items()
    ]


def variants(model: nn.Module, x: Tensor, fastest: bool) -> dict[str, nn.Module]:
    """Return what is compared, by name."""
    tucker = half_tucker(model)
    recipes: dict[str, list[lnn.Step]] = {
        "bf16": [lnn.FoldBatchNorm(), lnn.Quantize("bf16")],
        "int8": [lnn.FoldBatchNorm(), INT8],
        "Tucker C/2": [*tucker, lnn.FoldBatchNorm()],
        "Tucker C/2, int8": [*tucker, lnn.FoldBatchNorm(), INT8],
    }
    if fastest:
        recipes["int8, fastest kept"] = [lnn.FoldBatchNorm(), FASTEST]
    if not tucker:
        recipes = {name: steps for name, steps in recipes.items() if "Tucker" not in name}
    found: dict[str, nn.Module] = {"float32": model, "float32, channels_last": in_channels_last(copy.deepcopy(model))}
    for name, steps in recipes.items():
        small = lnn.compress_model(model, x, steps, calibration=[x], progress=False).model.eval()
        found[name] = small if "int8" in name else in_channels_last(small)
    return found


def in_channels_last(model: nn.Module) -> nn.Module:
    """Return the model with its weights in channels-last order: so are then its activations."""
    return model.to(memory_format=torch.channels_last)


def engines(model: nn.Module, quantized: dict[str, nn.Module], x: Tensor) -> dict[str, Forward]:
    """Return other ways to run the models: torch.compile and onnxruntime, as far as they are there."""
    found: dict[str, Forward] = {}
    folded = lnn.fold_batchnorm(model, x)
    try:
        compiled = torch.compile(copy.deepcopy(folded), options={"freezing": True})
        with torch.inference_mode():
            compiled(x)
        found["torch.compile, frozen"] = compiled
    except Exception as error:
        warnings.warn(f"torch.compile does not work here: {type(error).__name__}", stacklevel=1)
    try:
        found["onnxruntime"] = onnx_forward(folded, x)
        for name in ("int8", "Tucker C/2, int8"):
            if name in quantized:
                found[f"onnxruntime, {name}"] = onnx_forward(quantized[name], x)
    except ImportError as error:
        warnings.warn(f"no onnxruntime: {error}", stacklevel=1)
    return found


def onnx_forward(model: nn.Module, x: Tensor) -> Forward:
    """Return a model exported to ONNX as a function."""
    import onnxruntime

    file = io.BytesIO()
    torch.onnx.export(model, (x,), dynamo=True, verbose=False).save(file)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


@torch.inference_mode()
def run_rounds(forwards: dict[str, Forward], x: Tensor, rounds: int) -> dict[str, list[float]]:
    """Return the milliseconds of every model in every round."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in forwards}
    names = list(forwards)
    for index in range(-2, rounds):
        for name in names if index % 2 else reversed(names):
            start = clock()
            forwards[name](x)
            if index >= 0:
                times[name].append(1e3 * (clock() - start))
    return times


@torch.inference_mode()
def errors(forwards: dict[str, Forward], x: Tensor) -> dict[str, float]:
    """Return the relative error of each model's logits."""
    expected = forwards["float32"](x)
    return {name: float((run(x) - expected).norm() / expected.norm()) for name, run in forwards.items()}


def random_model(name: str) -> nn.Module:
    """Return the network with weights of torch's variance for ReLU networks."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
    return model


def main() -> None:
    """Print a table for each network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--engines", action="store_true", help="also torch.compile and onnxruntime")
    parser.add_argument("--fastest", action="store_true", help="also Quantize(keep_fastest=True)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, {arguments.threads} threads, batch {arguments.batch}, {arguments.size} px\n")
    for name in arguments.models:
        model = random_model(name)
        x = torch.randn(arguments.batch, 3, arguments.size, arguments.size)
        compressed = variants(model, x, arguments.fastest)
        forwards: dict[str, Forward] = {**compressed}
        if arguments.engines:
            forwards |= engines(model, compressed, x)
        times = run_rounds(forwards, x, arguments.rounds)
        print_table(name, times, errors(forwards, x))


def print_table(name: str, times: dict[str, list[float]], wrong: dict[str, float]) -> None:
    """Print one network's table as Markdown."""
    print(f"| {name} | times as fast | ms | relative error |\n| --- | ---: | ---: | ---: |")
    for variant, values in times.items():
        ratio = np.median(np.array(times["float32"]) / np.array(values))
        print(f"| {variant} | {ratio:.2f} | {min(values):.2f} | {wrong[variant]:.4f} |")
    print()


if __name__ == "__main__":
    main()
