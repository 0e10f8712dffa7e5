"""Architectures of the public CIFAR checkpoints: ResNet with option-A shortcuts, DenseNet-BC."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, pad, relu


class _BasicBlock(nn.Module):
    def __init__(self, channels_in: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.added = stride, channels - channels_in

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(relu(self.bn1(self.conv1(x)))))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        return relu(out + pad(shortcut, (0, 0, 0, 0, self.added // 2, self.added // 2)))


class ResNetA(nn.Module):
    """CIFAR ResNet with parameter-free shortcuts (He et al., CVPR 2016, section 4.2, option A).

    64 features; ``blocks`` per stage: 3 gives ResNet-20, 9 gives ResNet-56.
    """

    def __init__(self, blocks: int, num_classes: int = 10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(blocks, 16, 16, 1)
        self.layer2 = self._stage(blocks, 16, 32, 2)
        self.layer3 = self._stage(blocks, 32, 64, 2)
        self.linear = nn.Linear(64, num_classes)

    @staticmethod
    def _stage(blocks: int, channels_in: int, channels: int, stride: int) -> nn.Sequential:
        first = _BasicBlock(channels_in, channels, stride)
        others = [_BasicBlock(channels, channels, 1) for _ in range(blocks - 1)]
        return nn.Sequential(first, *others)

    def forward(self, x: Tensor) -> Tensor:
        x = relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


class _DenseLayer(nn.Module):
    def __init__(self, channels_in: int, growth: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, 4 * growth, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv2(relu(self.bn2(self.conv1(relu(self.bn1(x))))))], 1)


class _DenseBlock(nn.Module):
    def __init__(self, layers: int, channels_in: int, growth: int):
        super().__init__()
        widths = range(channels_in, channels_in + layers * growth, growth)
        self.layer = nn.Sequential(*(_DenseLayer(width, growth) for width in widths))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class _Transition(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, channels // 2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return avg_pool2d(self.conv1(relu(self.bn1(x))), 2)


class DenseNetBC(nn.Module):
    """DenseNet-BC for 32-pixel images: three dense blocks, compression 1/2.

    Huang et al., CVPR 2017. 16 layers per block at growth 12 is DenseNet-BC-100: 342 features.
    """

    def __init__(self, num_classes: int, *, layers: int = 16, growth: int = 12):
        super().__init__()
        channels = 2 * growth
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        for i in (1, 2, 3):
            self.add_module(f"block{i}", _DenseBlock(layers, channels, growth))
            channels += layers * growth
            if i < 3:
                self.add_module(f"trans{i}", _Transition(channels))
                channels //= 2
        self.bn1 = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        for name in ("conv1", "block1", "trans1", "block2", "trans2", "block3", "bn1"):
            x = self.get_submodule(name)(x)
        return self.fc(relu(x).mean((2, 3)))
