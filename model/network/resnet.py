"""The two encoders: ResNet-50 under torchvision's key names, and a compact residual one."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from model.network.blocks import ConvNormAct, ResidualBlock

RESNET50_WIDTHS = (64, 256, 512, 1024, 2048)


class BottleneckBlock(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut (He et al. 2016, Fig. 5).

    The 3x3 convolution has the stride, as in torchvision.
    """

    def __init__(self, inputs: int, width: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width * 4, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width * 4)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs, h, w) -> (n, 4 width, h / stride, w / stride)."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu(y + shortcut)


def _build_stage(inputs: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    """`blocks` blocks with 4 * width channels; the first one has the stride."""
    downsample = nn.Sequential(
        nn.Conv2d(inputs, width * 4, 1, stride, bias=False), nn.BatchNorm2d(width * 4)
    )
    rest = [BottleneckBlock(width * 4, width, 1, None) for _ in range(blocks - 1)]
    return nn.Sequential(BottleneckBlock(inputs, width, stride, downsample), *rest)


class ResNet50(nn.Module):
    """ResNet-50 (He et al. 2016) without its classifier; torchvision's weights fit except `fc`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = _build_stage(64, 64, 3, 1)
        self.layer2 = _build_stage(256, 128, 4, 2)
        self.layer3 = _build_stage(512, 256, 6, 2)
        self.layer4 = _build_stage(1024, 512, 3, 2)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, BottleneckBlock):
                # each block starts as its shortcut; training from scratch is hard otherwise
                nn.init.zeros_(module.bn3.weight)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(n, channels, h, w) -> features at strides 2, 4, 8, 16, 32, `RESNET50_WIDTHS` wide."""
        features = [self.relu(self.bn1(self.conv1(x)))]
        x = self.maxpool(features[0])
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            features.append(x)
        return features


class CompactEncoder(nn.Module):
    """A stem and `blocks` residual blocks for each stride: the encoder of the small, fast model."""

    def __init__(self, channels: int, widths: Sequence[int], blocks: int) -> None:
        super().__init__()
        self.stem = ConvNormAct(channels, widths[0], stride=2)
        self.stages = nn.ModuleList()
        for inputs, outputs in zip(widths, widths[1:]):
            rest = [ResidualBlock(outputs, outputs, 1) for _ in range(blocks - 1)]
            self.stages.append(nn.Sequential(ResidualBlock(inputs, outputs, 2), *rest))

    def forward(self, x: Tensor) -> list[Tensor]:
        """(n, channels, h, w) -> features at strides 2, 4, 8, ... of the configured widths."""
        features = [self.stem(x)]
        for stage in self.stages:
            features.append(stage(features[-1]))
        return features
