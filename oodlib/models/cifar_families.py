"""Small classifiers of several families for 32-pixel images, each below 600,000 parameters.

Each is ``head(features(x))``: a body that ends in a ReLU, so that features are non-negative, global
average pooling, and a linear head. Families differ in their convolutions and connections.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from oodlib.models.fast_convnet import FastConvNet


class Family(nn.Module):
    """A non-negative body (n, 3, h, w) -> (n, D, h', w'), mean over positions, linear head."""

    def __init__(self, body: nn.Module, width: int, num_classes: int, *, bias: bool):
        super().__init__()
        self.body, self.pool = body, nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(width, num_classes, bias=bias)

    def initialise(self, images: Tensor) -> None:
        """Nothing: no layer is set from images."""

    def features(self, x: Tensor) -> Tensor:
        """(n, 3, h, w) normalised images -> (n, D) non-negative features."""
        return self.pool(self.body(x)).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def plain(
    num_classes: int = 10, *, widths: tuple[int, ...] = (32, 64, 128), bias: bool = True
) -> Family:
    """Pairs of 3x3 convolutions, max-pooled in between (Simonyan, Zisserman, arXiv 1409.1556)."""
    layers: list[nn.Module] = []
    for a, b in pairwise((3, *widths)):
        layers += [_convolution(a, b), _convolution(b, b), nn.MaxPool2d(2)]
    return Family(nn.Sequential(*layers[:-1]), widths[-1], num_classes, bias=bias)


def wide(
    num_classes: int = 10, *, widths: tuple[int, ...] = (64, 128, 192, 160), bias: bool = False
) -> Family:
    """Few, wide layers: one 3x3 convolution at each resolution, max-pooled in between."""
    layers: list[nn.Module] = []
    for a, b in pairwise((3, *widths)):
        layers += [_convolution(a, b), nn.MaxPool2d(2)]
    return Family(nn.Sequential(*layers[:-1]), widths[-1], num_classes, bias=bias)


def residual(
    num_classes: int = 10, *, widths: tuple[int, ...] = (24, 64, 128), bias: bool = False
) -> Family:
    """One wide pre-activation residual block at each resolution (Zagoruyko, arXiv 1605.07146)."""
    blocks = [
        _Residual(a, b, 1 if i == 0 else 2) for i, (a, b) in enumerate(pairwise((16, *widths)))
    ]
    stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
    body = nn.Sequential(stem, *blocks, nn.BatchNorm2d(widths[-1]), nn.ReLU())
    return Family(body, widths[-1], num_classes, bias=bias)


def depthwise(
    num_classes: int = 10,
    *,
    widths: tuple[int, ...] = (64, 128, 128, 256, 256, 384),
    bias: bool = True,
    halved: tuple[int, ...] = (0, 3),
) -> Family:
    """Depthwise 3x3 convolutions, each followed by a 1x1 one (Howard et al., arXiv 1704.04861).

    halved : the pairs that halve the resolution
    """
    layers: list[nn.Module] = [_convolution(3, 32)]
    for i, (a, b) in enumerate(pairwise((32, *widths))):
        stride = 2 if i in halved else 1
        layers += [_convolution(a, a, groups=a, stride=stride), _convolution(a, b, 1)]
    return Family(nn.Sequential(*layers), widths[-1], num_classes, bias=bias)


def shuffled(
    num_classes: int = 10,
    *,
    widths: tuple[int, ...] = (96, 192, 288),
    last: int = 384,
    bias: bool = True,
) -> Family:
    """Units that convolve half of the channels and shuffle both halves; three units per stage.

    Ma et al., arXiv 1807.11164
    """
    units: list[nn.Module] = []
    for a, b in pairwise((32, *widths)):
        units += [_Shuffled(a, b), _Shuffled(b, b), _Shuffled(b, b)]
    body = nn.Sequential(_convolution(3, 32), *units, _convolution(widths[-1], last, 1))
    return Family(body, last, num_classes, bias=bias)


class AveragedFastConvNet(FastConvNet):
    """FastConvNet with global average pooling in place of maximum pooling."""

    def __init__(self, num_classes: int = 10, **options: Any):
        super().__init__(num_classes, **options)
        self.pool = nn.AdaptiveAvgPool2d(1)  # type: ignore[assignment]


def _convolution(
    channels_in: int,
    channels: int,
    size: int = 3,
    *,
    stride: int = 1,
    groups: int = 1,
    activation: bool = True,
) -> nn.Sequential:
    """Convolution without bias, batch normalisation, ReLU."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels, size, stride, size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU() if activation else nn.Identity(),
    )


class _Residual(nn.Module):
    """x + conv(act(conv(act(x)))); a change of shape is a 1x1 convolution of act(x)."""

    def __init__(self, channels_in: int, channels: int, stride: int):
        super().__init__()
        self.before = nn.Sequential(nn.BatchNorm2d(channels_in), nn.ReLU())
        self.branch = nn.Sequential(
            _convolution(channels_in, channels, stride=stride),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        )
        same = stride == 1 and channels_in == channels
        self.shortcut = None if same else nn.Conv2d(channels_in, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.before(x)
        return self.branch(h) + (x if self.shortcut is None else self.shortcut(h))


class _Shuffled(nn.Module):
    """Half of the channels is convolved; where the width grows, both are, and the side halves."""

    def __init__(self, channels_in: int, channels: int):
        super().__init__()
        half, grows = channels // 2, channels_in != channels
        into, stride = (channels_in, 2) if grows else (half, 1)
        self.branch = nn.Sequential(
            _convolution(into, half, 1),
            _convolution(half, half, stride=stride, groups=half, activation=False),
            _convolution(half, half, 1),
        )
        self.other = None
        if grows:
            self.other = nn.Sequential(
                _convolution(into, into, stride=2, groups=into, activation=False),
                _convolution(into, half, 1),
            )

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1) if self.other is None else (self.other(x), x)
        return torch.stack([left, self.branch(right)], 2).flatten(1, 2)  # their channels in turn


FAMILIES: dict[str, Callable[..., Family]] = {
    build.__name__: build for build in (plain, wide, residual, depthwise, shuffled)
}
