"""The architectures that the benchmarks compress, at full size, from their papers."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


def alexnet() -> nn.Module:
    """AlexNet with its two-group convolutions (Krizhevsky et al. 2012), input 227 x 227."""
    return nn.Sequential(
        nn.Conv2d(3, 96, 11, stride=4),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(96, 256, 5, padding=2, groups=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(256, 384, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(384, 384, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Flatten(),
        nn.Linear(256 * 6 * 6, 4096),
        nn.ReLU(),
        nn.Linear(4096, 4096),
        nn.ReLU(),
        nn.Linear(4096, 1000),
    )


def vgg16() -> nn.Module:
    """VGG-16 (Simonyan and Zisserman 2015), input 224 x 224."""
    layers: list[nn.Module] = []
    channels = 3
    for width, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(depth):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    layers += [nn.Flatten(), nn.Linear(512 * 7 * 7, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(4096, 1000))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 with a projection where the shape changes."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        out = 4 * width
        self.body = nn.Sequential(
            *_conv_bn(channels, width, 1),
            nn.ReLU(),
            *_conv_bn(width, width, 3, stride),
            nn.ReLU(),
            *_conv_bn(width, out, 1),
        )
        changes = stride != 1 or channels != out
        self.shortcut = nn.Sequential(*_conv_bn(channels, out, 1, stride)) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, channels, H, W) to (N, 4 width, H / stride, W / stride)."""
        return F.relu(self.body(x) + self.shortcut(x))


def resnet50() -> nn.Module:
    """ResNet-50 (He et al. 2016), input 224 x 224."""
    layers: list[nn.Module] = [*_conv_bn(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    channels = 64
    for width, depth, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for index in range(depth):
            layers.append(Bottleneck(channels, width, stride if index == 0 else 1))
            channels = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, with a projection where the shape changes."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv_bn(channels, width, 3, stride)
        self.conv2, self.bn2 = _conv_bn(width, width, 3)
        changes = stride != 1 or channels != width
        self.downsample = nn.Sequential(*_conv_bn(channels, width, 1, stride)) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, channels, H, W) to (N, width, H / stride, W / stride)."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.downsample(x))


class ResNet18(nn.Module):
    """ResNet-18 (He et al. 2016), input 224 x 224, its layers under torchvision's names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv_bn(3, 64, 7, 2)
        self.pool = nn.MaxPool2d(3, 2, 1)
        channels = 64
        for stage, width in enumerate((64, 128, 256, 512), 1):
            blocks = BasicBlock(channels, width, 1 if stage == 1 else 2), BasicBlock(width, width, 1)
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
            channels = width
        self.fc = nn.Linear(512, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, 3, H, W) to logits (N, 1000)."""
        x = self.pool(F.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))


class CifarBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters (option A)."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv_bn(channels, width, 3, stride)
        self.conv2, self.bn2 = _conv_bn(width, width, 3)
        self.stride, self.extra = stride, width - channels

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, channels, H, W) to (N, width, H / stride, W / stride)."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.extra:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.extra // 2, self.extra // 2))
        return F.relu(x + y)


class CifarResNet(nn.Module):
    """ResNet for 32 x 32 images (He et al. 2016, section 4.2); depth 6 n + 2."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv_bn(3, 16, 3)
        channels = 16
        for stage, width in enumerate((16, 32, 64), 1):
            blocks = []
            for index in range((depth - 2) // 6):
                blocks.append(CifarBlock(channels, width, 2 if stage > 1 and index == 0 else 1))
                channels = width
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, 3, 32, 32) to logits (N, 10)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def cifar_resnet_from(state: dict[str, Tensor]) -> CifarResNet:
    """Return the CIFAR ResNet of the depth that the state dict has, with its weights, in eval mode."""
    blocks = len({key.split(".")[1] for key in state if key.startswith("layer1.")})
    model = CifarResNet(6 * blocks + 2)
    model.load_state_dict(state)
    return model.eval()


class InvertedResidual(nn.Module):
    """1x1 to more channels, 3x3 depthwise, 1x1 back without an activation; a shortcut where the shape stays."""

    def __init__(self, channels: int, width: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = expansion * channels
        layers: list[nn.Module] = [*_conv_bn(channels, hidden, 1), nn.ReLU6()] if expansion > 1 else []
        depthwise = nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False)
        layers += [depthwise, nn.BatchNorm2d(hidden), nn.ReLU6(), *_conv_bn(hidden, width, 1)]
        self.body = nn.Sequential(*layers)
        self.adds = stride == 1 and channels == width

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, channels, H, W) to (N, width, H / stride, W / stride)."""
        return x + self.body(x) if self.adds else self.body(x)


def mobilenet_v2() -> nn.Module:
    """MobileNetV2 (Sandler et al. 2018), input 224 x 224."""
    layers: list[nn.Module] = [*_conv_bn(3, 32, 3, 2), nn.ReLU6()]
    channels = 32
    stages = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    for expansion, width, depth, stride in stages:
        for index in range(depth):
            layers.append(InvertedResidual(channels, width, stride if index == 0 else 1, expansion))
            channels = width
    layers += [*_conv_bn(channels, 1280, 1), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, 1000)]
    return nn.Sequential(*layers)


def _conv_bn(channels: int, width: int, kernel: int, stride: int = 1) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    return nn.Conv2d(channels, width, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(width)
