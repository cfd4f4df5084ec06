"""Small models of many architectures, with example inputs: what every part of the library must work on."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tests.zoo._seeded import Entry, seeded
from tests.zoo.alexnet import AlexNet
from tests.zoo.control_flow import EarlyExit
from tests.zoo.inception import InceptionNet
from tests.zoo.language import LanguageModel
from tests.zoo.lenet import LeNet5
from tests.zoo.mobilenet import MobileNetV2
from tests.zoo.recurrent import CRNN
from tests.zoo.resnet import ResNet
from tests.zoo.tied import TiedNet
from tests.zoo.transformer import TransformerClassifier
from tests.zoo.unet import UNet
from tests.zoo.vgg import VGG16
from tests.zoo.vit import ViT

ZOO: dict[str, Callable[[], Entry]] = {
    "lenet5": seeded(lambda: (LeNet5(), torch.randn(2, 1, 28, 28))),
    "alexnet": seeded(lambda: (AlexNet(), torch.randn(2, 3, 96, 96))),
    "vgg16": seeded(lambda: (VGG16(), torch.randn(2, 3, 32, 32))),
    "inception": seeded(lambda: (InceptionNet(), torch.randn(2, 3, 32, 32))),
    "resnet20": seeded(lambda: (ResNet(20), torch.randn(2, 3, 32, 32))),
    "mobilenet_v2": seeded(lambda: (MobileNetV2(), torch.randn(2, 3, 32, 32))),
    "vit": seeded(lambda: (ViT(), torch.randn(2, 3, 32, 32))),
    "transformer": seeded(lambda: (TransformerClassifier(), torch.randint(1, 50, (2, 12)))),
    "language": seeded(lambda: (LanguageModel(), torch.randint(0, 50, (2, 12)))),
    "unet": seeded(lambda: (UNet(), torch.randn(2, 3, 16, 16))),
    "crnn": seeded(lambda: (CRNN(), torch.randn(2, 1, 16, 24))),
    "tied": seeded(lambda: (TiedNet(), (torch.randint(0, 40, (2, 9)),))),
    "control_flow": seeded(lambda: (EarlyExit(), {"image": torch.randn(2, 3, 8, 8), "options": {"settled": 0.3}})),
}
"""By name: a function that returns the model (in eval mode, seeded weights) and its example inputs."""
