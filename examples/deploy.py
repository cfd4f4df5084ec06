"""From a trained network to integers that run elsewhere: low rank, int8, one file, and an ONNX graph.

Run it with ``python examples/deploy.py``; a few seconds. Needs the extra ``onnx``.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from digits import DigitNet, accuracy, digits, trained_net

import lowrank_nn as lnn


def main() -> None:
    """Compress without training or labels, save, load, export, and compare what comes out."""
    training, test = digits()
    images, labels = test.tensors
    dense = trained_net(training)
    recipe = [
        lnn.LowRank(but_not=["conv1", "fc"]),
        lnn.FoldBatchNorm(),
        lnn.Quantize("int8", activations="int8"),
    ]
    unlabelled = training.tensors[0][:512].split(64)
    result = lnn.compress_model(dense, images[:1], recipe, budget=lnn.Budget(params=0.4), calibration=unlabelled)
    print(result.report)

    with tempfile.TemporaryDirectory() as folder:
        file, graph = Path(folder) / "digits.lrnn", Path(folder) / "digits.onnx"
        size, dense_size = lnn.save(result.model, file), lnn.save(dense, Path(folder) / "dense.lrnn")
        loaded = lnn.load(file, DigitNet()).eval()
        batch = torch.export.Dim("batch")
        torch.onnx.export(loaded, (images[:2],), graph, dynamo=True, dynamic_shapes=({0: batch},), verbose=False)
        session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
        (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})

    classes = np.asarray(logits).argmax(1)
    with torch.no_grad():
        same = 100 * (classes == loaded(images).argmax(1).numpy()).mean()
    print(f"\nfile {dense_size:,} bytes dense, {size:,} bytes compressed: {dense_size / size:.1f}x smaller")
    print(
        f"accuracy {accuracy(dense, test):.2f} % dense, {accuracy(loaded, test):.2f} % in integers, "
        f"{100 * (classes == labels.numpy()).mean():.2f} % in onnxruntime, which agrees on {same:.1f} % of the images"
    )


if __name__ == "__main__":
    main()
