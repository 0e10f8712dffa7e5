"""Small classifiers for 32-pixel images. Each one is ``head(features(x))`` with a linear head."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def whitening_filters(images: Tensor, *, size: int = 2, eps: float = 5e-4) -> Tensor:
    r"""Filters that decorrelate the pixels of small patches (PCA whitening).

    With patch covariance ``V diag(l) V^T`` the filters are the columns of ``V / sqrt(l + eps)``,
    then the same with the opposite sign, so that no information is lost behind a ReLU.

    Parameters
    ----------
    images : (n, c, h, w) float, normalised as the network will see them
    size : side of the square patch, in pixels

    Returns
    -------
    (2 * c * size**2, c, size, size) float32

    References
    ----------
    K. Jordan 2024, arXiv 2404.00498, section 3.2
    """
    c = images.shape[1]
    patches = images.unfold(2, size, 1).unfold(3, size, 1).permute(0, 2, 3, 1, 4, 5)
    covariance = torch.cov(patches.reshape(-1, c * size**2).double().T)
    eigenvalues, eigenvectors = torch.linalg.eigh(covariance)
    filters = (eigenvectors / (eigenvalues + eps).sqrt()).T.reshape(-1, c, size, size)
    return torch.cat([filters, -filters]).float()


class _Block(nn.Module):
    """Convolution, 2x2 max-pool, then a second convolution; batch normalisation without scale."""

    def __init__(self, channels_in: int, channels_out: int, last: nn.Module):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels_out, momentum=0.4)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels_out, momentum=0.4)
        self.pool, self.activation, self.last = nn.MaxPool2d(2), nn.GELU(), last
        for norm in (self.norm1, self.norm2):
            norm.weight.requires_grad_(False)
        for conv in (self.conv1, self.conv2):  # part of each layer starts as the identity
            nn.init.dirac_(conv.weight[: conv.in_channels])

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.norm1(self.pool(self.conv1(x))))
        return self.last(self.norm2(self.conv2(x)))


class FastConvNet(nn.Module):
    """Six convolutions that reach 92-94 % on CIFAR-10 in minutes of GPU or hours of CPU.

    After K. Jordan 2024 (arXiv 2404.00498): a frozen whitening layer, three blocks of two
    convolutions, global max-pooling, a linear head without bias. Ours differs on purpose: the last
    activation is a ReLU, so that features are non-negative as in the OOD papers, and the head
    includes the recipe's logit scale, so that ``logits = features @ W.T``.

    Parameters
    ----------
    num_classes : C
    widths : channels of the three blocks; the last one is the feature dimension D
    """

    def __init__(
        self,
        num_classes: int = 10,
        *,
        widths: tuple[int, int, int] = (64, 192, 256),
        in_channels: int = 3,
    ):
        super().__init__()
        filters = 2 * in_channels * 4
        self.whiten = nn.Conv2d(in_channels, filters, 2)
        self.whiten.weight.requires_grad_(False)
        activations = (nn.GELU(), nn.GELU(), nn.ReLU())
        self.blocks = nn.Sequential(*map(_Block, (filters, *widths[:-1]), widths, activations))
        self.pool = nn.AdaptiveMaxPool2d(1)
        self.head = nn.Linear(widths[-1], num_classes, bias=False)

    def initialise(self, images: Tensor) -> None:
        """Set the whitening layer from normalised training images (n, c, h, w)."""
        with torch.no_grad():
            self.whiten.weight.copy_(whitening_filters(images))
            self.whiten.bias.zero_()  # type: ignore[union-attr]
            self.head.weight.div_(9)

    def features(self, x: Tensor) -> Tensor:
        """(n, c, h, w) normalised images -> (n, D) non-negative features."""
        x = nn.functional.gelu(self.whiten(x))
        return self.pool(self.blocks(x)).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))
